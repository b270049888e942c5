"""The differentiable gradient estimator against NumPy."""

import dataclasses

import jax
import numpy as np
import pytest
import quantizer_oracles as oracle
from oracles import E2M1
from quantizer_checks import MATMUL, as_read, check_everywhere, random, recipe_of

import fp4jax
from fp4jax import MXFP4, Hadamard, Operand
from fp4jax.quantizers import DifferentiableEstimator

RCEIL = dataclasses.replace(MXFP4, scale_rule="rceil")


def gradient(quantizer, w, dw, **others):
  """What becomes of `dw`, the gradient that wgrad computes for w."""
  recipe = recipe_of(fprop_rhs=quantizer, **others)
  x = np.eye(len(w), dtype=np.float32)
  return np.asarray(jax.grad(lambda w: (fp4jax.dot_general(recipe)(x, w, MATMUL) * dw).sum())(w))


def one_block(scaled, scale):
  """A column whose rceil scale is `scale`: its largest value lies on 6."""
  column = np.full(32, 6.0)
  column[: len(scaled)] = scaled
  return (column * scale).astype(np.float32)[:, None]


@pytest.mark.parametrize("k, limit", [(5.0, 3.0), (3.0, 100.0), (1.0, 3.0)])
def test_derivative(k, limit):
  """Every grid value, middle and something between, of both signs, at three scales."""
  points = np.concatenate([E2M1, (E2M1[1:] + E2M1[:-1]) / 2, E2M1[:-1] + 0.1, [5.9]])
  w = np.concatenate(
    [
      one_block(sign * points[start : start + 31], scale)
      for scale in (1.0, 2.0**-9, 2.0**20)
      for start in (0, 16)
      for sign in (1, -1)
    ],
    axis=1,
  )
  scale = 2.0 ** np.ceil(np.log2(np.abs(w).max(0) / 6))
  dw = random(32, w.shape[1], seed=1)
  quantizer = DifferentiableEstimator(Operand(RCEIL), k, limit)
  actual = gradient(quantizer, w, dw)
  expected = dw * oracle.dge_derivative(w / scale, k, limit)
  # Near a middle the power is steep: a float32 error of 2^-23 in the distance 0.2 and more from it
  # is one of 2^-20; the power itself is good to a few ulps.
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_zero_beyond_the_grid_on_both_sides():
  """Under the rule "floor" a block's largest value may lie in (6, 8)."""
  w = np.full((32, 1), 7.5, np.float32)
  w[1], w[2], w[3] = -7.5, 6.0, -6.0
  actual = gradient(DifferentiableEstimator(Operand(MXFP4)), w, np.ones_like(w))
  assert (actual[[0, 1]] == 0).all()
  np.testing.assert_allclose(actual[[2, 3]], 0.2, rtol=1e-6)


def test_mean_of_the_derivative():
  """0.5935 with the limit of 3, as the integral gives; 1 without (the tail of it is 0.6 %)."""
  inside = np.linspace(-6, 6, 32 * 400 + 2)[1:-1].astype(np.float32)
  w = inside.reshape(400, 32).T.copy()
  w[-1] = 6  # so that every scale is 1
  ones = np.ones_like(w)
  assert abs(gradient(DifferentiableEstimator(Operand(RCEIL)), w, ones)[:-1].mean() - 0.5935) < 5e-3
  straight = gradient(DifferentiableEstimator(Operand(RCEIL), k=1.0), w, ones)
  np.testing.assert_array_equal(straight, ones)


def test_the_values_are_those_of_the_operand():
  x = random(8, 96)
  np.testing.assert_array_equal(
    as_read(DifferentiableEstimator(Operand(MXFP4)), x), oracle.mxfp4(x)
  )


def test_padding():
  """50 rows of w are padded to 64 along k, and the gradient is cut back."""
  w, dw = random(50, 4), random(50, 4, seed=1)
  actual = gradient(DifferentiableEstimator(Operand(RCEIL)), w, dw)
  padded = np.pad(w, [(0, 14), (0, 0)])
  scale = 2.0 ** np.ceil(np.log2(np.abs(padded.reshape(2, 32, 4)).max(1) / 6)).repeat(32, 0)[:50]
  np.testing.assert_allclose(actual, dw * oracle.dge_derivative(w / scale), rtol=1e-4)


def test_a_transform_needs_the_gradient_in_its_space():
  quantizer = DifferentiableEstimator(Operand(RCEIL, transform=Hadamard(32)))
  with pytest.raises(ValueError, match=r'DifferentiableEstimator in fprop.rhs .* must be "fprop"'):
    recipe_of(fprop_rhs=quantizer)
  recipe_of(fprop_rhs=quantizer, wgrad_lhs=Operand(np.float32, source="fprop"))


def test_works_everywhere():
  quantizer = DifferentiableEstimator(Operand(RCEIL))
  check_everywhere(recipe_of(fprop_rhs=quantizer, fprop_lhs=Operand(MXFP4)))
