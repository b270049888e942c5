"""MXFP4_E3M0 against its table: every code, every midpoint, and LUQ's unbiased draws."""

import dataclasses

import format_laws as laws
import format_oracles as oracle
import jax
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax.formats import MXFP4_E3M0

pytestmark = pytest.mark.usefixtures("strict_promotion")
CORPUS = oracles.corpus()


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
def test_is_the_oracle(rule):
  interval = oracle.SCALED_AMAX["E3M0", rule]
  x = np.concatenate([CORPUS, oracle.ties(oracle.E3M0, (16, 10, 23.9), 32)])
  expected = oracle.quantize(x, oracle.E3M0, interval, (1, 32))
  q = laws.jit_quantize(x, dataclasses.replace(MXFP4_E3M0, scale_rule=rule))
  np.testing.assert_array_equal(np.asarray(q.scales), expected.scales)
  np.testing.assert_array_equal(np.asarray(q.codes[::16]), oracle.pack(expected.codes[::16], 4))
  np.testing.assert_array_equal(
    np.asarray(laws.jit_dequantize(q)), oracle.saturated(expected.values)
  )


def test_every_code_and_every_midpoint():
  x = oracle.exhaustive_magnitudes(oracle.E3M0[:-1])
  x = np.concatenate([x, [-v for v in x], np.zeros(-2 * len(x) % 31)]).reshape(-1, 31)
  x = np.concatenate([x, np.full((len(x), 1), 16)], 1).astype(np.float32)  # the scale is 1
  expected = oracle.signed_values(oracle.E3M0)[
    oracle.nearest(np.abs(x), oracle.E3M0) + 8 * np.signbit(x)
  ]
  np.testing.assert_array_equal(np.asarray(laws.jit_fake_quantize(x, MXFP4_E3M0)), expected)
  codes = np.tile(np.arange(16, dtype=np.uint8), (256, 2))
  scales = np.arange(256, dtype=np.uint8)[:, None]
  q = fp4jax.QuantizedArray(oracle.pack(codes, 4), scales, None, MXFP4_E3M0, -1)
  values = oracle.saturated(oracle.signed_values(oracle.E3M0)[codes] * oracles.e8m0(scales))
  np.testing.assert_array_equal(np.asarray(laws.jit_dequantize(q)), values)


def test_powers_of_two_stay_and_nothing_clips():
  x = 2.0 ** np.random.default_rng(0).integers(-6, 1, (64, 32))
  x[:, 5] = 1
  x = (x * 2.0 ** np.arange(-32, 32)[:, None]).astype(np.float32)
  np.testing.assert_array_equal(np.asarray(laws.jit_fake_quantize(x, MXFP4_E3M0)), x)
  finite = CORPUS[np.isfinite(CORPUS).all(1)]
  assert not np.asarray(laws.jit_decompose(finite, MXFP4_E3M0).clipped).any()


def test_draws_of_luq():
  """Between two powers, and below the smallest, the mean is the value; II.6.2 of the techniques."""
  values = np.array([0.05, 0.2, 0.3, 0.6, 1.1, 1.5, 3.3, 7.2, 12], np.float32)
  x = np.broadcast_to(np.append(values, np.float32(16)), (20_000, 10))
  x = np.concatenate([x, np.zeros((20_000, 22), np.float32)], 1)
  options = {"rounding": "stochastic", "key": jax.random.key(0)}
  q = np.asarray(laws.jit_fake_quantize(x, MXFP4_E3M0, **options))[:, :9]
  low = np.array([max(0, *(e for e in oracle.E3M0 if e <= v)) for v in values])
  high = np.array([min(e for e in oracle.E3M0 if e > v) for v in values])
  assert ((q == low) | (q == high)).all()
  p = (values - low) / (high - low)
  z = ((q == high).mean(0) - p) / np.sqrt(p * (1 - p) / len(q))
  assert np.abs(z).max() < 5


@pytest.mark.slow
def test_laws():
  x = laws.gaussian((32, 128))
  laws.lies_along_every_axis(MXFP4_E3M0, CORPUS[-800:])
  laws.is_the_same_compiled(MXFP4_E3M0, CORPUS[::8])
  laws.loses_no_octave(MXFP4_E3M0, 1 / 3)
  laws.decomposes(MXFP4_E3M0, x)
  laws.keeps_nan_in_its_block(MXFP4_E3M0, 32)
  laws.has_unbiased_draws(MXFP4_E3M0, x)
  laws.multiplies(MXFP4_E3M0)
