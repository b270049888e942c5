"""FP8 (E4M3) quantizers for operands of `grouped_matmul`: 1x128 rows, 128x1 columns, 128x128 tiles.

    scale = amax / 448, or the power of two at or above it; code = E4M3(x / scale)

FP8 tensor cores want the contracted axis contiguous, so what wgrad contracts is written transposed.
Scales lie with the blocks first, (k / 128, m), as the matmul reads them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl
from pallas_kernels import e4m3
from pallas_kernels.tracing import traced_once

# Runs of 8 rows that a CTA of the row quantizer takes.
TUNING = {
  "rows": {"runs": 4},
}
TILE = 128
_ROUNDED = 64  # rows of a float32 tile that a warpgroup rounds at once


@traced_once("power_of_two")
def quantize_fp8_rows(x, *, power_of_two: bool = False):
  """Quantizes x in blocks of 1 x 128.

  Args:
    x: (m, k) bfloat16 or float32; m >= 8, k a multiple of 128.
    power_of_two: round scales up to a power of two instead of storing amax / 448.

  Returns:
    float8_e4m3fn codes (m, k) and float32 scales (k / 128, m). A block with a NaN or an infinity
    has the scale NaN and codes 0.
  """
  _check_dtype("quantize_fp8_rows", x, (jnp.bfloat16, jnp.float32))
  if x.ndim != 2 or x.shape[0] < 8 or x.shape[1] % TILE or not x.size:
    raise ValueError(f"{x.shape=} is not (m, k) with m >= 8 and k % 128 == 0")
  m, k = x.shape
  rows = bl.fit(8 * TUNING["rows"]["runs"], m)

  def kernel(x_gmem, codes_gmem, scales_gmem):
    here, block = bl.tile_of(m, rows, k // TILE)
    layout = bl.block_layout(16, 8)
    values = plgpu.load(x_gmem.at[here, block], layout=layout, optimized=False)
    codes, scales_gmem[block, here] = e4m3.quantize(values, layout, power_of_two)
    codes_gmem[here, block] = codes

  codes, scales = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((m, k // TILE, 16, 8), bl.E4M3),
      jax.ShapeDtypeStruct((k // TILE, m), jnp.float32),
    ),
    **bl.tiles(m, rows, k // TILE),
    compiler_params=bl.WARPGROUP,
  )(x.reshape(m, k // TILE, 16, 8))
  return codes.reshape(m, k), scales


@traced_once("power_of_two")
def quantize_fp8_columns(x, *, power_of_two: bool = False):
  """Quantizes x in blocks of 128 x 1, transposed: codes (k, m), scales (m / 128, k).

  x is (m, k) bfloat16, both multiples of 128. Otherwise as `quantize_fp8_rows`.
  """
  _check_dtype("quantize_fp8_columns", x, (jnp.bfloat16,))
  return _tiles(x[None], power_of_two, rows=False, columns=True, square=False)


@traced_once("power_of_two")
def quantize_fp8_both(x, *, power_of_two: bool = False):
  """`quantize_fp8_rows` and `quantize_fp8_columns` in one read of x: four arrays."""
  _check_dtype("quantize_fp8_both", x, (jnp.bfloat16,))
  return _tiles(x[None], power_of_two, rows=True, columns=True, square=False)


@traced_once("power_of_two", "rows", "columns")
def quantize_fp8_weights(w, *, power_of_two: bool = False, rows: bool = True, columns: bool = True):
  """Quantizes w in blocks of 128 x 128.

  Args:
    w: (e, k, n) bfloat16, or float32, which is rounded to bfloat16 first; k and n multiples of 128.
    rows, columns: which orientations to write.

  Returns:
    codes (e, k, n) where `rows`, codes (e, n, k) where `columns`, scales (e, k / 128, n / 128).
  """
  _check_dtype("quantize_fp8_weights", w, (jnp.bfloat16, jnp.float32))
  return _tiles(w, power_of_two, rows=rows, columns=columns, square=True)


def _tiles(x, power_of_two, *, rows, columns, square):
  """One CTA a tile of 128 x 128, read once into SMEM and from there in either orientation."""
  if x.ndim != 3 or x.shape[1] % TILE or x.shape[2] % TILE or not x.size:
    raise ValueError(f"x of shape {x.shape[-2:]} is not (m, k) with m % 128 == k % 128 == 0")
  e, m, k = x.shape
  scratch = [plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=bl.swizzled(jnp.bfloat16))]
  out_type = []
  tile = plgpu.SMEM((TILE, TILE), bl.E4M3, transforms=bl.swizzled(bl.E4M3))
  if rows:
    out_type += [((e, m, k), bl.E4M3)] + ([] if square else [((e, k // TILE, m), jnp.float32)])
    scratch += [tile]
  if columns:
    out_type += [((e, k, m), bl.E4M3)] + ([] if square else [((e, m // TILE, k), jnp.float32)])
    scratch += [tile]
  if square:
    out_type += [((e, m // TILE, k // TILE), jnp.float32)]

  def kernel(x_gmem, *refs):
    out, (x_smem, *tiles, barrier) = refs[: len(out_type)], refs[len(out_type) :]
    g, i, j = (lax.axis_index(name) for name in ("group", "row", "column"))
    here, there = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)
    if x.dtype == jnp.bfloat16:
      plgpu.copy_gmem_to_smem(x_gmem.at[g, here, there], x_smem, barrier)
      plgpu.barrier_wait(barrier)
    else:
      for start in range(0, TILE, _ROUNDED):
        part = x_gmem.at[g, pl.ds(i * TILE + start, _ROUNDED), there]
        values = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)
        x_smem[pl.ds(start, _ROUNDED)] = values.astype(jnp.bfloat16)
      plgpu.commit_smem()
    out, tiles = list(out), list(tiles)
    copies = []
    if square:
      amax = jnp.max(jnp.max(jnp.abs(_read(x_smem)), axis=1).astype(jnp.float32), axis=0)
      scale, inverse = e4m3.scale(bl.bits(amax), power_of_two)
      out[-1][g, i, j] = scale
    for wanted, view, target, block in (
      (rows, x_smem, (here, there), j),
      (columns, x_smem.transpose((1, 0)), (there, here), i),
    ):
      if not wanted:
        continue
      values = _read(view)
      codes_smem, codes_gmem = tiles.pop(0), out.pop(0)
      if not square:
        amax = jnp.max(jnp.abs(values), axis=1).astype(jnp.float32)
        scale, inverse = e4m3.scale(bl.bits(amax), power_of_two)
        out.pop(0)[g, block, target[0]] = scale
        inverse = plgpu.layout_cast(
          lax.broadcast_in_dim(inverse, values.shape, (0,)), plgpu.Layout.WGMMA
        )
      codes_smem[...] = e4m3.rounded(values, inverse)
      copies.append((codes_smem, codes_gmem.at[g, *target]))
    plgpu.commit_smem()
    for source, target in copies:
      plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  outputs = plgpu.kernel(
    kernel,
    out_type=tuple(jax.ShapeDtypeStruct(*spec) for spec in out_type),
    grid=(e, m // TILE, k // TILE),
    grid_names=("group", "row", "column"),
    scratch_types=(*scratch, plgpu.Barrier()),
    compiler_params=bl.LANE,
  )(x)
  return outputs if square else tuple(o[0] for o in outputs)


def _read(view):
  return plgpu.load(view, layout=plgpu.Layout.WGMMA)


def _check_dtype(name, x, allowed):
  if x.dtype not in allowed:
    raise TypeError(f"x is {x.dtype}; {name} takes {[jnp.dtype(d).name for d in allowed]}")
