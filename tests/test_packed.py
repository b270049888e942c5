"""The arithmetic of `convert` and `widen`, run over arrays in place of registers, without a GPU."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lanes import Lanes

from experiments.kernel_cases import mxfp4_format
from fp4jax import dequantize, formats, quantize
from fp4jax.quantized_array import QuantizedArray
from pallas_kernels import convert, widen


def blocks_with_largest(top):
  """Blocks of 32 codes, the largest magnitude `top`: all of the smaller ones, of both signs."""
  rest = np.r_[0 : top + 1, 128 : 128 + top + 1]
  rest = np.resize(rest, (-(-len(rest) // 31), 31))
  first = np.full((len(rest), 1), top)
  return np.concatenate([np.roll(rest, top % 31, 1), first + 128 * (top % 2)], 1).astype(np.uint8)


@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "oas"])
def test_narrow_every_code_under_every_largest_one(rule):
  blocks = np.concatenate([blocks_with_largest(top) for top in range(128)])
  blocks = np.concatenate([blocks, blocks[:, ::-1]])  # the largest in either lane
  for field in (*range(1, 15), 127, *range(236, 256)):
    scale = np.uint32(field << 23 | (field == 255) << 22)
    # (block, lane, word, byte)
    words = np.ascontiguousarray(blocks).view("<u4").reshape(-1, 2, 4)
    codes, stored = convert.narrow(
      [Lanes(words[..., i]) for i in range(4)], Lanes(np.full(words.shape[:2], scale)), rule
    )
    with np.errstate(over="ignore"):
      values = blocks.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale.view(np.float32)
    expected = quantize(jnp.asarray(values), mxfp4_format(rule))
    packed = np.stack([c.array for c in codes], -1).astype("<u4").reshape(-1, 4).view(np.uint8)
    for lane in (0, 1):
      np.testing.assert_array_equal(stored.array[:, lane], np.asarray(expected.scales)[:, 0])
    np.testing.assert_array_equal(packed, np.asarray(expected.codes), err_msg=f"{field=}")


def widened(codes, exponents, top):
  """E4M3 codes and float32 scales of MXFP4 blocks (n, 16) that share a scale with `top`.

  In float64, which holds 6 times the largest scale too.
  """
  ones = jnp.full((len(codes), 1), 127, jnp.uint8)
  elements = dequantize(QuantizedArray(jnp.asarray(codes), ones, None, formats.MXFP4, -1))
  stored = np.maximum(top.astype(int) - 6, 1)
  bad = (top == 255)[:, None]
  scaled = np.asarray(elements, np.float64) * np.exp2(exponents - 1.0 * stored)[:, None]
  wide = np.where(bad, 0, scaled).astype(ml_dtypes.float8_e4m3fn)
  scale = np.where(bad[:, 0], np.nan, np.exp2(stored - 127.0))
  return wide.view(np.uint8), scale.astype(np.float32)


@pytest.mark.parametrize("place", range(4))
def test_widen_row_every_code_under_every_scale(place):
  """In a block of 32 at each place of the row, the largest scale in another or in the same."""
  tops = np.r_[0:24, 127, 140, 248:256]
  top, own = (a.ravel() for a in np.meshgrid(tops, np.arange(256), indexing="ij"))
  top, own = top[own <= top].astype(np.uint8), own[own <= top].astype(np.uint8)
  exponents = np.zeros((len(top), 4), np.uint8)
  exponents[np.arange(len(top)), (place + 1 + np.arange(len(top)) % 3) % 4] = top
  exponents[:, place] = own
  codes = np.tile(np.uint8([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2), (len(top), 1))
  words = codes.view("<u4")
  wide, scale = widen.widen_row(
    [Lanes(words[:, i : i + 1]) for i in range(4)],
    Lanes(exponents.view("<u4")),
    Lanes(np.full((len(top), 1), place, np.uint32)),
  )
  actual = np.concatenate([w.array for w in wide], -1).astype("<u4").view(np.uint8)
  expected, expected_scale = widened(codes, own, top)
  np.testing.assert_array_equal(actual, expected)
  np.testing.assert_array_equal(scale.array[:, 0].view(np.float32), expected_scale)


def test_widen_columns():
  """128 rows with scales of their own: 4 of a lane, 32 lanes; no scale in the last tile."""
  rng = np.random.default_rng(0)
  for tile in range(40):
    block = tile % 4
    codes = rng.integers(0, 256, (128, 16), dtype=np.uint8)
    low = rng.integers(0, 230)
    exponents = rng.integers(low, low + [3, 12, 25][tile % 3], (128, 4)).astype(np.uint8)
    if tile == 39:
      exponents[77, block] = 255
    words = codes.view("<u4").reshape(32, 4, 4)
    columns, scale = widen.widen_columns(
      [[Lanes(words[:, row, i]) for i in range(4)] for row in range(4)],
      [Lanes(exponents.view("<u4").reshape(32, 4)[:, row]) for row in range(4)],
      Lanes(np.full(32, block, np.uint32)),
    )
    actual = np.stack([c.array for c in columns]).astype("<u4").view(np.uint8)
    top = np.full(128, exponents[:, block].max())
    expected, expected_scale = widened(codes, exponents[:, block], top)
    np.testing.assert_array_equal(actual, expected.T)
    np.testing.assert_array_equal(scale.array.view(np.float32), expected_scale[:32])
