"""Delayed scaling against NumPy in float32, over steps in which amax grows, falls and is zero."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import quantizer_oracles as oracle
from quantizer_checks import as_read, check_everywhere, next_state, random, recipe_of

from fp4jax import FP8_TENSOR, Operand
from fp4jax.quantizers import DelayedScaling

E5M2 = dataclasses.replace(FP8_TENSOR, element_dtype=ml_dtypes.float8_e5m2)
SIZES = [1.0, 3.0, 100.0, 1e-3, 0.0, 0.0, 0.0, 0.0, 1e30, 1e-30, 1e-37, 1e-37, 1e-42]


@pytest.mark.parametrize("history, margin", [(1, 0), (3, 0), (1024, 0), (3, 2)])
@pytest.mark.parametrize("name, fmt", [("e4m3", FP8_TENSOR), ("e5m2", E5M2)])
def test_steps(history, margin, name, fmt):
  quantizer = DelayedScaling(Operand(fmt), history, margin)
  state = quantizer.init((8, 32))
  expected_state = np.float32(1), np.zeros(history, np.float32)
  for step, size in enumerate(SIZES):
    x = random(8, 32, seed=step) * np.float32(size)
    x = np.where(np.abs(x) < 2.0**-126, 0, x)
    actual = as_read(quantizer, x, state=state)
    expected, expected_state = oracle.delayed_scaling(
      expected_state, x, oracle.FP8_TABLES[name], margin
    )
    state = next_state(quantizer, x, state)
    # XLA on a CPU flushes what is subnormal.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2.0**-126)
    np.testing.assert_array_equal(state["multiplier"], expected_state[0])
    np.testing.assert_array_equal(state["history"], expected_state[1])


def test_growth_saturates():
  quantizer = DelayedScaling(history=1)
  state = next_state(quantizer, np.full((4, 32), 2, np.float32), quantizer.init((4, 32)))
  assert state["multiplier"] == 224
  grown = np.full((4, 32), -1e6, np.float32)
  np.testing.assert_array_equal(as_read(quantizer, grown, state=state), np.full((4, 32), -2.0))
  state = next_state(quantizer, grown, state)
  np.testing.assert_allclose(as_read(quantizer, grown, state=state), grown, rtol=2**-22)


def test_an_infinity_leaves_the_scale():
  quantizer = DelayedScaling(history=1)
  x = np.full((4, 32), 2, np.float32)
  state = next_state(quantizer, x, quantizer.init((4, 32)))
  x[0, 0] = np.inf
  assert next_state(quantizer, x, state)["multiplier"] == 224


def test_settings_are_checked():
  with pytest.raises(ValueError, match="history=0 is not positive"):
    DelayedScaling(history=0)
  with pytest.raises(ValueError, match="rounding='stochastic': delayed scaling rounds to nearest"):
    DelayedScaling(Operand(FP8_TENSOR, "stochastic"))


def test_works_everywhere():
  rows, gradients = DelayedScaling(history=4), DelayedScaling(Operand(E5M2), history=4)
  check_everywhere(
    recipe_of(
      fprop_lhs=rows, fprop_rhs=rows, dgrad_lhs=gradients, wgrad_lhs=rows, wgrad_rhs=gradients
    )
  )
