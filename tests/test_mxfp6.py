"""MXFP6 of both elements against typed-in tables: every code, every midpoint, packing."""

import dataclasses

import format_laws as laws
import format_oracles as oracle
import ml_dtypes
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax.formats import MXFP6_E2M3, MXFP6_E3M2

pytestmark = pytest.mark.usefixtures("strict_promotion")
FORMATS = {"E2M3": MXFP6_E2M3, "E3M2": MXFP6_E3M2}
TABLES = {"E2M3": oracle.E2M3, "E3M2": oracle.E3M2}
DTYPES = {"E2M3": ml_dtypes.float6_e2m3fn, "E3M2": ml_dtypes.float6_e3m2fn}
CORPUS = oracles.corpus()


@pytest.mark.parametrize("element", FORMATS)
def test_tables_of_the_oracle(element):
  codes = np.arange(64, dtype=np.uint8)
  np.testing.assert_array_equal(
    oracle.signed_values(TABLES[element]), codes.view(DTYPES[element]).astype(np.float64)
  )


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
@pytest.mark.parametrize("element", FORMATS)
def test_is_the_oracle(element, rule):
  fmt = dataclasses.replace(FORMATS[element], scale_rule=rule)
  table, interval = TABLES[element], oracle.SCALED_AMAX[element, rule]
  low, high, _ = interval
  x = np.concatenate([CORPUS, oracle.ties(table, (low * 1.001, low * 1.3, high * 0.999), 32)])
  expected = oracle.quantize(x, table, interval, (1, 32))
  q = laws.jit_quantize(x, fmt)
  np.testing.assert_array_equal(np.asarray(q.scales), expected.scales)
  np.testing.assert_array_equal(np.asarray(q.codes[::16]), oracle.pack(expected.codes[::16], 6))
  # An element times a power of two is exact in float32, and saturates there.
  np.testing.assert_array_equal(
    np.asarray(laws.jit_dequantize(q)), oracle.saturated(expected.values)
  )


@pytest.mark.parametrize("element", FORMATS)
def test_every_code_and_every_midpoint(element):
  fmt, table = FORMATS[element], TABLES[element]
  x = oracle.exhaustive_magnitudes(table)
  x = np.concatenate([x, -x])
  x = np.concatenate([x, np.zeros(-len(x) % 31)]).reshape(-1, 31).astype(np.float32)
  x = np.concatenate([x, np.full((len(x), 1), 2.0 ** np.floor(np.log2(table[-1])))], 1)
  x = x.astype(np.float32)  # the last column makes the scale 1, but where a value is beyond 2^(e+1)
  expected = oracle.quantize(x, table, oracle.SCALED_AMAX[element, "floor"], (1, 32))
  assert set(expected.codes.ravel()) == set(range(64))
  np.testing.assert_array_equal(np.asarray(laws.jit_fake_quantize(x, fmt)), expected.values)
  q = fp4jax.QuantizedArray(
    oracle.pack(np.tile(np.arange(64, dtype=np.uint8), (256, 1)), 6),
    np.arange(256, dtype=np.uint8)[:, None].repeat(2, 1),
    None,
    fmt,
    -1,
  )
  values = oracle.signed_values(table) * oracles.e8m0(q.scales[:, :1])
  np.testing.assert_array_equal(np.asarray(laws.jit_dequantize(q)), oracle.saturated(values))


@pytest.mark.parametrize("axis", [0, 1])
def test_four_codes_lie_in_three_bytes(axis):
  x = np.zeros((32, 32), np.float32)
  x[:4] = np.array([1, 1.125, -1.25, 7.5])[:, None]  # codes 8, 9, 32 + 10, 31
  q = laws.jit_quantize(x if axis == 0 else x.T, MXFP6_E2M3, axis)
  codes = np.moveaxis(np.asarray(q.codes), axis, 0)
  assert codes.shape == (24, 32) and q.shape == (32, 32)
  number = 8 | 9 << 6 | 42 << 12 | 31 << 18
  assert codes[:3, 0].tolist() == [number & 255, number >> 8 & 255, number >> 16]
  assert q.nbytes == 32 * 32 * 6.25 / 8 and MXFP6_E2M3.bits_per_value == 6.25


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_laws(fmt):
  laws.lies_along_every_axis(fmt, CORPUS[-800:])
  laws.is_the_same_compiled(fmt, CORPUS[::8])
  laws.loses_no_octave(fmt, 1 / 8)
  laws.decomposes(fmt, laws.gaussian((32, 128)))
  laws.keeps_nan_in_its_block(fmt, 32)
  laws.has_unbiased_draws(fmt, laws.gaussian((32, 128)))
  laws.multiplies(fmt)
