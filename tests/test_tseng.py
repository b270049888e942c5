"""Three quarters, rounded stochastically: against NumPy with the same draws, and unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_oracles as oracle
from quantizer_checks import KEY, MATMUL, check_everywhere, random, recipe_of

import fp4jax
from fp4jax import MXFP4, Operand
from fp4jax.quantizers import MXFP4_THREE_QUARTERS, Context, FreshHadamard, ThreeQuarters


def uniform(key, shape):
  """The 18 bits of a draw, in the middle of their interval."""
  bits = np.asarray(jax.random.bits(key, shape, jnp.uint32))
  return ((bits >> 14) + 0.5) * 2.0**-18


def hard_blocks():
  """An outlier a thousand times as large; amax at and around powers of two, and just below 8."""
  x = random(16, 64)
  x[0, 5] = 1000 * np.abs(x[0]).max()
  for row, top in enumerate([1, 1.5, 2, 2 - 2**-22, 1 + 2**-22, 3.999999, 4, 6, 7.9999995], 1):
    x[row] *= np.float32(top) / np.abs(x[row]).max()
    x[row, 40] = top
  return x


def test_values():
  x = hard_blocks()
  read = ThreeQuarters().read(x, -1, Context(key=KEY))
  expected = oracle.three_quarters(x, uniform(KEY, x.shape))
  np.testing.assert_array_equal(np.asarray(read.terms[0], np.float64), expected)
  assert read.factor == 4 / 3
  scaled = np.abs(expected).reshape(16, 2, 32).max(-1)
  assert (scaled > 0).all()


def means(quantizer, x, draws=4000):
  @jax.jit
  def total(keys):
    def add(total, key):
      read = quantizer.read(x, -1, Context(key=key))
      return total + read.terms[0].astype(jnp.float32) * read.factor, None

    return jax.lax.scan(add, jnp.zeros(x.shape), keys)[0]

  # Sums of 250 values of few bits are exact in float32.
  sums = [total(keys) for keys in jax.random.split(KEY, (draws // 250, 250))]
  return np.sum(np.asarray(sums, np.float64), 0) / draws


def test_the_mean_is_x():
  x, n = hard_blocks(), 4000
  low, high = (4 / 3 * oracle.three_quarters(x, np.full(x.shape, u)) for u in (0, 1 - 2.0**-30))
  step = np.where(high != low, np.abs(high - low), 1)
  p = np.abs(x - low) / step
  error = np.abs(means(ThreeQuarters(), x, n) - x)
  often = n * p * (1 - p) > 10
  z = error[often] / (step * np.sqrt(p * (1 - p) / n))[often]
  assert often.sum() > 500 and z.max() < 5
  assert (error <= 40 / n * step)[~often].all()  # a Poisson count of mean 10 that reaches 40
  # Without the three quarters the largest values of blocks clip.
  plain = means(Operand(MXFP4, "stochastic"), x, 250)
  assert (plain[9, 40], x[9, 40]) == (6, np.float32(7.9999995))


def test_the_product_is_multiplied_by_sixteen_ninths():
  x, w = random(8, 64), random(64, 16, seed=1)
  recipe = recipe_of(fprop_lhs=ThreeQuarters(), fprop_rhs=ThreeQuarters())
  y = np.asarray(fp4jax.dot_general(recipe, key=KEY)(x, w, MATMUL))
  a = oracle.three_quarters(x, uniform(jax.random.fold_in(KEY, 0), x.shape))
  # The draws of w have its own shape, with k along axis 0.
  draws = uniform(jax.random.fold_in(KEY, 1), w.shape).T
  b = oracle.three_quarters(np.ascontiguousarray(w.T), draws).T
  bound = 70 * 2.0**-24 * 16 / 9 * (np.abs(a) @ np.abs(b))
  assert (np.abs(y - 16 / 9 * (a @ b)) <= bound).all()


@pytest.mark.slow
def test_works_everywhere():
  quantizer = ThreeQuarters(Operand(MXFP4_THREE_QUARTERS, "stochastic", FreshHadamard(64)))
  check_everywhere(
    recipe_of(**dict.fromkeys(("dgrad_lhs", "dgrad_rhs", "wgrad_lhs", "wgrad_rhs"), quantizer))
  )
