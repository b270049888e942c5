"""GradScale against NumPy: how its multiplier moves, where it settles, what it rounds to."""

import dataclasses

import numpy as np
import pytest
import quantizer_oracles as oracle
from oracles import E2M1
from quantizer_checks import KEY, as_read, check_everywhere, next_state, random, recipe_of

from fp4jax import FP8_TENSOR, Operand
from fp4jax.formats import TableGrid
from fp4jax.quantizers import Context, GradScale

MAGNITUDES = (0.0, *(4.0**n for n in range(-3, 4)))  # of the paper: radix 4
RADIX4 = dataclasses.replace(
  FP8_TENSOR, name="RADIX4", element_dtype=TableGrid("radix4", MAGNITUDES, ties="down")
)
FP4 = dataclasses.replace(FP8_TENSOR, name="FP4", element_dtype="float4_e2m1fn")


@pytest.mark.parametrize("fmt, table", [(RADIX4, np.array(MAGNITUDES)), (FP4, E2M1)])
def test_steps(fmt, table):
  quantizer = GradScale(Operand(fmt))
  state, multiplier = quantizer.init((8, 32)), 1.0
  # Up, down, and at both ends of the interval that is kept.
  sizes = [1, 1e-3, 1e-3, 1e-3, 40, 40, 1e9, 1e9, 0, 1]
  for step, size in enumerate(sizes):
    x = random(8, 32, seed=step)
    x *= np.float32(size / np.abs(x).max())
    expected, next_multiplier = oracle.grad_scale(multiplier, x, table)
    np.testing.assert_array_equal(as_read(quantizer, x, state=state), expected)
    state = next_state(quantizer, x, state)
    multiplier = next_multiplier if size else multiplier  # zeros say nothing
    assert state == multiplier
  for top, factor in ((64, 1), (64.01, 0.5), (32, 2), (32.01, 1)):
    x = np.full((4, 32), top * table[-1] / 64, np.float32)
    assert next_state(quantizer, x, np.float32(1)) == factor


def test_it_settles_in_the_upper_half():
  quantizer = GradScale(Operand(RADIX4))
  for size in (1e-12, 1.0, 1e12):
    x, state = random(8, 32) * np.float32(size), np.float32(1)
    seen = []
    for _ in range(60):
      state = next_state(quantizer, x, state)
      seen.append(float(state))
    assert 32 < np.abs(x).max() * seen[-1] <= 64 and seen[-2] == seen[-1]


def test_zeros_do_not_run_away():
  quantizer, x = GradScale(Operand(RADIX4)), np.zeros((4, 32), np.float32)
  assert next_state(quantizer, x, np.float32(8)) == 8
  tiny = np.full((4, 32), 1e-37, np.float32)
  assert next_state(quantizer, tiny, np.float32(2.0**100)) == 2.0**100


def test_stochastic_rounding_is_unbiased():
  n, points = 4096, np.array([0.005, 0.1, 0.7, 2.0, 7.0, 30.0, -40.0])
  x = np.repeat(points[:, None], n, 1).astype(np.float32)
  quantizer = GradScale(Operand(RADIX4, "stochastic"))
  values = quantizer.read(x, -1, Context(key=KEY, state=np.float32(1))).terms[0]
  table = np.array(MAGNITUDES)
  below = np.searchsorted(table, np.abs(points), side="right") - 1
  low, high = table[below], table[below + 1]
  p = (np.abs(points) - low) / (high - low)
  mean = np.asarray(values, np.float64).mean(1)
  z = (mean - points) / ((high - low) * np.sqrt(p * (1 - p) / n))
  assert np.abs(z).max() < 5


def test_works_everywhere():
  quantizer = GradScale(Operand(RADIX4))
  check_everywhere(recipe_of(dgrad_lhs=quantizer, wgrad_rhs=quantizer))
