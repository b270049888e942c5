"""RADIX4_EVEN and RADIX4_ODD against their tables and the published rounding."""

import dataclasses

import format_laws as laws
import format_oracles as oracle
import jax
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax.formats import RADIX4_EVEN, RADIX4_ODD

pytestmark = pytest.mark.usefixtures("strict_promotion")
FORMATS = {"RADIX4_EVEN": RADIX4_EVEN, "RADIX4_ODD": RADIX4_ODD}
BLOCKS = {name: dataclasses.replace(fmt, block_shape=(32,)) for name, fmt in FORMATS.items()}
TABLES = {"RADIX4_EVEN": oracle.RADIX4_EVEN, "RADIX4_ODD": oracle.RADIX4_ODD}
CORPUS = oracles.corpus()
both = pytest.mark.parametrize("name", FORMATS)


@both
def test_blocks_are_the_oracle(name):
  table, interval = TABLES[name], oracle.SCALED_AMAX[name, "radix4"]
  x = np.concatenate([CORPUS, oracle.ties(table, (64, 33, 47), 32)])
  expected = oracle.quantize(x, table, interval, (1, 32), ties="down")
  q = laws.jit_quantize(x, BLOCKS[name])
  np.testing.assert_array_equal(np.asarray(q.scales), expected.scales)
  np.testing.assert_array_equal(np.asarray(q.codes[::16]), oracle.pack(expected.codes[::16], 4))
  np.testing.assert_array_equal(
    np.asarray(laws.jit_dequantize(q)), oracle.saturated(expected.values)
  )


@both
def test_every_code_every_threshold_and_one_scale_for_all(name):
  """4^n / 1.6 itself goes down, the float32 above it up; the largest value sets the scale to 1."""
  table = TABLES[name]
  x = np.minimum(oracle.exhaustive_magnitudes(table), 64)
  x = np.append(np.concatenate([x, -x]), 64).astype(np.float32)
  thresholds = np.append(table[1] / 2, table[2:] / 1.6)
  above = (np.abs(x)[:, None] > thresholds).sum(1)
  expected = np.copysign(table[above], x)
  assert len(np.unique(expected[expected >= 0])) == 8 - (name == "RADIX4_ODD")
  actual = np.asarray(laws.jit_fake_quantize(x, FORMATS[name]))
  np.testing.assert_array_equal(actual, expected)
  codes = oracle.pack(np.arange(16, dtype=np.uint8)[None], 4)
  q = fp4jax.QuantizedArray(codes, np.full((1, 1), 127, np.uint8), None, FORMATS[name], -1)
  np.testing.assert_array_equal(np.asarray(laws.jit_dequantize(q))[0], oracle.signed_values(table))


def test_scale_is_where_grad_scale_settles():
  """Largest scaled value in (32, 64]: halved above MaxRep = 64, doubled up to half of it."""
  for amax in (1, 1.001, 1.999, 2, 3e-5, 7e20):
    scale = 1.0
    for _ in range(300):
      scale *= 0.5 if amax * scale > 64 else 2 if amax * scale <= 32 else 1
    for fmt in FORMATS.values():
      q = laws.jit_quantize(np.float32([[amax, 0]]), fmt)
      assert oracles.e8m0(np.asarray(q.scales)).item() == 1 / scale


def test_odd_is_twice_even_of_half():
  """Under one scale, which the same largest value of 64 makes 1."""
  x = np.abs(laws.gaussian((64, 64))) * 16
  x[0] = 64
  x = np.minimum(x, 64).astype(np.float32)
  even, odd = (np.asarray(laws.jit_fake_quantize(x, fmt)) for fmt in FORMATS.values())
  half = np.minimum(x / 2, 64)
  half[0, 0] = 64
  even_of_half = np.asarray(laws.jit_fake_quantize(half, RADIX4_EVEN))
  np.testing.assert_array_equal(odd.ravel()[1:], 2 * even_of_half.ravel()[1:])
  errors = (even - x).ravel(), (odd - x).ravel()
  assert np.corrcoef(*errors)[0, 1] < 0  # the two phases complement each other


def test_one_scale_per_slice():
  x = laws.gaussian((2, 32, 32)) * np.float32([1, 1e6])[:, None, None]
  recipe = fp4jax.recipes.MXFP4.replace(
    {f"fprop.{side}.format": RADIX4_EVEN for side in ("lhs", "rhs")}
  )
  dimensions = (((2,), (1,)), ((0,), (0,)))
  y = np.asarray(jax.jit(lambda x: fp4jax.dot_general(recipe)(x, x, dimensions))(x))
  q = [np.asarray(laws.jit_fake_quantize(a, RADIX4_EVEN), np.float64) for a in x]
  for actual, a in zip(y, q, strict=True):
    np.testing.assert_allclose(actual, a @ a, rtol=0, atol=32 * 2.0**-24 * np.abs(a @ a).max())


@pytest.mark.slow
@both
def test_laws(name):
  fmt, x = BLOCKS[name], laws.gaussian((32, 128))
  laws.lies_along_every_axis(fmt, CORPUS[-800:])
  laws.is_the_same_compiled(fmt, CORPUS[::8])
  laws.is_the_same_compiled(FORMATS[name], x)
  laws.loses_no_octave(fmt, 0.6)
  laws.decomposes(fmt, x)
  laws.keeps_nan_in_its_block(fmt, 32)
  laws.has_unbiased_draws(fmt, x)
  laws.multiplies(FORMATS[name])
