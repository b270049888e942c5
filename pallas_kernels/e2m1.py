"""Rounds eight bf16 values of a lane to E2M1, two to a 32-bit instruction.

float16 holds bf16's eight bits, and 2^-14 lays E2M1's exponents over its smallest ones, subnormals
over subnormals: of such a float16 the bits from 9 up are the code and those below it the fraction.
What float16 cannot hold lies below E2M1's 2^-4 and is rounded to zero all the same.
"""

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector


def largest(x, layout):
  """Largest magnitude of each lane of x (..., 8) bfloat16, as the bits of a float32 or a NaN."""

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=_of_lanes(x, jnp.int32, layout))
  def lanes(ctx, x: fa.FragmentedArray):
    del ctx
    i32 = ir.IntegerType.get_signless(32)

    def largest_of(register):
      pairs = [_and(pair, 0x7FFF7FFF) for pair in _pairs(register)]
      while len(pairs) > 1:
        pairs = [
          mgpu_utils.inline_ptx("max.NaN.bf16x2 $0, $1, $2;", a, b, result_types=i32)
          for a, b in zip(pairs[::2], pairs[1::2], strict=True)
        ]
      return arith.maxsi(*_halves(pairs[0]))

    return _map(largest_of, layout, [x], is_signed=True)

  return lanes(x)


def rounded(x, inverse, layout, *, clips: bool):
  """E2M1 of x times its block's `inverse`, to nearest, ties to even: a word of nibbles a lane.

  Args:
    x: (..., 4, 8) bfloat16; below 8 after the multiplication, or else the word means nothing.
    inverse: (...) float32, powers of two.
    clips: whether values may round to 8, which E2M1 lacks.
  """
  per_block = layout.reduce((x.ndim - 2, x.ndim - 1))

  @plgpu.inline_mgpu(arg_types=(layout, per_block), return_type=_of_lanes(x, jnp.uint32, layout))
  def words(ctx, x: fa.FragmentedArray, inverse: fa.FragmentedArray):
    del ctx
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    tiny = mgpu_utils.c(2.0**-14, f32)

    def word_of(register, inverse):
      inverse = fa.mulf(_element(inverse, 0), tiny)  # exact: float32 has subnormals here
      values = [
        fa.mulf(arith.bitcast(f32, half), inverse)
        for pair in _pairs(register)
        for half in _halves(pair)
      ]
      magnitudes = signs = mgpu_utils.c(0, i32)
      for j in range(4):  # values j and j + 4: their nibbles lie 16 bits apart, as they do
        code = mgpu_utils.inline_ptx(
          "cvt.rn.f16x2.f32 $0, $1, $2;", values[j + 4], values[j], result_types=i32
        )
        odd = _and(_shifted(code, 9), 0x00010001)
        even = arith.addi(arith.addi(code, mgpu_utils.c(0x00FF00FF, i32)), odd)
        magnitudes = arith.ori(magnitudes, _shifted(_and(even, 0x1E001E00), 9 - 4 * j))
        signs = arith.ori(signs, _shifted(_and(code, 0x80008000), 12 - 4 * j))
      if clips:  # 8 is 7, the code of 6
        magnitudes = arith.subi(magnitudes, _and(_shifted(magnitudes, 3), 0x11111111))
      return arith.ori(magnitudes, signs)

    return _map(word_of, layout, [x, inverse], is_signed=False)

  return words(x, inverse)


def _of_lanes(x, dtype, layout):
  return plgpu.ShapeDtypeStruct(x.shape[:-1], dtype, layout=layout.reduce(x.ndim - 1))


def _map(f, layout, arrays, is_signed):
  """One word of each register of the arrays, in the layout that lacks the last axis."""
  x = arrays[0]
  target = layout.reduce(len(x.shape) - 1).to_mgpu()
  words = [f(*registers) for registers in zip(*(a.registers.flat for a in arrays), strict=True)]
  registers = x.registers.copy()
  registers.flat = [vector.from_elements(ir.VectorType.get((1,), w.type), [w]) for w in words]
  registers = registers.reshape(target.registers_shape(x.shape[:-1]))
  return fa.FragmentedArray(_registers=registers, _layout=target, _is_signed=is_signed)


def _pairs(register):
  i32 = ir.IntegerType.get_signless(32)
  words = vector.bitcast(ir.VectorType.get((4,), i32), register)
  return [_element(words, i) for i in range(4)]


def _halves(pair):
  """The bits of the float32 values of two bf16, the lower first."""
  return _shifted(pair, -16), _and(pair, 0xFFFF0000)


def _element(v, i):
  place = ir.DenseI64ArrayAttr.get([i])
  return vector.extract(v, dynamic_position=[], static_position=place)


def _and(word, mask):
  return arith.andi(word, mgpu_utils.c(mask - (mask >> 31 << 32), word.type))


def _shifted(word, right):
  shift = arith.shrui if right > 0 else arith.shli
  return shift(word, mgpu_utils.c(abs(right), word.type)) if right else word
