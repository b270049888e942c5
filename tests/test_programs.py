"""A call outside `jax.jit`, and its gradient, are programs and not hundreds of operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from fp4jax import recipes
from fp4jax.moe_ffn import moe_ffn

X = jax.random.normal(jax.random.key(0), (64, 128))
W = jax.random.normal(jax.random.key(1), (2, 128, 192))
KEY = jax.random.key(2)
SIZES, EXPERTS = jnp.array([40, 24]), jnp.arange(64)[:, None] % 2


def dot(x, w):
  numbers = (((1,), (0,)), ((), ()))
  return fp4jax.dot_general(recipes.MXFP4_RHT_SR, key=KEY)(x, w[0], numbers)


def grouped(x, w):
  return fp4jax.grouped_dot(x, w, SIZES, recipes.FP8)


def experts(x, w):
  return moe_ffn(x, w, jnp.swapaxes(w[..., :96], 1, 2), EXPERTS, jnp.ones((64, 1)), recipes.MXFP4)


def rounded(x, w):
  return fp4jax.fake_quantize(x, fp4jax.NVFP4)


@pytest.fixture
def compilations():
  """The names of the programs that were compiled or read from the cache."""
  names = []

  def listen(event, duration, **said):
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(said.get("fun_name"))

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("layer", [dot, grouped, experts, rounded])
def test_an_eager_gradient_is_few_programs_and_has_the_bits_of_a_compiled_one(layer, compilations):
  def value_and_pull(x, w):
    out, pull = jax.vjp(layer, x, w)
    return out, pull(jnp.ones_like(out))

  jax.clear_caches()
  eager = value_and_pull(X, W)
  # Two are the rules, the rest checks arguments and lays out the groups; op by op it is hundreds.
  assert len(compilations) < 60, compilations
  compilations.clear()
  value_and_pull(X, W)
  assert not compilations
  for a, b in zip(*map(jax.tree.leaves, (eager, jax.jit(value_and_pull)(X, W))), strict=True):
    np.testing.assert_array_equal(a, b)
