"""What the backward pass computes again: the same numbers, fewer bytes, no GEMM more than told."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxprs import equations

from experiments.checks import validate
from experiments.config import Experiment, Optimizer
from experiments.train import make_trainer, policy_of, saved_activation_bytes
from fp4jax import recipes
from fp4jax.models import ModelConfig
from fp4jax.quantizers import DelayedScaling

POLICIES = ("attention+norm", "attention+norm+experts", "everything")
LAYERS, WIDTH, EXPERTS, TOP_K, D_FF = 2, 64, 4, 2, 96
DELAYED = recipes.FP8.replace({"fprop.lhs": DelayedScaling(history=4), "name": "delayed"})
SHAPE = ModelConfig(
  num_layers=LAYERS,
  d_model=WIDTH,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  num_experts=EXPERTS,
  top_k=TOP_K,
  d_ff=D_FF,
)


@functools.cache
def trainer_of(recipe, remat, clip_norm=1.0, **model):
  config = Experiment(model=dataclasses.replace(SHAPE, remat=remat, **model))
  config.optimizer = Optimizer(warmup_steps=0, clip_norm=clip_norm)
  validate(config)
  config.implementation = "xla"
  return make_trainer(config, 64, policy_of(recipe, config))


def tokens(batch=2, length=32):
  return np.random.default_rng(0).integers(0, 64, (batch, length + 1)).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("recipe", "model", "policies"),
  [
    (recipes.BF16, {"d_ff_shared": 32}, POLICIES),
    (recipes.HOPPER_FP4, {}, POLICIES[:1]),
    (recipes.MXFP4_RHT_SR, {}, POLICIES[2:]),  # draws again what it drew
  ],
  ids=lambda value: getattr(value, "name", str(value)),
)
def test_every_policy_computes_the_same_bits(recipe, model, policies):
  def gradients(remat, **how):
    trainer, seed = trainer_of(recipe, remat, **model, **how), jnp.int32(0)
    return trainer.gradients(trainer.init(seed), tokens(), seed)

  expected = gradients("none")
  for remat in policies:
    jax.tree.map(np.testing.assert_array_equal, gradients(remat), expected)
  if len(policies) > 1:
    jax.tree.map(np.testing.assert_array_equal, gradients("none", unroll=True), expected)


@pytest.mark.slow
def test_losses_taps_and_states_are_the_same():
  """In float32, where the compiler has no rounding to leave out.

  Without a loop the norm is summed in another order, so nothing is clipped by it here.
  """

  def run(remat, **how):
    trainer = trainer_of(DELAYED, remat, clip_norm=1e6, dtype="float32", **how)
    seed = jnp.int32(0)
    state = trainer.init(seed)
    taps = trainer.probe(state, tokens(), seed)
    state, scalars = trainer.step(state, tokens(), seed)
    assert all(x.any() for x in jax.tree.leaves(state.quantizers))
    return scalars.pop("grad_norm"), (taps, state, scalars)

  (norm, again), (expected, kept) = run("attention+norm", unroll=True), run("none")
  jax.tree.map(np.testing.assert_array_equal, again, kept)
  np.testing.assert_allclose(norm, expected, rtol=1e-6)


X, H = 2 * WIDTH, 2 * TOP_K * 2 * D_FF  # bytes of bf16
PACKED = 17 / 32 / 2  # of MXFP4, 4.25 bits a value
ROUTING = 4 * EXPERTS + 2 * 4 * TOP_K


@pytest.mark.parametrize(
  ("recipe", "model", "expected"),
  [
    (recipes.BF16, {}, (X + H + ROUTING, ROUTING)),
    (recipes.MXFP4, {}, (X + H + ROUTING, ROUTING)),
    (recipes.HOPPER_FP4, {}, 2 * ((X + H) * PACKED + ROUTING,)),
    (recipes.BF16, {"num_experts": 0}, (X + H / TOP_K, 0)),
    (recipes.HOPPER_FP4, {"num_experts": 0}, (X + H / TOP_K, 0)),
  ],
  ids=lambda value: getattr(value, "name", str(value)),
)
def test_bytes_kept_by_hand(recipe, model, expected):
  """A token and a layer, beside the input of a block, which is all that `everything` keeps."""
  found = [saved_activation_bytes(trainer_of(recipe, r, **model), 2, 32) for r in POLICIES]
  assert [(own - found[2]) / LAYERS for own in found[:2]] == list(expected)
  deeper = saved_activation_bytes(trainer_of(recipe, "everything", num_layers=3, **model), 2, 32)
  assert deeper - found[2] == X


def gemms(jaxpr):
  """How often a dot_general is, those of a scan's body once, for its layers do the same."""
  return sum(eqn.primitive is lax.dot_general_p for eqn in equations(jaxpr))


@pytest.mark.parametrize(
  ("recipe", "model", "expected"),
  [  # q k v, the two of the scores and out; h; the router. The last of the block never.
    (recipes.BF16, {}, (4, 5, 6)),
    (recipes.HOPPER_FP4, {}, (4, 4, 6)),
    (recipes.HOPPER_FP4, {"num_experts": 0}, (4, 5, 5)),
  ],
  ids=lambda value: getattr(value, "name", str(value)),
)
def test_gemms_that_run_again(recipe, model, expected):
  def count(remat):
    trainer = trainer_of(recipe, remat, **model)
    state = jax.eval_shape(trainer.init, jnp.int32(0))
    return gemms(trainer.gradients.trace(state, tokens(), jnp.int32(0)).jaxpr.jaxpr)

  assert tuple(count(remat) - count("none") for remat in POLICIES) == expected


@pytest.mark.slow
def test_what_is_computed_again_is_not_kept_without_a_loop_either():
  """XLA would share the second forward pass with the first one, and keep its results."""

  def temporary(remat):
    trainer = trainer_of(recipes.BF16, remat, unroll=True)
    state = jax.eval_shape(trainer.init, jnp.int32(0))
    compiled = trainer.gradients.lower(state, tokens(8, 64), jnp.int32(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  kept = temporary("none") - temporary("everything")
  saved = [
    saved_activation_bytes(trainer_of(recipes.BF16, r), 8, 64) for r in ("none", "everything")
  ]
  assert kept > 0.5 * 8 * 64 * (saved[0] - saved[1]), (kept, saved)


def test_a_policy_that_there_is_not():
  with pytest.raises(ValueError, match=r"model\.remat='all' is not one of none, attention\+norm,"):
    trainer_of(recipes.BF16, "all")
