"""SwiGLU fused with the quantization of its output, and its backward pass with that of gradients.

The activation never lies in memory in bf16, nor do the gradients of gate and up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl
from pallas_kernels import transpose as tr
from pallas_kernels.tracing import traced_once

TILE = tr.TILE
# Runs of 8 rows that a CTA takes; warpgroups that share a tile, 96 KiB of SMEM.
TUNING = {
  "forward": {"runs": 2},
  "backward": {"warpgroups": 1},
}


@traced_once("power_of_two")
def swiglu_fp8_rows(h, *, power_of_two: bool = False):
  """`quantize_fp8_rows(silu(gate) * up)`; gate and up are the halves of h's last axis.

  SwiGLU is computed in float32 and rounded to bfloat16 before it is quantized.

  Args:
    h: (m, 2 f) bfloat16; m >= 8, f a multiple of 128. Or the same in MXFP4, uint8 codes (m, f) and
      scales (m, f / 16).

  Returns:
    float8_e4m3fn codes (m, f) and float32 scales (f / 128, m).
  """
  m, f = _shape(h)
  if m < 8 or f % TILE or not f:
    raise ValueError(f"h with {m=}, {f=} is not (m, 2 f) with m >= 8 and f % 128 == 0")
  blocks = f // TILE
  rows = bl.fit(8 * TUNING["forward"]["runs"], m)

  def kernel(*refs):
    *h_gmem, codes_gmem, scales_gmem = refs
    here, block = bl.tile_of(m, rows, blocks)
    gate, up = (_half(h_gmem, here, half, block).astype(jnp.float32) for half in (0, 1))
    activation = (gate * _sigmoid(gate) * up).astype(jnp.bfloat16)
    codes_gmem[here, block], scales_gmem[block, here] = bl.quantize_e4m3(activation, power_of_two)

  codes, scales = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((m, blocks, *tr.BLOCKS), bl.E4M3),
      jax.ShapeDtypeStruct((blocks, m), jnp.float32),
    ),
    **bl.tiles(m, rows, blocks),
    compiler_params=bl.WARPGROUP,
  )(*_halves(h, blocks))
  return codes.reshape(m, f), scales


@traced_once("power_of_two")
def swiglu_backward_fp8(h, g, after, *, power_of_two: bool = False):
  """What the backward pass needs of a = silu(gate) * up, given the gradient g of its result.

  As in `swiglu_fp8_rows`, a is rounded to bfloat16; so is the gradient da = after * g, and that of
  h, which are then quantized.

  Args:
    h: (m, 2 f) bfloat16, gate and up the halves of the last axis, m and f multiples of 128; or the
      same in MXFP4, uint8 codes (m, f) and scales (m, f / 16).
    g: (m, f) bfloat16.
    after: (m,) float32, by which a and g are multiplied, row by row.

  Returns:
    four pairs and an array: of dh, `quantize_fp8_rows` and `quantize_fp8_columns`; the latter of
    after * a; float32 sums (m,) of a * g along f.
  """
  m, f = _shape(h)
  _check_backward(m, f, g, after)
  blocks = f // TILE
  warpgroups = TUNING["backward"]["warpgroups"]
  rows = TILE // warpgroups

  def kernel(*refs):
    *h_gmem, g_gmem, after_gmem = refs[:-11]
    rows_gmem, row_scales_gmem, columns_gmem, column_scales_gmem = refs[-11:-7]
    a_gmem, a_scales_gmem, sums_gmem, *smem, barrier = refs[-7:]
    i, j, warpgroup = (lax.axis_index(name) for name in ("row", "column", "warpgroup"))

    @pl.loop(0, rows // 32)
    def _(block):
      top = warpgroup * rows + block * 32
      runs = []
      for run in range(4):
        here = pl.ds(i * TILE + top + run * 8, 8)
        gate, up = (_half(h_gmem, here, half, j) for half in (0, 1))
        factor = _load(after_gmem.at[here], tr.ROWS.reduce((1, 2, 3)))
        *dh, a, product = _backward(gate, up, _load(g_gmem.at[here, j], tr.ROWS), factor)
        for half, values in enumerate(dh):
          codes, scales = bl.quantize_e4m3(values, power_of_two)
          rows_gmem[here, half, j], row_scales_gmem[half, j, here] = codes, scales
        sums_gmem[j, here] = jnp.sum(jnp.sum(jnp.sum(product, axis=3), axis=2), axis=1)
        runs.append((*dh, a))
      for tile, parts in zip(smem, zip(*runs, strict=True), strict=True):
        tr.write(parts, tile.at[pl.ds(top, 32)])

    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
    for part in range(rows // 64):
      own = warpgroup * rows + part * 64
      there = pl.ds(j * TILE + own, 64)
      for tile, codes_gmem, scales_gmem in (
        (smem[0], columns_gmem.at[0], column_scales_gmem.at[:, 0]),
        (smem[1], columns_gmem.at[1], column_scales_gmem.at[:, 1]),
        (smem[2], a_gmem, a_scales_gmem),
      ):
        values = tr.read(tile.at[:, pl.ds(own, 64)])
        codes_gmem[there, i], scales_gmem[i, there] = bl.quantize_e4m3(values, power_of_two)

  of_rows, of_columns = (m, 2, blocks, *tr.BLOCKS), (f, m // TILE, *tr.BLOCKS)
  out = {
    "rows": (of_rows, bl.E4M3),
    "row_scales": ((2, blocks, m), jnp.float32),
    "columns": ((2, *of_columns), bl.E4M3),
    "column_scales": ((m // TILE, 2, f), jnp.float32),
    "a": (of_columns, bl.E4M3),
    "a_scales": ((m // TILE, f), jnp.float32),
    "sums": ((blocks, m), jnp.float32),
  }
  codes, scales, codes_t, scales_t, a, a_scales, sums = plgpu.kernel(
    kernel,
    out_type=tuple(jax.ShapeDtypeStruct(*spec) for spec in out.values()),
    grid=(m // TILE, blocks),
    grid_names=("row", "column"),
    num_threads=warpgroups,
    thread_name="warpgroup",
    scratch_types=(*[tr.scratch()] * 3, plgpu.Barrier(num_arrivals=warpgroups)),
    compiler_params=bl.WARPGROUP,
  )(*_halves(h, blocks), g.reshape(m, blocks, *tr.BLOCKS), after)
  return (
    (codes.reshape(m, 2 * f), scales.reshape(2 * blocks, m)),
    (codes_t.reshape(2 * f, m), scales_t.reshape(m // TILE, 2 * f)),
    (a.reshape(f, m), a_scales),
    jnp.sum(sums, axis=0),
  )


def _halves(h, blocks):
  """h as (m, 2, block, 4, 4, 8), or its words (m, 2, block, 4, 4) and scales (m, 2, block, 4)."""
  if not isinstance(h, tuple):
    return (h.reshape(-1, 2, blocks, *tr.BLOCKS),)
  codes, scales = h
  words = lax.bitcast_convert_type(codes.reshape(-1, 2, blocks, 4, 4, 4), jnp.uint32)
  return words, scales.reshape(-1, 2, blocks, 4)


def _half(h_gmem, *place):
  """bf16 values (row, 4, 4, 8) of one half of h."""
  if len(h_gmem) == 1:
    return _load(h_gmem[0].at[place], tr.ROWS)
  words, scales = h_gmem
  words = _load(words.at[place], tr.ROWS.reduce(3))
  return bl.mxfp4_values(words, _load(scales.at[place], tr.ROWS.reduce((2, 3))), tr.ROWS)


def _load(ref, layout):
  return plgpu.load(ref, layout=layout, optimized=False)


def _backward(gate, up, g, after):
  """Gradients of gate and up, after * a, all in bfloat16, and a * g."""
  gate, up, g = (x.astype(jnp.float32) for x in (gate, up, g))
  after = lax.broadcast_in_dim(after, g.shape, (0,))
  sigmoid = _sigmoid(gate)
  silu = gate * sigmoid
  a, da = _rounded(silu * up), _rounded(g * after)
  dsilu = da * up
  dgate = dsilu * sigmoid + dsilu * gate * (sigmoid * (1.0 - sigmoid))
  return *(x.astype(jnp.bfloat16) for x in (dgate, da * silu, a * after)), a * g


def _sigmoid(x):
  return 1.0 / (1.0 + jnp.exp(-x))


def _rounded(x):
  return x.astype(jnp.bfloat16).astype(jnp.float32)


def _shape(h):
  """m and f of h (m, 2 f)."""
  if not isinstance(h, tuple):
    if h.ndim != 2 or h.shape[1] % 2:
      raise ValueError(f"{h.shape=} is not (m, 2 f)")
    m, f = h.shape[0], h.shape[1] // 2
    _check_array("h", h, (m, 2 * f), jnp.bfloat16)
    return m, f
  codes, scales = h
  if codes.ndim != 2:
    raise ValueError(f"the codes of h have the shape {codes.shape}, not (m, f)")
  m, f = codes.shape
  _check_array("the codes of h", codes, (m, f), jnp.uint8)
  _check_array("the scales of h", scales, (m, f // 16), jnp.uint8)
  return m, f


def _check_backward(m, f, g, after):
  if m % TILE or f % TILE or not m * f:
    raise ValueError(f"h with {m=}, {f=} is not (m, 2 f) with m % 128 == f % 128 == 0")
  _check_array("g", g, (m, f), jnp.bfloat16)
  _check_array("after", after, (m,), jnp.float32)


def _check_array(name, x, shape, dtype):
  if x.dtype != dtype or x.shape != shape:
    error = TypeError if x.dtype != dtype else ValueError
    raise error(f"{name}: {x.dtype} {x.shape}, not {jnp.dtype(dtype).name} {shape}")
