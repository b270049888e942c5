"""MS-EDEN (Quartet II, arXiv 2601.22813): unbiased by its scales rather than by its elements.

Elements go to the nearest; then the scales grow by what rounding took from the operand's length,
and are rounded stochastically: one draw per 16 values, and less than half the error of rounding
the elements stochastically. Together with a Hadamard transform of fresh signs the mean is x, in the
limit of long groups: for values like a Gaussian's at 128 already, not for a few among zeros.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32

from fp4jax import float_bits as fb
from fp4jax import names
from fp4jax.formats import NVFP4, WHOLE
from fp4jax.formats.based import Based
from fp4jax.formats.format import Rounded
from fp4jax.formats.scales import slice_scale
from fp4jax.quantizers.quantizer import Operand
from fp4jax.quantizers.transform import FreshHadamard

_BLOCK = 16
_AMAX_AT = 6 / (17 / 16 * 0.93)  # 0.93 errs least; 17/16 leaves room for the scale's rounding
_SCALES_UP_TO = 255.99  # leaves E4M3 room for growth


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdenFormat(Based):
  """NVFP4 whose block scales are refit: times sum x^2 / sum x q over `group` values, then rounded.

  Stochastic rounding rounds those scales, never the elements. The slice's scale maps its amax to
  255.99 * 6.07. A block whose first scale rounds to zero takes 1; one with a NaN counts in no
  growth.
  """

  name: str = dataclasses.field(compare=False)
  group: int = 128

  def __post_init__(self):
    if self.group < _BLOCK or self.group % _BLOCK:
      raise ValueError(f"group={self.group} is not a multiple of the block of {_BLOCK}")
    names.settle(self)

  base = NVFP4
  scale_rule = "eden"

  def round(self, x, axis, random_bits=None, slices=WHOLE) -> Rounded:
    axis %= x.ndim
    if x.shape[axis] % self.group:
      raise ValueError(f"axis {axis} of shape {x.shape} is not a multiple of {self.group=}")
    r = self.base.round(x, axis - x.ndim, None, slices)
    stored = self.base.codec.grid
    finite = r.amax < fb.EXPONENT_MASK
    amax = jnp.where(finite, r.amax, 0)
    unit = slice_scale(slices.amax(amax), _SCALES_UP_TO * _AMAX_AT)
    per_unit = fb.multiply(amax, jnp.broadcast_to(1 / unit, amax.shape))
    scale = stored.round(per_unit * (1 / _AMAX_AT), None)
    scale = jnp.where(scale > 0, scale, 1.0)
    magnitude = fb.multiply(r.magnitude, jnp.broadcast_to(1 / unit, r.magnitude.shape))
    scaled = magnitude * (1 / scale)
    elements = self.base.grid.round(scaled, None)
    if random_bits is not None:  # the first of each block
      random_bits = random_bits.reshape(r.elements.shape)
      random_bits = jnp.take(random_bits, jnp.array([0]), 2 * axis + 1)
    scale = stored.round(scale * self._growth(magnitude, elements * scale, axis), random_bits)
    codes = jnp.where(finite, stored.encode(scale), self.base.codec.nan).astype(jnp.uint8)
    elements = jnp.copysign(elements, r.elements)
    return r._replace(elements=elements, scales=codes, slice_scale=unit, scaled=scaled)

  def _growth(self, x, q, axis) -> Float32[Array, "*u"]:
    """sum x^2 / sum x q over each group, for each of its blocks; any where all q are 0."""
    blocks = self.group // _BLOCK

    def sum_of(products):
      sums = jnp.sum(products, 2 * axis + 1, keepdims=True)
      shape = (*sums.shape[: 2 * axis], -1, blocks, *sums.shape[2 * axis + 1 :])
      total = jnp.sum(sums.reshape(shape), 2 * axis + 1)
      return jnp.repeat(total, blocks, 2 * axis)

    product = sum_of(x * q)
    return sum_of(x * x) / jnp.where(product > 0, product, 1)


NVFP4_EDEN = EdenFormat(name="NVFP4_EDEN")
# For both operands of dgrad and of wgrad, which share the signs.
EDEN = Operand(NVFP4_EDEN, "stochastic", FreshHadamard(128))
