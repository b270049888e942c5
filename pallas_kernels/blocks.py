"""How a warpgroup holds blocks, and what every kernel here has in common.

A tensor (m, k) is seen as (block, lane, value): the lanes of a block hold `value` consecutive
values each, so that a lane's values are one 16-byte load and the largest magnitude of a block is
found within each lane first and then over a few neighbours.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import packed as pk

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


def largest(x, layout):
  """Of the eight values of each lane, the bits of the largest magnitude as float32, or a NaN's."""
  of_lanes, shape = layout.reduce(x.ndim - 1), x.shape[:-1]

  @plgpu.inline_mgpu(
    arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=of_lanes)
  )
  def largest(ctx, values: fa.FragmentedArray):
    del ctx
    largest_of = pk.largest_half if x.dtype == jnp.bfloat16 else pk.largest_float
    words = [[largest_of(words)] for words in pk.registers(values)]
    return pk.fragmented(words, shape, jnp.int32, of_lanes)

  return largest(x)


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
