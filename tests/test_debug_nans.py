"""JAX_DEBUG_NANS=1 finds a NaN of the user's: none is made here where the numbers have none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import rows_of, small

import fp4jax
from experiments import config as configs
from experiments.run import run
from fp4jax import formats, operands, recipes
from fp4jax.models import Numerics, Policy
from fp4jax.models.attention import attend

RECIPES = ("bf16", "mxfp4", "hopper_fp4")
by_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(autouse=True)
def debug_nans():
  with jax.debug_nans(True):
    yield


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def with_zeros():
  """Blocks of zeros, of subnormals and of ordinary values."""
  x = normal(0, 128, 256)
  return x.at[:, :128].set(0).at[0, 128:].set(1e-40).at[1].set(1e15)


def test_the_switch_is_on():
  with pytest.raises(FloatingPointError):
    jnp.zeros(2) / jnp.zeros(2)


# Each codec once, and each format that is a class of its own; op by op costs seconds per format.
NAMES = ("MXFP4", "NVFP4", "FP8_BLOCK", "HIF4", "MXFP4_MBS_S")


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [formats.FORMATS[name] for name in NAMES], ids=NAMES)
def test_formats(fmt):
  x = with_zeros()
  with jax.disable_jit():
    q = fp4jax.quantize(x, fmt)
    assert fp4jax.dequantize(q).shape == x.shape
    assert np.isfinite(fp4jax.decompose(x, fmt).summary().sqnr_db)
    fp4jax.fake_quantize(x, fmt, rounding="stochastic", key=jax.random.key(0))
  jax.jit(lambda x: fp4jax.decompose(x, fmt).summary())(x)


@pytest.mark.slow
@by_recipe
def test_dot_general(name):
  x, w = normal(0, 40, 64).at[3:5].set(0), normal(1, 64, 32)

  def loss(x, w, tap):
    dot = fp4jax.dot_general(recipes.by_name(name), tap=tap)
    return jnp.sum(dot(x, w, (((1,), (0,)), ((), ()))) ** 2)

  jax.grad(loss, argnums=(0, 1, 2))(x, w, operands.new_tap())


@pytest.mark.slow
@by_recipe
def test_attention_op_by_op(name):
  """It masks with -inf, which is no NaN."""
  q, k, v = normal(0, 1, 9, 2, 2, 16), normal(1, 1, 9, 2, 16), normal(2, 1, 9, 2, 16)
  numerics = Numerics(Policy(scores=recipes.by_name(name)))
  jax.grad(lambda *x: jnp.sum(attend(*x, numerics) ** 2), argnums=(0, 1, 2))(q, k, v)


@pytest.mark.slow
def test_the_runner_with_probes(tmp_path, corpus_file):
  changes = {"data.path": corpus_file, "steps": 2, "eval_every": 1, "probe_every": 1}
  changes["optimizer.warmup_steps"] = 0
  config = small(**changes, recipes=configs.Names(RECIPES))
  run(config, tmp_path)
  rows = rows_of(tmp_path, "metrics")
  assert {r["recipe"] for r in rows if r["split"] == "train" and r["step"] == 2} == set(RECIPES)
  assert {r["recipe"] for r in rows_of(tmp_path, "probes")} >= {"mxfp4", "hopper_fp4"}
