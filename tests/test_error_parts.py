"""The chosen parts of the error against a decomposition in float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantizer_oracles as oracle
from quantizer_checks import as_read, check_everywhere, next_state, random, recipe_of

from fp4jax import MXFP4, Operand
from fp4jax.quantizers import Context, ErrorParts

PARTS = ("scale_bias", "deadzone", "grid_noise")
SUBSETS = [c for n in range(4) for c in itertools.combinations(PARTS, n)]
ONLY_DEADZONE = ErrorParts(Operand(MXFP4), ("deadzone",))


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_values(parts, rule):
  x = random(32, 64)
  fmt = dataclasses.replace(MXFP4, scale_rule=rule)
  actual = as_read(ErrorParts(Operand(fmt), parts), x)
  errors = oracle.error_parts(x, rule)
  expected = x + sum(errors[part] for part in parts)
  # The ideal scale amax / 6 has an error of an ulp, and so have its values, each difference and
  # each sum, relative to values of up to 6 / 4 times the largest of a block.
  largest = np.abs(x).reshape(32, 2, 32).max(-1).repeat(32, 1)
  assert (np.abs(actual - expected) <= 8 * 2.0**-24 * 1.5 * largest).all()


def test_none_is_x_and_all_are_the_format():
  x = random(32, 64)
  np.testing.assert_array_equal(as_read(ErrorParts(Operand(MXFP4), ()), x), x)
  np.testing.assert_array_equal(as_read(ErrorParts(Operand(MXFP4), PARTS), x), oracle.mxfp4(x))


def test_all_are_the_format_to_the_last_bit():
  """Where a value is rounded away from, the differences are rounded too."""
  x, ctx = random(32, 64), Context(key=jax.random.key(0))
  operand = Operand(MXFP4, "stochastic")
  (actual,) = ErrorParts(operand, PARTS).read(jnp.asarray(x), -1, ctx).terms
  (expected,) = operand.read(jnp.asarray(x), -1, ctx).terms
  np.testing.assert_array_equal(actual, expected.astype(jnp.float32))


def state_of(parts, share=1.0):
  return {part: jnp.float32(share if part in parts else 0) for part in PARTS}


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_a_state_chooses_as_a_name_does(parts):
  x, any_parts = random(32, 64), ErrorParts(Operand(MXFP4), None)
  assert any_parts.init((32, 64)) == state_of(PARTS)
  expected = as_read(ErrorParts(Operand(MXFP4), parts), x)
  np.testing.assert_array_equal(as_read(any_parts, x, state=state_of(parts)), expected)
  assert next_state(any_parts, x, state_of(parts)) == state_of(parts)


def test_a_state_may_ask_for_a_share():
  x, half = random(32, 64), state_of(["deadzone"], 0.5)
  actual = as_read(ErrorParts(Operand(MXFP4), None), x, state=half)
  np.testing.assert_array_equal(actual, x + 0.5 * (as_read(ONLY_DEADZONE, x) - x))


def test_unknown_parts_are_refused():
  for parts in (("scale",), "scale_bias", ["scale_bias"]):
    with pytest.raises(ValueError, match=r"parts=.* neither a tuple of \('scale_bias', 'deadzone'"):
      ErrorParts(Operand(MXFP4), parts)


def test_works_everywhere():
  quantizer = ErrorParts(Operand(MXFP4), ("scale_bias", "deadzone"))
  check_everywhere(recipe_of(fprop_lhs=quantizer, fprop_rhs=quantizer, wgrad_rhs=quantizer))
