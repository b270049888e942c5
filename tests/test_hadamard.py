"""The block Hadamard transform against a float64 matrix."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax import hadamard

pytestmark = pytest.mark.usefixtures("strict_promotion")


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def oracle(x, axis, block, signs):
  """float64 result, and the sum of magnitudes that a rounding error is relative to."""
  x = np.moveaxis(x.astype(np.float64), axis, -1)
  runs = x.reshape(*x.shape[:-1], -1, block) * (1 if signs is None else signs)
  matrix = oracles.sylvester(block)
  back = [
    np.moveaxis((r @ m).reshape(x.shape), -1, axis)
    for r, m in ((runs, matrix.T), (np.abs(runs), np.abs(matrix)))
  ]
  return back


# Entries of the matrix are rounded, block products, block - 1 sums: at most block + 1 roundings of
# 2^-24 of each term.
def assert_close(actual, exact, magnitude, block):
  assert (np.abs(np.asarray(actual) - exact) <= (block + 1) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("block", [1, 2, 16, 32, 128])
def test_is_the_matrix_product_along_every_axis(block):
  signs = np.random.default_rng(block).choice(np.float32([-1, 1]), block)
  for axis, shape in ((0, (128, 2, 3)), (-2, (2, 128, 3)), (2, (2, 3, 128))):
    x = random(*shape)
    for s in (None, signs):
      actual = hadamard(x, axis, block, None if s is None else jnp.asarray(s))
      assert actual.dtype == np.float32
      assert_close(actual, *oracle(x, axis, block, s), block)


def test_default_block_is_32_without_signs():
  x = random(2, 64)
  np.testing.assert_array_equal(hadamard(x, -1), hadamard(x, 1, 32, None))


@pytest.mark.parametrize("block", [16, 64])
def test_is_exact_where_the_root_is(block):
  """Integers over 4 or 8: no rounding at all, so a transposed or permuted matrix shows."""
  x = np.random.default_rng(0).integers(-8, 9, (5, 128)).astype(np.float32)
  signs = np.where(np.arange(block) % 3 == 0, -1, 1).astype(np.float32)
  exact, _ = oracle(x, 1, block, signs)
  np.testing.assert_array_equal(hadamard(x, 1, block, jnp.asarray(signs)), exact)
  back = (
    jnp.tile(signs, 128 // block) * hadamard(hadamard(x, 1, block, jnp.asarray(signs)), 1, block)[0]
  )
  np.testing.assert_array_equal(back, x[0])


@pytest.mark.parametrize("shape", [(0, 64), (64, 0)])
def test_nothing_turns_to_nothing(shape):
  for axis in (0, 1):
    assert hadamard(np.zeros(shape, np.float32), axis).shape == shape


def test_spreads_an_outlier_over_its_block_alone():
  x = np.zeros((1, 96), np.float32)
  x[0, 40] = 8
  y = np.asarray(hadamard(x, 1, 32))[0]
  np.testing.assert_allclose(np.abs(y[32:64]), 8 / np.sqrt(32), rtol=2.0**-23)
  assert (y[:32] == 0).all() and (y[64:] == 0).all()


def test_pair_cancels_in_a_product():
  a, b = random(7, 96), random(96, 5, seed=1)
  signs = jnp.asarray(fp4jax.Hadamard(32, seed=5).signs())
  ha, hb = (np.asarray(hadamard(v, axis, 32, signs)) for v, axis in ((a, 1), (b, 0)))
  # Each transform errs by (32 + 1) 2^-24 of sum |h x|, at most sqrt(32) the largest of a run.
  bound = 2 * 33 * 2.0**-24 * 96 * 32 * np.abs(a).max() * np.abs(b).max()
  assert np.abs(ha.astype(np.float64) @ hb - a.astype(np.float64) @ b).max() < bound
  wrong = np.asarray(hadamard(b, 0, 32))
  assert np.abs(ha @ wrong - a @ b).max() > 1  # with other signs nothing cancels


def test_half_precision_rounds_once():
  x = random(4, 64).astype(ml_dtypes.bfloat16)
  y = hadamard(x, 1, 32)
  assert y.dtype == jnp.bfloat16
  exact = hadamard(x.astype(np.float32), 1, 32)
  np.testing.assert_array_equal(y, np.asarray(exact).astype(ml_dtypes.bfloat16))


def test_gradient_is_the_transpose():
  x, g = random(3, 64), random(3, 64, seed=1)
  signs = jnp.asarray(fp4jax.Hadamard(16, seed=1).signs())
  (dx,) = jax.vjp(lambda x: hadamard(x, 1, 16, signs), jnp.asarray(x))[1](jnp.asarray(g))
  runs = g.reshape(3, 4, 16).astype(np.float64) @ oracles.sylvester(16) * np.asarray(signs)
  np.testing.assert_allclose(dx, runs.reshape(3, 64), atol=17 * 2.0**-24 * 16)


def test_signs_of_a_recipe():
  signs = fp4jax.Hadamard(32, seed=0).signs()
  assert signs.shape == (32,) and signs.dtype == np.float32 and set(signs) == {-1, 1}
  np.testing.assert_array_equal(fp4jax.Hadamard(32, seed=0).signs(), signs)
  assert (fp4jax.Hadamard(32, seed=1).signs() != signs).any()
  assert fp4jax.Hadamard(32, seed=None).signs() is None
  assert fp4jax.Hadamard() == fp4jax.Hadamard(block=32, seed=0)


def test_a_list_is_refused():
  with pytest.raises(TypeError, match=r"x has type list, not jax.Array"):
    hadamard([[1.0] * 32], -1)


@pytest.mark.parametrize(
  "axis, block, signs, message",
  [
    (1, 24, None, "block=24 is not a power of two"),
    (1, 0, None, "block=0 is not a power of two"),
    (2, 32, None, r"axis=2 is out of range for x of shape \(4, 64\)"),
    (0, 32, None, r"axis 0 of shape \(4, 64\) is not a multiple of block=32"),
    (1, 32, 16, r"signs of shape \(16,\) do not match block=32"),
  ],
)
def test_bad_arguments_are_refused(axis, block, signs, message):
  with pytest.raises(ValueError, match=message):
    hadamard(random(4, 64), axis, block, None if signs is None else jnp.ones(signs))


@pytest.mark.parametrize("name", ["int32", "int8", "uint8", "bool", "float64", "float8_e4m3fn"])
def test_other_dtypes_are_refused_by_name(name):
  wrong = np.ones((4, 64)).astype(np.dtype(name))
  message = f"is {name}; hadamard takes float32, bfloat16 or float16"
  with pytest.raises(TypeError, match=f"^x {message}"):
    hadamard(wrong, 1)
  with pytest.raises(TypeError, match=f"^signs {message}"):
    hadamard(random(4, 64), 1, 32, wrong[0, :32])


@pytest.mark.parametrize("wrong", [2.0, 0.0, np.nan, -np.inf])
def test_signs_are_signs(wrong):
  signs = np.ones(32, np.float32)
  signs[7] = wrong
  for array in (signs, jnp.asarray(signs), signs.astype(ml_dtypes.bfloat16)):
    with pytest.raises(ValueError, match=f"^signs hold {wrong}, which is neither 1 nor -1"):
      hadamard(random(4, 64), 1, 32, array)


def test_signs_that_are_traced_have_no_values_yet():
  x, signs = random(4, 64), jnp.asarray(fp4jax.Hadamard(32, seed=5).signs())
  traced = jax.jit(lambda s: hadamard(x, 1, 32, s))(signs)
  np.testing.assert_array_equal(traced, jax.jit(lambda x: hadamard(x, 1, 32, signs))(x))


@pytest.mark.parametrize("axis", [1.0, None, "1", (1,)])
def test_an_axis_that_is_no_int_is_refused(axis):
  message = rf"^axis={re.escape(repr(axis))} has type {type(axis).__name__}, not int"
  with pytest.raises(TypeError, match=message):
    hadamard(random(4, 64), axis)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_numpy_arrays_and_ints_are_taken(dtype):
  x, signs = random(4, 64).astype(dtype), fp4jax.Hadamard(32, seed=5).signs()
  expected = hadamard(jnp.asarray(x), 1, 32, jnp.asarray(signs))
  actual = hadamard(x, np.int64(1), 32, signs)
  assert isinstance(actual, jax.Array) and actual.dtype == dtype
  np.testing.assert_array_equal(actual, expected)
