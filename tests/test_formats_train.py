"""Every format in a model that trains, is probed, and goes on from a checkpoint."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints import Checkpoints
from experiments.config import Experiment, Optimizer
from experiments.probes import probe_rows
from experiments.train import make_trainer
from fp4jax import formats, recipes
from fp4jax.models import ModelConfig, Policy

MODEL = ModelConfig(
  num_layers=1,
  d_model=64,
  num_heads=1,
  num_kv_heads=1,
  head_dim=64,
  num_experts=2,
  top_k=2,
  d_ff=64,
)
CONFIG = Experiment(steps=10, model=MODEL, optimizer=Optimizer(warmup_steps=0))
ROLES = ("fprop.lhs", "dgrad.lhs", "dgrad.rhs", "wgrad.lhs", "wgrad.rhs")  # and fprop.rhs
KINDS = ("experts", "attention", "head", "router")


def policy_of_all() -> Policy:
  """Each format as one operand at least; blocks of two axes as fprop's weights."""
  square = [f for f in formats.FORMATS.values() if f.block_shape and len(f.block_shape) == 2]
  lines = itertools.cycle([f for f in formats.FORMATS.values() if f not in square])
  squares = itertools.cycle(square)
  kinds = {}
  for kind in KINDS:
    changes = {f"{role}.format": next(lines) for role in ROLES}
    changes |= {"fprop.rhs.format": next(squares), "name": kind}
    kinds[kind] = recipes.MXFP4.replace(changes)
  return Policy(**kinds)


def batch(seed):
  return np.random.default_rng(seed).integers(0, 50, (2, 33)).astype(np.int32)


@pytest.mark.slow
def test_every_format_trains_is_probed_and_resumes(tmp_path):
  policy, seed = policy_of_all(), jnp.int32(0)
  trainer = make_trainer(CONFIG, 50, policy)
  states = [trainer.init(seed)]
  for step in range(2):
    states.append(trainer.step(jax.tree.map(jnp.copy, states[-1]), batch(step), seed)[0])
  rows = probe_rows(trainer.probe(states[0], batch(0), seed), policy, MODEL.num_layers)
  assert {row["format"] for row in rows} == set(formats.FORMATS)
  assert all(5 < row["sqnr_db"] < 60 for row in rows)

  saved = Checkpoints(tmp_path, 1)
  saved.save(1, states[1], {})
  again = make_trainer(CONFIG, 50, policy)
  _, found, _ = saved.restore_latest(jax.eval_shape(again.init, seed))
  found, scalars = again.step(found, batch(1), seed)
  jax.tree.map(np.testing.assert_array_equal, found, states[2])
  assert np.isfinite(scalars["loss"])
