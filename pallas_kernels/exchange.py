"""Rows between the GPUs of one host over NVLink: stored into the peers' memory, or read from it.

    send      a token's row goes into the inboxes of the devices that its experts are on
    collect   a token's sum of the rows that the devices have for it

Both run on all devices of a mesh axis at once, inside `jax.shard_map`, in one process. A row is
read once and written where it is wanted; nothing travels that holds no row. An inbox is a result of
the kernel: the slots that no row is for hold anything.

A device may touch a peer's memory only while the peer's own call runs. `_Meeting` sees to that. Its
two counters are zero before a sum over the axis, so that they exist on every device once any
device's kernel begins. There each CTA waits until all devices have said that theirs has begun, and
the kernel ends when all CTAs of all devices have said that they are done. It leaves zeros, for XLA
may run it twice.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl
from pallas_kernels.mxfp4 import ScaleRule, quantize_blocks
from pallas_kernels.tracing import traced_once

# CTAs of an SM, and rows that a CTA has on the way, at most.
TUNING = {
  "send": {"ctas": 8, "rows": 4},
  "mxfp4": {"ctas": 8, "rows": 4},
  "collect": {"ctas": 4},
}
_SMS, _SMEM = 132, 224 * 1024
_RUN = 1024  # values that a warpgroup quantizes at once
_LONGEST = 256  # elements along an axis of a copy
_ALIGNED = 128  # bytes: copies begin at multiples of it in SMEM


@traced_once("slots", "axis")
def send(arrays, slot_of_token, slots: int, axis: str):
  """Rows of tokens into the inboxes of the devices along `axis`.

  Args:
    arrays: of (tokens, n) each; a row has a multiple of 16 bytes.
    slot_of_token: (devices, tokens) int32: the place of a token among those that this device sends
      to each; `slots` where it does not go there.
    slots: places that a device keeps for each.

  Returns:
    of (devices * slots, n) each: the rows from the first device, then those from the second.
  """
  tokens, peers = len(arrays[0]), lax.axis_size(axis)
  arrays = [x.reshape(tokens, *_copied(x)) for x in arrays]
  n, stages = len(arrays), _stages(arrays)

  def kernel(*refs):
    sources, inboxes, smem = refs[:n], refs[n + 3 : 2 * n + 3], refs[2 * n + 3 : -1]
    (slot_gmem, counters, met), barrier = refs[n : n + 3], refs[-1]
    own, count = _tokens_of_cta(tokens)

    def load(i):
      stage = lax.rem(i, jnp.int32(stages))
      for source, buffer in zip(sources, row_of(stage), strict=True):
        plgpu.copy_gmem_to_smem(source.at[own(i)], buffer, barrier.at[stage])

    def row_of(stage):
      return [b.at[stage, pl.ds(0, x.shape[1])] for b, x in zip(smem, arrays, strict=True)]

    _begin(counters, met, axis)
    load(jnp.int32(0))

    @pl.loop(0, count)
    def _(i):
      stage = lax.rem(i, jnp.int32(stages))
      plgpu.wait_smem_to_gmem(stages - 2, wait_read_only=True)  # the next row's SMEM is free

      @pl.when(i + 1 < count)
      def _():
        load(i + 1)

      plgpu.barrier_wait(barrier.at[stage])
      _store(row_of(stage), inboxes, slot_gmem, own(i), slots, axis)

    plgpu.wait_smem_to_gmem(0, wait_read_only=False)
    _end(counters, axis)

  inboxes = plgpu.kernel(
    kernel,
    out_type=[jax.ShapeDtypeStruct((peers * slots, *x.shape[1:]), x.dtype) for x in arrays],
    **_grid("send", tokens),
    scratch_types=[
      *(plgpu.SMEM((stages, *_aligned(x)), x.dtype) for x in arrays),
      plgpu.Barrier(num_arrivals=n, num_barriers=stages),
    ],
    compiler_params=bl.WARPGROUP,
  )(*arrays, slot_of_token, *_Meeting.of(arrays[0], slot_of_token, axis))
  return [inbox.reshape(peers * slots, -1) for inbox in inboxes]


@traced_once("slots", "axis", "scale_rule")
def send_mxfp4(x, slot_of_token, slots: int, axis: str, *, scale_rule: ScaleRule = "floor"):
  """`send` of what `quantize_mxfp4` makes of x, which is quantized on its way.

  Args:
    x: (tokens, k) bfloat16 for which `quantizes` holds.

  Returns:
    uint8 codes (devices * slots, k / 2) and scales (devices * slots, k / 32).
  """
  if not quantizes(x):
    raise ValueError(f"x is {x.dtype} {x.shape}, not bfloat16 (tokens, k) with k % {_RUN} == 0")
  (tokens, k), peers = x.shape, lax.axis_size(axis)
  blocks, stages, layout = k // 32, TUNING["mxfp4"]["rows"], bl.block_layout(4, 8)

  def kernel(x_gmem, slot_gmem, counters, met, codes_gmem, scales_gmem, codes_smem, scales_smem):
    own, count = _tokens_of_cta(tokens)
    _begin(counters, met, axis)

    @pl.loop(0, count)
    def _(i):
      values = plgpu.load(x_gmem.at[own(i)], layout=layout, optimized=False)
      codes, scales = quantize_blocks(values, scale_rule, layout)
      plgpu.wait_smem_to_gmem(stages - 1, wait_read_only=True)
      _wait_for_warpgroup()
      stage = lax.rem(i, jnp.int32(stages))
      row = codes_smem.at[stage], scales_smem.at[stage, pl.ds(0, blocks)]
      row[0][...], row[1][...] = codes, scales
      plgpu.commit_smem()
      _store(row, (codes_gmem, scales_gmem), slot_gmem, own(i), slots, axis)

    plgpu.wait_smem_to_gmem(0, wait_read_only=False)
    _end(counters, axis)

  codes, scales = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((peers * slots, blocks, 4), jnp.uint32),
      jax.ShapeDtypeStruct((peers * slots, blocks), jnp.uint8),
    ),
    **_grid("mxfp4", tokens),
    scratch_types=(
      plgpu.SMEM((stages, blocks, 4), jnp.uint32),
      plgpu.SMEM((stages, -(-blocks // _ALIGNED) * _ALIGNED), jnp.uint8),
    ),
    compiler_params=bl.WARPGROUP,
  )(x.reshape(tokens, blocks, 4, 8), slot_of_token, *_Meeting.of(x, slot_of_token, axis))
  codes = lax.bitcast_convert_type(codes, jnp.uint8)  # four bytes a word: no data moves
  return codes.reshape(-1, k // 2), scales


def quantizes(x) -> bool:
  """Whether `send_mxfp4` takes rows like those of x."""
  return x.dtype == jnp.bfloat16 and x.shape[1] % _RUN == 0 and x.shape[1] <= 32 * _LONGEST


@traced_once("axis", "dtype")
def collect(rows, slot_of_token, axis: str, dtype=jnp.bfloat16):
  """For each token the sum of the rows that the devices along `axis` have for it.

  Args:
    rows: (devices * slots, d) as `send` left them; d a multiple of 128.
    slot_of_token: as in `send`, which sent these tokens.
    dtype: of the result.

  Returns:
    (tokens, d): summed in float32, from the first device to the last.
  """
  (peers, tokens), d = slot_of_token.shape, rows.shape[1]
  slots = len(rows) // peers
  vector = math.gcd(d // 128, 16 // rows.dtype.itemsize)
  layout = plgpu.Layout.WG_STRIDED((d,), vec_size=vector)

  def kernel(rows_gmem, slot_gmem, counters, met, out_gmem):
    own, count = _tokens_of_cta(tokens)
    theirs = lax.axis_index(axis) * slots
    _begin(counters, met, axis)

    @pl.loop(0, count)
    def _(i):
      total = plgpu.layout_cast(jnp.zeros((d,), jnp.float32), layout)
      for peer in range(peers):
        slot, there = slot_gmem[peer, own(i)], plgpu.remote_ref(rows_gmem, {axis: peer})

        def add(total, slot=slot, there=there):
          row = plgpu.load(there.at[theirs + slot], layout=layout, optimized=False)
          return total + row.astype(jnp.float32)

        total = lax.cond(slot < slots, add, lambda total: total, total)
      out_gmem[own(i)] = total.astype(dtype)

    _end(counters, axis)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((tokens, d), dtype),
    **_grid("collect", tokens),
    compiler_params=bl.WARPGROUP,
  )(rows, slot_of_token, *_Meeting.of(rows, slot_of_token, axis))


class _Meeting(NamedTuple):
  """A sum over the axis, which ends no earlier than all devices have their counters at zero."""

  counters: jax.Array  # (2,) int32: devices that have begun, CTAs of all devices that are done
  met: jax.Array  # (2,) int32 zeros

  @classmethod
  def of(cls, rows, slot_of_token, axis):
    # Zeros of each call, which the compiler does not know as such: neither a constant, nor what can
    # be made before a loop and copied.
    bits = lax.bitcast_convert_type(rows.reshape(-1)[:2], f"uint{8 * rows.dtype.itemsize}")
    counters = jnp.minimum(slot_of_token[0, :2] | (bits.astype(jnp.int32) & 127), 0)
    return cls(counters, lax.psum(counters, axis))


def _begin(counters, met, axis):
  peers = lax.axis_size(axis)

  @pl.when(lax.axis_index("cta") == 0)
  def _():
    for peer in range(peers):
      _signal(plgpu.remote_ref(counters.at[0], {axis: peer}))

  _wait(counters.at[0], peers + met[0], leave=True)


def _end(counters, axis):
  """For a CTA whose copies have ended."""
  peers = lax.axis_size(axis)
  for peer in range(peers):
    _signal(plgpu.remote_ref(counters.at[1], {axis: peer}))

  @pl.when(lax.axis_index("cta") == 0)
  def _():
    _wait(counters.at[1], peers * lax.axis_size("cta"))
    _wait(counters.at[0], peers)


def _signal(counter):
  """Adds one, after what the threads of the warpgroup stored."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def signal(ctx, counter):
    del ctx
    mgpu_utils.warpgroup_barrier()
    mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(counter)).signal(1)

  signal(counter)


def _wait(counter, value, leave=False):
  """Until the counter is `value` or more, which is taken from it unless it is left."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
  def wait(ctx, counter, value):
    del ctx
    (value,) = value.registers.flat
    mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(counter)).wait(value, decrement=not leave)

  wait(counter, jnp.int32(value))


def _wait_for_warpgroup():
  @plgpu.inline_mgpu()
  def barrier(ctx):
    del ctx
    mgpu_utils.warpgroup_barrier()

  barrier()


def _store(row, inboxes, slot_gmem, token, slots, axis):
  """A row from SMEM to all devices that want it, in one group of copies."""
  own = lax.axis_index(axis) * slots
  for peer in range(lax.axis_size(axis)):
    slot = slot_gmem[peer, token]
    for buffer, inbox in zip(row, inboxes, strict=True):
      there = plgpu.remote_ref(inbox, {axis: peer}).at[own + slot]
      plgpu.copy_smem_to_gmem(buffer, there, predicate=slot < slots, commit_group=False)
  plgpu.commit_smem_to_gmem_group()


def _stages(arrays):
  """Rows that a CTA has on the way: as many as SMEM holds, two at least."""
  tuning = TUNING["send"]
  held = _SMEM // tuning["ctas"] // sum(x.dtype.itemsize * math.prod(_aligned(x)) for x in arrays)
  return max(2, min(tuning["rows"], held))


def _grid(kind, tokens):
  return dict(grid=(min(_SMS * TUNING[kind]["ctas"], tokens),), grid_names=("cta",))


def _tokens_of_cta(tokens):
  """The i-th token of this CTA as a function of i, and how many there are."""
  first, step = lax.axis_index("cta"), lax.axis_size("cta")
  return (lambda i: first + i * step), lax.div(tokens - first + step - 1, jnp.int32(step))


def _copied(x):
  """How a row of x is seen by a copy, whose last axis has a multiple of 16 bytes."""
  n, per_16 = x.shape[1], 16 // x.dtype.itemsize
  if n % per_16:
    raise ValueError(f"rows of {n} {x.dtype} have no multiple of 16 bytes")
  inner = max(i for i in range(per_16, _LONGEST + 1, per_16) if n % i == 0)
  return n // inner, inner


def _aligned(x):
  """A row of x with so much below it that another one after it is aligned."""
  _, rows, inner = x.shape
  step = _ALIGNED // math.gcd(_ALIGNED, inner * x.dtype.itemsize)
  return -(-rows // step) * step, inner
