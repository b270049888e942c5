"""What fp4jax asks of a format, and how blocks lie in an array.

`Format` is a protocol: `BlockFormat` is the common case, one scale per block; a format with more
levels of scales, or one that searches for its scales, is a class of its own in a file of its own.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt8, UInt32

from fp4jax.formats.scales import StoredScale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slices:
  """Which values share a scale of the whole slice: what one GEMM reads, never a stack of those.

  Each index of the first `leading` axes is a slice. With `owner`, so are the entries along axis 0
  that have the same owner, such as the rows of one expert. By default the whole array is one.
  """

  leading: int = dataclasses.field(default=0, metadata={"static": True})
  owner: Int[Array, " n"] | None = None
  owners: int = dataclasses.field(default=0, metadata={"static": True})

  @property
  def axes(self) -> int:
    """Axes that tell slices apart."""
    return self.leading if self.owner is None else 1

  def amax(self, amax: Int32[Array, "*u"]) -> Int32[Array, "*w"]:
    """The largest amax of each slice; `amax` is in block view, and so is the result."""
    rest = tuple(range(2 * self.axes, amax.ndim))
    top = jnp.max(amax, axis=rest, keepdims=True, initial=0)
    if self.owner is None:
      return top
    return jax.ops.segment_max(top, self.owner, self.owners)[self.owner]


WHOLE = Slices()


class Rounded(NamedTuple):
  """x rounded to a format, in block view: axis i of x is axes 2i (blocks) and 2i + 1 (within)."""

  shape: tuple[int, ...]  # of x
  elements: Float32[Array, "*v"]  # on the element grid, with x's signs
  scales: StoredScale  # within-axes of length 1
  slice_scale: Any  # the scale of an outer level: of the whole slice, of a macro block; or None
  scaled: Float32[Array, "*v"]  # |x| / scale before rounding
  magnitude: Int32[Array, "*v"]  # bits of |x|
  amax: Int32[Array, "*u"]  # bits of each block's largest magnitude
  random_bits: UInt32[Array, "*v"] | None


class Ideal(NamedTuple):
  """Q*(x), the same rounding on the grid of the unrounded scale s* of each block; x's shape."""

  values: Float32[Array, "*s"]
  in_deadzone: Bool[Array, "*s"]  # |x| < q_min / 2 * s*: Q* rounds to zero


@runtime_checkable
class Format(Protocol):
  """How values are rounded and stored. Instances are frozen, hashable, equal by what they compute.

  `round` makes a `Rounded`, which the next three read; `store` and `load` are for packed arrays.
  A block with a NaN or an infinity is NaN as a whole, and other blocks are untouched.
  """

  name: str
  block_shape: tuple[int, ...] | None  # (32,), (128, 128), or None for one block per slice
  has_tensor_scale: bool  # whether blocks of one slice depend on one another by a scale of it
  element_bits: int
  bits_per_value: float  # the value's share of the scales included
  scale_rule: Any  # how the scale is chosen, for tables
  dequantized_dtype: DTypeLike  # narrowest of bfloat16 and float32 that holds every value

  def round(
    self,
    x: Float32[Array, "*s"],
    axis: int,
    random_bits: UInt32[Array, "*s"] | None,
    slices: Slices,
  ) -> Rounded:
    """x in blocks along the negative `axis`: to nearest, or stochastically with random bits."""

  def values(self, r: Rounded) -> Float32[Array, "*s"]:
    """The rounded values, of x's shape, saturated in float32."""

  def ideal(self, r: Rounded) -> Ideal: ...

  def clipped(self, r: Rounded) -> Bool[Array, "*s"]:
    """Where |x| lay beyond the largest element times the scale."""

  def store(self, r: Rounded) -> tuple[UInt8[Array, "*s"], Any, Any]:
    """One code per value, block scales, scale of the slice."""

  def load(self, codes: UInt8[Array, "*s"], scales: Any, slice_scale: Any) -> Float32[Array, "*s"]:
    """The values of what `store` gave."""


def is_format(value: Any) -> bool:
  return isinstance(value, Format) and not isinstance(value, type)


def block_axes(fmt: Format, axis: int) -> dict[int, int]:
  """Block length of every blocked axis, axes counted from the end: {-1: 32} for MXFP4."""
  if fmt.block_shape is None:
    return {}
  if len(fmt.block_shape) == 1:
    return {axis: fmt.block_shape[0]}
  return {axis: fmt.block_shape[1], -3 - axis: fmt.block_shape[0]}


def block_view(
  shape: tuple[int, ...], fmt: Format, axis: int, slices: Slices = WHOLE
) -> list[tuple[int, int]]:
  """(number of blocks, block length) of every axis; flattened, the shape in which blocks show."""
  if fmt.block_shape is None:
    return [(n, 1) if i < slices.axes else (1, n) for i, n in enumerate(shape)]
  blocks = block_axes(fmt, axis)
  return [
    (n // blocks.get(i - len(shape), 1), blocks.get(i - len(shape), 1)) for i, n in enumerate(shape)
  ]


def view_shape(view: list[tuple[int, int]]) -> list[int]:
  return [n for pair in view for n in pair]
