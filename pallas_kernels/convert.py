"""Direct conversions between FP8 (E4M3, blocks of 128) and MXFP4 (E2M1, blocks of 32).

Scales are powers of two on both sides, so that their exponents add and nothing passes through a
full-precision tensor, as in arXiv 2603.02731.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl

TILE = 128
RUNS = 4  # runs of 32 (to MXFP4) or of 8 rows (to FP8) that a CTA takes

ZERO = -4096  # the place of zero: below every other, whatever the scale

# Mantissas of E4M3 above this one take the next exponent: of 7 none does (the OCP floor), of 6
# those that divide to more than 3.5 (OAS), of 4 those that divide to more than 6 (rceil).
_LARGEST_MANTISSA = {"floor": 7, "oas": 6, "rceil": 4}


def fp8_to_mxfp4(codes, scales, *, scale_rule="floor"):
  """MXFP4 of FP8 values by integer arithmetic alone.

  Args:
    codes: (m, k) float8_e4m3fn; m >= 32, k a multiple of 128.
    scales: (k / 128, m) float32 powers of two, NaN for a block that has none.
    scale_rule: "floor", "oas" or "rceil", as in `quantize_mxfp4`.

  Returns:
    uint8 codes (m, k / 2) and scales (m, k / 32): what quantizing the values gives.
  """
  m, k = _check_rows("codes", codes, bl.E4M3, TILE, 32)
  _check_array("scales", scales, (k // TILE, m), jnp.float32)
  if scale_rule not in _LARGEST_MANTISSA:
    raise ValueError(f"{scale_rule=} is not one of {list(_LARGEST_MANTISSA)}")
  rows = _rows(m, 32)
  layout = bl.block_layout(4, 8)

  def kernel(codes_gmem, scales_gmem, out_gmem, exponents_gmem):
    start = jnp.minimum(lax.axis_index("rows") * rows, m - rows)  # the last may overlap
    here, block = pl.ds(start, rows), lax.axis_index("block")
    for sub in range(4):
      source = codes_gmem.at[here, block, sub]
      byte = lax.bitcast_convert_type(plgpu.load(source, layout=layout, optimized=False), jnp.uint8)
      scale = plgpu.load(scales_gmem.at[block, here], optimized=False)
      out_gmem[here, block, sub], exponents_gmem[here, block, sub] = _narrow(
        byte.astype(jnp.int32), scale, _LARGEST_MANTISSA[scale_rule]
      )

  out, exponents = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((m, k // TILE, 4, 4), jnp.uint32),
      jax.ShapeDtypeStruct((m, k // TILE, 4), jnp.uint8),
    ),
    grid=(-(-m // rows), k // TILE),
    grid_names=("rows", "block"),
    compiler_params=bl.WARPGROUP,
  )(codes.reshape(m, k // TILE, 4, 4, 8), scales)
  out = lax.bitcast_convert_type(out, jnp.uint8)  # four bytes a word: no data moves
  return out.reshape(m, k // 2), exponents.reshape(m, k // 32)


def _narrow(byte, scale, largest_mantissa):
  """E4M3 codes (row, 4, 8) -> eight nibbles (row, 4), E8M0 codes (row,).

  A magnitude code counts steps of 1/8 binade. Subnormal ones are continued below 8 in the same
  steps, which holds them exactly, so that dividing by a power of two is a subtraction.
  """
  magnitude = byte & 0x7F
  place = jnp.where(magnitude >= 4, 2 * magnitude - 8, 4 * magnitude - 16)
  place = jnp.where(magnitude == 1, -16, jnp.where(magnitude == 0, ZERO, place))
  place = jnp.where(magnitude >= 8, magnitude, place)
  top = jnp.max(jnp.max(place, axis=2), axis=1)
  exponent = (top >> 3) - 9 + jnp.where((top & 7) > largest_mantissa, 1, 0)  # of block / scale
  stored = (bl.bits(scale) >> 23) + exponent
  stored = jnp.where(top == ZERO, 0, jnp.maximum(stored, 0))
  finite = bl.bits(scale) < bl.INFINITY
  # Of E2M1's 1.0. Where E8M0 ends, the exponent that is stored counts.
  one = (stored - (bl.bits(scale) >> 23) + 7) * 8

  steps = place - lax.broadcast_in_dim(one, place.shape, (0,))
  quarter = jnp.maximum(steps, 0) + 8  # four to a code from 1.0 up
  code = jnp.minimum((quarter + 1 + ((quarter >> 2) & 1)) >> 2, 7)
  code = jnp.where(steps >= -4, code, jnp.where(steps > -16, 1, 0))  # 3/4 and up; 1/4 is a tie
  nibble = (code | ((byte >> 4) & 8)).astype(jnp.uint32)
  packed = jnp.sum(nibble << (4 * lax.broadcasted_iota(jnp.uint32, place.shape, 2)), axis=2)
  packed = jnp.where(lax.broadcast_in_dim(finite, packed.shape, (0,)), packed, 0)
  return packed, jnp.where(finite, stored, 255).astype(jnp.uint8)


def mxfp4_to_fp8_rows(codes, scales):
  """FP8 of MXFP4 values, exact while the scales of 128 values lie within 14 binades.

  Args:
    codes: (m, k / 2) uint8, m >= 8, k a multiple of 128.
    scales: (m, k / 32) uint8, E8M0.

  Returns:
    float8_e4m3fn codes (m, k) and float32 scales (k / 128, m): 2^-6 times the largest of the four
    MXFP4 scales, so that 6 becomes 384. Values too small for that are rounded to E4M3's subnormals.
  """
  m, k = _check_rows("codes", codes, jnp.uint8, TILE // 2, 8)
  k *= 2
  _check_array("scales", scales, (m, k // 32), jnp.uint8)
  rows = _rows(m, 8)

  def kernel(words_gmem, exponents_gmem, codes_gmem, scales_gmem):
    start = jnp.minimum(lax.axis_index("rows") * rows, m - rows)  # the last may overlap
    here, block = pl.ds(start, rows), lax.axis_index("block")
    exponents = [
      plgpu.load(
        exponents_gmem.at[here, block, sub],
        layout=bl.block_layout(16, 8).reduce((1, 2)),
        optimized=False,
      ).astype(jnp.int32)
      for sub in range(4)
    ]
    top = jnp.maximum(
      jnp.maximum(exponents[0], exponents[1]), jnp.maximum(exponents[2], exponents[3])
    )
    stored = jnp.maximum(top - 6, 1)
    words = plgpu.load(
      words_gmem.at[here, block], layout=bl.block_layout(16, 8).reduce(2), optimized=False
    )
    words = plgpu.layout_cast(
      lax.broadcast_in_dim(words, (rows, 16, 8), (0, 1)), bl.block_layout(16, 8)
    )
    lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
    own = lax.broadcast_in_dim(exponents[3], words.shape, (0,))
    for sub in (2, 1, 0):
      other = lax.broadcast_in_dim(exponents[sub], words.shape, (0,))
      own = jnp.where(lane < 4 * (sub + 1), other, own)
    values = _widen(words, own - lax.broadcast_in_dim(stored, words.shape, (0,)))
    finite = top < 255
    whole = plgpu.layout_cast(
      lax.broadcast_in_dim(jnp.where(finite, 1.0, 0.0), words.shape, (0,)), bl.block_layout(16, 8)
    )
    codes_gmem[here, block] = (values * whole).astype(bl.E4M3)
    scales_gmem[block, here] = jnp.where(finite, bl.floats(stored << 23), jnp.nan)

  words = lax.bitcast_convert_type(codes.reshape(m, k // TILE, 16, 4), jnp.uint32)
  out, out_scales = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((m, k // TILE, 16, 8), bl.E4M3),
      jax.ShapeDtypeStruct((k // TILE, m), jnp.float32),
    ),
    grid=(-(-m // rows), k // TILE),
    grid_names=("rows", "block"),
    compiler_params=bl.WARPGROUP,
  )(words, scales.reshape(m, k // TILE, 4))
  return out.reshape(m, k), out_scales


def _widen(words, exponent):
  """Values of eight nibbles a word (row, lane, 8), times 2^exponent, which is at most 6.

  E2M1's bits, put at 22, are a float32 2^-126 times as large.
  """
  nibble = words >> (4 * lax.broadcasted_iota(jnp.uint32, words.shape, 2))
  value = bl.floats(
    lax.bitcast_convert_type(((nibble & 7) << 22) | ((nibble & 8) << 28), jnp.int32)
  )
  return value * 2.0**126 * bl.floats((jnp.maximum(exponent, -40) + 127) << 23)


def mxfp4_to_fp8_columns(codes, scales):
  """The FP8 operand of wgrad: transposed, in blocks of 128 x 1, from rows quantized 1 x 32.

  A column of 128 takes 2^-6 times the largest scale of its rows, so that no largest magnitude is
  looked for and nothing is rounded while the scales of 128 rows lie within 14 binades.

  Args:
    codes: (m, k / 2) uint8, m and k multiples of 128.
    scales: (m, k / 32) uint8, E8M0.

  Returns:
    float8_e4m3fn codes (k, m) and float32 scales (m / 128, k).
  """
  m, k = _check_rows("codes", codes, jnp.uint8, TILE // 2, TILE)
  k *= 2
  _check_array("scales", scales, (m, k // 32), jnp.uint8)
  if m % TILE:
    raise ValueError(f"{m=} rows are no multiple of 128")
  # A byte for 16 of codes: XLA finds the largest scale of each column of 128.
  top = jnp.max(scales.reshape(m // TILE, TILE, k // 32), axis=1).astype(jnp.int32)
  stored = jnp.maximum(top - 6, 1)
  column_scale = jnp.where(top < 255, bl.floats(stored << 23), jnp.nan)

  def kernel(words_gmem, exponents_gmem, stored_gmem, out_gmem, wide_smem, out_smem):
    i, j = lax.axis_index("row"), lax.axis_index("column")
    here = pl.ds(i * TILE, TILE)
    words = plgpu.load(
      words_gmem.at[here, j], layout=bl.block_layout(16, 8).reduce(2), optimized=False
    )
    words = lax.broadcast_in_dim(words, (TILE, 16, 8), (0, 1))
    lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
    own = None
    for sub in (3, 2, 1, 0):
      row = plgpu.load(exponents_gmem.at[here, j, sub], optimized=False).astype(jnp.int32)
      shift = lax.broadcast_in_dim(row - stored_gmem[i, 4 * j + sub], words.shape, (0,))
      own = shift if own is None else jnp.where(lane < 4 * (sub + 1), shift, own)
    wide_smem[...] = _merge(_widen(words, own).astype(jnp.bfloat16))
    plgpu.commit_smem()
    wide = plgpu.load(wide_smem.transpose((1, 0)), layout=plgpu.Layout.WGMMA)
    out_smem[...] = wide.astype(jnp.float32).astype(bl.E4M3)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[pl.ds(j * TILE, TILE), here])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  words = lax.bitcast_convert_type(codes.reshape(m, k // TILE, 16, 4), jnp.uint32)
  (out,) = plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct((k, m), bl.E4M3),),
    grid=(m // TILE, k // TILE),
    grid_names=("row", "column"),
    scratch_types=(
      plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=bl.swizzled(jnp.bfloat16)),
      plgpu.SMEM((TILE, TILE), bl.E4M3, transforms=bl.swizzled(bl.E4M3)),
    ),
    compiler_params=bl.WARPGROUP,
  )(words, scales.reshape(m, k // TILE, 4), stored)
  return out, jnp.repeat(column_scale, 32, axis=1)


def _merge(x):
  """(row, 16, 8) seen as (row, 128): the same values in the same registers."""
  flat = fa.TiledLayout(
    fa.Tiling(((8, 128), (2, 128), (1, 8))),
    warp_dims=(-6,),
    lane_dims=(-4, -3),
    vector_dim=-1,
    _check_canonical=False,
  ).canonicalize()
  flat = plgpu.Layout.TILED(flat.tiling, flat.warp_dims, flat.lane_dims, flat.vector_dim)

  @plgpu.inline_mgpu(
    arg_types=(bl.block_layout(16, 8),),
    return_type=plgpu.ShapeDtypeStruct((x.shape[0], 128), x.dtype, layout=flat),
  )
  def merge(ctx, x: fa.FragmentedArray):
    del ctx
    layout = flat.to_mgpu()
    registers = x.registers.reshape(layout.registers_shape((x.shape[0], 128)))
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

  return merge(x)


def _rows(m, run):
  rows = run * RUNS
  while rows > m:
    rows //= 2
  return rows


def _check_rows(name, x, dtype, multiple, least_rows):
  _check_array(name, x, x.shape, dtype)
  if x.ndim != 2 or x.shape[0] < least_rows or x.shape[1] % multiple or not x.size:
    raise ValueError(
      f"{name} of shape {x.shape} are not (m, c) with m >= {least_rows} and c % {multiple} == 0"
    )
  return x.shape


def _check_array(name, x, shape, dtype):
  if x.dtype != dtype:
    raise TypeError(f"{name} are {x.dtype}, not {jnp.dtype(dtype).name}")
  if x.shape != shape:
    raise ValueError(f"{name} have the shape {x.shape}, not {shape}")
