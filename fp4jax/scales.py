"""From the largest magnitude of a block to its stored scale, and back.

Each rule of `BlockFormat.scale_rule` is one line of integer arithmetic on the bits of amax.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8

from fp4jax import float_bits as fb
from fp4jax.formats import E8M0, FP32, BlockFormat

StoredScale = UInt8[Array, "*s"] | Float32[Array, "*s"]
NAN_CODE_E8M0 = 255
_E8M0_BIAS = 127
_NAN = np.float32(np.nan)


def scale_exponent(amax: Int32[Array, "*s"], fmt: BlockFormat) -> Int32[Array, "*s"]:
  """Unclamped exponent of the power-of-two scale of a block, from the bits of its amax.

  Subnormal and zero amax have exponent field 0, that is -127 or less, where every scale clamps.
  """
  info = ml_dtypes.finfo(fmt.element_dtype)
  q_max_exponent = int(np.floor(np.log2(fmt.q_max)))
  match fmt.scale_rule:
    case "floor":
      bits = amax
    case "even":
      # Half a unit of the element's last mantissa bit: the top half carries into the exponent.
      bits = amax + (1 << (22 - info.nmant))
    case "rceil":
      bits = _carry_above(amax, fmt.q_max)
    case "oas":
      bits = _carry_above(amax, 7.0)
  return (bits >> 23) - 127 - q_max_exponent


def _carry_above(amax, limit):
  """Carries into the exponent where amax's mantissa exceeds `limit`'s: ceil(log2(amax / limit))."""
  limit_mantissa = int(np.float32(limit).view(np.int32)) & fb.MANTISSA_MASK
  return amax + (fb.MANTISSA_MASK - limit_mantissa)


def tensor_scale(amax: Int32[Array, ""], fmt: BlockFormat) -> Float32[Array, ""]:
  """Scale of the whole tensor: its finite amax falls on q_max * 448. 1 for a tensor of zeros.

  At least 2^-126, which keeps it and its reciprocal normal.
  """
  target = fmt.q_max * float(ml_dtypes.finfo(fmt.scale_dtype).max)
  encode = jnp.minimum(target / fb.from_bits(jnp.maximum(amax, fb.SMALLEST_NORMAL)), 2.0**126)
  return jnp.where(amax == 0, 1.0, 1.0 / encode)


def encode(
  amax: Int32[Array, "*s"], fmt: BlockFormat, global_scale: Float32[Array, ""] | None
) -> StoredScale:
  """The scale of each block as `fmt` stores it; NaN where amax is not finite.

  Args:
    amax: bits of each block's largest magnitude.
    fmt: the format.
    global_scale: the tensor scale, for formats that have one.
  Returns:
    uint8 codes of `fmt.scale_dtype`, or float32 scales.
  """
  finite = amax < fb.EXPONENT_MASK
  if fmt.scale_dtype == E8M0:
    code = jnp.clip(scale_exponent(amax, fmt) + _E8M0_BIAS, 0, 254)
    return jnp.where(finite, code, NAN_CODE_E8M0).astype(jnp.uint8)
  if fmt.has_power_of_two_scales:
    return jnp.where(finite, fb.exp2(scale_exponent(amax, fmt)), _NAN)
  factor = 1.0 / fmt.q_max if global_scale is None else (1.0 / global_scale) * (1.0 / fmt.q_max)
  scale = fb.multiply(amax, jnp.full_like(amax, factor, jnp.float32))
  if fmt.scale_dtype == FP32:
    return jnp.where(finite, jnp.maximum(scale, 2.0**-126), _NAN)
  scale = jnp.where(finite, fb.round_to_grid(scale, fmt.scale_dtype), _NAN)
  return lax.bitcast_convert_type(scale.astype(fmt.scale_dtype), jnp.uint8)


def decode(scales: StoredScale, fmt: BlockFormat) -> Float32[Array, "*s"]:
  """The value of every stored E4M3 or float32 scale. E8M0 has exponents instead: `exponent`."""
  if fmt.scale_dtype == FP32:
    return scales
  return lax.bitcast_convert_type(scales, fmt.scale_dtype).astype(jnp.float32)


def exponent(scales: UInt8[Array, "*s"]) -> Int32[Array, "*s"]:
  """The exponent of every E8M0 scale; that of code 255, NaN, is 128."""
  return scales.astype(jnp.int32) - _E8M0_BIAS


def reciprocal(scales: StoredScale, fmt: BlockFormat) -> Float32[Array, "*s"]:
  """What elements are multiplied by before rounding: 1 / scale, and 0 where that is not finite."""
  if fmt.scale_dtype == E8M0:
    return jnp.where(scales == NAN_CODE_E8M0, 0.0, fb.exp2(-exponent(scales)))
  value = decode(scales, fmt)
  return jnp.where(value > 0, 1.0 / value, 0.0)
