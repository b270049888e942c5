"""QuEST against NumPy: its values, its mask, and the published errors."""

import format_laws as laws
import jax
import numpy as np
import oracles
import pytest
import quantizer_oracles as oracle
from quantizer_checks import MATMUL, check_everywhere, random, recipe_of

import fp4jax
from fp4jax import Hadamard, Operand
from fp4jax.quantizers import MXFP4_QUEST, Context, DeviationFormat, Quest

ROTATION = Hadamard(32, seed=None)
FLOOR = Quest(Operand(DeviationFormat(name="FLOOR", exponent="floor"), transform=ROTATION))
QUANTIZERS = {"nearest": Quest(), "floor": FLOOR}
AS_READ = Operand(np.float32, source="fprop")


def inputs(exponent):
  """Groups whose exponent and codes no rounding error of float32 can change."""
  x = random(64, 96)
  values, mask, log_scale = oracle.quest(x, exponent)
  distance = np.abs(log_scale - np.floor(log_scale) - {"nearest": 0.5, "floor": 0}[exponent])
  assert np.minimum(distance, 1 - distance).min() > 1e-5
  return x, values, mask


@pytest.mark.parametrize("exponent", ["nearest", "floor"])
def test_values_and_mask(exponent):
  x, values, mask = inputs(exponent)
  read = QUANTIZERS[exponent].read(x, -1, Context())
  np.testing.assert_array_equal(np.asarray(read.terms[0], np.float64), values)
  np.testing.assert_array_equal(read.saved, mask)
  assert (~mask).any()


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e-6, 1e20, 1e36])
def test_sizes(size):
  """No square leaves float32. The 1e-8 of the definition makes tiny operands zero."""
  x = (np.random.default_rng(0).standard_normal((8, 32)) * size).astype(np.float32)
  read = Quest().read(x, -1, Context())
  values, mask, _ = oracle.quest(x)
  np.testing.assert_array_equal(np.asarray(read.terms[0], np.float64), values)
  np.testing.assert_array_equal(read.saved, mask)
  assert (values == 0).all() == (size < 1e-10)


@pytest.mark.parametrize(
  "exponent, error, masked", [("nearest", 1.34e-2, 0.008), ("floor", 2.23e-2, 0.053)]
)
def test_published_errors(exponent, error, masked):
  """Gaussian groups whose deviations fill an octave."""
  rng = np.random.default_rng(0)
  rotated = rng.standard_normal((4096, 32)) * 2 ** rng.random((4096, 1))
  x = oracle.rotate(rotated, np.ones(32)).astype(np.float32)
  read = QUANTIZERS[exponent].read(x, -1, Context())
  relative = ((np.asarray(read.terms[0], np.float64) - rotated) ** 2).sum(1) / (rotated**2).sum(1)
  # 4096 groups with a deviation of about 1e-2 each: a standard error of 1.5e-4.
  assert abs(relative.mean() - error) < 1e-3
  assert abs(1 - np.asarray(read.saved).mean() - masked) < 0.1 * masked


@pytest.mark.parametrize("exponent", ["nearest", "floor"])
def test_gradients(exponent):
  """Backward GEMMs read the rotated, rounded operands; clipped values have no gradient."""
  quantizer = QUANTIZERS[exponent]
  recipe = recipe_of(fprop_lhs=quantizer, fprop_rhs=quantizer, dgrad_rhs=AS_READ, wgrad_lhs=AS_READ)
  x, x_values, x_mask = inputs(exponent)
  w = random(96, 16, seed=1)
  w_values, w_mask, _ = oracle.quest(np.ascontiguousarray(w.T), exponent)
  dy = random(64, 16, seed=2)
  y, pull = jax.vjp(lambda x, w: fp4jax.dot_general(recipe)(x, w, MATMUL), x, w)
  dx, dw = pull(dy)
  expected = (
    x_values @ w_values.T,
    oracle.quest_pull(x_mask, dy.astype(np.float64) @ w_values),
    oracle.quest_pull(w_mask, dy.T.astype(np.float64) @ x_values).T,
  )
  bounds = (
    np.abs(x_values) @ np.abs(w_values).T,
    np.abs(dy) @ np.abs(w_values),
    (np.abs(dy).T @ np.abs(x_values)).T,
  )
  for actual, exact, bound in zip((y, dx, dw), expected, bounds, strict=True):
    # Sums of at most 96 products, then of 32: a term passes fewer than 140 roundings of 2^-24, and
    # the second sum, over sqrt(32), mixes 32 bounds of a group.
    assert (np.abs(actual - exact) <= 140 * 2.0**-24 * 6 * bound.max(-1, keepdims=True)).all()


def test_gradient_is_zero_where_clipped():
  x, _, mask = inputs("floor")
  w = random(96, 16, seed=1)
  recipe = recipe_of(fprop_lhs=FLOOR, dgrad_rhs=AS_READ)
  dx = jax.grad(lambda x: fp4jax.dot_general(recipe)(x, w, MATMUL).sum())(x)
  rotated = oracle.rotate(np.asarray(dx), np.ones(32))
  assert (np.abs(rotated[~mask]) < 1e-5 * np.abs(rotated).max()).all()
  assert (np.abs(rotated[mask]) > 1e-5 * np.abs(rotated).max()).mean() > 0.99


def test_backward_operands_in_another_space_are_refused():
  with pytest.raises(ValueError, match=r'Quest in fprop.lhs .* must be "fprop"'):
    recipe_of(fprop_lhs=Quest(), fprop_rhs=Quest())


def test_a_constant_block_is_lost():
  """It has no deviation; neither has, rotated, a value alone at the first place of a block."""
  x = np.full((1, 32), 3.0, np.float32)
  assert np.abs(fp4jax.fake_quantize(x, MXFP4_QUEST)).max() < 1e-7
  spikes = 3 * np.eye(2, 32, dtype=np.float32)
  read = Quest().read(spikes, -1, Context())
  assert np.abs(read.terms[0][0]).max() < 1e-7 and not read.saved[0].any()
  np.testing.assert_allclose(np.abs(read.terms[0][1]), 3 / 32**0.5, rtol=0.06)
  assert read.saved[1].all()


@pytest.mark.slow
def test_laws_of_a_format():
  """But one: a block of the largest values is constant."""
  laws.lies_along_every_axis(MXFP4_QUEST, laws.gaussian((256, 64)))
  laws.is_the_same_compiled(MXFP4_QUEST, oracles.corpus()[::8])
  laws.decomposes(MXFP4_QUEST, laws.gaussian((32, 64)))
  laws.keeps_nan_in_its_block(MXFP4_QUEST, 32)
  laws.has_unbiased_draws(MXFP4_QUEST, laws.gaussian((32, 64)))


def test_works_everywhere():
  check_everywhere(
    recipe_of(fprop_lhs=Quest(), fprop_rhs=Quest(), dgrad_rhs=AS_READ, wgrad_lhs=AS_READ)
  )
