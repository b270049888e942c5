"""A few rows of bf16 times a matrix in MXFP4 or FP8: what a decoding step multiplies.

  y[i, j] = sum_r x[i, r] * E2M1(codes[r, j]) * 2^(scales[r // 32, j] - 127)
  y[i, j] = sum_b scales[b, j // 128] * sum_r x[i, 128 b + r] * E4M3(codes[128 b + r, j])

Bound by reading the codes, so these come through TMA as they lie, are made bf16 in registers and
are operand A of wgmma, y transposed: 128 columns of the matrix are its 128 rows, and the rows of x,
filled up to a multiple of 8, its columns. A warpgroup is a worker: it takes every so-manieth step
of 64 along k of a CTA's columns, through a ring of slots of its own. Workers of a CTA sum through
shared memory, CTAs of a cluster through that of each other, always in the same order.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector

from pallas_kernels import blocks as bl
from pallas_kernels import few_rows_weights as wt
from pallas_kernels import packed as pk
from pallas_kernels.few_rows_weights import BLOCK, COLUMNS, STEP, TILE
from pallas_kernels.ring import count_sms
from pallas_kernels.tracing import traced_once

MAX_ROWS = {"mxfp4": 128, "fp8": 64}  # a thread holds as many sums, of FP8 twice
_MAX_CLUSTER = 8  # that every Hopper grants
_SMEM = 226 * 1024  # bytes of a CTA, of 227 KiB


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """How a CTA works, and how many share k."""

  workers: int = 4  # warpgroups
  stages: int = 4  # slots of a worker
  depth: int = 1  # steps of a slot: while one is multiplied, the next is made bf16
  ctas_per_sm: int = 1  # that are wanted before k is no longer divided


TUNING: dict[Literal["up to 64 rows", "more", "FP8"], TuningConfig] = {
  "up to 64 rows": TuningConfig(),
  "more": TuningConfig(workers=2),
  "FP8": TuningConfig(workers=3),
}

# What the tests run besides, up to 64 rows.
VARIANTS = {
  "2 CTAs of 2": TuningConfig(workers=2, ctas_per_sm=2),
  "128 of k": TuningConfig(workers=3, stages=3, depth=2),
}
FP8_VARIANTS = {
  "2 workers": TuningConfig(workers=2, stages=6),
  "2 CTAs of 2": TuningConfig(workers=2, ctas_per_sm=2),
  "128 of k": TuningConfig(workers=3, stages=2, depth=2),
}


def sum_address(row, column):
  """Byte of the sum (row, column) of a worker: 128 columns a row, swizzled against conflicts."""
  return (row << 9) + ((column ^ (((row >> 1) & 3) << 3)) << 2)


def own_sums(warp, lane, rows: int):
  """(row, column, two places among a thread's registers) of each pair of sums of a thread.

  A product (128, rows) has registers (64 columns of the matrix, 8 rows, column + 8, row + 1); what
  wgmma takes for 8 columns apart are neighbours, as `few_rows_weights` loads them.
  """
  column = (warp << 4) + ((lane >> 2) << 1)
  row = (lane & 3) << 1
  for half in (0, 1):
    for eight in range(rows // 8):
      for odd in (0, 1):
        first = ((half * (rows // 8) + eight) * 2) * 2 + odd
        yield row + (8 * eight + odd), column + 64 * half, (first, first + 2)


@traced_once("config")
def few_rows_matmul(x, codes, scales, *, config: TuningConfig | None = None):
  """x @ w of a matrix w in MXFP4 or in FP8, accumulated in float32.

  Args:
    x: (m, k) bfloat16, 1 to 128 rows, of FP8 1 to 64; k a multiple of 64, of FP8 of 128. Or
      (e, m, k), and as many matrices, each for its own rows.
    codes: MXFP4: (k / 2, n) uint8, n a multiple of 128: two values of k in a byte, the first in the
      low nibble. FP8: (k, n) uint8, E4M3 without NaN.
    scales: MXFP4: (k / 32, n) uint8, E8M0; NaN where 255. FP8: (k / 128, n / 128) float32.

  Returns:
    (m, n) or (e, m, n) bfloat16, to the bit the same in each call.
  """
  _check(x, codes, scales)
  if x.ndim == 3:
    return _matmul(x, codes, scales, config)
  return _matmul(*(part[None] for part in (x, codes, scales)), config)[0]


def _matmul(x, codes, scales, config):
  (e, m, k), n = x.shape, codes.shape[2]
  fp8 = scales.dtype == jnp.float32
  if config is None:
    config = TUNING["FP8" if fp8 else "up to 64 rows" if m <= 64 else "more"]
  if k % (STEP * config.depth):
    config = dataclasses.replace(config, depth=1, stages=config.stages * config.depth)
  rows, depth, wgs, stages = -(-m // 8) * 8, config.depth, config.workers, config.stages
  width = STEP * depth  # of a slot, along k
  steps = k // width
  _check_memory(rows, config, fp8)
  if rows != m:  # TMA reads the swizzled x in units of 8 rows
    x = jnp.pad(x, ((0, 0), (0, rows - m), (0, 0)))
  ctas, slots, code_rows = _cluster(e * n, steps, config), wgs * stages, width // (1 if fp8 else 2)
  x, codes, scales = (part.reshape(-1, part.shape[2]) for part in (x, codes, scales))
  swizzled_x, swizzled_codes = bl.swizzled(jnp.bfloat16), bl.swizzled(jnp.uint8)
  sums_layout = plgpu.Layout.WGMMA
  ring = [plgpu.RefType(transforms) for transforms in (swizzled_x, swizzled_codes, ())]
  memory, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT

  @plgpu.inline_mgpu(arg_types=(memory, memory, memory, *ring, memory, scalar, scalar, scalar))
  def load(ctx, x_gmem, codes_gmem, scales_gmem, x, codes, scales, full, step, matrix, tile):
    step, matrix = step.registers.item(), matrix.registers.item()
    first = pk.Word(tile.registers.item()) * COLUMNS
    of_all = (pk.Word(matrix) * steps + pk.Word(step)).value  # among the steps of all matrices
    copies = [
      (x_gmem, x, (matrix, rows), (step, width), swizzled_x),
      (codes_gmem, codes, (of_all, code_rows), (first, COLUMNS), swizzled_codes),
      (scales_gmem, scales, (of_all, width // BLOCK), (first, COLUMNS), ()),
    ]
    _copy(ctx, copies[:2] if fp8 else copies, full)  # one scale of FP8 is no copy for TMA

  @plgpu.inline_mgpu(
    arg_types=(*ring, memory, scalar, sums_layout),
    return_type=plgpu.ShapeDtypeStruct((COLUMNS, rows), jnp.float32, layout=sums_layout),
  )
  def multiply(ctx, x, codes, scales, full, parity, sums: fa.FragmentedArray):
    del ctx
    pk.address_of(full).wait_barrier(pk.Word(parity.registers.item()))
    acc = mgpu.WGMMAAccumulator.from_registers(sums)
    for part in range(depth):
      weights = _fragment(_load_e4m3(codes, part) if fp8 else _load_mxfp4(codes, scales, part))
      own = mgpu_utils.memref_slice(x, (slice(None), slice(part, part + 1)))
      acc = mgpu.wgmma(acc, weights, mgpu.memref_transpose(own, (1, 0, 3, 2)))
      nvvm.wgmma_commit_group_sync_aligned()
    nvvm.wgmma_wait_group_sync_aligned(0)
    return fa.optimization_barrier(acc.value)

  @plgpu.inline_mgpu(arg_types=(memory,))
  def initialize(ctx, full):
    del ctx
    start = pk.address_of(full)
    pk.when(
      pk.thread_of_cta().equals(0), lambda: [(start + 8 * i).make_barrier() for i in range(slots)]
    )
    pk.barrier_of_cta()

  @plgpu.inline_mgpu(arg_types=(sums_layout, ring[0], memory, scalar, scalar))
  def store(ctx, sums: fa.FragmentedArray, x, out, matrix, tile):
    del ctx
    parts = pk.address_of(x), stages * rows * width * 2
    first = pk.Word(matrix.registers.item()) * (m * n) + pk.Word(tile.registers.item()) * COLUMNS
    _store(sums, parts, pk.pointer_to(out), first, (m, n), wgs, ctas)

  def kernel(x_gmem, codes_gmem, scales_gmem, out_gmem, ring_x, ring_codes, ring_scales, full):
    wg, tile = lax.axis_index("worker"), lax.axis_index("tile")
    matrix = lax.div(tile, jnp.int32(n // COLUMNS))
    tile = tile - matrix * (n // COLUMNS)
    worker = lax.axis_index("cta") * wgs + wg if ctas > 1 else wg
    count = lax.div(steps - 1 - worker + wgs * ctas, jnp.int32(wgs * ctas))
    initialize(full)

    def slot(i):
      place = wg * stages + lax.rem(i, jnp.int32(stages))
      return [ref.at[place] for ref in (ring_x, ring_codes, ring_scales, full)]

    def fill(i):
      step = worker + i * (wgs * ctas)
      load(x_gmem, codes_gmem, scales_gmem, *slot(i), step, matrix, tile)

    def body(i, sums):
      arrived = *slot(i), lax.rem(lax.div(i, jnp.int32(stages)), jnp.int32(2))
      if fp8:
        block = lax.div((worker + i * (wgs * ctas)) * width, jnp.int32(TILE))
        # Asked for before the codes are waited for.
        scale = scales_gmem[matrix * (k // TILE) + block, tile]
        sums += scale * multiply(*arrived, zeros)
      else:
        sums = multiply(*arrived, sums)
      plgpu.commit_smem()  # all its warps have read the slot, before TMA writes there
      pl.when(i + stages < count)(lambda: fill(i + stages))
      return sums

    zeros = plgpu.layout_cast(jnp.zeros((COLUMNS, rows), jnp.float32), sums_layout)
    for i in range(stages):
      pl.when(i < count)(lambda i=i: fill(jnp.int32(i)))
    store(lax.fori_loop(0, count, body, zeros), ring_x, out_gmem, matrix, tile)

  cluster = dict(cluster=(ctas,), cluster_names=("cta",)) if ctas > 1 else {}
  out = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((e * m, n), jnp.bfloat16),
    grid=(e * (n // COLUMNS),),
    grid_names=("tile",),
    **cluster,
    num_threads=wgs,
    thread_name="worker",
    scratch_types=dict(
      ring_x=plgpu.SMEM((slots, rows, width), jnp.bfloat16, transforms=swizzled_x),
      ring_codes=plgpu.SMEM((slots, code_rows, COLUMNS), jnp.uint8, transforms=swizzled_codes),
      ring_scales=plgpu.SMEM((slots, width // BLOCK, COLUMNS), jnp.uint8),
      full=plgpu.SMEM((slots, 2), jnp.uint32),  # barriers, that one thread arrives at
    ),
    compiler_params=bl.LANE,
  )(x, codes, scales)
  return out.reshape(e, m, n)


def _copy(ctx, copies, full):
  """Starts the copies of a slot, by one thread of a worker, which arrives once for all of them.

  Pallas's own copy has all 128 threads arrive for each copy: 384 arrivals for 32 words of a thread.
  """
  index = ir.IndexType.get()

  def start_of(place, size):
    match place:
      case int():
        return mgpu_utils.c(place, index)
      case pk.Word():
        return arith.index_castui(index, place.value)
    return arith.index_castui(index, (pk.Word(place) * size).value)

  one = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP)
  word = ir.IntegerType.get_signless(32)
  barrier = mgpu_utils.BarrierRef(mgpu_utils.memref_ptr(full), mgpu_utils.c(0, word), None, 1)
  sizes = [
    mgpu_utils.bytewidth(ref.type.element_type) * math.prod(ref.type.shape) for _, ref, *_ in copies
  ]
  barrier.arrive_expect_tx(sum(sizes), predicate=one)
  for source, target, rows, columns, transforms in copies:
    places = [mgpu_utils.ds(start_of(*place), place[1]) for place in (rows, columns)]
    ctx.async_copy(
      src_ref=source,
      dst_ref=target,
      gmem_slice=tuple(places),
      gmem_transform=tuple(mgpu.TileTransform(t.tiling) for t in transforms[:1]),
      swizzle=128 if transforms else None,
      barrier=barrier,
      arrive=False,
      predicate=one,
    )


def _cluster(n, steps, config):
  """CTAs that share k: enough to fill the chip while each worker has a step."""
  ctas, wanted = 1, count_sms(interpret=False) * config.ctas_per_sm
  while (
    2 * ctas <= _MAX_CLUSTER
    and n // COLUMNS * 2 * ctas <= wanted
    and config.workers * 2 * ctas <= steps
  ):
    ctas *= 2
  return ctas


def _load_mxfp4(codes, scales, part):
  """The words of one of a slot's tiles, of the references to the slot."""
  warp, lane = pk.thread_of_warpgroup()
  codes = pk.address_of(codes) + (wt.mxfp4_address(warp, lane) + part * (STEP // 2 * COLUMNS))
  scales = pk.address_of(scales)
  scales += wt.scale_address(warp, lane) + part * (STEP // BLOCK * COLUMNS)
  return wt.load_mxfp4(codes, scales)


def _load_e4m3(codes, part):
  """As `_load_mxfp4`, without scales."""
  base = pk.address_of(codes) + part * (STEP * COLUMNS)
  return wt.load_e4m3([base + place for place in wt.e4m3_addresses(*pk.thread_of_warpgroup())])


def _fragment(words):
  """Words of two bf16 as wgmma's operand (128, 64)."""
  pair, one = (
    ir.VectorType.get((2,), ir.BF16Type.get()),
    ir.VectorType.get((1,), words[0].value.type),
  )
  registers = np.empty(len(words), object)
  for i, word in enumerate(words):
    registers[i] = vector.bitcast(pair, vector.from_elements(one, [word.value]))
  registers = registers.reshape(fa.WGMMA_LAYOUT.registers_shape((COLUMNS, STEP)))
  return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)


def _store(sums, parts, out, first, shape, wgs, ctas):
  """Sums over the workers, then over the CTAs, and stores what falls to this CTA as bf16.

  Args:
    sums: (128, rows) of this worker.
    parts: address in shared memory of the first worker's sums, bytes from each to the next.
    out: pointer to the results (e, m, n).
    first: place of the CTA's first column among them.
  """
  (m, n), (base, stride) = shape, parts
  warp, lane = pk.thread_of_warpgroup()
  thread = pk.thread_of_cta()
  mgpu_utils.warpgroup_barrier()  # all its warps have read the last x
  words = [w for register in pk.registers(sums) for w in register]
  here = base + (thread >> 7) * stride
  for row, column, places in own_sums(warp, lane, sums.shape[1]):
    (here + sum_address(row, column)).store_shared([words[place] for place in places])
  pk.barrier_of_cta()

  def add(loaded):
    total = loaded[0]
    for part in loaded[1:]:
      total = [a.plus_float(b) for a, b in zip(total, part, strict=True)]
    return total

  def each_four(count, start, body):
    """body(row, column) for the fours of sums from `start` on, dealt out to the threads."""
    for i in range(0, count, 128 * wgs):
      four = thread + i

      def one(four=four + start):
        body(four >> 5, (four & 31) << 2)

      pk.when(four.below(count), one)

  def sum_of_workers(row, column):
    place = base + sum_address(row, column)
    return add([(place + stride * wg).load_shared(4) for wg in range(wgs)])

  def write(row, column, total):
    halves = [total[i + 1].to_bf16(total[i]) for i in (0, 2)]
    pk.store_global(out, (row * n + first + column) << 1, halves)

  if ctas == 1:
    each_four(32 * m, 0, lambda row, column: write(row, column, sum_of_workers(row, column)))
    return

  def keep(row, column):
    (base + sum_address(row, column)).store_shared(sum_of_workers(row, column))

  def write_sum_of_ctas(row, column):
    place = base + sum_address(row, column)
    write(row, column, add([place.of_cta(cta).load_cluster(4) for cta in range(ctas)]))

  each_four(32 * m, 0, keep)
  pk.barrier_of_cluster()
  share = 32 * m // ctas
  each_four(share, pk.rank_in_cluster() * share, write_sum_of_ctas)
  pk.barrier_of_cluster(release=False)  # until then others read here


def _check_memory(rows, config, fp8):
  """A worker's sums, (rows, 128) float32, lie where its slots had x."""
  width, slots = STEP * config.depth, config.workers * config.stages
  if config.stages * width * 2 < COLUMNS * 4:
    raise ValueError(f"{config}: the slots have no room for the sums")
  codes = COLUMNS if fp8 else COLUMNS // 2
  size = slots * width * (2 * rows + codes + COLUMNS // BLOCK)
  if size > _SMEM:
    raise ValueError(f"{config}: the slots take {size} bytes of shared memory, above {_SMEM}")


def _check(x, codes, scales):
  if x.dtype != jnp.bfloat16:
    raise TypeError(f"x is {x.dtype}, not bfloat16")
  if x.ndim not in (2, 3) or codes.ndim != x.ndim:
    raise ValueError(f"{x.shape=}, {codes.shape=}: not (m, k) and (k / 2, n), or (e, ...) of each")
  (*e, m, k), n = x.shape, codes.shape[-1]
  fp8 = scales.dtype == jnp.float32
  most, step = MAX_ROWS["fp8" if fp8 else "mxfp4"], TILE if fp8 else STEP
  if not 1 <= m <= most:
    raise ValueError(f"{m=} rows of x are not 1 to {most}")
  if k % step or n % COLUMNS or not k or not n:
    raise ValueError(f"{k=} is not a multiple of {step}, or {n=} not of {COLUMNS}")
  results = (*e, m, n)
  if not 0 < math.prod(results) < 2**30:
    raise ValueError(f"results of shape {results} are none, or 2^30 and more")
  bl.check_array("codes", codes, (*e, k if fp8 else k // 2, n), jnp.uint8)
  if fp8:
    bl.check_array("scales", scales, (*e, k // TILE, n // TILE), jnp.float32)
  else:
    bl.check_array("scales", scales, (*e, k // BLOCK, n), jnp.uint8)
