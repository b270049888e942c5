"""The arithmetic of a lane's eight values, run over arrays in place of registers, without a GPU."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lanes import Lanes

from experiments import kernel_cases as cases
from fp4jax import dequantize, formats, quantize
from fp4jax.quantized_array import QuantizedArray
from fp4jax.swiglu import swiglu, swiglu_backward
from pallas_kernels import e2m1, e4m3, swiglu_words
from pallas_kernels import packed as pk

BF16 = ml_dtypes.bfloat16
EVERY = np.arange(2**16, dtype=np.uint16).view(BF16)


def words_of(x):
  """x (..., an even number) in bf16 or (..., n) in float32, as words."""
  x = np.ascontiguousarray(x).view(np.uint32)
  return [Lanes(x[..., i]) for i in range(x.shape[-1])]


def values_of(words, dtype):
  return np.stack([w.array for w in words], -1).view(dtype)


def test_every_nibble_in_every_place_under_every_scale():
  codes = np.stack([np.roll(np.arange(16), i)[:8] for i in range(16)])
  words = np.sum(codes.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32)), 1, dtype=np.uint32)
  words, scales = np.repeat(words, 256), np.tile(np.arange(256, dtype=np.uint32), 16)
  actual = values_of(e2m1.values_of(Lanes(words), Lanes(scales)), BF16)
  block = np.zeros((len(words), 16), np.uint8)
  block[:, :4] = words[:, None].view(np.uint8)
  packed = QuantizedArray(block, scales[:, None].astype(np.uint8), None, formats.MXFP4, -1)
  # float64: on a CPU a product in float32 has no subnormals.
  grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
  magnitude, sign = grid[codes & 7].repeat(256, 0), np.where(codes & 8, -1.0, 1.0).repeat(256, 0)
  with np.errstate(over="ignore"):
    expected = (sign * magnitude * np.exp2(scales[:, None] - 127.0)).astype(np.float32).astype(BF16)
  expected[scales == 255] = np.nan
  np.testing.assert_array_equal(np.float32(actual), np.float32(expected))
  np.testing.assert_array_equal(
    np.signbit(actual)[scales < 255], np.signbit(expected)[scales < 255]
  )
  usual = (scales > 2) & (scales < 252)  # the same as fp4jax's, where the CPU computes them
  same = np.asarray(dequantize(packed), np.float32)[usual, :8]
  np.testing.assert_array_equal(np.float32(actual)[usual], same)


@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "oas"])
def test_words_of_every_bf16_value_under_its_scale(rule):
  """In each place of a lane, with a larger one in its block that takes the scale."""
  small = EVERY[np.isfinite(EVERY) & (np.abs(np.float32(EVERY)) < 2.0**120)]
  for place, factor in enumerate((1, 1.25, 1.5, 1.75, 2.5, 3.5, 13, 100)):
    blocks = np.zeros((len(small), 32), BF16)
    blocks[:, place], blocks[:, 17] = small, np.abs(np.float32(small)) * BF16(factor)
    expected = quantize(jnp.asarray(blocks), cases.mxfp4_format(rule))
    inverse = np.exp2(127.0 - np.asarray(expected.scales)[:, :1]).astype(np.float32)
    lanes = blocks.reshape(-1, 4, 8)
    factors = Lanes(np.broadcast_to(inverse.view(np.uint32), (len(small), 4)))
    words = e2m1.word_of(words_of(lanes), factors, clips=rule in ("floor", "oas"))
    packed = np.ascontiguousarray(words.array).view(np.uint8)
    np.testing.assert_array_equal(packed, np.asarray(expected.codes), err_msg=f"{factor=}")


@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_the_largest_magnitude_or_a_nan(dtype):
  rng = np.random.default_rng(0)
  x = EVERY[rng.integers(0, 2**16, (4096, 8))]
  x[:1024] = np.where(np.isfinite(x[:1024]), x[:1024], -0.0)
  x[:16, 5] = -np.inf
  x = x.astype(dtype)
  largest_of = pk.largest_half if dtype == BF16 else pk.largest_float
  actual = largest_of(words_of(x)).array.view(np.float32)
  np.testing.assert_array_equal(actual, np.max(np.abs(x.astype(np.float32)), 1))
  assert not np.signbit(actual).any()
  assert np.isnan(actual).any() and np.isinf(actual).any() and np.isfinite(actual).any()


@pytest.mark.parametrize("fmt", [formats.FP8_BLOCK, formats.FP8_BLOCK_POW2], ids=lambda f: f.name)
def test_codes_of_every_bf16_value_under_its_scale(fmt):
  """Each with one in its block that is larger by a factor. Below 2^-100 a CPU that computes what is
  expected flushes."""
  magnitude = np.abs(np.float32(EVERY))
  small = EVERY[(magnitude == 0) | (magnitude >= 2.0**-100) & (magnitude < 2.0**110)]
  for factor in (1, 1.0078125, 1.5, 7, 448, 2.0**9):
    blocks = np.zeros((len(small), 128), BF16)
    blocks[:, 3], blocks[:, 77] = small, np.abs(np.float32(small)) * BF16(factor)
    expected = quantize(jnp.asarray(blocks), fmt)
    power_of_two = fmt == formats.FP8_BLOCK_POW2
    bits = jnp.asarray(np.abs(np.float32(blocks)).max(1).view(np.int32))
    scale, inverse = (np.asarray(x) for x in e4m3.scale(bits, power_of_two))
    np.testing.assert_array_equal(scale, np.asarray(expected.scales)[:, 0])
    words = e4m3.codes_of(pk.floats(words_of(blocks)), Lanes(inverse.view(np.uint32)))
    np.testing.assert_array_equal(values_of(words, np.uint8), np.asarray(expected.codes))


def test_a_block_without_a_scale_has_the_codes_zero():
  x = np.array([[1, np.nan, np.inf, -np.inf, -0.0, -1, 448, 0]], BF16)
  words = e4m3.codes_of(pk.floats(words_of(x)), Lanes(np.zeros(1, np.uint32)))
  assert not values_of(words, np.uint8).any()


def pairs(seed, scale):
  rng = np.random.default_rng(seed)
  return (scale * rng.standard_normal((3, 20_000, 2))).astype(BF16)


@pytest.mark.parametrize("scale", [0.1, 1, 10, 20])
def test_swiglu_forward(scale):
  gate, up, _ = pairs(0, scale)
  actual = values_of([swiglu_words.forward(*(words_of(x)[0] for x in (gate, up)))], BF16)
  expected = swiglu(jnp.concatenate([gate, up], -1))
  check_roundings(actual, expected, np.abs(np.float32(gate)))


def test_swiglu_of_what_is_not_finite_and_of_the_extremes():
  ends = np.array([np.inf, -np.inf, np.nan, 0, -0.0, 100, -100, 3e38, -3e38, 1, 1e-30], BF16)
  gate, up = (x.reshape(-1, 1).repeat(2, 1) for x in np.meshgrid(ends, ends))
  actual = values_of([swiglu_words.forward(*(words_of(x)[0] for x in (gate, up)))], BF16)
  expected = np.asarray(swiglu(jnp.concatenate([gate, up], -1)))
  np.testing.assert_array_equal(np.float32(actual), np.float32(expected))
  numbers = ~np.isnan(np.float32(expected))
  np.testing.assert_array_equal(np.signbit(actual)[numbers], np.signbit(expected)[numbers])


def check_roundings(actual, expected, gate, slack=0.0):
  """Equal, but where exp's error, of |gate| in units of float32, moves a value over the edge
  between two of bf16: to the neighbour, and at most as often as twice that error meets an edge."""
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  tiny = 2.0**-100  # A CPU has no subnormals, and one may be multiplied by what is large.
  assert np.all(np.abs(actual - expected) <= 2.0**-7 * np.abs(expected) + slack + tiny)
  differ = (actual != expected) & (np.abs(expected) > tiny)
  assert differ.mean() <= 2 * np.mean((2 + gate) * 2.0**-23 / 2.0**-8) + 1e-3, differ.mean()


@pytest.mark.parametrize("scale", [0.1, 1, 10, 20])
@pytest.mark.parametrize("after", [1.0, 2.0**-70, -3.0])
def test_swiglu_backward(scale, after):
  gate, up, g = pairs(1, scale)
  factor = np.full(len(gate), after, np.float32)
  *words, products = swiglu_words.backward(
    *(words_of(x)[0] for x in (gate, up, g)), Lanes(factor.view(np.uint32))
  )
  a, dh, sums = jax.jit(swiglu_backward)(jnp.concatenate([gate, up], -1), g, factor[:, None])
  for word, expected in zip(words, (dh[:, :2], dh[:, 2:], a), strict=True):
    # Of the gradient of gate, a sum of two of either sign, an error is relative to the larger.
    slack = 1e-5 * scale**3 * abs(after) if expected is not a else 0.0
    check_roundings(values_of([word], BF16), expected, np.abs(np.float32(gate)), slack)
  np.testing.assert_allclose(products.array.view(np.float32), sums, rtol=1e-2, atol=0.02 * scale**3)
