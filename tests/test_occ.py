"""Outlier clamping and compensation against NumPy."""

import jax
import numpy as np
import pytest
import quantizer_oracles as oracle
from quantizer_checks import MATMUL, as_read, check_everywhere, random, recipe_of

import fp4jax
from fp4jax import MXFP4, Operand, operands
from fp4jax.decomposition import SUMMARY_FIELDS
from fp4jax.quantizers import OutlierClamp


@pytest.mark.parametrize("alpha", [0.999, 0.99, 0.97, 1.0])
@pytest.mark.parametrize("k", [256, 200])  # 200 is padded to 224, whose quantiles are others
def test_values(alpha, k):
  x = random(8, k)
  clamped, cut = oracle.clamp_outliers(x, alpha)
  padded = np.pad(clamped, [(0, 0), (0, -k % 32)])
  expected = oracle.mxfp4(padded)[:, :k] + cut
  actual = as_read(OutlierClamp(Operand(MXFP4), alpha), x)
  np.testing.assert_allclose(actual, expected, rtol=2**-22, atol=0)  # the sum of two is rounded
  without = as_read(OutlierClamp(Operand(MXFP4), alpha, compensated=False), x)
  np.testing.assert_array_equal(without, expected - cut)
  # Q(Y_c) is exact, so that all of the difference is what was cut off.
  assert (cut != 0).mean() <= 2 * (1 - alpha) + 2 / k and ((cut != 0).any() or alpha > 0.99)


def test_what_was_cut_off_meets_the_weights_before_rounding():
  x, w = random(8, 256), random(256, 16, seed=1)
  quantizer = OutlierClamp(Operand(MXFP4), 0.97)
  recipe = recipe_of(fprop_lhs=quantizer, fprop_rhs=Operand(MXFP4))
  y = np.asarray(fp4jax.dot_general(recipe)(x, w, MATMUL))
  quantized_w = oracle.mxfp4(np.ascontiguousarray(w.T)).T
  expected = oracle.occ_product(x, w, oracle.mxfp4, quantized_w, 0.97)
  # Two sums of 256 products: a term passes fewer than 260 roundings of 2^-24.
  bound = 260 * 2.0**-24 * (np.abs(x).astype(np.float64) * 1.5 @ (np.abs(w) * 1.5))
  assert (np.abs(y - expected) <= bound).all()
  cut = oracle.clamp_outliers(x, 0.97)[1]
  assert np.abs(cut @ (w - quantized_w)).max() > 10 * bound.max()  # or the test sees nothing


def test_padding_is_not_lifted_to_limits_above_zero():
  """The zeros that fill the last block would count in the summary of the error."""
  x = 3 + np.abs(random(4, 40))
  clamped, _ = oracle.clamp_outliers(x, 0.9)
  clamped = np.pad(clamped, [(0, 0), (0, 24)]).astype(np.float64)
  recipe = recipe_of(fprop_lhs=OutlierClamp(Operand(MXFP4), 0.9))

  def loss(tap):
    return fp4jax.dot_general(recipe, tap=tap)(x, np.ones((40, 1), np.float32), MATMUL).sum()

  row = jax.grad(loss)(operands.new_tap())[0]
  error = oracle.mxfp4(clamped) - clamped
  expected = 10 * np.log10((clamped**2).sum() / (error**2).sum())
  assert abs(row[SUMMARY_FIELDS.index("sqnr_db")] - expected) < 1e-3  # float32 sums of 160 squares


def test_columns_of_weights():
  w = random(64, 16, seed=1)
  recipe = recipe_of(fprop_rhs=OutlierClamp(Operand(MXFP4), 0.9))
  y = np.asarray(fp4jax.dot_general(recipe)(np.eye(64, dtype=np.float32), w, MATMUL))
  clamped, cut = oracle.clamp_outliers(np.ascontiguousarray(w.T), 0.9)
  np.testing.assert_allclose(y, (oracle.mxfp4(clamped) + cut).T, rtol=2**-22, atol=0)


def test_alpha_is_checked():
  with pytest.raises(ValueError, match=r"alpha=0.01 is not in \(0.5, 1\]"):
    OutlierClamp(Operand(MXFP4), 0.01)


def test_works_everywhere():
  quantizer = OutlierClamp(Operand(MXFP4), 0.97)
  check_everywhere(recipe_of(fprop_lhs=quantizer, fprop_rhs=quantizer, dgrad_lhs=quantizer))
