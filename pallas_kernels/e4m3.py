"""E4M3 of blocks of 128 values, bf16 or float32: a scale for each, and the codes.

    scale = amax / 448, or the power of two at or above it; code = E4M3(x / scale)

No instruction clips: by roundings alone a value over its scale exceeds 448, and what is below 464
rounds to it.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl
from pallas_kernels import packed as pk


def scale(amax, power_of_two: bool):
  """(scale, what values are multiplied by): amax falls on 448 or, rounded up to 2^n, below it.

  NaN and 0 where amax, the bits of a float32 magnitude, is not finite. A scale is at least 2^-126,
  which keeps its reciprocal normal.
  """
  finite = amax < bl.INFINITY
  if power_of_two:
    # 448 has the mantissa 0x600000: what lies above carries into the exponent.
    exponent = jnp.maximum(((amax + 0x1FFFFF) >> 23) - 8, 1)
    scale, inverse = bl.floats(exponent << 23), bl.floats((254 - exponent) << 23)
  else:
    scale = jnp.maximum(bl.floats(amax) * np.float32(1 / 448), 2.0**-126)
    inverse = 1.0 / scale
  return jnp.where(finite, scale, jnp.nan), jnp.where(finite, inverse, 0.0)


def rounded(x, inverse):
  """Codes of x times its block's `inverse`; 0 where the block has no scale."""
  return jnp.where(inverse > 0, x.astype(jnp.float32) * inverse, 0.0).astype(bl.E4M3)


def quantize(x, layout, power_of_two: bool):
  """Codes of x (row, ..., 8), bfloat16 or float32, in `layout`, whose lanes hold eight values of
  the last axis, and a scale (row,) each."""
  amax = bl.largest(x, layout)
  while amax.ndim > 1:
    amax = jnp.max(amax, axis=1)
  own, inverse = scale(amax, power_of_two)
  return _codes(x, lax.broadcast_in_dim(inverse, x.shape[:-1], (0,)), layout), own


def codes_of(values, inverse):
  """Words of four codes each: of float32 words times the word `inverse`."""
  scaled = [value.times_float(inverse) for value in values]
  words = [scaled[i].to_e4m3(*scaled[i + 1 : i + 4]) for i in range(0, len(scaled), 4)]
  return [inverse.above(0).where(word, 0) for word in words]


def _codes(x, inverse, layout):
  @plgpu.inline_mgpu(
    arg_types=(layout, layout.reduce(x.ndim - 1)),
    return_type=plgpu.ShapeDtypeStruct(x.shape, bl.E4M3, layout=layout),
  )
  def codes(ctx, values: fa.FragmentedArray, inverse: fa.FragmentedArray):
    del ctx
    floats = pk.floats if x.dtype == jnp.bfloat16 else list
    registers = zip(pk.registers(values), pk.registers(inverse), strict=True)
    words = [codes_of(floats(words), factor) for words, (factor,) in registers]
    return pk.fragmented(words, x.shape, bl.E4M3, layout)

  return codes(x, inverse)
