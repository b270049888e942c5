"""Weights projected to MXFP4 under FP8: what the GEMMs read, and when FP8 keeps it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_oracles as oracle
from quantizer_checks import MATMUL, check_everywhere, random

import fp4jax
from fp4jax import recipes
from fp4jax.recipes import FP8_MXFP4_WEIGHTS


def weights_read(w) -> tuple[np.ndarray, np.ndarray]:
  """By fprop and by dgrad, whose other operand is the identity: exact in FP8."""
  k, n = w.shape
  dot = fp4jax.dot_general(FP8_MXFP4_WEIGHTS)
  y = dot(np.eye(k, dtype=np.float32), w, MATMUL)
  _, pull = jax.vjp(lambda x: dot(x, w, MATMUL), jnp.zeros((n, k)))
  (dx,) = pull(jnp.eye(n))
  return np.asarray(y), np.asarray(dx).T


def columns(function, w):
  return function(np.ascontiguousarray(w.T)).T


def with_spread(binades: int) -> np.ndarray:
  """Two tiles whose MXFP4 scales spread over so many binades, with every code in each block."""
  rng = np.random.default_rng(0)
  codes = rng.choice([0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -3, 0], (4, 32, 128))
  codes[:, 0] = 6
  exponents = rng.integers(-binades, 1, (4, 1, 128))
  exponents[:, 0, 0], exponents[:, 0, 1] = 0, -binades
  return (codes * 2.0**exponents).reshape(128, 128).astype(np.float32)


@pytest.mark.slow
def test_both_gemms_read_the_projected_weight():
  w = random(256, 160) * 0.02
  projected = columns(oracle.mxfp4_weight, w)
  for read in weights_read(w):
    np.testing.assert_array_equal(read, projected)
  # What is deployed: the same codes and scales.
  rceil = FP8_MXFP4_WEIGHTS.residual.rhs
  np.testing.assert_array_equal(fp4jax.dequantize(fp4jax.quantize(w, rceil, 0)), projected)


@pytest.mark.parametrize("binades", [0, 7, 14, 15, 20])
def test_exact_within_14_binades(binades):
  w = with_spread(binades)
  np.testing.assert_array_equal(columns(oracle.mxfp4_weight, w), w)
  expected = oracle.fp8_tiles(w)
  changed = (expected != w).mean()
  assert (changed > 0) == (binades > 14)
  for read in weights_read(w):
    np.testing.assert_array_equal(read, expected)


def test_the_rest_is_fp8_and_gradients_pass_straight_through():
  x, w, dy = random(128, 128), random(128, 128, seed=1), random(128, 128, seed=2)

  def gemms(recipe, w):
    y, pull = jax.vjp(lambda x, w: fp4jax.dot_general(recipe)(x, w, MATMUL), x, w)
    return y, *pull(dy)

  y, dx, dw = gemms(FP8_MXFP4_WEIGHTS, w)
  projected = columns(oracle.mxfp4_weight, w).astype(np.float32)
  for actual, expected in zip((y, dx), gemms(recipes.FP8_POW2, projected), strict=False):
    np.testing.assert_array_equal(actual, expected)
  np.testing.assert_array_equal(dw, gemms(recipes.FP8_POW2, w)[2])
  assert (
    FP8_MXFP4_WEIGHTS.replace(
      {
        "residual.rhs": None,
        "fprop.rhs.source": "original",
        "dgrad.rhs.source": "original",
      }
    )
    == recipes.FP8_POW2
  )


@pytest.mark.slow
def test_works_everywhere():
  check_everywhere(FP8_MXFP4_WEIGHTS)
