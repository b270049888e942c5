"""Which axes of tokens are merged, and that it changes no number."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import fp4jax
from fp4jax import operands, quantizers, recipes
from fp4jax.canonical import canonical, tokens_apart


def tokens(*shape, seed=0):
  """Powers of two, and 32 tokens of which one is not 0: a Hadamard sum has but one term."""
  rng = np.random.default_rng(seed)
  values = rng.choice([-2.0, -1.0, 1.0, 2.0], shape) * (np.arange(shape[1]) % 32 == 5)[:, None]
  return jnp.asarray(values, jnp.float32)


def dw(recipe, x, dy, mesh=False):
  dot = fp4jax.dot_general(recipe, key=jax.random.key(0))
  w = jnp.ones((x.shape[-1], dy.shape[-1]))

  @jax.jit
  def run(x, dy):
    pull = jax.vjp(lambda w: dot(x, w, (((x.ndim - 1,), (0,)), ((), ()))), w)[1]
    return pull(dy)[0]

  devices = jax.make_mesh(
    (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2]
  )
  with jax.set_mesh(devices) if mesh else contextlib.nullcontext():
    return run(x, dy)


@pytest.mark.parametrize(
  "sizes, multiple, expected",
  [
    ((4, 64), 1, (4, 64)),
    ((4, 64), 32, (4, 64)),
    ((2, 4, 16), 32, (2, 64)),  # two axes are enough
    ((3, 8, 4), 32, (3, 32)),
    ((3, 5), 32, (15,)),  # never a multiple: all, and padded as one
    ((3, 0), 32, (3, 0)),
    ((), 32, (1,)),
    ((7,), 1, (7,)),
  ],
)
def test_axes_are_merged_from_the_last_one(sizes, multiple, expected):
  assert tokens_apart(sizes, multiple) == expected


@pytest.mark.parametrize("token_multiple", [None, 1, 4])
@pytest.mark.parametrize(
  "lhs, rhs, dimension_numbers",
  [
    ((2, 3, 8), (8, 5), (((2,), (0,)), ((), ()))),
    ((8, 2, 3), (5, 8), (((0,), (1,)), ((), ()))),
    ((2, 3, 4, 8), (2, 4, 8, 5), (((3,), (2,)), ((0, 2), (0, 1)))),
    ((2, 3, 4, 8), (8, 6, 4), (((3, 2), (0, 2)), ((), ()))),
    ((8,), (8,), (((0,), (0,)), ((), ()))),
  ],
)
def test_product_is_that_of_lax(lhs, rhs, dimension_numbers, token_multiple):
  rng = np.random.default_rng(0)
  # Small integers: every order of summation is exact.
  lhs, rhs = (jnp.asarray(rng.integers(-4, 5, s), jnp.float32) for s in (lhs, rhs))
  a, b, batch = canonical(lhs, rhs, dimension_numbers, token_multiple)
  axes = tuple(range(batch))
  product = lax.dot_general(a, b, (((a.ndim - 1,), (batch,)), (axes, axes)))
  expected = lax.dot_general(lhs, rhs, dimension_numbers)
  assert np.array_equal(product.reshape(expected.shape), expected)
  assert b.ndim == batch + 2
  if token_multiple is None:
    assert batch <= 1 and a.ndim == b.ndim


@pytest.mark.parametrize("name", ["fp8", "mxfp4_rht_sr", "hopper_fp4"])
def test_axes_apart_have_the_blocks_of_one_axis(name):
  """(2, 128) tokens on a mesh, 256 in a row without one. Values are such that sums are exact."""
  recipe = recipes.RECIPES[name]
  assert operands.token_multiple(recipe) == {"mxfp4_rht_sr": 32}.get(name, 128)
  x, dy = tokens(2, 128, 64), tokens(2, 128, 96, seed=1)
  assert np.array_equal(dw(recipe, x, dy, mesh=True), dw(recipe, x, dy))


def test_blocks_over_two_rows_see_both():
  """128 tokens of (2, 64) share a scale, on a mesh as in one row: small ones become 0."""
  x, dy = tokens(2, 64, 32) * jnp.asarray([2.0**20, 1])[:, None, None], tokens(2, 64, 8, seed=1)
  apart, one = dw(recipes.FP8, x, dy, mesh=True), dw(recipes.FP8, x, dy)
  halves = dw(recipes.FP8, x[0], dy[0]) + dw(recipes.FP8, x[1], dy[1])
  assert np.array_equal(apart, one)
  assert not np.array_equal(halves, one)  # else this shows nothing


def test_whole_rows_of_tokens_stay_whole():
  """A quantile of 256 tokens is not that of two times 128."""
  clamp = quantizers.OutlierClamp(recipes.MXFP4.wgrad.lhs, compensated=False)
  recipe = recipes.MXFP4.replace({"wgrad.lhs": clamp})
  x, dy = tokens(2, 128, 64), tokens(2, 128, 32, seed=1)
  x = x.at[0].multiply(4)
  one = dw(recipe, x, dy)
  assert np.array_equal(dw(recipe, x, dy, mesh=True), one)
  assert not np.array_equal(dw(recipe, x[0], dy[0]) + dw(recipe, x[1], dy[1]), one)
