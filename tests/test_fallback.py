"""Outlier fallback against NumPy: two passes, four products."""

import dataclasses

import jax
import numpy as np
import pytest
import quantizer_oracles as oracle
from quantizer_checks import KEY, MATMUL, as_read, check_everywhere, random, recipe_of

import fp4jax
from fp4jax import MXFP4, Operand, operands
from fp4jax.decomposition import SUMMARY_FIELDS
from fp4jax.quantizers import Context, OutlierFallback

RCEIL = dataclasses.replace(MXFP4, scale_rule="rceil")


@pytest.mark.parametrize("alpha", [0.5, 1.0, 0.3])
@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_values(alpha, rule):
  x = random(8, 96)
  fmt = dataclasses.replace(MXFP4, scale_rule=rule)
  expected = oracle.outlier_fallback(x, lambda v: oracle.mxfp4(v, rule), alpha)
  actual = as_read(OutlierFallback(Operand(fmt), alpha), x)
  if alpha == 0.3:  # alpha times the second pass rounds, and so does its sum with the first
    np.testing.assert_allclose(actual, expected, rtol=2**-22, atol=0)
  else:  # values on a grid of few bits
    np.testing.assert_array_equal(actual, expected)


def test_a_gemm_of_two_is_four_products():
  x, w = random(8, 64), random(64, 16, seed=1)
  quantizer = OutlierFallback(Operand(MXFP4))
  y = fp4jax.dot_general(recipe_of(fprop_lhs=quantizer, fprop_rhs=quantizer))(x, w, MATMUL)
  a = oracle.outlier_fallback(x, oracle.mxfp4)
  b = oracle.outlier_fallback(np.ascontiguousarray(w.T), oracle.mxfp4).T
  # Four sums of 64 products: a term passes fewer than 70 roundings of 2^-24. Terms of the two
  # passes may have opposite signs, but the second is at most a third of the first.
  bound = 70 * 2.0**-24 * (np.abs(a) @ np.abs(b)) * 4
  assert (np.abs(np.asarray(y) - a @ b) <= bound).all()


def test_the_second_pass_draws_on_its_own():
  """Where the first one went up, its draw was large: again, it would push the rest up too."""
  x = random(64, 64)
  read = OutlierFallback(Operand(RCEIL, "stochastic"), 1.0).read(x, -1, Context(key=KEY))
  first, second = (np.asarray(term, np.float64) for term in read.terms)
  rest = x - first
  unit = np.abs(rest).reshape(64, 2, 32).max(-1).repeat(32, 1)
  pushed = ((np.abs(second) - np.abs(rest)) / unit)[np.abs(first) > np.abs(x)]
  assert abs(pushed.mean()) / (pushed.std() / np.sqrt(pushed.size)) < 5


def test_the_probe_shows_the_error_of_both_passes():
  x, w = random(32, 64), random(64, 32, seed=1)
  recipe = recipe_of(fprop_lhs=OutlierFallback(Operand(MXFP4)))

  def loss(tap):
    return fp4jax.dot_general(recipe, tap=tap)(x, w, MATMUL).sum()

  row = jax.grad(loss)(operands.new_tap())[0]
  error = oracle.outlier_fallback(x, oracle.mxfp4) - x
  expected = 10 * np.log10((x.astype(np.float64) ** 2).sum() / (error**2).sum())
  assert abs(row[SUMMARY_FIELDS.index("sqnr_db")] - expected) < 1e-3  # float32 sums of 2048 squares


def test_works_everywhere():
  quantizer = OutlierFallback(Operand(RCEIL))
  check_everywhere(recipe_of(fprop_lhs=quantizer, fprop_rhs=quantizer, wgrad_rhs=quantizer))
