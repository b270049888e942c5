"""Outlier fallback (arXiv 2605.20402): a second pass quantizes what the first one lost."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from fp4jax import float_bits as fb
from fp4jax.formats import WHOLE, Format
from fp4jax.formats.based import Based
from fp4jax.formats.format import Rounded
from fp4jax.formats.roundings import fold_in
from fp4jax.quantizers.quantizer import Composed, Operand, Read


@dataclasses.dataclass(frozen=True)
class OutlierFallback(Composed):
  """x1 + alpha * Q(x - x1) with x1 = Q(x), for all blocks.

  The two are terms of their own, each in the format: a GEMM of two such operands is four. The paper
  takes alpha = 1/2, which did better than the full correction of 1.
  """

  operand: Operand
  alpha: float = 0.5

  @property
  def packed_format(self) -> "TwoTerms":
    """In which weights are packed that it reads."""
    return TwoTerms(self.operand.format, self.alpha)

  def read(self, x, axis, ctx):
    x = self.operand.transformed(x, axis, ctx)
    first = self.operand.rounded(x, axis, ctx)
    rest = x.astype(jnp.float32) - first.astype(jnp.float32)
    key = None if ctx.key is None else fold_in(ctx.key, 1)
    second = self.operand.rounded(rest, axis, ctx._replace(key=key))
    scaled = _scaled(second, self.alpha)
    values = first.astype(jnp.float32) + scaled.astype(jnp.float32)
    summary = self.operand.summary(x, axis, ctx, values)
    return Read((first, scaled), original=x, summary=summary)


def _scaled(x: Float[Array, "*s"], alpha: float) -> Float[Array, "*s"]:
  """alpha * x; in x's dtype where alpha is a power of two, which needs no more bits."""
  dtype = x.dtype if _is_power_of_two(alpha) else jnp.float32
  return (alpha * x.astype(jnp.float32)).astype(dtype)


def _is_power_of_two(alpha: float) -> bool:
  return math.frexp(alpha)[0] == 0.5


@dataclasses.dataclass(frozen=True)
class TwoTerms(Based):
  """How weights are packed that `OutlierFallback` reads: both codes of a value in one byte.

  The scales of the second pass lie behind those of the first, along the last axis.
  """

  base: Format
  alpha: float

  element_bits = 8
  dequantized_dtype = jnp.dtype(jnp.float32)

  @property
  def name(self) -> str:
    return f"{self.base.name}+{self.alpha:g}*{self.base.name}"

  @property
  def scale_rule(self):
    return self.base.scale_rule

  @property
  def bits_per_value(self) -> float:
    return 2 * self.base.bits_per_value

  def obstacle(self) -> str | None:
    """Why weights can't be packed so."""
    if self.base.element_bits != 4:
      return f"two codes of {self.base.name} do not fill a byte"
    if not _is_power_of_two(self.alpha) and self._dtype != jnp.float32:
      return f"alpha={self.alpha:g} is no power of two: its terms have two dtypes"
    return None

  @property
  def _dtype(self):
    return self.base.dequantized_dtype

  def round(self, x, axis, random_bits=None, slices=WHOLE) -> Rounded:
    """To nearest.

    Raises:
      ValueError: random bits, of which two passes would need two.
    """
    if random_bits is not None:
      raise ValueError(f"{self.name} rounds to nearest alone")
    first = self.base.round(x, axis, None, slices)
    rest = x - fb.saturate(self.base.values(first), self._dtype).astype(jnp.float32)
    second = self.base.round(rest, axis, None, slices)
    return first._replace(slice_scale=(first.slice_scale, second))

  def store(self, r):
    (first, scales, slice_scale), (second, *behind) = map(self.base.store, _passes(r))
    scales = jnp.concatenate([scales, behind[0]], axis=-1)
    return first | (second << 4), scales, (slice_scale, behind[1])

  def ideal(self, r):
    raise ValueError(f"{self.name} has no parts of its error: the second pass mends the first's")

  def values(self, r):
    first, second = (self.base.values(one) for one in _passes(r))
    return first + self.alpha * second

  def load(self, codes, scales, slice_scale):
    first, second = self.terms(codes, scales, slice_scale)
    return first.astype(jnp.float32) + second.astype(jnp.float32)

  def terms(self, codes, scales, slice_scale) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """As `OutlierFallback` gives them to a GEMM, of what `store` gave."""
    parts = zip((codes & 15, codes >> 4), jnp.split(scales, 2, axis=-1), slice_scale, strict=True)
    first, second = (self.base.load(*part) for part in parts)
    first, second = (fb.saturate(term, self._dtype) for term in (first, second))
    return first, _scaled(second, self.alpha)


def _passes(r: Rounded) -> tuple[Rounded, Rounded]:
  slice_scale, second = r.slice_scale
  return r._replace(slice_scale=slice_scale), second
