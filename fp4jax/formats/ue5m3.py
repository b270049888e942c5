"""NVFP4's blocks of 16 under UE5M3 scales, without a scale of the slice (arXiv 2605.08565).

UE5M3 is E4M3 with its sign bit given to the exponent: bias 15, no sign, subnormals of 2^-17. It
reaches 1.75 * 2^16; code 255 is NaN, as E4M3 has it. The 34 binades replace the scale per slice, so
that blocks do not depend on one another. Amax falls on 6; block maxima beyond 6 * 114688 saturate,
and those below 6 * 2^-18 have a scale of zero.
"""

import dataclasses

import jax.numpy as jnp

from fp4jax import float_bits as fb
from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.grids import E2M1
from fp4jax.formats.scales import SmallFloat

_MANTISSA_BITS = 3
_SMALLEST_NORMAL = 2.0**-14
_BIAS = (127 - 15) << _MANTISSA_BITS  # between the leading bits of a float32 and a code


@dataclasses.dataclass(frozen=True)
class UE5M3Grid:
  """Unsigned magnitudes; to nearest, ties to even, saturating."""

  name: str = "ue5m3"
  bits: int = 8
  max: float = 1.75 * 2.0**16
  smallest: float = 2.0**-17
  first_midpoint: float = 2.0**-18
  mantissa_bits: int = _MANTISSA_BITS

  @property
  def magnitudes(self) -> tuple[float, ...]:
    return tuple(self.decode(jnp.arange(255)).tolist())

  def round(self, x, random_bits=None):
    if random_bits is not None:
      raise ValueError("UE5M3 scales round to nearest, not stochastically")
    x = jnp.minimum(x, self.max)
    binade = fb.to_bits(jnp.maximum(x, _SMALLEST_NORMAL)) & fb.EXPONENT_MASK
    # Adding 2^23 steps leaves no fraction bit below one step, so the addition itself rounds.
    shift = fb.from_bits(binade + (23 - _MANTISSA_BITS << 23))
    return jnp.minimum((x + shift) - shift, self.max)

  def encode(self, elements):
    normal = (fb.to_bits(elements) >> 23 - _MANTISSA_BITS) - _BIAS
    subnormal = (jnp.minimum(elements, _SMALLEST_NORMAL) / self.smallest).astype(jnp.int32)
    return jnp.where(elements < _SMALLEST_NORMAL, subnormal, normal).astype(jnp.uint8)

  def decode(self, codes):
    codes = codes.astype(jnp.int32)
    normal = fb.from_bits(codes + _BIAS << 23 - _MANTISSA_BITS)
    return jnp.where(codes < 8, codes.astype(jnp.float32) * self.smallest, normal)


UE5M3 = SmallFloat(UE5M3Grid(), nan=255)

NVFP4_UE5M3 = BlockFormat(
  name="NVFP4_UE5M3",
  element_dtype=E2M1,
  block_shape=(16,),
  scale_dtype=UE5M3,
  scale_rule="nearest",
)
