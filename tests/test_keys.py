"""Random keys: of any trace, and which draw is whose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from fp4jax import fake_quantize, operands

KEY = jax.random.key(3)


def stochastic(x, key):
  return fake_quantize(x, fp4jax.MXFP4, rounding="stochastic", key=key)


def scanned(x, key):
  return jax.lax.scan(lambda c, k: (c, stochastic(x, k)), 0.0, jax.random.split(key, 1))[1][0]


INNER_TRACES = {
  "checkpoint": jax.checkpoint(stochastic),
  "jit": jax.jit(stochastic),
  "scan": scanned,
  "cond": lambda x, k: jax.lax.cond(k is not None, stochastic, lambda x, k: x, x, k),
  "fori_loop": lambda x, k: jax.lax.fori_loop(0, 1, lambda i, y: stochastic(y, k), x),
  "vmap": lambda x, k: jax.vmap(stochastic)(x[None], k[None])[0],
}


@pytest.mark.parametrize("name", INNER_TRACES)
def test_a_key_may_be_of_an_inner_trace(name):
  x = jnp.linspace(-1, 1, 32)
  f = INNER_TRACES[name]
  g = jax.grad(lambda x, key: f(x, key).sum())(x, KEY)
  np.testing.assert_array_equal(g, np.ones(32))
  expected = jax.random.split(KEY, 1)[0] if name == "scan" else KEY
  np.testing.assert_array_equal(f(x, KEY), stochastic(x, expected))


def test_draws_do_not_hang_on_the_order_of_roles():
  """Numbers of a role are typed in: a table in another order may not change what is drawn."""
  assert operands.recipe_lib.ROLES == {
    "fprop.lhs": 0,
    "fprop.rhs": 1,
    "dgrad.lhs": 2,
    "dgrad.rhs": 3,
    "wgrad.lhs": 4,
    "wgrad.rhs": 5,
  }
