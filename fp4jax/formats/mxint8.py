"""MXINT8 of OCP Microscaling Formats v1.0: integers in blocks of 32 with an E8M0 scale.

An element is a two's complement byte times an implied 2^-6: steps of 1/64 up to 127/64. The
specification leaves code 128, which is -2, to the implementation; none is made here, so that a
value and its negative round alike, but one that is read is -2. There is no negative zero. Rule
"floor" as the specification has it.

Its largest element lies in the binade of 1, so that the floor of a block's largest value is the
scale itself, 2^127 in float32's last octave. The reciprocal of that one is subnormal, which XLA
flushes on a CPU: the largest scale is 2^126, and values beyond 127/64 * 2^126 saturate.
"""

import dataclasses

import jax.numpy as jnp

from fp4jax import float_bits as fb
from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.scales import PowerOfTwo


@dataclasses.dataclass(frozen=True)
class Int8Grid:
  """Multiples of 1/64; to nearest, ties to even, saturating at 127/64 on both sides."""

  name: str = "int8"
  bits: int = 8
  max: float = 127 / 64
  smallest: float = 1 / 64
  first_midpoint: float = 1 / 128
  mantissa_bits: int = 6

  @property
  def magnitudes(self) -> tuple[float, ...]:
    return tuple(i / 64 for i in range(128))

  def round(self, x, random_bits=None):
    steps = jnp.minimum(x, self.max) * 64
    if random_bits is None:
      return jnp.round(steps) / 64
    # The fraction apart: a sum with 64 and more has no room for all bits of the uniform number, and
    # could carry what is on the grid to its neighbour.
    low = jnp.floor(steps)
    return (low + jnp.floor(steps - low + fb.uniform(random_bits))) / 64

  def encode(self, elements):
    return ((elements * 64).astype(jnp.int32) & 255).astype(jnp.uint8)

  def decode(self, codes):
    return codes.astype(jnp.int8).astype(jnp.float32) / 64


@dataclasses.dataclass(frozen=True)
class InvertibleE8M0(PowerOfTwo):
  """E8M0 up to 2^126, so that every scale has a normal reciprocal."""

  max: float = 2.0**126

  def store(self, rule, grid, amax, unit=None):
    codes = super().store(rule, grid, amax, unit)
    return jnp.where(codes == 254, 253, codes).astype(jnp.uint8)


MXINT8 = BlockFormat(
  name="MXINT8",
  element_dtype=Int8Grid(),
  block_shape=(32,),
  scale_dtype=InvertibleE8M0(),
  scale_rule="floor",
)
