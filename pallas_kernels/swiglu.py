"""SwiGLU fused with the quantization of its output, and its backward pass with that of gradients.

The activation never lies in memory in bf16, nor do the gradients of gate and up.
"""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl
from pallas_kernels import e2m1, e4m3, swiglu_words
from pallas_kernels import packed as pk
from pallas_kernels import transpose as tr
from pallas_kernels.mxfp4 import ScaleRule, quantize_blocks
from pallas_kernels.tracing import traced_once

TILE = tr.TILE
# Runs of 8 rows that a CTA takes; warpgroups that share a tile, 96 KiB of SMEM.
TUNING = {
  "forward": {"runs": 2},
  "kept": {"runs": 2},
  "backward": {"warpgroups": 1},
}


@traced_once("power_of_two")
def swiglu_fp8_rows(h, *, power_of_two: bool = False):
  """`quantize_fp8_rows(silu(gate) * up)`; gate and up are the halves of h's last axis.

  SwiGLU is computed in float32 and rounded to bfloat16 before it is quantized.

  Args:
    h: (m, 2 f) bfloat16; m >= 8, f a multiple of 128.

  Returns:
    float8_e4m3fn codes (m, f) and float32 scales (f / 128, m).
  """
  m, f = _shape_of_values(h)
  _check_forward(m, f)
  blocks = f // TILE
  rows = bl.fit(8 * TUNING["forward"]["runs"], m)

  def kernel(h_gmem, codes_gmem, scales_gmem):
    here, block = bl.tile_of(m, rows, blocks)
    activation = _forward(*(_load(h_gmem.at[here, half, block], tr.ROWS) for half in (0, 1)))
    codes, scales_gmem[block, here] = e4m3.quantize(activation, tr.ROWS, power_of_two)
    codes_gmem[here, block] = codes

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


@traced_once("scale_rule", "power_of_two")
def keep_swiglu_fp8_rows(h, *, scale_rule: ScaleRule = "floor", power_of_two: bool = False):
  """`quantize_mxfp4` of h, and `swiglu_fp8_rows` of what that makes, in one read of h.

  Args:
    h: (m, 2 f) bfloat16; m >= 8, f a multiple of 128.
    scale_rule: as in `quantize_mxfp4`.

  Returns:
    uint8 codes (m, f) and scales (m, f / 16) of h; float8_e4m3fn codes (m, f) and float32 scales
    (f / 128, m) of the result.
  """
  m, f = _shape_of_values(h)
  _check_forward(m, f)
  if scale_rule not in get_args(ScaleRule):
    raise ValueError(f"{scale_rule=} is not one of {get_args(ScaleRule)}")
  blocks = f // TILE
  rows = bl.fit(8 * TUNING["kept"]["runs"], m)

  def kernel(h_gmem, words_gmem, stored_gmem, codes_gmem, scales_gmem):
    here, block = bl.tile_of(m, rows, blocks)
    kept = []
    halves = [_load(h_gmem.at[here, half, block], tr.ROWS) for half in (0, 1)]
    for half, values in enumerate(halves):
      words, stored = quantize_blocks(values, scale_rule, tr.ROWS)
      words_gmem[here, half, block], stored_gmem[here, half, block] = words, stored
      kept.append(e2m1.values(words, stored, tr.ROWS))
    codes, scales_gmem[block, here] = e4m3.quantize(_forward(*kept), tr.ROWS, power_of_two)
    codes_gmem[here, block] = codes

  words, stored, codes, scales = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((m, 2, blocks, 4, 4), jnp.uint32),
      jax.ShapeDtypeStruct((m, 2, blocks, 4), jnp.uint8),
      jax.ShapeDtypeStruct((m, blocks, *tr.BLOCKS), bl.E4M3),
      jax.ShapeDtypeStruct((blocks, m), jnp.float32),
    ),
    **bl.tiles(m, rows, blocks),
    compiler_params=bl.WARPGROUP,
  )(*_halves(h, blocks))
  words = lax.bitcast_convert_type(words, jnp.uint8)  # four bytes a word: no data moves
  return words.reshape(m, f), stored.reshape(m, f // 16), codes.reshape(m, f), scales


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

    def runs_of(block):
      top = warpgroup * rows + block * 32
      return [pl.ds(i * TILE + top + run * 8, 8) for run in range(4)]

    def load(block):
      """h, g and `after` of four runs of 8 rows. They are loaded before anything is stored, for a
      load waits for a store that may be to the same place."""
      return [
        (
          *(_load_half(h_gmem, here, half, j) for half in (0, 1)),
          _load(g_gmem.at[here, j], tr.ROWS),
          _load(after_gmem.at[here], tr.ROWS.reduce((1, 2, 3))),
        )
        for here in runs_of(block)
      ]

    def step(block, loaded):
      following = load(jnp.minimum(block + 1, rows // 32 - 1))
      runs = []
      for here, (*halves, g, factor) in zip(runs_of(block), loaded, strict=True):
        *dh, a, product = _backward(*(_values(*half) for half in halves), g, factor)
        for half, values in enumerate(dh):
          codes, scales = e4m3.quantize(values, tr.ROWS, power_of_two)
          rows_gmem[here, half, j], row_scales_gmem[half, j, here] = codes, scales
        sums_gmem[j, here] = jnp.sum(jnp.sum(product, axis=2), axis=1)
        runs.append((*dh, a))
      own = pl.ds(warpgroup * rows + block * 32, 32)
      for tile, parts in zip(smem, zip(*runs, strict=True), strict=True):
        tr.write(parts, tile.at[own])
      return following

    lax.fori_loop(0, rows // 32, step, load(0))
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
        codes, scales_gmem[i, there] = e4m3.quantize(values, tr.COLUMNS, power_of_two)
        codes_gmem[there, i] = codes

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


def _load_half(h_gmem, *place):
  """One half of h as it lies in memory: values, or words and scales."""
  layouts = [tr.ROWS] if len(h_gmem) == 1 else [tr.ROWS.reduce(3), tr.ROWS.reduce((2, 3))]
  return [_load(ref.at[place], layout) for ref, layout in zip(h_gmem, layouts, strict=True)]


def _values(*half):
  """bf16 values (row, 4, 4, 8) of what `_load_half` loads."""
  return half[0] if len(half) == 1 else e2m1.values(*half, tr.ROWS)


def _load(ref, layout):
  return plgpu.load(ref, layout=layout, optimized=False)


def _forward(gate, up):
  """silu(gate) * up in bfloat16, as are both."""

  @plgpu.inline_mgpu(arg_types=(tr.ROWS,) * 2, return_type=_like(gate))
  def activation(ctx, gate: fa.FragmentedArray, up: fa.FragmentedArray):
    del ctx
    registers = zip(*(pk.registers(x) for x in (gate, up)), strict=True)
    words = [list(map(swiglu_words.forward, *pairs)) for pairs in registers]
    return pk.fragmented(words, gate.shape, jnp.bfloat16, tr.ROWS)

  return activation(gate, up)


def _backward(gate, up, g, after):
  """Gradients of gate and up, after * a, all in bfloat16, and each lane's sum of a * g."""
  of_lanes, shape = tr.ROWS.reduce(3), gate.shape[:-1]

  @plgpu.inline_mgpu(
    arg_types=(*(tr.ROWS,) * 3, of_lanes),
    return_type=(
      *(_like(gate),) * 3,
      plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=of_lanes),
    ),
  )
  def gradients(ctx, *arrays: fa.FragmentedArray):
    del ctx
    results = []
    for *pairs, (factor,) in zip(*map(pk.registers, arrays), strict=True):
      *values, products = zip(
        *(swiglu_words.backward(*words, factor) for words in zip(*pairs, strict=True)), strict=True
      )
      results.append((*values, [functools.reduce(pk.Word.plus_float, products)]))
    *values, sums = zip(*results, strict=True)
    return (
      *(pk.fragmented(x, gate.shape, jnp.bfloat16, tr.ROWS) for x in values),
      pk.fragmented(sums, shape, jnp.float32, of_lanes),
    )

  return gradients(gate, up, g, lax.broadcast_in_dim(after, shape, (0,)))


def _like(x):
  return plgpu.ShapeDtypeStruct(x.shape, jnp.bfloat16, layout=tr.ROWS)


def _check_forward(m, f):
  if m < 8 or f % TILE or not f:
    raise ValueError(f"h with {m=}, {f=} is not (m, 2 f) with m >= 8 and f % 128 == 0")


def _shape(h):
  """m and f of h (m, 2 f), values or packed."""
  if not isinstance(h, tuple):
    return _shape_of_values(h)
  codes, scales = h
  if codes.ndim != 2:
    raise ValueError(f"the codes of h have the shape {codes.shape}, not (m, f)")
  m, f = codes.shape
  _check_array("the codes of h", codes, (m, f), jnp.uint8)
  _check_array("the scales of h", scales, (m, f // 16), jnp.uint8)
  return m, f


def _shape_of_values(h):
  if h.ndim != 2 or h.shape[1] % 2:
    raise ValueError(f"{h.shape=} is not (m, 2 f)")
  m, f = h.shape[0], h.shape[1] // 2
  _check_array("h", h, (m, 2 * f), jnp.bfloat16)
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
