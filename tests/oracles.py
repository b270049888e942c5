"""Independent oracles in NumPy: tables typed in from the specifications, arithmetic in float64.

Nothing here imports fp4jax or looks at the bits of a float. Scales come from the interval that a
rule puts the largest value of a block in, codes from a search among the midpoints of the table.
float64 holds every float32 times a power of two exactly, so "exact" below means exact.
"""

import dataclasses
import math

import numpy as np

# OCP MX v1.0: E2M1 codes 0..7, the sign is bit 3. OFP8: magnitudes in the order of their codes.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
  [m / 8 * 2.0**-6 for m in range(8)]
  + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]  # S.1111.111: NaN
)
E5M2 = np.array(
  [m / 4 * 2.0**-14 for m in range(4)]
  + [(1 + m / 4) * 2.0 ** (e - 15) for e in range(1, 31) for m in range(4)]  # e = 31: Inf, NaN
)
SIGN_BIT = {len(E2M1): 8, len(E4M3): 0x80, len(E5M2): 0x80}

# The formats that have their oracle here; others have one of their own.
FORMATS = (
  *("MXFP4", "MXFP8", "NVFP4", "FP8_BLOCK", "FP8_BLOCK_2D"),
  *("FP8_BLOCK_POW2", "FP8_BLOCK_POW2_2D", "FP8_TENSOR"),
)

# Where a rule puts amax / scale. "[)" and "(]" say which end belongs to the interval.
SCALED_AMAX = {
  (len(E2M1), "floor"): (4, 8, "[)"),
  (len(E2M1), "even"): (3.5, 7, "[)"),
  (len(E2M1), "rceil"): (3, 6, "(]"),
  (len(E2M1), "oas"): (3.5, 7, "(]"),
  (len(E4M3), "floor"): (256, 512, "[)"),
  (len(E4M3), "even"): (248, 496, "[)"),
  (len(E4M3), "rceil"): (224, 448, "(]"),
  (len(E5M2), "floor"): (32768, 65536, "[)"),
  (len(E5M2), "rceil"): (28672, 57344, "(]"),
}

SMALLEST_NORMAL = 2.0**-126
NAN_E8M0, NAN_E4M3 = 255, 0x7F


def signed_values(table: np.ndarray) -> np.ndarray:
  """The value of every code, negative zero included; NaN for the codes past the table."""
  half = np.full(SIGN_BIT[len(table)], np.nan)
  half[: len(table)] = table
  return np.concatenate([half, -half])


def e8m0(codes: np.ndarray) -> np.ndarray:
  codes = np.asarray(codes, np.float64)
  return np.where(
    codes == NAN_E8M0, np.nan, np.ldexp(1.0, (np.minimum(codes, 254) - 127).astype(int))
  )


def nearest(magnitudes: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Codes of the nearest table entries, ties to the even code, saturating."""
  midpoints = (table[1:] + table[:-1]) / 2
  below = np.searchsorted(midpoints, magnitudes, side="left")  # midpoints < magnitude
  up_to = np.searchsorted(midpoints, magnitudes, side="right")  # midpoints <= magnitude
  return np.where(below % 2 == 0, below, up_to).astype(np.uint8)


def with_sign(codes: np.ndarray, x: np.ndarray, table: np.ndarray) -> np.ndarray:
  return (codes | np.where(np.signbit(x), SIGN_BIT[len(table)], 0)).astype(np.uint8)


def scale_exponent(amax: np.ndarray, table: np.ndarray, rule: str) -> np.ndarray:
  """The one integer k with amax / 2^k in the interval of the rule; a large negative one for 0."""
  low, high, ends = SCALED_AMAX[len(table), rule]
  assert high == 2 * low
  k = np.frexp(amax)[1] - math.frexp(low)[1]
  for _ in range(2):
    lower, upper = np.ldexp(float(low), k), np.ldexp(float(high), k)
    if ends == "[)":
      k = k - (amax < lower) + (amax >= upper)
    else:
      k = k - (amax <= lower) + (amax > upper)
  return np.where(amax == 0, -10_000, k)


def block_lengths(shape: tuple[int, ...], axis: int, block: int) -> tuple[int, ...]:
  """1 x `block` along `axis`, as lengths for every axis."""
  return tuple(block if i == axis % len(shape) else 1 for i in range(len(shape)))


def block_amax(x: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
  """Largest magnitude of each block, NaN where the block holds a NaN or an infinity."""
  view = [
    n for size, length in zip(x.shape, lengths, strict=True) for n in (size // length, length)
  ]
  magnitude = np.where(np.isfinite(x), np.abs(x), np.nan).reshape(view)
  return magnitude.max(axis=tuple(range(1, len(view), 2)))  # np.max passes NaN on


def spread(per_block: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
  """One value a block to one a tensor element."""
  for axis, length in enumerate(lengths):
    per_block = np.repeat(per_block, length, axis)
  return per_block


@dataclasses.dataclass(frozen=True)
class Quantized:
  codes: np.ndarray  # one a byte
  scales: np.ndarray
  values: np.ndarray  # float64


def quantize_mx(x, table: np.ndarray, rule: str, lengths: tuple[int, ...]) -> Quantized:
  """Power-of-two scales in E8M0."""
  x = np.asarray(x).astype(np.float64)
  amax = block_amax(x, lengths)
  k = np.clip(scale_exponent(np.nan_to_num(amax), table, rule), -127, 127)
  scales = np.where(np.isnan(amax), NAN_E8M0, k + 127).astype(np.uint8)
  return encode(x, spread(e8m0(scales), lengths), scales, table)


def encode(x, element_scales: np.ndarray, scales: np.ndarray, table: np.ndarray) -> Quantized:
  """Codes given the scale of every element; codes are 0 where it is NaN, and 0 / 0 is 0."""
  lost = np.isnan(element_scales)
  with np.errstate(invalid="ignore", divide="ignore"):
    scaled = np.where(lost | (element_scales == 0), 0, np.abs(x) / element_scales)
  codes = np.where(lost, 0, with_sign(nearest(scaled, table), x, table)).astype(np.uint8)
  return Quantized(codes, scales, signed_values(table)[codes] * element_scales)


def neighbours(
  scaled: np.ndarray, table: np.ndarray, slack: float
) -> tuple[np.ndarray, np.ndarray]:
  """The smallest and the largest code that rounding `scaled` may give if off by `slack`."""
  return nearest(scaled * (1 - slack), table), nearest(scaled * (1 + slack), table)


def sylvester(n: int) -> np.ndarray:
  """H_2n = [[H_n, H_n], [H_n, -H_n]], over sqrt(n)."""
  h = np.ones((1, 1))
  while len(h) < n:
    h = np.block([[h, h], [h, -h]])
  return h / np.sqrt(n)


def float32_ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """How many float32 lie between positive a and b."""
  a, b = (np.asarray(v, np.float32) for v in (a, b))
  return np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32))


def next_float32(x, ulps: int) -> np.ndarray:
  """The float32 `ulps` above positive x."""
  bits = np.asarray(x, np.float32).view(np.int32) + np.asarray(ulps, np.int32)
  return bits.view(np.float32)


def corpus(seed: int = 0, block: int = 32) -> np.ndarray:
  """Blocks, float32 (number, block), of all that is hard: see the comments."""
  rng = np.random.default_rng(seed)
  parts = []
  normal = rng.standard_normal((512, block))
  parts.append(normal * 2.0 ** rng.integers(-30, 30, (512, 1)))  # Gaussian
  parts.append(rng.standard_t(1.2, (512, block)) * 2.0 ** rng.integers(-9, 9, (512, 1)))  # heavy

  # Ties: midpoints of the grids and their float32 neighbours under largest values that every rule
  # scales differently.
  midpoints = [(t[1:] + t[:-1]) / 2 for t in (E2M1, E4M3[-32:])]
  for points in midpoints:
    for top in (3.25, 3.5, 4, 5, 6, 6.5, 7, 7.5):
      top = top * (1 if points[-1] < 6 else 64)
      values = rng.choice(points, (16, block)) * 2.0 ** rng.integers(-2, 2, (16, 1))
      values = np.minimum(next_float32(values, rng.integers(-1, 2, (16, block))), top)
      values[:, 0] = top
      parts.append(values * 2.0 ** rng.integers(-100, 100, (16, 1)))

  # Largest values one ulp around each limit of a rule, in every binade, over values one ulp around
  # the fractions of it that some rule makes a midpoint.
  limits = np.array([1, 1.5, 1.75, 1.875, 1.9375])
  tops = np.ldexp(limits[:, None], np.arange(-126, 128)).ravel()
  tops = np.concatenate([next_float32(tops, ulps) for ulps in (-1, 0, 1)])
  fractions = rng.choice(
    [1 / 24, 1 / 16, 1 / 12, 1 / 8, 0.625, 0.75, 0.4375, 0.875], (len(tops), block)
  )
  values = tops[:, None] * np.where(
    rng.random(fractions.shape) < 0.5, fractions, rng.random(fractions.shape)
  )
  values = np.where(values > 0, next_float32(values, rng.integers(-1, 2, values.shape)), values)
  values = np.minimum(values, tops[:, None])
  values[np.arange(len(tops)), rng.integers(0, block, len(tops))] = tops
  parts.append(values)

  # Subnormals alone, and beside small normal values.
  parts.append(rng.integers(0, 2**23, (128, block)) * 2.0**-149)
  parts.append(rng.integers(0, 2 ** rng.integers(1, 23, (128, 1)), (128, block)) * 2.0**-149)
  parts.append(normal[:256] * 2.0 ** rng.integers(-133, -118, (256, 1)))
  # Up to the largest float32.
  largest = float(np.finfo(np.float32).max)
  parts.append(np.clip(normal[:128] * 2.0 ** rng.integers(120, 128, (128, 1)), -largest, largest))
  # Zeros of both signs, alone and beside values that are flushed.
  parts.append(np.zeros((2, block)))
  parts.append(np.where(rng.random((62, block)) < 0.5, 0.0, -0.0))
  flushed = normal[:64] * 1e-6
  flushed[:, 7] = 1
  parts.append(flushed)

  x = np.concatenate(parts)
  x = np.where(rng.random(x.shape) < 0.5, -x, x).astype(np.float32)

  # One NaN or infinity a block, at any place, between blocks that must not notice.
  bad = x[:128].copy()
  bad[np.arange(128), rng.integers(0, block, 128)] = rng.choice(
    np.float32([np.nan, -np.nan, np.inf, -np.inf]), 128
  )
  rest = x[rng.permutation(len(x))]
  x = np.concatenate([bad, rest[:128]]).reshape(2, 128, block).swapaxes(0, 1).reshape(256, block)
  return np.concatenate([rest[128:], x])


def blocks_along(blocks: np.ndarray, axis: int, leading: tuple[int, int] = (8, 4)) -> np.ndarray:
  """Blocks (number, b) as a 3-D tensor with `axis` blocked; zeros fill up the last ones."""
  a, b = leading
  missing = -len(blocks) % (a * b)
  blocks = np.concatenate([blocks, np.zeros((missing, blocks.shape[1]), blocks.dtype)])
  return np.moveaxis(blocks.reshape(a, b, -1), -1, axis)
