"""Block-scaled grouped FP8 matmuls: the GEMMs of a mixture of experts.

`grouped_matmul`, for row i of group g (fprop; dgrad is the same kernel on a transposed weight):

  out[i, j] = sum_b lhs_scales[b, i] * rhs_scales[g, j // 128, b] * <lhs[i, b], rhs[g, j, b]>

`grouped_wgrad`, over the 128-token tiles b that belong to group g:

  out[g, i, j] = sum_b lhs_scales[b, i] * rhs_scales[b, j] * <lhs[i, b], rhs[j, b]>

where x[i, b] is block b of 128 elements of row i. Every block product is promoted to a float32 sum
in registers; `ring` has how the kernels run.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ring import (
  PIECES,
  SLICE,
  TuningConfig,
  by_row,
  column_of,
  columns_of,
  count_sms,
  each_slot,
  fill_slot,
  launch,
  load_rows,
  persistent,
  slot_after,
  store,
  unless_idle,
  zeros,
)
from pallas_kernels.tracing import traced_once
from pallas_kernels.wgmma import BLOCK, WAVE, issue, wait

ALIGNMENT = 8  # rows of one swizzle pattern, which TMA copies whole


TUNING: dict[Literal["matmul", "wgrad"], TuningConfig] = {
  "matmul": TuningConfig(stages=4, cluster=2, skip_idle=True),
  "wgrad": TuningConfig(stages=4, cluster=2, skip_idle=True),
}

# What the tests run besides: every way through the kernels.
VARIANTS = {
  "3 warpgroups": TuningConfig(),
  "2 warpgroups": TuningConfig(compute_warpgroups=2, skip_idle=True),
  "cluster": TuningConfig(cluster=2),
  "cluster, idle warpgroups skipped": TuningConfig(cluster=2, skip_idle=True),
}


def _schedule(rows, steps, tile_m: int, n_tiles: int, max_tiles: int, width: int):
  """Output tile w -> (group, row tile, column tile), and the number of tiles.

  rows[g] of the output are group g's, and each of its tiles takes steps[g] of the contraction.
  A group's last row tile, cut by its end, is less work than the whole ones before it: the tiles go
  by work, the most first, so that little is left to wait for at the end. Among a group's whole
  tiles strips of `width` column tiles are swept along the rows, back and forth, so that the tiles
  that run together share their operands in L2.
  """
  whole, cut = rows // tile_m, rows % tile_m
  tiles = jnp.concatenate([whole, jnp.minimum(cut, 1)])  # bands: a group's whole tiles, its cut one
  work = jnp.concatenate([tile_m * steps, cut * steps])
  bands = jnp.arange(tiles.size, dtype=jnp.int32)
  # Ranked by comparisons, not sorted: XLA makes fewer kernels of it, of 1 to 2 us each.
  sooner = (work > work[:, None]) | ((work == work[:, None]) & (bands < bands[:, None]))
  first = jnp.sum(jnp.where(sooner, tiles, 0), axis=1, dtype=jnp.int32) * n_tiles
  items = jnp.arange(max_tiles * n_tiles, dtype=jnp.int32)
  own = (items[:, None] >= first) & (items[:, None] < first + tiles * n_tiles)
  band = jnp.sum(jnp.where(own, bands, 0), axis=1, dtype=jnp.int32)
  m_tiles = jnp.maximum(tiles[band], 1)
  item = items - first[band]
  strip = item // (width * m_tiles)
  item = item - strip * width * m_tiles
  strip_width = jnp.maximum(jnp.minimum(width, n_tiles - strip * width), 1)
  row, column = item // strip_width, strip * width + item % strip_width
  row = jnp.where(strip % 2 == 0, row, m_tiles - 1 - row)
  group = band % rows.size
  row = row + jnp.where(band == group, 0, whole[group])
  return group, row, column, jnp.sum(tiles, dtype=jnp.int32)[None] * n_tiles


def _starts(sizes):
  return jnp.cumsum(sizes) - sizes


def grouped_matmul(
  lhs,
  lhs_scales,
  rhs,
  rhs_scales,
  group_sizes,
  *,
  out_dtype=jnp.bfloat16,
  config=None,
  interpret: Any = False,
):
  """(m, k), (k/128, m), (e, n, k), (e, n/128, k/128), (e,) -> (m, n).

  Groups are packed one after another, of any size; traced sizes can't be checked. Rows past the
  last group are not written. Tiles are loaded whole, with rows of their group's neighbours or past
  the last group, but no output depends on those: they may be NaN.
  """
  _check_operands(lhs, rhs, group_sizes)
  _check_sizes(group_sizes, len(lhs))
  options = dict(out_dtype=out_dtype, config=config or TUNING["matmul"], interpret=interpret)
  return _grouped_matmul(lhs, lhs_scales, rhs, rhs_scales, group_sizes, **options)


@traced_once("out_dtype", "config", "interpret")
def _grouped_matmul(lhs, lhs_scales, rhs, rhs_scales, group_sizes, *, out_dtype, config, interpret):
  _check_result(out_dtype)
  (m, k), (e, n, rhs_k) = lhs.shape, rhs.shape
  if k != rhs_k:
    raise ValueError(f"lhs has {k=}, rhs has k={rhs_k}")
  if k % BLOCK or n % BLOCK:
    raise ValueError(f"{k=} or {n=} is not a multiple of {BLOCK}")
  _check("lhs_scales", lhs_scales, (k // BLOCK, m), jnp.float32)
  _check("rhs_scales", rhs_scales, (e, n // BLOCK, k // BLOCK), jnp.float32)
  _check("group_sizes", group_sizes, (e,), jnp.int32)
  tile_m, k_steps = config.tile_m, k // BLOCK
  num_sms = count_sms(interpret) // config.cluster

  # TMA reads the swizzled lhs in units of 8 rows, and strides of multiples of 16 bytes: a group's
  # first tile starts up to 7 rows early, and those rows are not stored.
  padding = -m % ALIGNMENT
  lhs = jnp.pad(lhs, ((0, padding), (0, 0))) if padding else lhs
  lhs_scales = jnp.pad(lhs_scales, ((0, 0), (0, padding))) if padding else lhs_scales
  start = _starts(group_sizes)
  skip = start % ALIGNMENT
  rows = jnp.where(group_sizes > 0, skip + group_sizes, 0)
  max_tiles = (m + (ALIGNMENT - 1) * e) // tile_m + e
  n_tiles = pl.cdiv(n, BLOCK * config.cluster)
  group, row, column, num_items = _schedule(
    rows, jnp.ones_like(rows), tile_m, n_tiles, max_tiles, config.grid_tile_width
  )
  first = (start - skip)[group] + row * tile_m
  begin = jnp.maximum(start[group] - first, 0)
  end = jnp.minimum((start + group_sizes)[group] - first, tile_m)
  schedule = jnp.stack([group, first, column, begin, end]).astype(jnp.int32)

  def fill(lhs, lhs_scales, rhs, rhs_scales, schedule, num_items, out, ring):
    del rhs_scales, out

    def tile(entry, first_slot):
      group, row, pair, *_ = entry
      rows = pl.ds(pl.multiple_of(row, ALIGNMENT), tile_m)
      columns = pl.ds(column_of(config, pair) * BLOCK, BLOCK)

      def step(b, slot, carry):
        contraction = pl.ds(b * BLOCK, BLOCK)
        copies = [
          (lhs.at[rows, contraction], "lhs"),
          (rhs.at[group, columns, contraction], "rhs"),
          (lhs_scales.at[b, rows], "lhs_scales"),
        ]
        fill_slot(ring, config, slot, copies)
        return carry

      each_slot(config, first_slot, k_steps, step)
      return slot_after(config, first_slot, k_steps)

    persistent(num_sms, num_items[0], schedule, tile)

  def multiply(lhs, lhs_scales, rhs, rhs_scales, schedule, num_items, out, ring, wg):
    del lhs, lhs_scales, rhs
    own = pl.ds(wg * WAVE, WAVE)

    def tile(entry, first_slot):
      group, row, pair, begin, end = entry
      column = column_of(config, pair)
      block = jnp.minimum(column, n // BLOCK - 1)  # past the last one nothing is stored
      offset = wg * WAVE
      begin, end = jnp.clip(begin - offset, 0, WAVE), jnp.clip(end - offset, 0, WAVE)

      def step(b, slot, total):
        block_scale = rhs_scales[group, block, b]  # read early: its latency hides in the wait
        plgpu.barrier_wait(ring["full"].at[slot])
        product = issue(ring["lhs"], ring["rhs"], slot, own, interpret)
        row_scales = load_rows(ring["lhs_scales"].at[slot, own])
        scales = wait(row_scales * block_scale, interpret)
        plgpu.barrier_arrive(ring["empty"].at[slot])
        return total + product * by_row(scales, BLOCK)

      def work():
        total = each_slot(config, first_slot, k_steps, step, zeros(BLOCK))
        sums = [columns_of(total, piece) for piece in PIECES]
        store(ring, wg, sums, out, row + offset, (begin, end), column * BLOCK)

      unless_idle(ring, config, begin < end, work, first_slot, k_steps)
      return slot_after(config, first_slot, k_steps)

    persistent(num_sms, num_items[0], schedule, tile)

  out_type = jax.ShapeDtypeStruct((m, n), out_dtype)
  kernel = launch(fill, multiply, out_type, config, interpret, copies=3)
  return kernel(lhs, lhs_scales, rhs, rhs_scales, schedule, num_items)


def grouped_wgrad(
  lhs,
  lhs_scales,
  rhs,
  rhs_scales,
  group_sizes,
  *,
  out_dtype=jnp.float32,
  config=None,
  interpret: Any = False,
):
  """(k, t), (t/128, k), (n, t), (t/128, n), (e,) -> (e, k, n).

  Group g owns ceil(size/128) tiles of 128 tokens, right after those of group g-1; the fill at the
  end of a group is zeros. Tiles past the last group are never read; an empty group gives zeros.
  """
  _check_operands(lhs, rhs, group_sizes)
  _check_sizes(group_sizes, lhs.shape[1], tile=BLOCK)
  options = dict(out_dtype=out_dtype, config=config or TUNING["wgrad"], interpret=interpret)
  return _grouped_wgrad(lhs, lhs_scales, rhs, rhs_scales, group_sizes, **options)


@traced_once("out_dtype", "config", "interpret")
def _grouped_wgrad(lhs, lhs_scales, rhs, rhs_scales, group_sizes, *, out_dtype, config, interpret):
  _check_result(out_dtype)
  (k, t), (n, rhs_t), (e,) = lhs.shape, rhs.shape, group_sizes.shape
  if t != rhs_t:
    raise ValueError(f"lhs has {t=}, rhs has t={rhs_t}")
  if k % BLOCK or n % BLOCK or t % BLOCK:
    raise ValueError(f"{k=}, {n=} or {t=} is not a multiple of {BLOCK}")
  _check("lhs_scales", lhs_scales, (t // BLOCK, k), jnp.float32)
  _check("rhs_scales", rhs_scales, (t // BLOCK, n), jnp.float32)
  _check("group_sizes", group_sizes, (e,), jnp.int32)
  tile_m, num_sms = config.tile_m, count_sms(interpret) // config.cluster
  k_tiles = pl.cdiv(k, tile_m)
  n_tiles = pl.cdiv(n, BLOCK * config.cluster)
  token_tiles = pl.cdiv(group_sizes, BLOCK)
  group, row, column, num_items = _schedule(
    jnp.full_like(token_tiles, k), token_tiles, tile_m, n_tiles, k_tiles * e, config.grid_tile_width
  )
  first = _starts(token_tiles)[group]
  schedule = jnp.stack([group, row, column, first, token_tiles[group]]).astype(jnp.int32)

  def fill(lhs, lhs_scales, rhs, rhs_scales, schedule, num_items, out, ring):
    del out

    def tile(entry, first_slot):
      _, row, pair, first, count = entry
      column = column_of(config, pair)
      rows = pl.ds(row * tile_m, tile_m)
      columns = pl.ds(column * BLOCK, BLOCK)

      def step(i, slot, carry):
        contraction = pl.ds((first + i) * BLOCK, BLOCK)
        copies = [
          (lhs.at[rows, contraction], "lhs"),
          (rhs.at[columns, contraction], "rhs"),
          (lhs_scales.at[first + i, rows], "lhs_scales"),
          (rhs_scales.at[first + i, columns], "rhs_scales"),
        ]
        fill_slot(ring, config, slot, copies)
        return carry

      each_slot(config, first_slot, count, step)
      return slot_after(config, first_slot, count)

    persistent(num_sms, num_items[0], schedule, tile)

  def multiply(lhs, lhs_scales, rhs, rhs_scales, schedule, num_items, out, ring, wg):
    del lhs, lhs_scales, rhs, rhs_scales
    own = pl.ds(wg * WAVE, WAVE)

    def tile(entry, first_slot):
      group, row, pair, _, count = entry
      column = column_of(config, pair)
      offset = row * tile_m + wg * WAVE
      end = jnp.clip(k - offset, 0, WAVE)  # the last row tile may reach past k

      def step(_, slot, sums):
        plgpu.barrier_wait(ring["full"].at[slot])
        product = issue(ring["lhs"], ring["rhs"], slot, own, interpret)
        row_scales = wait(load_rows(ring["lhs_scales"].at[slot, own]), interpret)
        new = []
        # Only now and by slices: a scale for each of a thread's columns takes many registers.
        for piece, total in zip(PIECES, sums, strict=True):
          column_scales = plgpu.load(
            ring["rhs_scales"].at[slot, piece], layout=plgpu.Layout.WGMMA.reduce(0)
          )
          part = columns_of(product, piece) * by_row(row_scales, SLICE)
          new.append(total + part * lax.broadcast_in_dim(column_scales, (WAVE, SLICE), (1,)))
        plgpu.barrier_arrive(ring["empty"].at[slot])
        return tuple(new)

      def work():
        sums = each_slot(config, first_slot, count, step, (zeros(SLICE),) * len(PIECES))
        store(ring, wg, sums, out.at[group], offset, (0, end), column * BLOCK)

      unless_idle(ring, config, end > 0, work, first_slot, count)
      return slot_after(config, first_slot, count)

    persistent(num_sms, num_items[0], schedule, tile)

  out_type = jax.ShapeDtypeStruct((e, k, n), out_dtype)
  kernel = launch(fill, multiply, out_type, config, interpret, copies=4, column_scales=True)
  return kernel(lhs, lhs_scales, rhs, rhs_scales, schedule, num_items)


def _check(name, x, shape, dtype):
  if x.dtype != dtype:
    raise TypeError(f"{name} is {x.dtype}, not {jnp.dtype(dtype)}")
  if x.shape != shape:
    raise ValueError(f"{name} has shape {x.shape}, not {shape}")


def _check_operands(lhs, rhs, group_sizes):
  for name, x in (("lhs", lhs), ("rhs", rhs)):
    if x.dtype != jnp.float8_e4m3fn:
      raise TypeError(f"{name} is {x.dtype}, not float8_e4m3fn")
  if lhs.ndim != 2 or rhs.ndim not in (2, 3) or group_sizes.ndim != 1:
    raise ValueError(f"{lhs.shape=}, {rhs.shape=}, {group_sizes.shape=}: wrong ranks")
  if not (lhs.size and rhs.size and group_sizes.size):
    raise ValueError(f"{lhs.shape=}, {rhs.shape=} or {group_sizes.shape=} is empty")


def _check_result(out_dtype):
  if jnp.dtype(out_dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
    raise TypeError(f"out_dtype is {jnp.dtype(out_dtype)}, not float32 or bfloat16")


def _check_sizes(group_sizes, limit, tile=1):
  if isinstance(group_sizes, jax.core.Tracer):
    return
  sizes = np.asarray(group_sizes)
  if (sizes < 0).any() or (-(-sizes // tile) * tile).sum() > limit:
    raise ValueError(f"group_sizes={sizes.tolist()} are negative or need more than {limit} rows")


def _dequantize(x, scales):
  """(r, c) elements times (c/128, r) scales, in float32."""
  return x.astype(jnp.float32) * jnp.repeat(scales.astype(jnp.float32).T, BLOCK, axis=1)


def grouped_matmul_reference(
  lhs, lhs_scales, rhs, rhs_scales, group_sizes, *, out_dtype=jnp.bfloat16
):
  """What `grouped_matmul` computes, in float32; rows past the last group are zeros."""
  lhs = _dequantize(lhs, lhs_scales)
  rhs_scales = jnp.repeat(jnp.repeat(rhs_scales, BLOCK, axis=1), BLOCK, axis=2)
  rows, ends = jnp.arange(lhs.shape[0]), jnp.cumsum(group_sizes)
  out = jnp.zeros((lhs.shape[0], rhs.shape[1]), jnp.float32)
  for g in range(rhs.shape[0]):
    product = jnp.dot(lhs, (rhs[g].astype(jnp.float32) * rhs_scales[g]).T, precision="highest")
    owned = (rows >= ends[g] - group_sizes[g]) & (rows < ends[g])
    out = jnp.where(owned[:, None], product, out)
  return out.astype(out_dtype)


def grouped_wgrad_reference(
  lhs, lhs_scales, rhs, rhs_scales, group_sizes, *, out_dtype=jnp.float32
):
  """What `grouped_wgrad` computes, in float32."""
  lhs, rhs = _dequantize(lhs, lhs_scales), _dequantize(rhs, rhs_scales)
  tiles = pl.cdiv(group_sizes, BLOCK)
  token_tile, ends = jnp.arange(lhs.shape[1]) // BLOCK, jnp.cumsum(tiles)

  def group(g):
    owned = (token_tile >= ends[g] - tiles[g]) & (token_tile < ends[g])
    masked_lhs, masked_rhs = jnp.where(owned, lhs, 0), jnp.where(owned, rhs, 0)
    return jnp.dot(masked_lhs, masked_rhs.T, precision="highest")

  return jnp.stack([group(g) for g in range(group_sizes.size)]).astype(out_dtype)
