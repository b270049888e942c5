"""One FP8 product of a warpgroup, issued by hand: `issue`, then `wait`.

Pallas's own wgmma adds to registers, which must be zeros first, and works out in 64 bits, and
between the arrival of a slot and its product, where the slot lies. A warpgroup that also scales and
sums its products has no instructions to spare: here the product goes to fresh registers, and the
slot is added to descriptors made once. The emulator runs Pallas's, which computes the same.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

BLOCK = 128  # elements along the contraction of one product
WAVE = 64  # its rows
OPERAND = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK))

_INSTRUCTION = 32  # elements along the contraction of one instruction
_UNIT = 16  # bytes, in which descriptors count


def issue(lhs, rhs, slot, rows, interpret):
  """Starts lhs[slot, rows] @ rhs[slot].T for E4M3 refs (slots, m, 128) and (slots, n, 128) in SMEM.

  Returns the float32 product, (64, n), of which nothing may be used before `wait`.
  """
  n = rhs.shape[1]
  if interpret:

    def scope(acc):
      plgpu.wgmma(acc, lhs.at[slot, rows], rhs.at[slot].transpose((1, 0)))
      return plgpu.wgmma_accumulator_load(acc, wait_n=None)

    return pl.run_scoped(scope, plgpu.ACC((WAVE, n), jnp.float32))

  operand = plgpu.RefType(OPERAND)

  @plgpu.inline_mgpu(
    arg_types=(operand, operand, plgpu.Layout.WG_SPLAT),
    return_type=plgpu.ShapeDtypeStruct((WAVE, n), jnp.float32, layout=plgpu.Layout.WGMMA),
  )
  def product(ctx, first_lhs, first_rhs, slot):
    del ctx
    describe = functools.partial(mma_utils.create_descriptor, swizzle=BLOCK)
    (first_lhs, _), *_ = describe(
      first_lhs, large_tile=(WAVE, BLOCK), group_size=(WAVE, BLOCK), logical_k_major=False
    )
    (first_rhs, _), *_ = describe(
      mgpu.memref_transpose(first_rhs, (1, 0, 3, 2)),
      large_tile=(BLOCK, BLOCK),
      group_size=(BLOCK, n),
      logical_k_major=True,
    )
    sizes = [ref.shape[1] * BLOCK // _UNIT for ref in (lhs, rhs)]
    registers = _assemble(
      _product_ptx(n, *sizes),
      [first_lhs, first_rhs, slot.registers.item()],
      ["l", "l", "r"],
      outputs=n // 2,
    )
    return _fragments(registers, (WAVE, n), mgpu.WGMMA_LAYOUT, 2)

  return product(lhs.at[0, rows], rhs.at[0], slot)


def wait(scales, interpret):
  """Waits for the product. Returns `scales`, (64,), one for each of its rows.

  Compilers don't know that the product comes later than its instruction: what multiplies it by
  scales that come out of the wait can't be moved before it.
  """
  if interpret:
    plgpu.wgmma_wait(0)
    return scales
  layout = plgpu.Layout.WGMMA.reduce(1)
  result = plgpu.ShapeDtypeStruct((WAVE,), jnp.float32, layout=layout)

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
  def held_back(ctx, scales):
    del ctx
    values = [vector.extract(register, [], [0]) for register in scales.registers.flat]
    tied = [str(i) for i in range(len(values))]
    ptx = "wgmma.wait_group.sync.aligned 0;"
    registers = _assemble(ptx, values, tied, outputs=len(values))
    return _fragments(registers, (WAVE,), scales.layout, 1)

  return held_back(scales)


def _product_ptx(n, lhs_size, rhs_size):
  """Operands: n/2 registers of the product, descriptors of slot 0, slot. Sizes: units a slot."""
  out = ", ".join(f"${i}" for i in range(n // 2))
  first_lhs, first_rhs, slot = (f"${n // 2 + i}" for i in range(3))
  lines = ["{", ".reg .pred add;", ".reg .b32 low, high;", ".reg .b64 a, b, lhs, rhs;"]
  for side, first, size in (("lhs", first_lhs, lhs_size), ("rhs", first_rhs, rhs_size)):
    lines += [  # the low 14 bits are the address, of any slot: SMEM ends below 2^18 bytes
      f"mov.b64 {{low, high}}, {first};",
      f"mad.lo.s32 low, {slot}, {size}, low;",
      f"mov.b64 {side}, {{low, high}};",
    ]
  lines.append("wgmma.fence.sync.aligned;")
  for i in range(BLOCK // _INSTRUCTION):
    lines += [
      f"setp.ne.b32 add, {i}, 0;",
      f"add.s64 a, lhs, {i * _INSTRUCTION // _UNIT};",
      f"add.s64 b, rhs, {i * _INSTRUCTION // _UNIT};",
      f"wgmma.mma_async.sync.aligned.m64n{n}k{_INSTRUCTION}.f32.e4m3.e4m3",
      f"{{{out}}}, a, b, add, 1, 1;",
    ]
  return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])


def _assemble(ptx, inputs, constraints, outputs):
  """The float32 registers that `ptx` writes. It stays where it is among barriers and loads."""
  f32 = ir.F32Type.get()
  struct = llvm.inline_asm(
    llvm.StructType.get_literal([f32] * outputs),
    inputs,
    ptx,
    ",".join(["=f"] * outputs + constraints + ["~{memory}"]),
    has_side_effects=True,
  )
  return np.array([llvm.extractvalue(f32, struct, [i]) for i in range(outputs)], dtype=object)


def _fragments(registers, shape, layout, vector_length):
  vector_type = ir.VectorType.get((vector_length,), ir.F32Type.get())
  vectors = [vector.from_elements(vector_type, r) for r in registers.reshape(-1, vector_length)]
  return mgpu.FragmentedArray(
    _registers=np.array(vectors, dtype=object).reshape(layout.registers_shape(shape)),
    _layout=layout,
    _is_signed=None,
  )
