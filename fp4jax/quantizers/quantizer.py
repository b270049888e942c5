"""What a recipe says of one operand of one GEMM: how it is read, and what its gradient becomes.

`Operand` is the plain quantizer: transform, then round to a format. Every other one is a frozen
dataclass in a file of its own that obeys `Quantizer`, mostly by composing an `Operand`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from fp4jax import quantization as qz
from fp4jax.decomposition import SUMMARY_FIELDS, decompose_slices
from fp4jax.formats import WHOLE, Format, Rounding, Slices, is_format
from fp4jax.formats.format import block_axes
from fp4jax.formats.roundings import as_rounding
from fp4jax.quantizers.transform import Transform

Source = Literal["original", "residual", "fprop"]
Summary = Float32[Array, " field"]


class Context(NamedTuple):
  """What the layer hands to `read`, beside the operand."""

  key: jax.Array | None = None  # of this operand alone
  gemm_key: jax.Array | None = None  # of both operands of the GEMM
  state: Any = ()
  slices: Slices = WHOLE  # which values one GEMM reads, for scales of a whole slice
  tapped: bool = False  # whether a summary of the error is asked for
  length: int | None = None  # of the contracted axis, without its padding; None: there is none
  # The whole of what is read, from codes and scales of this device's part of the last axis.
  gather: Callable[[Any], Any] | None = None


class Read(NamedTuple):
  """An operand as its GEMM reads it: factor * (sum of terms + sum of exact).

  A term meets the other operand's terms; an exact one meets the other operand before rounding.
  """

  terms: tuple[Float[Array, "*s"], ...]
  exact: tuple[Float[Array, "*s"], ...] = ()
  factor: Any = 1.0
  original: Float[Array, "*s"] | None = None  # before rounding, transformed
  saved: Any = ()  # for `pull`
  state: Any = ()  # the next one
  summary: Summary | None = None  # the error of rounding, where it was asked for


@runtime_checkable
class Quantizer(Protocol):
  """A frozen value. Its state is a pytree of float32 arrays, () for most.

  One that learns its state, for operands of fprop, sets `learns_state` and has
  `pull_state(saved, g)`: the gradient of the state from that of what was read, which then comes out
  where the next state would. One whose `Read` has exact terms sets `has_exact`.
  """

  format: Format | DTypeLike  # that it rounds to
  source: Source  # see `Operand`
  transform: Transform | None
  needs_key: bool
  multiple: int  # of the contracted axis
  reads_whole_rows: bool  # more than blocks, slices and single values: all of the contracted axis

  def init(self, shape: tuple[int, ...]) -> Any:
    """The first state, for an operand of that shape."""

  def read(self, x: Float[Array, "*s"], axis: int, ctx: Context) -> Read:
    """x, padded along the contracted `axis` to what both operands need, as the GEMM reads it."""

  def pull(self, saved: Any, g: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """The gradient of x from that of what was read, for operands of fprop; straight through: g."""


@dataclasses.dataclass(frozen=True)
class Operand:
  """First transformed, then rounded to `format`: a block format, or a float dtype to cast to.

  `source` says what is read: "original"; "residual", the tensor as the recipe keeps it between
  forward and backward pass, dequantized; or "fprop", the operand as the forward GEMM read it, in
  the space of its transform.
  """

  format: Format | DTypeLike
  rounding: str | Rounding = "nearest"
  transform: Transform | None = None
  source: Source = "original"

  reads_whole_rows = False

  def __post_init__(self):
    if not self.is_quantized:
      if not _is_float_dtype(self.format):
        raise ValueError(f"format={self.format!r} is neither a BlockFormat nor a float dtype")
      # A name equals its dtype, but has another hash.
      object.__setattr__(self, "format", jnp.dtype(self.format))
    if not isinstance(self.transform, Transform | None):
      raise ValueError(f"transform={self.transform!r} is neither a Hadamard nor None")
    draws = as_rounding(self.rounding).needs_key
    if self.source not in get_args(Source):
      raise ValueError(f"source={self.source!r} is not one of {get_args(Source)}")
    if draws and not self.is_quantized:
      raise ValueError(f"stochastic rounding needs a block format, not {self.format}")

  @property
  def is_quantized(self) -> bool:
    return is_format(self.format)

  @property
  def needs_key(self) -> bool:
    fresh = self.transform is not None and self.transform.needs_key
    return as_rounding(self.rounding).needs_key or fresh

  @property
  def multiple(self) -> int:
    block = self.format.block_shape if self.is_quantized else None
    return math.lcm(
      1 if block is None else block[-1], 1 if self.transform is None else self.transform.block
    )

  def init(self, shape) -> tuple[()]:
    return ()

  def read(self, x, axis, ctx):
    x = self.transformed(x, axis, ctx)
    if not self.is_quantized:
      values = x.astype(self.format)
      return Read((values if ctx.gather is None else ctx.gather(values),), original=x)
    values = self.rounded(x, axis, ctx)
    return Read((values,), original=x, summary=self.summary(x, axis, ctx))

  def pull(self, saved, g):
    return g

  def transformed(self, x, axis, ctx) -> Float[Array, "*s"]:
    return x if self.transform is None else self.transform.apply(x, axis, ctx.gemm_key)

  def rounded(self, x, axis, ctx) -> Float[Array, "*s"]:
    """x rounded to the format, in the narrowest dtype that holds its values."""
    fmt, shape = self.format, x.shape
    if ctx.gather is not None:  # whole blocks: `moe_ffn` refuses others
      packed = ctx.gather(qz.pack_blocks(x, fmt, axis, self.rounding, ctx.key, ctx.slices))
      return qz.dequantize(packed, fmt.dequantized_dtype, implementation="xla")
    values = pad_to_blocks(x, fmt, axis).astype(jnp.float32)
    values = qz.straight_through(
      values, fmt, axis, self.rounding, ctx.key, ctx.slices, fmt.dequantized_dtype
    )
    return values[tuple(slice(n) for n in shape)]

  def summary(self, x, axis, ctx, values=None) -> Summary | None:
    """The error of `rounded`, or of other `values`, where it is asked for."""
    if not ctx.tapped:
      return None
    x, values = (
      v if v is None else pad_to_blocks(v, self.format, axis).astype(jnp.float32)
      for v in (x, values)
    )
    return error_summary(
      x,
      self.format,
      axis,
      rounding=self.rounding,
      key=ctx.key,
      slices=ctx.slices,
      values=values,
    )


class Composed:
  """For a dataclass with an `operand: Operand`, by which it rounds: what it does not change."""

  operand: Operand
  reads_whole_rows = False

  @property
  def format(self):
    return self.operand.format

  @property
  def source(self):
    return self.operand.source

  @property
  def transform(self):
    return self.operand.transform

  @property
  def is_quantized(self):
    return self.operand.is_quantized

  @property
  def rounding(self):
    return self.operand.rounding

  @property
  def needs_key(self):
    return self.operand.needs_key

  @property
  def multiple(self):
    return self.operand.multiple

  def init(self, shape):
    return ()

  def pull(self, saved, g):
    return g


def _is_float_dtype(dtype) -> bool:
  try:
    return dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:  # no dtype at all, such as the name of a format
    return False


def pad_to_blocks(x: Float[Array, "*s"], fmt: Format, axis: int) -> Float[Array, "*t"]:
  """x filled up with zeros to whole blocks; they change neither blocks nor products."""
  for a, block in block_axes(fmt, axis).items():
    x = pad(x, a, block)
  return x


def pad(x: Float[Array, "*s"], axis: int, multiple: int) -> Float[Array, "*t"]:
  if x.shape[axis] % multiple == 0:
    return x
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, padding)


def error_summary(
  x, fmt, axis, *, rounding="nearest", key=None, slices=WHOLE, values=None
) -> Summary:
  """A row of a tap: the fields of `ErrorSummary`."""
  key = key if as_rounding(rounding).needs_key else None
  summary = decompose_slices(x, fmt, axis, rounding, key, slices, values=values).summary()
  return jnp.stack([getattr(summary, name) for name in SUMMARY_FIELDS])
