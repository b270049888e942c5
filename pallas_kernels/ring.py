"""A persistent kernel around a ring of SMEM slots: how the grouped matmuls run.

One CTA stays on each SM and takes every `num_sms`-th output tile, or a pair of CTAs two of them.
One warpgroup keeps the slots full and the others multiply; the ring does not stop between output
tiles, so the next tile's operands arrive while the last tile is stored. A slot is `full` when its
copies have landed and `empty` when every compute warpgroup is done with it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wgmma import BLOCK, OPERAND, WAVE

SLICE = 64  # columns of a product that are stored together
PIECES = tuple(pl.ds(c, SLICE) for c in range(0, BLOCK, SLICE))
STAGING = 16 * 1024  # bytes of SMEM through which a warpgroup's results go to memory
NUM_SMS = 132  # of an H100 or H200, for lowering where there is none


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """A schedule. Each compute warpgroup owns a tile of 64 x 128: 64 registers of products in flight
  and as many of sums, of the 152 (three warpgroups) or 232 (two) that a thread can have.
  """

  compute_warpgroups: int = 3
  stages: int = 3
  cluster: int = 1  # CTAs with neighbouring columns that load their rows of lhs together
  skip_idle: bool = False  # warpgroups without a row of the group multiply nothing
  grid_tile_width: int = 8  # columns of output tiles that neighbouring CTAs sweep together

  @property
  def tile_m(self) -> int:
    return WAVE * self.compute_warpgroups


def count_sms(interpret) -> int:
  if interpret:
    return 2  # enough for tiles to be shared out, few enough to be emulated
  device = jax.devices()[0]
  return device.core_count if device.platform == "gpu" else NUM_SMS


def column_of(config, pair):
  """The column tile of this CTA among those that its cluster takes."""
  return pair * config.cluster + (lax.axis_index("cluster") if config.cluster > 1 else 0)


def zeros(width):
  """Sums of 64 rows and `width` columns before anything is added."""
  return plgpu.layout_cast(jnp.zeros((WAVE, width), jnp.float32), plgpu.Layout.WGMMA)


def columns_of(product, piece):
  return product[:, piece.start : piece.start + piece.size]


def by_row(scale, width):
  return lax.broadcast_in_dim(scale, (WAVE, width), (0,))


def load_rows(ref):
  return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def persistent(num_sms, num_items, schedule, body):
  """slot = body(entry, slot) for the entries of the schedule that are this CTA's.

  Entries are dealt out back and forth, so that no CTA gets the longer one each time. The next
  entry is read before a tile is begun: its latency passes behind the tile.
  """
  sm = lax.axis_index("sm")
  rounds = lax.div(num_items, jnp.int32(num_sms))
  place = lambda i: jnp.where(i % 2 == 0, sm, num_sms - 1 - sm)  # noqa: E731
  count = rounds + jnp.where(rounds * num_sms + place(rounds) < num_items, 1, 0)

  def read(i):
    item = jnp.minimum(i * num_sms + place(i), schedule.shape[1] - 1)
    return tuple(schedule[j, item] for j in range(schedule.shape[0]))

  def step(i, carry):
    entry, slot = carry
    following = read(i + 1)
    return following, body(entry, slot)

  lax.fori_loop(0, count, step, (read(0), jnp.int32(0)))


def each_slot(config, first_slot, count, step, carry=()):
  """carry = step(i, slot, carry) for i below `count`, around the ring from `first_slot` on."""

  def body(i, state):
    slot, carry = state
    carry = step(i, slot, carry)
    return jnp.where(slot == config.stages - 1, 0, slot + 1), carry

  return lax.fori_loop(0, count, body, (first_slot, carry))[1]


def slot_after(config, first_slot, count):
  return lax.rem(first_slot + count, jnp.int32(config.stages))


def fill_slot(ring, config, slot, copies):
  """Memory warpgroup: wait for the slot to be free, then start its copies."""
  plgpu.barrier_wait(ring["empty"].at[slot])
  # The scales were read by loads, and TMA is another proxy: PTX orders its writes after those
  # loads only past a proxy fence. Here, off the critical path, one serves all readers.
  plgpu.commit_smem()
  if config.cluster > 1:  # what this CTA loads goes into the slots of both
    plgpu.barrier_arrive(ring["free"].at[slot])
    plgpu.barrier_wait(ring["free"].at[slot])

  for src, name in copies:
    shared = config.cluster > 1 and name == "lhs"
    plgpu.copy_gmem_to_smem(
      src,
      ring[name].at[slot],
      ring["full"].at[slot],
      collective_axes="cluster" if shared else None,
    )


def unless_idle(ring, config, busy, work, first_slot, count):
  """work(), or, for a warpgroup with nothing to store, only passes `count` slots on."""
  if not config.skip_idle:
    work()
    return
  pl.when(busy)(work)

  @pl.when(~busy)
  def _():
    def step(_, slot, carry):
      plgpu.barrier_wait(ring["full"].at[slot])
      plgpu.barrier_arrive(ring["empty"].at[slot])
      return carry

    each_slot(config, first_slot, count, step)


def launch(fill, multiply, out_type, config, interpret, copies, column_scales=False):
  """A persistent kernel: `fill` in the last warpgroup, `multiply` in the others.

  With `column_scales` the ring has a scale for every column of rhs too.
  """
  wgs, slots = config.compute_warpgroups, config.stages
  registers = min(232, (512 - 40) // wgs // 8 * 8)  # of 512 a thread of each SM quarter

  def kernel(*refs, **ring):
    wg = lax.axis_index("wg")

    @pl.when(wg < wgs)
    def _():
      plgpu.set_max_registers(registers, action="increase")
      for slot in range(slots):
        plgpu.barrier_arrive(ring["empty"].at[slot])
      multiply(*refs, ring, wg)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == wgs)
    def _():
      plgpu.set_max_registers(40, action="decrease")
      fill(*refs, ring)
      for slot in range(slots):  # every barrier must be waited for as often as it completes
        plgpu.barrier_wait(ring["empty"].at[slot])

  staged = STAGING // (WAVE * SLICE * out_type.dtype.itemsize)
  scratch = dict(
    lhs=plgpu.SMEM((slots, config.tile_m, BLOCK), jnp.float8_e4m3fn, transforms=OPERAND),
    rhs=plgpu.SMEM((slots, BLOCK, BLOCK), jnp.float8_e4m3fn, transforms=OPERAND),
    lhs_scales=plgpu.SMEM((slots, config.tile_m), jnp.float32),
    out=plgpu.SMEM((wgs, staged, WAVE, SLICE), out_type.dtype),
    full=plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
    empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=slots),
  )
  shape = dict(grid=(count_sms(interpret) // config.cluster,), grid_names=("sm",))
  if config.cluster > 1:
    scratch["free"] = plgpu.ClusterBarrier(collective_axes=("cluster",), num_barriers=slots)
    shape |= dict(cluster=(config.cluster,), cluster_names=("cluster",))
  if column_scales:
    scratch["rhs_scales"] = plgpu.SMEM((slots, BLOCK), jnp.float32)
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    **shape,
    num_threads=wgs + 1,
    thread_name="wg",
    scratch_types=scratch,
    # No thread reads what it wrote to SMEM, so loads and stores need no barriers of their own.
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    interpret=interpret or None,
  )


def store(ring, wg, sums, out, row, rows, column):
  """Stores rows[0]:rows[1] of a wave's sums, one for each of PIECES, at out[row:, column:].

  Copies have static shapes, so a wave cut by the ends of its group takes one for each bit of its
  number of rows.
  """
  begin, count = rows[0], rows[1] - rows[0]
  staging = ring["out"].at[wg]
  staged = staging.shape[0]
  for first in range(0, len(PIECES), staged):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    # An array each: halves of one that is twice as wide, as Mosaic swizzles it, came out wrong.
    for i in range(staged):
      staging[i] = sums[first + i].astype(out.dtype)
    plgpu.commit_smem()

    def copy(start, size, first=first):
      for i in range(staged):
        columns = pl.ds(column + PIECES[first + i].start, SLICE)
        target = out.at[pl.ds(row + start, size), columns]
        plgpu.copy_smem_to_gmem(staging.at[i, pl.ds(start, size)], target, commit_group=False)

    pl.when(count == WAVE)(functools.partial(copy, 0, WAVE))

    @pl.when(count < WAVE)
    def _(copy=copy):
      start = begin
      for size in (32, 16, 8, 4, 2, 1):
        pl.when(count & size != 0)(functools.partial(copy, start, size))
        start = start + (count & size)

    plgpu.commit_smem_to_gmem_group()
