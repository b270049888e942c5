"""How two operands become a product: all their terms, the rows that meet each matrix, one GEMM."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from fp4jax.formats import WHOLE, Slices
from fp4jax.operands import DrawIds
from fp4jax.quantizers.quantizer import Read


def multiply(
  lhs: Read, rhs: Read, product: Callable[[Array, Array], Float32[Array, "*s"]]
) -> Float32[Array, "*s"]:
  """The product of two operands: of all their terms, and of exact ones with unrounded operands."""
  pairs = [(a, b) for a in lhs.terms for b in rhs.terms]
  pairs += [(a, rhs.original) for a in lhs.exact]
  rest = lhs.original
  for a in lhs.exact:  # what they met already
    rest = rest - a
  pairs += [(rest, b) for b in rhs.exact]
  out = product(*pairs[0])
  for pair in pairs[1:]:
    out += product(*pair)
  for factor in (lhs.factor, rhs.factor):
    if not (isinstance(factor, float) and factor == 1):
      out *= factor
  return out


@runtime_checkable
class Layout(Protocol):
  """Which rows of tokens meet weights, and where."""

  rows_in: Int[Array, " r"] | None  # the row of x in each row of the products; None: as they are
  rows_out: Int[Array, " m"] | None  # where each row of x lies among those
  valid: Bool[Array, ""] | None  # False: what `linear` returns is NaN, and its gradients

  def rows(self, x: Float[Array, "*b m k"]) -> Float[Array, "*b m k"]:
    """x with the rows zeroed that belong to no product."""


@runtime_checkable
class XlaLayout(Layout, Protocol):
  """How they meet in XLA: all of them one matrix, or each expert's rows its own."""

  slices: Slices  # which rows one GEMM reads
  weight_slices: Slices
  group_slices: Slices  # of what `groups` returns
  ids: DrawIds

  def groups(self, x: Float[Array, "*b m k"]) -> Float[Array, "*t m k"]:
    """x as wgrad quantizes it along m: no two groups share a block."""

  def fprop(self, x: Float[Array, "*r k"], w: Float[Array, "*b k n"]) -> Float32[Array, "*r n"]: ...

  def dgrad(
    self, dy: Float[Array, "*r n"], w: Float[Array, "*b k n"]
  ) -> Float32[Array, "*r k"]: ...

  def wgrad(
    self, x: Float[Array, "*t m k"], dy: Float[Array, "*t m n"]
  ) -> Float32[Array, "*b k n"]:
    """Takes what `groups` returned, quantized."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneMatrix:
  """The layout of a plain matmul: every row meets the same weights. Tokens may be several axes."""

  batch: int = dataclasses.field(metadata={"static": True})  # axes in front

  rows_in = rows_out = valid = None
  ids = DrawIds()

  @property
  def slices(self) -> Slices:
    """Each entry of a batch is a GEMM of its own."""
    return Slices(self.batch) if self.batch else WHOLE

  weight_slices = group_slices = slices

  def rows(self, x):
    return x

  def groups(self, x):
    return x

  def fprop(self, x, w):
    return self._product(x, w, [-1], [-2])

  def dgrad(self, dy, w):
    return self._product(dy, w, [-1], [-1])

  def wgrad(self, x, dy):
    tokens = range(self.batch, x.ndim - 1)
    return self._product(x, dy, tokens, tokens)

  def _product(self, lhs, rhs, lhs_axes, rhs_axes):
    contract = tuple(a % lhs.ndim for a in lhs_axes), tuple(a % rhs.ndim for a in rhs_axes)
    batch = tuple(range(self.batch))
    return gemm(lhs, rhs, (contract, (batch, batch)))


def gemm(
  lhs: Float[Array, "*r"], rhs: Float[Array, "*t"], dimension_numbers: lax.DotDimensionNumbers
) -> Float32[Array, "*s"]:
  """The product of two arrays, accumulated in float32.

  In bf16 where both are exact in it (their products are exact in float32), else in float32.
  """
  dtype = lhs.dtype if lhs.dtype == rhs.dtype else jnp.dtype(jnp.float32)
  return lax.dot_general(
    lhs.astype(dtype),
    rhs.astype(dtype),
    dimension_numbers,
    precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
