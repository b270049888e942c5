"""What a format has in common with the one that it stores as."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from fp4jax.formats.format import Format, Ideal, Rounded


class Based:
  """A `Format` in all but `round` and `scale_rule`: it stores, and is read and judged, as `base`.

  A subclass says what else differs.
  """

  base: Format
  scale_rule: str

  @property
  def block_shape(self) -> tuple[int, ...] | None:
    return self.base.block_shape

  @property
  def has_tensor_scale(self) -> bool:
    return self.base.has_tensor_scale

  @property
  def element_bits(self) -> int:
    return self.base.element_bits

  @property
  def bits_per_value(self) -> float:
    return self.base.bits_per_value

  @property
  def dequantized_dtype(self) -> jnp.dtype:
    return self.base.dequantized_dtype

  def values(self, r: Rounded) -> Float32[Array, "*s"]:
    return self.base.values(r)

  def ideal(self, r: Rounded) -> Ideal:
    return self.base.ideal(r)

  def clipped(self, r: Rounded) -> Bool[Array, "*s"]:
    return self.base.clipped(r)

  def store(self, r: Rounded):
    return self.base.store(r)

  def load(self, codes, scales, slice_scale):
    return self.base.load(codes, scales, slice_scale)
