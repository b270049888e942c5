"""Eight bf16 values of a lane and a word of E2M1 nibbles, two values to a 32-bit instruction.

To round them: float16 holds bf16's eight bits, and 2^-14 lays E2M1's exponents over its smallest
ones, subnormals over subnormals: of such a float16 the bits from 9 up are the code and those below
it the fraction. What float16 can't hold lies below E2M1's 2^-4 and is rounded to zero all the same.
"""

import functools
import operator

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import packed as pk


def word_of(pairs, inverse, clips: bool):
  """A word of eight nibbles, of four words of two bf16 times the word `inverse` of a float32."""
  tiny = inverse.times_float(pk.float_bits(2.0**-14))  # exact: float32 has subnormals here
  scaled = [value.times_float(tiny) for value in pk.floats(pairs)]
  result = []
  for j in range(4):  # values j and j + 4: their nibbles lie 16 bits apart, as they do
    code = scaled[j + 4].to_float16(scaled[j])
    even = code + 0x00FF00FF + ((code >> 9) & 0x00010001)
    magnitude, sign = even & 0x1E001E00, code & 0x80008000
    result.append((_right(magnitude, 9 - 4 * j), _right(sign, 12 - 4 * j)))
  magnitudes, signs = (functools.reduce(operator.or_, words) for words in zip(*result, strict=True))
  if clips:  # 8 is 7, the code of 6
    magnitudes = magnitudes - ((magnitudes >> 3) & 0x11111111)
  return magnitudes | signs


def _right(word, places):
  return word >> places if places > 0 else word << -places


def rounded(x, inverse, layout, *, clips: bool):
  """E2M1 of x times its block's `inverse`, to nearest, ties to even: a word of nibbles a lane.

  Args:
    x: (..., 4, 8) bfloat16; below 8 after the multiplication, or else the word means nothing.
    inverse: (...) float32, powers of two.
    clips: whether values may round to 8, which E2M1 lacks.
  """
  shape, of_lanes = x.shape[:-1], layout.reduce(x.ndim - 1)

  @plgpu.inline_mgpu(
    arg_types=(layout, layout.reduce((x.ndim - 2, x.ndim - 1))),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=of_lanes),
  )
  def words(ctx, x: fa.FragmentedArray, inverse: fa.FragmentedArray):
    del ctx
    registers = zip(pk.registers(x), pk.registers(inverse), strict=True)
    words = [[word_of(pairs, factor, clips)] for pairs, (factor,) in registers]
    return pk.fragmented(words, shape, jnp.uint32, of_lanes)

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
