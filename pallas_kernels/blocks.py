"""How a warpgroup holds blocks, and what every kernel here has in common.

A tensor (m, k) is seen as (block, lane, value): the lanes of a block hold `value` consecutive
values each, so that a lane's values are one 16-byte load and the largest magnitude of a block is
found within each lane first and then over a few neighbours.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

E4M3 = jnp.float8_e4m3fn
INFINITY = 0x7F800000  # the bits of infinity; NaNs lie above
WARPGROUP = plgpu.CompilerParams(
  lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
  unsafe_no_auto_barriers=True,  # nothing here is shared between threads but what barriers guard
)
LANE = plgpu.CompilerParams(
  lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
)


def block_layout(lanes: int, values: int):
  """Layout of a (block, lane, value) array: 32 / lanes blocks to a warp."""
  blocks = 32 // lanes
  tiles = ((4 * blocks, lanes, values), (blocks, lanes, values), (1, 1, values))
  return layout(tiles, warp_dims=(-9,), lane_dims=(-6, -5))


def layout(tiles, warp_dims, lane_dims):
  """A register holds the last axis of the last tile; see `fragmented_array.TiledLayout`."""
  tiled = fa.TiledLayout(
    fa.Tiling(tiles), warp_dims, lane_dims, vector_dim=-1, _check_canonical=False
  ).canonicalize()
  return plgpu.Layout.TILED(tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim)


def swizzled(dtype):
  """Transforms of a tile in SMEM that is read and written transposed without bank conflicts."""
  return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def bits(x):
  return lax.bitcast_convert_type(x, jnp.int32)


def floats(x):
  return lax.bitcast_convert_type(x, jnp.float32)


def e4m3_scale(amax, power_of_two: bool):
  """(scale, what values are multiplied by): amax falls on 448 or, rounded up to 2^n, below it.

  NaN and 0 where amax is not finite. A scale is at least 2^-126, which keeps its reciprocal normal.
  """
  finite = bits(amax) < INFINITY
  if power_of_two:
    # 448 has the mantissa 0x600000: what lies above carries into the exponent.
    exponent = jnp.maximum(((bits(amax) + 0x1FFFFF) >> 23) - 8, 1)
    scale, inverse = floats(exponent << 23), floats((254 - exponent) << 23)
  else:
    scale = jnp.maximum(amax * np.float32(1 / 448), 2.0**-126)
    inverse = 1.0 / scale
  return jnp.where(finite, scale, jnp.nan), jnp.where(finite, inverse, 0.0)


def to_e4m3(x, inverse):
  """x times its block's `inverse`, rounded to E4M3, saturating; 0 where the block has no scale."""
  scaled = jnp.clip(x.astype(jnp.float32) * inverse, -448.0, 448.0)
  return jnp.where(inverse > 0, scaled, 0.0).astype(E4M3)


def fit(rows: int, m: int) -> int:
  """`rows` of a CTA, halved until a tensor of m rows has them."""
  while rows > m:
    rows //= 2
  return rows


def tiles(m: int, rows: int, blocks: int) -> dict:
  """A kernel's grid: a CTA takes `rows` of m rows and one of `blocks` blocks; see `tile_of`.

  On one axis, for the others end at 65,535 CTAs; the blocks of the same rows are neighbours.
  """
  return dict(grid=(-(-m // rows) * blocks,), grid_names=("tile",))


def tile_of(m: int, rows: int, blocks: int):
  """The rows and the block of this CTA; the last rows may overlap those before."""
  tile, blocks = lax.axis_index("tile"), jnp.int32(blocks)
  start = jnp.minimum(lax.div(tile, blocks) * rows, m - rows)
  return pl.ds(start, rows), lax.rem(tile, blocks)


def check_rows(name, x, dtype, multiple, least_rows):
  check_array(name, x, x.shape, dtype)
  if x.ndim != 2 or x.shape[0] < least_rows or x.shape[1] % multiple or not x.size:
    raise ValueError(
      f"{name} of shape {x.shape} are not (m, c) with m >= {least_rows} and c % {multiple} == 0"
    )
  return x.shape


def check_array(name, x, shape, dtype):
  if x.dtype != dtype:
    raise TypeError(f"{name} are {x.dtype}, not {jnp.dtype(dtype).name}")
  if x.shape != shape:
    raise ValueError(f"{name} have the shape {x.shape}, not {shape}")


def quantize_e4m3(x, power_of_two: bool):
  """Codes of x (row, ...) and a scale per row; in the lanes' own layout."""
  amax = jnp.max(jnp.abs(x), axis=x.ndim - 1)
  while amax.ndim > 1:
    amax = jnp.max(amax, axis=1)
  scale, inverse = e4m3_scale(amax.astype(jnp.float32), power_of_two)
  return to_e4m3(x, lax.broadcast_in_dim(inverse, x.shape, (0,))), scale


def mxfp4_values(words, scales, layout):
  """bf16 values (..., 4, 8) in `layout` of words (..., 4) of eight nibbles and E8M0 codes (...).

  E2M1's bits, put at 22, are a float32 2^-126 times as large. NaN where the scale is 255.
  """
  shape = (*words.shape, 8)
  leading = range(len(shape) - 1)
  shift = 4 * lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  nibble = lax.broadcast_in_dim(words, shape, leading) >> shift
  value = lax.bitcast_convert_type(((nibble & 7) << 22) | ((nibble & 8) << 28), jnp.float32)
  code = scales.astype(jnp.int32)
  scale = jnp.where(code == 0, 1 << 22, jnp.where(code == 255, 0x7FC00000, code << 23))
  scale = lax.broadcast_in_dim(floats(scale), shape, leading[:-1])
  return plgpu.layout_cast(value * 2.0**126 * scale, layout).astype(jnp.bfloat16)
