"""FP8 (E4M3, blocks of 128) to MXFP4 (E2M1, blocks of 32), by integer arithmetic alone.

Scales are powers of two on both sides, so that their exponents add and nothing passes through a
full-precision tensor, as in arXiv 2603.02731. `widen` has the way back.

The code of a value counts the midpoints of E2M1 that it passes. E4M3's magnitudes order as their
codes do: a midpoint becomes a code, once a block, and a subtraction compares four values with it.
"""

import math
from typing import get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl
from pallas_kernels import packed as pk
from pallas_kernels.mxfp4 import ScaleRule
from pallas_kernels.tracing import traced_once
from pallas_kernels.widen import mxfp4_to_fp8_columns, mxfp4_to_fp8_rows

__all__ = ["fp8_to_mxfp4", "mxfp4_to_fp8_columns", "mxfp4_to_fp8_rows"]

TILE = 128
# A CTA takes so many tiles of so many rows of 128 values.
TUNING = {
  "narrow": {"rows": 16, "tiles": 4},
}

# Added to a code, what carries into its exponent where the rule takes the next scale: never, or
# from the mantissa 7 up (7.5 of 8), 6 (7) or 5 (6.5).
_CARRY = {"floor": 0, "oas": 1, "even": 2, "rceil": 3}

# Least place that rounds to the codes 1 to 7, in eighths of a binade above E2M1's 1.0. Ties go to
# the even code: 1/4, 5/4, 5/2 and 5 lie just below their places, 3/4, 7/4 and 7/2 on them.
_STEPS = (-15, -4, 3, 6, 11, 14, 19)
_LOWEST_ONE = 24  # what lies 15 places below it is not subnormal


def narrow(words, scale, rule):
  """Quantizes the half of a block of 32 that a lane holds; a neighbour holds the other.

  Args:
    words: four E4M3 codes each, of 16 values.
    scale: bits of the float32 scale of the values.
    rule: the scale rule.

  Returns:
    two words of eight nibbles each, and the E8M0 code of the block.
  """
  guarded = [w | pk.SIGNS for w in words]  # no subtraction borrows from the next byte
  top = pk.largest_byte(guarded, lanes=2) - 128
  field = (scale >> 23) & 0xFF
  stored, one = _scale(top, field, rule)
  limits = [one * pk.BYTES + step * pk.BYTES for step in _STEPS[:-1]]
  # A byte holds no limit above 128, which no magnitude reaches.
  limits.append((one + _STEPS[-1]).min(128) * pk.BYTES)
  stored, *limits = one.below(_LOWEST_ONE).branch(
    lambda: _among_subnormals(top, field, rule), [stored, *limits]
  )
  # A NaN, a scale that is NaN, a value that float32 can't hold.
  bad = top.equals(127) | field.equals(255) | (field + (top >> 3)).above(261)
  planes = [(word, *_count(g, limits)) for word, g in zip(words, guarded, strict=True)]
  codes = [bad.where(0, _interleave(*planes[i : i + 2])) for i in (0, 2)]
  return codes, bad.where(255, stored)


def _scale(place, field, rule):
  """(E8M0 code, place of E2M1's 1.0) of a block whose largest magnitude has this place."""
  # Where E8M0 ends, the exponent that is stored counts.
  stored = (field + (place + _CARRY[rule]).halved(3) - 9).max(0)
  return stored, (stored - field + 7) << 3


def _among_subnormals(top, field, rule):
  """[E8M0 code, limits], where magnitude codes below 8 matter, whose places lie further apart.

  Code and place fall together from 8 up; below, a piecewise linear function leads from one to the
  other, concave one way and convex the other. No limit is so low that zero passes it.
  """
  place = top.min(top * 2 - 8).min(top * 4 - 16).min(top * 8 - 24)
  stored, one = _scale(place, field, rule)
  stored = top.equals(0).where(0, stored)
  one = (stored - field + 7) << 3
  limits = [stored]
  for step in _STEPS:
    place = one + step
    code = place.max((place + 9).halved(1)).max((place + 19).halved(2)).max((place + 31).halved(3))
    limits.append(code.max(1) * pk.BYTES)
  return limits


def _count(guarded, limits):
  """The highest bits of each byte: of how many limits a magnitude reaches, bits 2, 1 and 0."""
  f1, f2, f3, f4, f5, f6, f7 = (guarded - limit for limit in limits)
  middle = f2 ^ f4 ^ f6  # who reaches a limit reaches all below it
  return f4, middle, middle ^ f1 ^ f3 ^ f5 ^ f7


def _interleave(low, high):
  """Eight nibbles of the highest bits in the bytes of (sign, bit 2, bit 1, bit 0) of two words."""
  odd, even = (
    [a.permute(b, selector) for a, b in zip(low, high, strict=True)]
    for selector in (0xFDB9, 0xECA8)  # their bytes 1, 3 and 0, 2, all of a byte what its sign is
  )
  bits = [*odd, *even]  # of a byte of two nibbles, from the highest down
  for mask in (0xAAAAAAAA, 0xCCCCCCCC, 0xF0F0F0F0):
    bits = [pk.select_bits(mask, *bits[i : i + 2]) for i in range(0, len(bits), 2)]
  return bits[0]


@traced_once("scale_rule")
def fp8_to_mxfp4(codes, scales, *, scale_rule: ScaleRule = "floor"):
  """MXFP4 of FP8 values by integer arithmetic alone.

  Args:
    codes: (m, k) float8_e4m3fn; m >= 32, k a multiple of 128.
    scales: (k / 128, m) float32 powers of two from 2^-126 up, NaN for a block that has none.
    scale_rule: as in `quantize_mxfp4`.

  Returns:
    uint8 codes (m, k / 2) and scales (m, k / 32): what quantizing the values in float32 gives.
    A block with a NaN, or with a value beyond float32, has the scale 255 and codes 0.
  """
  m, k = bl.check_rows("codes", codes, bl.E4M3, TILE, 32)
  bl.check_array("scales", scales, (k // TILE, m), jnp.float32)
  if scale_rule not in _CARRY:
    raise ValueError(f"{scale_rule=} is not one of {get_args(ScaleRule)}")
  tuning = TUNING["narrow"]
  rows, tiles = bl.fit(tuning["rows"], m), math.gcd(tuning["tiles"], k // TILE)
  layout = _layout(4)

  @plgpu.inline_mgpu(
    arg_types=(layout, layout.reduce((1, 2, 3))),
    return_type=(
      plgpu.ShapeDtypeStruct((rows, 4, 2, 2), jnp.uint32, layout=_layout(2)),
      plgpu.ShapeDtypeStruct((rows, 4), jnp.uint8, layout=layout.reduce((2, 3))),
    ),
  )
  def convert(ctx, words: fa.FragmentedArray, scales: fa.FragmentedArray):
    del ctx
    results = [
      narrow(w, scale, scale_rule)
      for w, (scale,) in zip(pk.registers(words), pk.registers(scales), strict=True)
    ]
    codes, stored = zip(*results, strict=True)
    return (
      pk.fragmented(codes, (rows, 4, 2, 2), jnp.uint32, _layout(2)),
      pk.fragmented([[s] for s in stored], (rows, 4), jnp.uint8, layout.reduce((2, 3))),
    )

  def kernel(words_gmem, scales_gmem, codes_gmem, exponents_gmem):
    here, first = bl.tile_of(m, rows, k // TILE // tiles)
    loaded = []
    for block in (first * tiles + tile for tile in range(tiles)):
      words = plgpu.load(words_gmem.at[here, block], layout=layout, optimized=False)
      scale = plgpu.load(
        scales_gmem.at[block, here], layout=layout.reduce((1, 2, 3)), optimized=False
      )
      loaded.append((block, words, scale))
    for block, words, scale in loaded:
      codes_gmem[here, block], exponents_gmem[here, block] = convert(words, scale)

  words = lax.bitcast_convert_type(codes.reshape(m, k // TILE, 4, 2, 4, 4), jnp.uint32)
  out, exponents = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((m, k // TILE, 4, 2, 2), jnp.uint32),
      jax.ShapeDtypeStruct((m, k // TILE, 4), jnp.uint8),
    ),
    **bl.tiles(m, rows, k // TILE // tiles),
    compiler_params=bl.WARPGROUP,
  )(words, scales)
  out = lax.bitcast_convert_type(out, jnp.uint8)  # four bytes a word: no data moves
  return out.reshape(m, k // 2), exponents.reshape(m, k // 32)


def _layout(words):
  """(row, block of 32, half, word): 16 rows of 128 values to a warpgroup, 8 lanes to a row."""
  tiles = ((16, 4, 2, words), (4, 4, 2, words), (1, 1, 1, words))
  return bl.layout(tiles, warp_dims=(-12,), lane_dims=(-8, -7, -6))
