"""Eight bf16 values of a lane and a word of E2M1 nibbles, two values to a 32-bit instruction.

To round them: float16 holds bf16's eight bits, and 2^-14 lays E2M1's exponents over its smallest
ones, subnormals over subnormals: of such a float16 the bits from 9 up are the code and those below
it the fraction. What float16 can't hold lies below E2M1's 2^-4 and is rounded to zero all the same.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import packed as pk


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


def expand(word):
  """Four words of two bf16, one for each byte of E2M1 nibbles: values times 2^-126.

  E2M1's three bits of magnitude are the lowest of bf16's exponent and the highest of its fraction,
  its subnormals bf16's. One multiplication puts them there and the sign at the top.
  """
  low, high = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
  # Bytes: low nibble, 0 (the sign of one below 16), high nibble, 0.
  apart = [low.permute(high, i | (8 + i) << 4 | (4 + i) << 8 | (8 + i) << 12) for i in range(4)]
  return [(a * (1 << 6 | 1 << 12)) & 0x81C081C0 for a in apart]


def values_of(word, scale):
  """Four words of two bf16, of eight nibbles and the E8M0 code of their block: NaN for 255."""
  # The codes 0 and 255 have the bit below the exponent: 2^-127 is subnormal, and NaN no infinity.
  special = ((scale + 1) & 0xFE).equals(0).where(0x40, 0)
  factor = ((scale << 7) | special) * 0x00010001
  return [v.times_bf16(0x7E807E80).times_bf16(factor) for v in expand(word)]


def values(words, scales, layout):
  """bf16 (..., 4, 8) in `layout`, of words (..., 4) of eight nibbles and E8M0 codes (...)."""
  shape, of_lanes = (*words.shape, 8), layout.reduce(words.ndim)
  scales = lax.broadcast_in_dim(scales.astype(jnp.int32), words.shape, range(words.ndim - 1))

  @plgpu.inline_mgpu(
    arg_types=(of_lanes, of_lanes),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=layout),
  )
  def expanded(ctx, words: fa.FragmentedArray, scales: fa.FragmentedArray):
    del ctx
    registers = zip(pk.registers(words), pk.registers(scales), strict=True)
    pairs = [values_of(word, scale) for (word,), (scale,) in registers]
    return pk.fragmented(pairs, shape, jnp.bfloat16, layout)

  return expanded(words, scales)


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
