"""MXFP4 (E2M1, blocks of 32) to FP8 (E4M3, blocks of 128), along rows and along columns.

A byte permutation looks up eight bytes by the nibbles of a word, and codes of E2M1 are nibbles: the
table of a block holds E4M3's codes of the eight magnitudes times the block's power of two.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl
from pallas_kernels import packed as pk
from pallas_kernels.tracing import traced_once

TILE = 128
# A CTA takes so many tiles of so many rows of 128 values, or of 128 x 128.
TUNING = {
  "rows": {"rows": 64, "tiles": 2},
  "columns": {"tiles": 2},
}

_NAN = 0x7FC00000  # float32
_LEAST_SHIFT = -5  # that leaves 0.5 a normal number of E4M3


def common_scale(top):
  """(E8M0 code of the FP8 scale, its float32 bits, bytes of `expand`'s signs) of a block.

  `top` is the largest E8M0 code in the block. 2^-6 of it makes 6 become 384. NaN if it is 255.
  """
  stored = (top - 6).max(1)
  bad = top.equals(255)
  return stored, bad.where(_NAN, stored << 23), bad.where(0, pk.SIGNS)


def table(shift, signs):
  """E4M3's codes of E2M1's magnitudes times 2^shift, shift <= 6: four in either word.

  All 0 where there are no signs, which marks a block without a scale.
  """
  shift = signs.equals(0).where(-255, shift)
  # 0, 0.5, 1, 1.5 and 2, 3, 4, 6. A binade is 8.
  words = [shift * 0x08080800 + 0x3C383000, shift * 0x08080808 + 0x4C484440]
  return shift.below(_LEAST_SHIFT).branch(lambda: _with_subnormals(shift, words[1]), words)


def _with_subnormals(shift, high):
  """The table where some magnitudes fall among E4M3's subnormals: steps of 2^-9, ties to even.

  Steps are codes up to 16. `high` serves where all from 2 up are normal.
  """
  k = (-6 - shift).min(7)  # 6 * 2^-13 is not a step of the grid
  low, rounded = (_divide(eighths, k) for eighths in (0x18100800, 0x60403020))
  return [low, shift.below(-7).where(rounded, high)]


def _divide(eighths, k):
  """Bytes divided by 2^(k + 1), 0 <= k <= 7, ties to even; below 128 and multiples of 8."""
  half = (1 << k) * pk.BYTES - pk.BYTES
  odd = (eighths >> (k + 1)) & pk.BYTES
  return ((half + odd + eighths) >> (k + 1)) & ((0xFF >> (k + 1)) * pk.BYTES)


def expand(word, table, signs):
  """E4M3's codes of eight nibbles: two words."""
  magnitudes = word & 0x77777777
  halves = []
  for places in (0, 16):
    codes = table[0].permute(table[1], magnitudes >> places)
    # Of a byte 0x80, a nibble with a sign makes 0xFF.
    negative = signs.permute(signs, word >> places) << 1
    halves.append(codes | (negative & pk.SIGNS))
  return halves


def transpose(a, b, c, d):
  """Words of the first, second, third and fourth bytes of four words."""
  ab, cd = ([x.permute(y, s) for s in (0x5140, 0x7362)] for x, y in ((a, b), (c, d)))
  return [x.permute(y, s) for x, y in zip(ab, cd, strict=True) for s in (0x5410, 0x7632)]


def widen_row(words, exponents, block):
  """Part of a row of 128 values.

  Args:
    words: eight E2M1 codes each.
    exponents: the E8M0 codes of the four blocks of 32 in the row.
    block: the one of them that the words lie in.

  Returns:
    two words of four E4M3 codes for each word, and the bits of the row's float32 scale.
  """
  stored, scale, signs = common_scale(pk.largest_byte([exponents]))
  looked_up = table(_byte(exponents, block) - stored, signs)
  return [half for word in words for half in expand(word, looked_up, signs)], scale


def widen_columns(rows, exponents, block):
  """Columns of 128 rows, of which each lane of a warp holds four rows.

  Args:
    rows: words of eight E2M1 codes, of each of the four rows.
    exponents: for each row a word of E8M0 codes.
    block: whose byte is that of the columns.

  Returns:
    for each column a word of four E4M3 codes, and the bits of their common float32 scale.
  """
  own = [_byte(e, block) for e in exponents]
  top = own[0].max(own[1]).max(own[2].max(own[3])).max_of_warp()
  stored, scale, signs = common_scale(top)
  tables = [table(e - stored, signs) for e in own]
  columns = []
  for words in zip(*rows, strict=True):
    wide = [expand(w, t, signs) for w, t in zip(words, tables, strict=True)]
    for half in zip(*wide, strict=True):
      columns += transpose(*half)
  return columns, scale


def _byte(word, i):
  return word.permute(word & 0, i + 0x4440)


@traced_once()
def mxfp4_to_fp8_rows(codes, scales):
  """FP8 of MXFP4 values, exact while the scales of 128 values lie within 14 binades.

  Args:
    codes: (m, k / 2) uint8, m >= 8, k a multiple of 128.
    scales: (m, k / 32) uint8, E8M0.

  Returns:
    float8_e4m3fn codes (m, k) and float32 scales (k / 128, m): 2^-6 times the largest of the four
    MXFP4 scales, so that 6 becomes 384. Values too small for that are rounded to E4M3's subnormals.
  """
  m, k = bl.check_rows("codes", codes, jnp.uint8, TILE // 2, 8)
  k *= 2
  bl.check_array("scales", scales, (m, k // 32), jnp.uint8)
  tuning = TUNING["rows"]
  rows, tiles = bl.fit(tuning["rows"], m), math.gcd(tuning["tiles"], k // TILE)
  each = 2 if rows >= 16 else 1  # words of a lane: a load of 8 bytes, a store of 16
  lanes = 16 // each
  layout, wide = bl.block_layout(lanes, each), bl.block_layout(lanes, 2 * each)

  @plgpu.inline_mgpu(
    arg_types=(layout, layout.reduce((1, 2))),
    return_type=(
      plgpu.ShapeDtypeStruct((rows, lanes, 2 * each), jnp.uint32, layout=wide),
      plgpu.ShapeDtypeStruct((rows,), jnp.float32, layout=layout.reduce((1, 2))),
    ),
  )
  def widen(ctx, words: fa.FragmentedArray, exponents: fa.FragmentedArray):
    del ctx
    _, lane = pk.thread_of_warpgroup()
    block = (lane & (lanes - 1)) >> (lanes // 8)  # a quarter of the lanes has it
    results = [
      widen_row(w, e, block)
      for w, (e,) in zip(pk.registers(words), pk.registers(exponents), strict=True)
    ]
    codes, scales = zip(*results, strict=True)
    return (
      pk.fragmented(codes, (rows, lanes, 2 * each), jnp.uint32, wide),
      pk.fragmented([[s] for s in scales], (rows,), jnp.float32, layout.reduce((1, 2))),
    )

  def kernel(words_gmem, exponents_gmem, codes_gmem, scales_gmem):
    here, first = bl.tile_of(m, rows, k // TILE // tiles)
    loaded = []
    for block in (first * tiles + tile for tile in range(tiles)):
      words = plgpu.load(words_gmem.at[here, block], layout=layout, optimized=False)
      exponents = plgpu.load(
        exponents_gmem.at[here, block], layout=layout.reduce((1, 2)), optimized=False
      )
      loaded.append((block, words, exponents))
    for block, words, exponents in loaded:
      codes_gmem[here, block], scales_gmem[block, here] = widen(words, exponents)

  words = lax.bitcast_convert_type(codes.reshape(m, k // TILE, lanes, each, 4), jnp.uint32)
  exponents = lax.bitcast_convert_type(scales.reshape(m, k // TILE, 4), jnp.uint32)
  out, out_scales = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((m, k // TILE, lanes, 2 * each), jnp.uint32),
      jax.ShapeDtypeStruct((k // TILE, m), jnp.float32),
    ),
    **bl.tiles(m, rows, k // TILE // tiles),
    compiler_params=bl.WARPGROUP,
  )(words, exponents)
  return lax.bitcast_convert_type(out, bl.E4M3).reshape(m, k), out_scales


@traced_once()
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
  m, k = bl.check_rows("codes", codes, jnp.uint8, TILE // 2, TILE)
  k *= 2
  bl.check_array("scales", scales, (m, k // 32), jnp.uint8)
  if m % TILE:
    raise ValueError(f"{m=} rows are not a multiple of 128")
  tiles = math.gcd(TUNING["columns"]["tiles"], k // TILE)

  # Warps take a block of 32 columns each, lanes four rows each: (lane, row, block, word) become
  # (column, lane), where a warp stores 128 bytes of a column at once, and (column,).
  nested = ((32, 4, 4, 4), (32, 4, 1, 4), (1, 1, 1, 4))
  layout = bl.layout(nested, warp_dims=(-10,), lane_dims=(-8,))
  wide = bl.layout(((TILE, 32), (32, 32), (1, 1)), warp_dims=(-6,), lane_dims=(-3,))
  flat = bl.layout(((TILE,), (32,), (1,)), warp_dims=(-3,), lane_dims=(-2,))

  @plgpu.inline_mgpu(
    arg_types=(layout, layout.reduce((2, 3))),
    return_type=(
      plgpu.ShapeDtypeStruct((TILE, 32), jnp.uint32, layout=wide),
      plgpu.ShapeDtypeStruct((TILE,), jnp.float32, layout=flat),
    ),
  )
  def widen(ctx, words: fa.FragmentedArray, exponents: fa.FragmentedArray):
    del ctx
    warp, _ = pk.thread_of_warpgroup()
    rows_exponents = [e for (e,) in pk.registers(exponents)]
    columns, scale = widen_columns(pk.registers(words), rows_exponents, warp)
    return (
      pk.fragmented([[c] for c in columns], (TILE, 32), jnp.uint32, wide),
      pk.fragmented([[scale]], (TILE,), jnp.float32, flat),
    )

  def kernel(words_gmem, exponents_gmem, codes_gmem, scales_gmem):
    row, first = lax.axis_index("row"), lax.axis_index("columns") * tiles
    lanes, loaded = pl.ds(row * 32, 32), []
    for column in (first + tile for tile in range(tiles)):
      words = plgpu.load(words_gmem.at[lanes, :, column], layout=layout, optimized=False)
      exponents = plgpu.load(
        exponents_gmem.at[lanes, :, column], layout=layout.reduce((2, 3)), optimized=False
      )
      loaded.append((pl.ds(column * TILE, TILE), words, exponents))
    for columns, words, exponents in loaded:
      codes_gmem[columns, lanes], scales_gmem[row, columns] = widen(words, exponents)

  words = lax.bitcast_convert_type(codes.reshape(m // 4, 4, k // TILE, 4, 4, 4), jnp.uint32)
  exponents = lax.bitcast_convert_type(scales.reshape(m // 4, 4, k // TILE, 4), jnp.uint32)
  out, out_scales = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((k, m // 4), jnp.uint32),
      jax.ShapeDtypeStruct((m // TILE, k), jnp.float32),
    ),
    grid=(m // TILE, k // TILE // tiles),
    grid_names=("row", "columns"),
    compiler_params=bl.WARPGROUP,
  )(words, exponents)
  return lax.bitcast_convert_type(out, bl.E4M3).reshape(k, m), out_scales
