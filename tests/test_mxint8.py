"""MXINT8 against integers in float64: every code under every scale, every midpoint, every rule."""

import dataclasses

import format_laws as laws
import format_oracles as oracle
import jax
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax.formats import MXINT8

pytestmark = pytest.mark.usefixtures("strict_promotion")
CORPUS = oracles.corpus()
INT8 = np.arange(128) / 64  # the magnitudes; no code of the quantizer is -128
LARGEST = 127 / 64 * 2.0**126  # beyond it values saturate
SCALED_AMAX = {  # where a rule puts amax / scale; "even" rounds 127.5 / 64 up to 2
  "floor": (1, 2, "[)"),
  "even": (127.5 / 128, 127.5 / 64, "[)"),
  "rceil": (127 / 128, 127 / 64, "(]"),
}


def twos_complement(q: oracles.Quantized) -> np.ndarray:
  """The bytes of what the oracle codes as index and sign."""
  return np.where(q.codes >= 128, 256 - (q.codes.astype(int) - 128), q.codes) % 256


@pytest.mark.parametrize("rule", SCALED_AMAX)
def test_is_the_oracle(rule):
  x = np.concatenate([CORPUS, oracle.ties(INT8, (1, 1.3, 1.99, 2.5), 32)])
  if rule != "floor":  # "even" and "rceil" carry subnormal mantissas as if they were normal
    top = np.abs(x).max(1)
    x = x[~(top < 2.0**-126)]
  in_range = np.where(np.isfinite(x), np.clip(x, -LARGEST, LARGEST), x)
  expected = oracle.quantize(in_range, INT8, SCALED_AMAX[rule], (1, 32))
  q = laws.jit_quantize(x, dataclasses.replace(MXINT8, scale_rule=rule))
  np.testing.assert_array_equal(np.asarray(q.scales), expected.scales)
  np.testing.assert_array_equal(np.asarray(q.codes), twos_complement(expected))
  np.testing.assert_array_equal(
    np.asarray(laws.jit_dequantize(q)), oracle.saturated(expected.values)
  )


def test_every_midpoint_and_every_code():
  x = oracle.exhaustive_magnitudes(INT8)
  x = x[x < 2]  # from there on the scale is 2
  x = np.concatenate([x, -x])
  x = np.concatenate([x, np.zeros(-len(x) % 31)]).reshape(-1, 31)
  x = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float32)  # the scale is 1
  expected = np.clip(np.rint(x.astype(np.float64) * 64), -127, 127) / 64
  np.testing.assert_array_equal(np.asarray(laws.jit_fake_quantize(x, MXINT8)), expected)
  codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
  scales = np.arange(256, dtype=np.uint8)[:, None].repeat(8, 1)
  q = fp4jax.QuantizedArray(codes, scales, None, MXINT8, -1)
  integers = np.concatenate([np.arange(128), np.arange(-128, 0)])
  values = integers / 64 * oracles.e8m0(scales[:, :1])
  np.testing.assert_array_equal(np.asarray(laws.jit_dequantize(q)), oracle.saturated(values))


def test_draws_leave_the_grid_alone():
  """The uniform numbers are as fine as 2^-19, more than a sum with 127 has room for."""
  draws = np.uint32([0, 2**31, 2**32 - 1])[:, None]
  x = np.broadcast_to(INT8.astype(np.float32), (3, 128))
  round_ = jax.jit(MXINT8.grid.round)
  np.testing.assert_array_equal(np.asarray(round_(x, np.broadcast_to(draws, x.shape))), x)


@pytest.mark.slow
def test_laws():
  x = laws.gaussian((32, 128))
  laws.lies_along_every_axis(MXINT8, CORPUS[-800:])
  laws.is_the_same_compiled(MXINT8, CORPUS[::8])
  laws.loses_no_octave(MXINT8, 1 / 128, high=LARGEST)
  laws.decomposes(MXINT8, x)
  laws.keeps_nan_in_its_block(MXINT8, 32)
  laws.has_unbiased_draws(MXINT8, x)
  laws.multiplies(MXINT8)
