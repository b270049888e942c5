"""MS-EDEN against NumPy with the same signs and draws; its mean, and its error beside SR's."""

import dataclasses

import format_laws as laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_oracles as oracle
from quantizer_checks import KEY, MATMUL, check_everywhere, recipe_of

import fp4jax
from fp4jax import NVFP4, Operand
from fp4jax.quantizers import EDEN, NVFP4_EDEN, Context, EdenFormat, FreshHadamard

BY_16 = EdenFormat(name="BY_16", group=16)


def draws(key, shape):
  """One for each 16 values: that of the first."""
  bits = np.asarray(jax.random.bits(key, shape, jnp.uint32))[..., ::16]
  return ((bits >> 14) + 0.5) * 2.0**-18


def signs_of(gemm_key):
  return np.asarray(jax.random.rademacher(gemm_key, (128,), jnp.float32))


def gaussian(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("fmt, group", [(NVFP4_EDEN, 128), (BY_16, 16)])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_values(fmt, group, size):
  x = gaussian(16, 256) * np.float32(size)
  gemm_key = jax.random.key(5)
  read = dataclasses.replace(EDEN, format=fmt).read(x, -1, Context(key=KEY, gemm_key=gemm_key))
  rotated = oracle.rotate(x, signs_of(gemm_key))
  expected, scaled = oracle.eden(rotated, draws(KEY, x.shape), group)
  middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
  assert np.abs(scaled[..., None] - middles).min() > 1e-5  # no code hangs on float32's rounding
  # A few roundings of 2^-24 of scales, units and their products.
  np.testing.assert_allclose(read.terms[0], expected, rtol=1e-6)


def test_zeros_and_tiny_blocks():
  x = gaussian(4, 256)
  x[1] = 0
  x[2, :16] *= 1e-9  # its scale would round to zero
  values = np.asarray(fp4jax.fake_quantize(x, NVFP4_EDEN))
  assert (values[1] == 0).all() and (values[2, :16] == 0).all()
  assert (values[2, 16:] != 0).any()
  np.testing.assert_array_equal(fp4jax.fake_quantize(x[1:2], NVFP4_EDEN), np.zeros((1, 256)))


def draws_of(x, operand, n=8000):
  """n draws of x as fprop reads it, transformed back, each with signs and uniforms of its own."""
  recipe = recipe_of(fprop_lhs=operand)
  eye = np.eye(x.shape[1], dtype=np.float32)

  @jax.jit
  def draw(keys):
    return jax.lax.map(lambda key: fp4jax.dot_general(recipe, key=key)(x, eye, MATMUL), keys)

  return np.asarray(draw(jax.random.split(KEY, n)), np.float64)


def scores(values, x):
  return (values.mean(0) - x) / (values.std(0, ddof=1) / np.sqrt(len(values)))


def gain_score(values, x):
  gain = (values * x).sum((1, 2)) / (x.astype(np.float64) ** 2).sum()
  return (gain.mean() - 1) / (gain.std(ddof=1) / np.sqrt(len(gain)))


def test_the_mean_tends_to_x():
  x = gaussian(4, 128)
  values = draws_of(x, EDEN)
  z = scores(values, x)
  assert np.abs(z).max() < 5 and 0.7 < (z**2).mean() < 1.3  # 512 scores, correlated
  # The error of a mean of n falls as 1 / n, to less than 1e-5 of x.
  one = ((values - x) ** 2).mean()
  for n in (10, 100, 1000, 8000):
    of_mean = ((values[:n].mean(0) - x) ** 2).mean()
    assert 0.7 < of_mean * n / one < 1.4
  assert of_mean < 1e-5 * (x**2).mean()
  # Along x itself: the length that nearest elements take away is given back.
  assert abs(gain_score(values, x)) < 5
  plain = draws_of(x, Operand(NVFP4, transform=FreshHadamard(128)), 2000)
  assert gain_score(plain, x) < -20


def test_less_than_half_the_error_of_stochastic_rounding():
  x = gaussian(4, 128)
  rotation = FreshHadamard(128)
  eden, sr = (
    ((draws_of(x, operand, 500) - x) ** 2).mean()
    for operand in (EDEN, Operand(NVFP4, "stochastic", rotation))
  )
  assert 0.38 < eden / sr < 0.55


def test_both_operands_share_the_signs_and_each_call_draws_anew():
  x, w = gaussian(8, 128), gaussian(128, 8, seed=1)
  recipe = recipe_of(fprop_lhs=EDEN, fprop_rhs=EDEN)
  exact = x.astype(np.float64) @ w
  products = [
    np.asarray(fp4jax.dot_general(recipe, key=key)(x, w, MATMUL))
    for key in jax.random.split(KEY, 3)
  ]
  for y in products:
    # Two errors of 10 % each; signs that differ would leave nothing of the product.
    assert np.linalg.norm(y - exact) < 0.3 * np.linalg.norm(exact)
  assert (products[0] != products[1]).all() and (products[1] != products[2]).all()


def test_groups_are_checked():
  with pytest.raises(ValueError, match="group=24 is not a multiple of the block of 16"):
    EdenFormat(name="bad", group=24)
  with pytest.raises(ValueError, match=r"axis 1 of shape \(4, 64\) is not a multiple"):
    fp4jax.fake_quantize(gaussian(4, 64), NVFP4_EDEN)


@pytest.mark.slow
def test_laws_of_a_format():
  """But one: draws decide scales, not elements. A NaN's block also leaves its group's growth."""
  laws.lies_along_every_axis(NVFP4_EDEN, laws.gaussian((256, 128)))
  laws.is_the_same_compiled(NVFP4_EDEN, laws.gaussian((32, 256)))
  laws.loses_no_octave(NVFP4_EDEN, 1 / 4)
  laws.decomposes(NVFP4_EDEN, laws.gaussian((32, 128)))
  laws.keeps_nan_in_its_block(BY_16, 16)


@pytest.mark.slow
def test_works_everywhere():
  check_everywhere(
    recipe_of(
      dgrad_lhs=EDEN,
      dgrad_rhs=dataclasses.replace(EDEN, source="fprop"),
      wgrad_lhs=dataclasses.replace(EDEN, source="fprop"),
      wgrad_rhs=EDEN,
      fprop_lhs=Operand(NVFP4),
      fprop_rhs=Operand(NVFP4),
    )
  )
