"""QuEST (arXiv 2502.05003) as Quartet's forward pass (arXiv 2505.14669): clip at the deviation."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from fp4jax import float_bits as fb
from fp4jax import names
from fp4jax import quantization as qz
from fp4jax.formats import MXFP4, WHOLE
from fp4jax.formats.based import Based
from fp4jax.formats.format import Rounded
from fp4jax.formats.search import ordered_sum, squared_error
from fp4jax.quantizers.quantizer import Composed, Operand, pad_to_blocks
from fp4jax.quantizers.transform import Hadamard

_CLIP = 2.92247856  # deviations of a Gaussian: where E2M1's largest element errs least
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviationFormat(Based):
  """MXFP4 whose scale comes from the standard deviation of a block, its mean removed.

  The scale is 2^e with e the nearest integer to log2(2.92247856 / 6 * deviation + 1e-8), which
  gives the errors that the paper prints; the published code takes the integer below ("floor").
  Values beyond 6 scales are clipped: about 0.8 % of a Gaussian's, 5.3 % with "floor". A constant
  block has no deviation and becomes zero, and so does, once rotated, a value alone at the first
  place of a block.
  """

  name: str = dataclasses.field(compare=False)
  exponent: Literal["nearest", "floor"] = "nearest"

  def __post_init__(self):
    if self.exponent not in ("nearest", "floor"):
      raise ValueError(f"exponent={self.exponent!r} is not 'nearest' or 'floor'")
    names.settle(self)

  base = MXFP4

  @property
  def scale_rule(self) -> str:
    return f"deviation, {self.exponent}"

  def round(self, x, axis, random_bits=None, slices=WHOLE) -> Rounded:
    r = self.base.round(x, axis, None, slices)
    scales = self._scales(r, 2 * (axis % x.ndim) + 1)
    scaled = fb.multiply(r.magnitude, self.base.codec.reciprocal(scales))
    if random_bits is not None:
      random_bits = random_bits.reshape(scaled.shape)
    elements = jnp.copysign(self.base.grid.round(scaled, random_bits), r.elements)
    return r._replace(elements=elements, scales=scales, scaled=scaled, random_bits=random_bits)

  def _scales(self, r: Rounded, within: int):
    """No product meets a sum that is not exact, so that no fused multiply-add changes a scale."""
    finite = r.amax < fb.EXPONENT_MASK
    amax = jnp.where(finite, r.amax, 0)
    exponent, n = jnp.maximum(127 - (amax >> 23), -126), r.elements.shape[within]
    x = jnp.copysign(fb.from_bits(r.magnitude), r.elements) * fb.exp2(exponent)
    mean = ordered_sum(x, (within,)) * (1 / n)
    one = jnp.full_like(amax, 127 << 23)
    variance = squared_error(x - mean, one, (within,)) * (1 / n)
    deviation = jnp.sqrt(variance) * fb.exp2(-exponent)
    scale = jnp.minimum(_CLIP / 6 * deviation, 2.0**127) + _EPSILON
    if self.exponent == "nearest":
      scale = scale * 2**0.5
    code = jnp.clip(fb.to_bits(scale) >> 23, 0, 254)  # E8M0's bias is that of float32
    return jnp.where(finite, code, 255).astype(jnp.uint8)


MXFP4_QUEST = DeviationFormat(name="MXFP4_QUEST")


@dataclasses.dataclass(frozen=True)
class Quest(Composed):
  """Rotated by a Hadamard transform without signs, then clipped and rounded by `DeviationFormat`.

  For both operands of fprop. The gradient of a clipped value is zero, in the rotated space; so
  dgrad.rhs and wgrad.lhs read what fprop read, `source="fprop"`. A bit per value would do for the
  mask; it is kept as a byte.
  """

  operand: Operand = Operand(MXFP4_QUEST, transform=Hadamard(32, seed=None))  # noqa: RUF009

  pulls_transformed = True

  def read(self, x, axis, ctx):
    read = self.operand.read(x, axis, ctx)
    padded = pad_to_blocks(read.original, self.format, axis)
    r = qz.round_blocks(padded, self.format, axis, self.rounding, ctx.key, ctx.slices)
    return read._replace(saved=(r.scaled < 6).reshape(padded.shape))

  def pull(self, saved, g):
    return jnp.where(saved, g, 0)
