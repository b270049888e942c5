"""Float32 arithmetic on the bits, exact where a backend's floats are not.

XLA on the CPU flushes subnormal float32 inputs and results to zero; XLA on the GPU keeps them. What
must be the same on both, and equal to the definition, is computed here from exponent and mantissa.
Magnitudes are passed as int32 bit patterns with the sign cleared, which order as the values do.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

ABS_MASK = 0x7FFFFFFF
EXPONENT_MASK = 0x7F800000  # also the bits of infinity; above it lie the NaNs
MANTISSA_MASK = 0x007FFFFF
SMALLEST_NORMAL = 0x00800000  # the bits of 2^-126
_BIAS = 127
_NAN_BITS = 0x7FC00000
_FRACTION_BITS = 18  # of a stochastic rounding's uniform: its sum with a small integer is exact


def to_bits(x: Float32[Array, "*s"]) -> Int32[Array, "*s"]:
  return lax.bitcast_convert_type(x, jnp.int32)


def from_bits(bits: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
  return lax.bitcast_convert_type(bits, jnp.float32)


def exp2(exponent: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
  """2^exponent for exponents in [-126, 127]; those outside are clamped to it."""
  return from_bits((jnp.clip(exponent, -126, 127) + _BIAS) << 23)


def multiply(magnitude: Int32[Array, "*s"], factor: Float32[Array, "*#s"]) -> Float32[Array, "*s"]:
  """|x| * factor, reading subnormal |x| exactly; factor is zero or normal.

  A subnormal |x| is its mantissa field times 2^-149, and that field converts to a normal float. Its
  exponent is lowered on the bits, since XLA would fold two constant factors into one, subnormal.
  """
  field = to_bits(magnitude.astype(jnp.float32))
  subnormal = from_bits(jnp.maximum(field - (75 << 23), 0)) * (factor * 2.0**-74)
  return jnp.where(magnitude < SMALLEST_NORMAL, subnormal, from_bits(magnitude) * factor)


def ldexp(element: Float32[Array, "*s"], exponent: Int32[Array, "*#s"]) -> Float32[Array, "*s"]:
  """element * 2^exponent, exact into the subnormals; element is on a grid of at most 8 bits.

  A subnormal result is the integer element * 2^(exponent + 149) taken as bits.
  """
  half = exponent >> 1
  normal = (element * exp2(exponent - half)) * exp2(half)
  lifted = jnp.abs(element) * exp2(exponent + 149)
  sign = to_bits(element) & ~ABS_MASK
  subnormal = lifted.astype(jnp.int32) | sign
  # Chosen as bits: those of what is not chosen may be a NaN's.
  return from_bits(jnp.where(lifted < 2.0**23, subnormal, to_bits(normal)))


def round_to_grid(
  x: Float32[Array, "*s"], dtype: DTypeLike, random_bits: UInt32[Array, "*s"] | None = None
) -> Float32[Array, "*s"]:
  """Rounds x >= 0 to a value of the float `dtype`, saturating at its maximum.

  Ties to even; with `random_bits`, up with a probability of the distance to the value below in
  steps (within 2^-19, the resolution of the draw).
  """
  info = ml_dtypes.finfo(dtype)
  x = jnp.minimum(x, float(info.max))  # beyond, the shift below would overflow
  exponent = jnp.maximum(to_bits(x) & EXPONENT_MASK, (info.minexp + _BIAS) << 23)
  if random_bits is None:
    # Adding 2^23 steps leaves no fraction bit below one step, so the addition itself rounds.
    shift = from_bits(exponent + ((23 - info.nmant) << 23))
    rounded = (x + shift) - shift
  else:
    step = from_bits(exponent - (info.nmant << 23))
    steps = from_bits((2 * _BIAS << 23) - exponent + (info.nmant << 23))  # 1 / step
    rounded = jnp.floor(x * steps + uniform(random_bits)) * step
  return jnp.minimum(rounded, float(info.max))


def uniform(random_bits: UInt32[Array, "*s"]) -> Float32[Array, "*s"]:
  """In (0, 1), on a grid so coarse that its sum with a small integer is exact."""
  fraction = (random_bits >> (32 - _FRACTION_BITS)).astype(jnp.int32).astype(jnp.float32)
  return (fraction + 0.5) * 2.0**-_FRACTION_BITS


def nan_where(lost: Bool[Array, "*#s"], x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
  """x, NaN where `lost`. On the bits: no NaN is made where none is lost, not even a constant."""
  return from_bits(jnp.where(lost, _NAN_BITS, to_bits(x)))


def saturate(x: Float32[Array, "*s"], dtype: DTypeLike) -> Float[Array, "*s"]:
  """x in `dtype`, an overflow as its largest finite value: an infinity too, NaN stays."""
  largest = int(np.float32(jnp.finfo(dtype).max).view(np.int32))
  bits = to_bits(x)
  magnitude = bits & ABS_MASK
  finite = jnp.where(magnitude > EXPONENT_MASK, magnitude, jnp.minimum(magnitude, largest))
  return from_bits(finite | (bits & ~ABS_MASK)).astype(dtype)
