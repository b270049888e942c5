"""A few rows of bf16 times a matrix in MXFP4: what a decoding step multiplies.

  y[i, j] = sum_r x[i, r] * E2M1(codes[r, j]) * 2^(scales[r // 32, j] - 127)

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
from pallas_kernels import packed as pk
from pallas_kernels.ring import count_sms

MAX_ROWS = 128
COLUMNS = 128  # of the matrix, to a CTA: 128 bytes of codes, one row of a swizzle pattern
STEP = 64  # along k: 128 bytes of x, one row of a pattern too
_BLOCK = 32
_MAX_CLUSTER = 8  # that every Hopper grants
_SMEM = 226 * 1024  # bytes of a CTA, of 227 KiB


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """How a CTA works, and how many share k."""

  workers: int = 4  # warpgroups
  stages: int = 4  # slots of a worker
  depth: int = 1  # steps of a slot: while one is multiplied, the next is made bf16
  ctas_per_sm: int = 1  # that are wanted before k is no longer divided


TUNING: dict[Literal["up to 64 rows", "more"], TuningConfig] = {
  "up to 64 rows": TuningConfig(),
  "more": TuningConfig(workers=2),
}

# What the tests run besides, up to 64 rows.
VARIANTS = {
  "2 CTAs of 2": TuningConfig(workers=2, ctas_per_sm=2),
  "128 of k": TuningConfig(workers=3, stages=3, depth=2),
}


def expand(word):
  """Four words of two bf16, one for each byte of E2M1 nibbles: values times 2^-126.

  E2M1's three bits of magnitude are the lowest of bf16's exponent and the highest of its fraction,
  its subnormals bf16's. One multiplication puts them there and the sign at the top.
  """
  low, high = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
  # Bytes: low nibble, 0 (the sign of one below 16), high nibble, 0.
  apart = [low.permute(high, i | (8 + i) << 4 | (4 + i) << 8 | (8 + i) << 12) for i in range(4)]
  return [(a * (1 << 6 | 1 << 12)) & 0x81C081C0 for a in apart]


def values(word, scales):
  """Four words of two bf16 values, of four bytes of E2M1 nibbles.

  Args:
    word: bytes of the columns 0, 1, 0, 1, two values of k in each.
    scales: words, the E8M0 codes of columns 0 and 1, both below 128.
  """
  factors = [(scale + 126) * 0x00800080 for scale in scales]
  return [v.times_bf16(factors[i % 2]) for i, v in enumerate(expand(word))]


def values_of_any_scale(word, scales):
  """As `values`; saturated, NaN where the scale is 255."""
  result = []
  for i, v in enumerate(expand(word)):
    scale = scales[i % 2]
    factor = scale.equals(0).where(0x00400040, scale * 0x00800080)
    factor = scale.equals(255).where(0x7FC07FC0, factor)
    result.append(v.times_bf16(0x7E807E80).times_bf16(factor).saturated_bf16())
  return result


def code_address(warp, lane):
  """Byte of a step's codes (32, 128) that a lane names to `ldmatrix` for the first step of 16.

  Of the four matrices of 8 rows x 16 bytes that a lane's octet names, the first two have the 8 rows
  (of two k each) of one step of 16 and the columns of a warp in either 64; the others those of the
  next step. Rows come in the order 0, 4, 1, 5, ..: transposed, a lane of the group's four gets rows
  c and c + 4 of two columns, which is what it holds of wgmma's operand. Chunks of 16 bytes are
  swizzled.
  """
  matrix, i = lane >> 3, lane & 7
  row = (i >> 1) | ((i & 1) << 2)
  chunk = (((matrix & 1) << 2) | warp) ^ row
  return ((matrix >> 1) << 10) + (row << 7) + (chunk << 4)


def scale_address(warp, lane):
  """Byte of a row of scales (128,) at which a lane's two columns of the first 64 begin."""
  return (warp << 4) + ((lane >> 2) << 1)


def sum_address(row, column):
  """Byte of the sum (row, column) of a worker: 128 columns a row, swizzled against conflicts."""
  return (row << 9) + ((column ^ (((row >> 1) & 3) << 3)) << 2)


def own_sums(warp, lane, rows: int):
  """(row, column, two places among a thread's registers) of each pair of sums of a thread.

  A product (128, rows) has registers (64 columns of the matrix, 8 rows, column + 8, row + 1); what
  wgmma takes for 8 columns apart are neighbours, as `code_address` loads them.
  """
  column = (warp << 4) + ((lane >> 2) << 1)
  row = (lane & 3) << 1
  for half in (0, 1):
    for eight in range(rows // 8):
      for odd in (0, 1):
        first = ((half * (rows // 8) + eight) * 2) * 2 + odd
        yield row + (8 * eight + odd), column + 64 * half, (first, first + 2)


def few_rows_matmul(x, codes, scales, *, config: TuningConfig | None = None):
  """x @ w of a matrix w in MXFP4, accumulated in float32.

  Args:
    x: (m, k) bfloat16, 1 to 128 rows, k a multiple of 64.
    codes: (k / 2, n) uint8, n a multiple of 128: two values of k in a byte, the first in the low
      nibble.
    scales: (k / 32, n) uint8, E8M0; NaN where 255.

  Returns:
    (m, n) bfloat16, to the bit the same in each call.
  """
  m, k, n = _check(x, codes, scales)
  if config is None:
    config = TUNING["up to 64 rows" if m <= 64 else "more"]
  if k % (STEP * config.depth):
    config = dataclasses.replace(config, depth=1, stages=config.stages * config.depth)
  rows, depth, wgs, stages = -(-m // 8) * 8, config.depth, config.workers, config.stages
  width = STEP * depth  # of a slot, along k
  steps = k // width
  _check_memory(rows, config)
  if rows != m:  # TMA reads the swizzled x in units of 8 rows
    x = jnp.pad(x, ((0, rows - m), (0, 0)))
  ctas, slots = _cluster(n, steps, config), wgs * stages
  swizzled_x, swizzled_codes = bl.swizzled(jnp.bfloat16), bl.swizzled(jnp.uint8)
  sums_layout = plgpu.Layout.WGMMA
  ring = [plgpu.RefType(transforms) for transforms in (swizzled_x, swizzled_codes, ())]
  memory, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT

  @plgpu.inline_mgpu(arg_types=(memory, memory, memory, *ring, memory, scalar, scalar))
  def load(ctx, x_gmem, codes_gmem, scales_gmem, x, codes, scales, full, step, tile):
    step, first = step.registers.item(), pk.Word(tile.registers.item()) * COLUMNS
    copies = [
      (x_gmem, x, (0, rows), (step, width), swizzled_x),
      (codes_gmem, codes, (step, width // 2), (first, COLUMNS), swizzled_codes),
      (scales_gmem, scales, (step, width // _BLOCK), (first, COLUMNS), ()),
    ]
    _copy(ctx, copies, full)

  @plgpu.inline_mgpu(
    arg_types=(*ring, memory, scalar, sums_layout),
    return_type=plgpu.ShapeDtypeStruct((COLUMNS, rows), jnp.float32, layout=sums_layout),
  )
  def multiply(ctx, x, codes, scales, full, parity, sums: fa.FragmentedArray):
    del ctx
    pk.address_of(full).wait_barrier(pk.Word(parity.registers.item()))
    acc = mgpu.WGMMAAccumulator.from_registers(sums)
    for part in range(depth):
      weights = _weights(codes, scales, part)
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

  @plgpu.inline_mgpu(arg_types=(sums_layout, ring[0], memory, scalar))
  def store(ctx, sums: fa.FragmentedArray, x, out, tile: fa.FragmentedArray):
    del ctx
    parts = pk.address_of(x), stages * rows * width * 2
    first = pk.Word(tile.registers.item()) * COLUMNS
    _store(sums, parts, pk.pointer_to(out), first, (m, n), wgs, ctas)

  def kernel(x_gmem, codes_gmem, scales_gmem, out_gmem, ring_x, ring_codes, ring_scales, full):
    wg, tile = lax.axis_index("worker"), lax.axis_index("tile")
    worker = lax.axis_index("cta") * wgs + wg if ctas > 1 else wg
    count = lax.div(steps - 1 - worker + wgs * ctas, jnp.int32(wgs * ctas))
    initialize(full)

    def slot(i):
      place = wg * stages + lax.rem(i, jnp.int32(stages))
      return [ref.at[place] for ref in (ring_x, ring_codes, ring_scales, full)]

    def fill(i):
      step = worker + i * (wgs * ctas)
      load(x_gmem, codes_gmem, scales_gmem, *slot(i), step, tile)

    def body(i, sums):
      sums = multiply(*slot(i), lax.rem(lax.div(i, jnp.int32(stages)), jnp.int32(2)), sums)
      plgpu.commit_smem()  # all its warps have read the slot, before TMA writes there
      pl.when(i + stages < count)(lambda: fill(i + stages))
      return sums

    for i in range(stages):
      pl.when(i < count)(lambda i=i: fill(jnp.int32(i)))
    zeros = plgpu.layout_cast(jnp.zeros((COLUMNS, rows), jnp.float32), sums_layout)
    store(lax.fori_loop(0, count, body, zeros), ring_x, out_gmem, tile)

  cluster = dict(cluster=(ctas,), cluster_names=("cta",)) if ctas > 1 else {}
  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
    grid=(n // COLUMNS,),
    grid_names=("tile",),
    **cluster,
    num_threads=wgs,
    thread_name="worker",
    scratch_types=dict(
      ring_x=plgpu.SMEM((slots, rows, width), jnp.bfloat16, transforms=swizzled_x),
      ring_codes=plgpu.SMEM((slots, width // 2, COLUMNS), jnp.uint8, transforms=swizzled_codes),
      ring_scales=plgpu.SMEM((slots, width // _BLOCK, COLUMNS), jnp.uint8),
      full=plgpu.SMEM((slots, 2), jnp.uint32),  # barriers, that one thread arrives at
    ),
    compiler_params=bl.LANE,
  )(x, codes, scales)


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


def load_weights(codes, scales):
  """Words of two bf16: what a thread holds of wgmma's operand (128, 64), in the layout's order.

  Of either 64 columns, for each 16 along k: of column g and then g + 8 the values 2c and 2c + 1,
  then both with those 8 further on, lane 4g + c.

  Args:
    codes: address of the codes (32, 128) of a step, to which `code_address` is added.
    scales: address of its scales (2, 128), to which `scale_address` is added.
  """
  halves = [[], []]
  for block in range(STEP // _BLOCK):
    words = codes.load_matrices_transposed(2048 * block)
    pairs = [scales.load_16_bits(COLUMNS * block + 64 * half) for half in (0, 1)]
    own = [[pair & 0xFF, pair >> 8] for pair in pairs]
    jobs = [(word, own[half]) for half in (0, 1) for word in words[half::2]]
    usual = [v for job in jobs for v in values(*job)]

    def rare(jobs=jobs):
      return [v for job in jobs for v in values_of_any_scale(*job)]

    result = ((pairs[0] | pairs[1]) & 0x8080).above(0).branch(rare, usual)
    for half in (0, 1):
      halves[half] += result[8 * half : 8 * half + 8]
  return halves[0] + halves[1]


def _weights(codes, scales, part):
  """The operand of one of a slot's steps as an array, of the references to the slot."""
  warp, lane = pk.thread_of_warpgroup()
  codes = pk.address_of(codes) + (code_address(warp, lane) + part * (STEP // 2 * COLUMNS))
  scales = pk.address_of(scales) + (scale_address(warp, lane) + part * (STEP // _BLOCK * COLUMNS))
  words = load_weights(codes, scales)
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
    out: pointer to the result (m, n).
    first: column of the CTA.
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
    halves = [pk.to_bf16(total[i], total[i + 1]) for i in (0, 2)]
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


def _check_memory(rows, config):
  """A worker's sums, (rows, 128) float32, lie where its slots had x."""
  width, slots = STEP * config.depth, config.workers * config.stages
  if config.stages * width * 2 < COLUMNS * 4:
    raise ValueError(f"{config}: the slots have no room for the sums")
  size = slots * width * (2 * rows + COLUMNS // 2 + COLUMNS // _BLOCK)
  if size > _SMEM:
    raise ValueError(f"{config}: the slots take {size} bytes of shared memory, above {_SMEM}")


def _check(x, codes, scales):
  if x.dtype != jnp.bfloat16:
    raise TypeError(f"x is {x.dtype}, not bfloat16")
  if x.ndim != 2 or codes.ndim != 2:
    raise ValueError(f"{x.shape=}, {codes.shape=}: not (m, k) and (k / 2, n)")
  (m, k), n = x.shape, codes.shape[1]
  if not 1 <= m <= MAX_ROWS:
    raise ValueError(f"{m=} rows of x are not 1 to {MAX_ROWS}")
  if k % STEP or n % COLUMNS or not k or not n:
    raise ValueError(f"{k=} is not a multiple of {STEP}, or {n=} not of {COLUMNS}")
  bl.check_array("codes", codes, (k // 2, n), jnp.uint8)
  bl.check_array("scales", scales, (k // _BLOCK, n), jnp.uint8)
  return m, k, n
