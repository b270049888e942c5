"""Independent oracles of the further formats: tables typed in, encoders transcribed, in NumPy.

As in `oracles`: nothing here imports fp4jax, and float64 holds every product exactly unless a
definition asks for a rounding. Whole blocks lie along the last axis.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np
import oracles

# OCP MX v1.0, magnitudes in the order of their codes; the sign is the bit above.
E2M3 = np.array(
  [
    [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875],
    [1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875],
    [2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75],
    [4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5],
  ]
).ravel()
E3M2 = np.array(
  [
    [0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375],
    [0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75],
    [2, 2.5, 3, 3.5, 4, 5, 6, 7],
    [8, 10, 12, 14, 16, 20, 24, 28],
  ]
).ravel()
# 1-3-0 of LUQ (arXiv 2112.10769), here with the bias 3 of E3M2: zero and seven powers of two.
E3M0 = np.array([0, 0.25, 0.5, 1, 2, 4, 8, 16])
# Sun et al., NeurIPS 2020: 1-3-0 in radix 4.
RADIX4_EVEN = np.array([0, 1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64])
RADIX4_ODD = np.array([0, 1 / 32, 1 / 8, 1 / 2, 2, 8, 32, 128])
# Unsigned, bias 15; code 255 is NaN, as in E4M3(FN).
UE5M3 = np.array(
  [m / 8 * 2.0**-14 for m in range(8)]
  + [(1 + m / 8) * 2.0 ** (e - 15) for e in range(1, 32) for m in range(8)][:-1]
)
NAN_UE5M3 = 255

# Where a rule puts amax / scale, as in `oracles`; "(]" at 32 and 64 for both grids of radix 4,
# which are to round the same scaled values.
SCALED_AMAX = {
  ("E2M3", "floor"): (4, 8, "[)"),
  ("E2M3", "even"): (3.875, 7.75, "[)"),
  ("E2M3", "rceil"): (3.75, 7.5, "(]"),
  ("E3M2", "floor"): (16, 32, "[)"),
  ("E3M2", "even"): (15, 30, "[)"),
  ("E3M2", "rceil"): (14, 28, "(]"),
  ("E3M0", "floor"): (16, 32, "[)"),
  ("E3M0", "even"): (12, 24, "[)"),
  ("E3M0", "rceil"): (8, 16, "(]"),
  ("RADIX4_EVEN", "radix4"): (32, 64, "(]"),
  ("RADIX4_ODD", "radix4"): (32, 64, "(]"),
}


def nearest(magnitudes: np.ndarray, table: np.ndarray, ties: str = "even") -> np.ndarray:
  """Codes of the nearest entries, saturating; a tie goes to the even code, or down."""
  midpoints = (table[1:] + table[:-1]) / 2
  below = np.searchsorted(midpoints, magnitudes, side="left")  # midpoints < magnitude
  up_to = np.searchsorted(midpoints, magnitudes, side="right")  # midpoints <= magnitude
  even = np.where(below % 2 == 0, below, up_to)
  return (below if ties == "down" else even).astype(np.uint8)


def signed_values(table: np.ndarray) -> np.ndarray:
  """The value of every code; the sign is the bit above those of the magnitudes."""
  return np.concatenate([table, -table])


def scale_exponent(amax: np.ndarray, interval: tuple[float, float, str]) -> np.ndarray:
  """The one integer k with amax / 2^k in the interval; a large negative one for 0."""
  low, high, ends = interval
  assert high == 2 * low
  fraction, exponent = np.frexp(amax)
  low_fraction, low_exponent = math.frexp(low)
  # amax / 2^k >= low; at k - 1 it would be in the next interval up.
  short = fraction < low_fraction if ends == "[)" else fraction <= low_fraction
  return np.where(amax == 0, -10_000, exponent - low_exponent - short)


def quantize(x, table, interval, lengths, ties: str = "even") -> oracles.Quantized:
  """Elements of a table under power-of-two scales in E8M0; NaN blocks as in `oracles`."""
  x = np.asarray(x).astype(np.float64)
  amax = oracles.block_amax(x, lengths)
  k = np.clip(scale_exponent(np.nan_to_num(amax), interval), -127, 127)
  scales = np.where(np.isnan(amax), oracles.NAN_E8M0, k + 127).astype(np.uint8)
  element_scale = oracles.spread(oracles.e8m0(scales), lengths)
  lost = np.isnan(element_scale)
  magnitude = np.where(lost, 0, np.abs(x)) / np.where(lost, 1, element_scale)
  codes = nearest(magnitude, table, ties) + np.where(np.signbit(x), len(table), 0)
  codes = np.where(lost, 0, codes).astype(np.uint8)
  return oracles.Quantized(codes, scales, signed_values(table)[codes] * element_scale)


def pack(codes: np.ndarray, bits: int, axis: int = -1) -> np.ndarray:
  """Codes as one little-endian number along `axis`, the first code lowest; in uint8."""
  rows = np.moveaxis(codes, axis, -1)
  length = rows.shape[-1] * bits // 8
  numbers = [
    sum(int(code) << (bits * i) for i, code in enumerate(row))
    for row in rows.reshape(-1, rows.shape[-1])
  ]
  packed = np.array([list(n.to_bytes(length, "little")) for n in numbers], np.uint8)
  return np.moveaxis(packed.reshape(*rows.shape[:-1], length), -1, axis)


# HiFloat4, arXiv 2602.11287.


class HiFloat4(NamedTuple):
  words: np.ndarray  # uint32, one per 64 values: e6m2 | e1_8 << 8 | e1_16 << 16
  codes: np.ndarray  # uint8, one a byte: sign << 3 | quarters
  values: np.ndarray  # float64


def bfloat16(x) -> np.ndarray:
  return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def float32(x) -> np.ndarray:
  """Rounded once to float32, as the public kernel's products are."""
  return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


def saturated(values) -> np.ndarray:
  largest = float(np.finfo(np.float32).max)
  return np.clip(values, -largest, largest)


def e6m2(codes) -> np.ndarray:
  codes = np.asarray(codes, np.int64)
  return np.where(codes == 255, np.nan, 2.0 ** (codes // 4 - 48) * (1 + codes % 4 / 4))


def hifloat4(x: np.ndarray) -> HiFloat4:
  """The published encoder, as its public simulator has it: it does not round amax to bfloat16.

  The simulator says nothing of NaN and infinity; here they make their block of 64 NaN: scale code
  255 (NaN in E6M2), all other bits 0. It gives zeros the smallest scale.
  """
  x = np.asarray(x).astype(np.float64)
  blocks = x.reshape(-1, 64)
  bad = ~np.isfinite(blocks).all(1)
  blocks = np.where(bad[:, None], 0, blocks)
  magnitude = np.abs(blocks)
  v16 = magnitude.reshape(-1, 16, 4).max(2)
  v8 = v16.reshape(-1, 8, 2).max(2)
  scale = np.clip(bfloat16(float32(v8.max(1) * bfloat16(1 / 7))), 2.0**-48, 49152)
  exponent = np.floor(np.log2(scale)).astype(int)
  quarters = np.rint(scale * 2.0 ** (2 - exponent)).astype(int)  # 4..8, ties to even
  code = 4 * (exponent + 48) + quarters - 4
  reciprocal = bfloat16(1 / e6m2(code))[:, None]
  e8 = (float32(v8 * reciprocal) >= 4).astype(int)
  e16 = (float32(v16 * reciprocal) * 2.0 ** -e8.repeat(2, 1) >= 2).astype(int)
  exponents = (e8.repeat(2, 1) + e16).repeat(4, 1)
  scaled = float32(magnitude * reciprocal) * 2.0 ** (2 - exponents)
  codes = np.minimum(np.floor(scaled + 0.5), 7).astype(int) + 8 * np.signbit(blocks)  # half: away
  words = [
    int(c) + (bits(e8[i]) << 8) + (bits(e16[i]) << 16) if not bad[i] else 255
    for i, c in enumerate(code)
  ]
  codes = np.where(bad[:, None], 0, codes).astype(np.uint8)
  words = np.array(words, np.uint32).reshape(*x.shape[:-1], -1)
  codes = codes.reshape(x.shape)
  return HiFloat4(words, codes, hifloat4_values(words, codes))


def bits(flags) -> int:
  """The number whose bit i is flags[i]."""
  return sum(int(flag) << i for i, flag in enumerate(flags))


def hifloat4_values(words: np.ndarray, codes: np.ndarray) -> np.ndarray:
  words = words.astype(np.int64)[..., None]
  index = np.arange(64)
  exponent = (words >> (8 + index // 8) & 1) + (words >> (16 + index // 4) & 1)
  grouped = codes.astype(np.int64).reshape(*codes.shape[:-1], -1, 64)
  element = (grouped % 8) / 4 * np.where(grouped >= 8, -1.0, 1.0)
  return (e6m2(words % 256) * 2.0**exponent * element).reshape(codes.shape)


# Macro-block scaling of MXFP4, arXiv 2603.08713.


def macro_blocks(x) -> np.ndarray:
  """float64 (macro blocks, 128); all NaN where one value is NaN or infinite."""
  blocks = np.asarray(x).astype(np.float64).reshape(-1, 128)
  return np.where(np.isfinite(blocks).all(1, keepdims=True), blocks, np.nan)


def static_factor(x) -> np.ndarray:
  """m8 of each macro block: the leading 8 mantissa bits of float32(6 / amax); 0 for zeros.

  Also 0 where factor * amax would be beyond float32, which the formula leaves open.
  """
  amax = np.nan_to_num(np.abs(macro_blocks(x)).max(1)).astype(np.float32)
  with np.errstate(divide="ignore", over="ignore"):
    quotient = np.float32(6) / amax
  m8 = (quotient.view(np.int32) & 0x007F8000) >> 15
  return np.where((1 + m8 / 256) * amax > np.finfo(np.float32).max, 0, m8)


def macro_scaled(x, m8) -> oracles.Quantized:
  """MXFP4, overflow-aware, of float32(factor * x), saturated; times float32(1 / factor)."""
  blocks = macro_blocks(x)
  factor = 1 + np.reshape(m8, (-1, 1)) / 256
  y = saturated(blocks * factor).astype(np.float32)
  q = oracles.quantize_mx(y, oracles.E2M1, "oas", (1, 32))
  values = saturated(q.values) * float32(1 / factor)
  codes, values = (a.reshape(np.shape(x)) for a in (q.codes, values))
  return oracles.Quantized(codes, q.scales.reshape(*np.shape(x)[:-1], -1), values)


def macro_errors(x) -> np.ndarray:
  """Squared error of every macro block under the factors 1 + j / 16, (macro blocks, 16)."""
  x = macro_blocks(x)
  errors = [macro_scaled(x, np.full(len(x), 16 * j)).values - x for j in range(16)]
  return np.stack([(e * e).sum(1) for e in errors], 1)


# Four over six, arXiv 2512.02010.


def four_over_six(x, tensor_scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Both candidates under a given tensor scale: unrounded scales, E4M3 codes, squared errors.

  Each has shape (2, blocks): the one that puts amax at 6, the one that puts it at 4.
  """
  blocks = np.asarray(x).astype(np.float64).reshape(-1, 16)
  amax = oracles.block_amax(blocks, (1, 16))[:, 0]
  ideal = np.stack([amax / 6, amax / 4]) / tensor_scale
  codes = oracles.nearest(np.nan_to_num(ideal), oracles.E4M3)
  codes = np.where(np.isnan(amax), oracles.NAN_E4M3, codes).astype(np.uint8)
  errors = []
  for scales in codes:
    element_scale = oracles.signed_values(oracles.E4M3)[scales][:, None] * tensor_scale
    q = oracles.encode(blocks, np.broadcast_to(element_scale, blocks.shape), scales, oracles.E2M1)
    errors.append(((q.values - blocks) ** 2).sum(1))
  return ideal, codes, np.stack(errors)


# Data.


def ties(table: np.ndarray, tops, block: int, seed: int = 1) -> np.ndarray:
  """Blocks, float32, of the midpoints of a table and their float32 neighbours.

  `tops` are largest values, in units of the table; the blocks lie over many octaves.
  """
  rng = np.random.default_rng(seed)
  midpoints = (table[1:] + table[:-1]) / 2
  parts = []
  for top in tops:
    values = rng.choice(midpoints, (64, block)) * 2.0 ** rng.integers(-1, 2, (64, 1))
    values = oracles.next_float32(values, rng.integers(-1, 2, (64, block))).astype(np.float64)
    values = np.minimum(values, top)
    values[np.arange(64), rng.integers(0, block, 64)] = top
    parts.append(values * 2.0 ** rng.integers(-90, 90, (64, 1)))
  values = np.concatenate(parts)
  return np.where(rng.random(values.shape) < 0.5, -values, values).astype(np.float32)


def exhaustive_magnitudes(table: np.ndarray) -> np.ndarray:
  """Every entry, every midpoint and both float32 neighbours of each; and values past the end."""
  points = np.concatenate([table[1:], (table[1:] + table[:-1]) / 2, table[-1:] * 1.25])
  return np.concatenate([[0], *(oracles.next_float32(points, u) for u in (-1, 0, 1))])
