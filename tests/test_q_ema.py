"""Q-EMA against NumPy: which neighbour the average chooses, and how the average moves."""

import dataclasses

import numpy as np
import oracles
import pytest
import quantizer_oracles as oracle
from oracles import E2M1
from quantizer_checks import as_read, check_everywhere, next_state, random, recipe_of

from fp4jax import MXFP4, NVFP4, Operand
from fp4jax.quantizers import QEma

RCEIL = dataclasses.replace(MXFP4, scale_rule="rceil")
LATE = np.float32(10)


def scales(x, rule):
  """The scale of every value, in float64."""
  lengths = oracles.block_lengths(x.shape, -1, 32)
  codes = oracles.quantize_mx(x, E2M1, rule, lengths).scales
  return oracles.spread(oracles.e8m0(codes), lengths)


def state_for(x, ema_now, beta):
  """The state after which the average, moved towards x, is `ema_now`."""
  before = (ema_now.astype(np.float64) - (1 - beta) * x) / beta
  return {"ema": before.astype(np.float32), "step": LATE}


@pytest.mark.parametrize("rule", ["floor", "rceil"])
@pytest.mark.parametrize("distance", [0.0, 0.1, 1.0, 30.0])
def test_the_nearer_neighbour(rule, distance):
  x = random(16, 96)
  fmt = dataclasses.replace(MXFP4, scale_rule=rule)
  ema = x + np.float32(distance) * scales(x, rule).astype(np.float32) * random(16, 96, seed=1)
  quantizer = QEma(Operand(fmt), beta=0.5)
  state = state_for(x, ema, 0.5)
  ema = (0.5 * state["ema"] + 0.5 * x).astype(np.float32)  # one rounding, as in the quantizer
  actual = as_read(quantizer, x, state=state)
  expected = oracle.q_ema(x, ema, scales(x, rule))
  np.testing.assert_array_equal(actual, expected)
  plain = oracle.mxfp4(x, rule)
  assert ((actual != plain).mean() > 0.01) == (distance > 0)


def test_ties_go_up_and_values_on_the_grid_stay():
  x = np.array([[0.6, -0.6, 2.4, -2.4, 5, -5, 2, -2, 0, 6, 0.3, -0.3]], np.float32)
  x = np.pad(x, [(0, 0), (0, 20)])
  ema = np.array([[0.75, -0.75, 2.5, -2.5, 5, -5, 100, 100, 100, 0, -9, 9]], np.float32)
  ema = np.pad(ema, [(0, 0), (0, 20)])
  actual = as_read(QEma(Operand(RCEIL), beta=0.5), x, state=state_for(x, ema, 0.5))
  expected = [1, -0.5, 3, -2, 6, -4, 2, -2, 0, 6, 0, 0]
  np.testing.assert_array_equal(actual[0, :12], expected)


def test_the_average_and_the_first_ten_calls():
  beta = 0.9
  quantizer = QEma(Operand(RCEIL), beta)
  state = quantizer.init((8, 40))
  ema = None
  for step in range(12):
    x = random(8, 40, seed=step)
    padded = np.pad(x, [(0, 0), (0, 24)])
    ema = x if ema is None else (np.float32(beta) * ema + np.float32(1 - beta) * x)
    actual = as_read(quantizer, x, state=state)
    state = next_state(quantizer, x, state)
    assert state["step"] == step + 1
    # Two products and a sum, which XLA may fuse: a few ulps a step.
    np.testing.assert_allclose(state["ema"], ema, rtol=0, atol=2.0**-20 * np.abs(ema).max())
    if step < 10:
      np.testing.assert_array_equal(actual, oracle.mxfp4(padded, "rceil")[:, :40])
    else:
      ema_padded = np.pad(np.asarray(state["ema"]), [(0, 0), (0, 24)])
      expected = oracle.q_ema(padded, ema_padded, scales(padded, "rceil"))[:, :40]
      np.testing.assert_array_equal(actual, expected)
      assert (actual != oracle.mxfp4(padded, "rceil")[:, :40]).any()


def test_an_average_of_the_weights_themselves_rounds_to_nearest():
  """But for ties; NVFP4 has two levels of scales."""
  x = random(16, 64)
  quantizer = QEma(Operand(NVFP4), beta=0.5)
  actual = as_read(quantizer, x, state={"ema": x, "step": LATE})
  np.testing.assert_array_equal(actual, as_read(Operand(NVFP4), x))


def test_stochastic_rounding_is_refused():
  with pytest.raises(ValueError, match="rounding='stochastic': Q-EMA rounds to nearest"):
    QEma(Operand(RCEIL, "stochastic"))


def test_works_everywhere():
  check_everywhere(recipe_of(fprop_rhs=QEma(Operand(RCEIL)), fprop_lhs=Operand(MXFP4)))
