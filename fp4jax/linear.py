"""Three GEMMs, six operands: the one place where a recipe's products are formed in XLA.

A `Layout` says how the products are formed; the recipe says what they read. Every product goes
through `operands.gemm`. `linear` is the custom_vjp behind `dot_general` and `grouped_dot`.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped

from fp4jax import operands as ops
from fp4jax.formats import BlockFormat
from fp4jax.recipe import Recipe

Summaries = dict[str, Float32[Array, " field"] | None]  # rows of a tap, by role


class Layout(Protocol):
  """How rows of tokens meet weights: all of them one matrix, or each expert's rows its own."""

  def rows(self, x: Float[Array, "*b m k"]) -> Float[Array, "*b m k"]:
    """x with the rows zeroed that belong to no product."""

  def groups(self, x: Float[Array, "*b m k"]) -> Float[Array, "*t m k"]:
    """x as wgrad quantizes it along m: no two groups share a block."""

  def fprop(self, x: ops.Prepared, w: ops.Prepared) -> Float32[Array, "*b m n"]: ...

  def dgrad(self, dy: ops.Prepared, w: ops.Prepared) -> Float32[Array, "*b m k"]: ...

  def wgrad(self, x: ops.Prepared, dy: ops.Prepared) -> Float32[Array, "*b k n"]:
    """Takes what `groups` returned, quantized."""


@dataclasses.dataclass(frozen=True)
class XlaGemms:
  """The three GEMMs of one linear layer, each with the tap's rows of its operands.

  `rows` says which row of x lies in each row of the product; None, as they are.
  """

  recipe: Recipe
  layout: Layout
  key: jax.Array | None
  tapped: bool

  def keep(self, x: Float[Array, "*s"], fmt: BlockFormat | None) -> ops.Tensor:
    """x, and packed in blocks along its last axis where `fmt` is one."""
    return ops.Tensor.of(x, fmt)

  def fprop(
    self, x: ops.Tensor, w: ops.Tensor, rows: Int[Array, " m"] | None = None
  ) -> tuple[Float32[Array, "*b m n"], Summaries]:
    """y = x @ w"""
    lhs = self._prepare("fprop.lhs", take_rows(x.read(self.recipe.fprop.lhs.source), rows), -1)
    rhs = self._prepare("fprop.rhs", w.read(self.recipe.fprop.rhs.source), -2)
    return self.layout.fprop(lhs, rhs), {
      "fprop.lhs": lhs.summary,
      "fprop.rhs": rhs.summary,
      "residual.lhs": ops.residual_summary(x, self.tapped),
      "residual.rhs": ops.residual_summary(w, self.tapped),
    }

  def gradient(self, dy: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """dy as `dgrad` and `wgrad` take it."""
    return dy

  def dgrad(
    self, dy: Float[Array, "*b m n"], w: ops.Tensor
  ) -> tuple[Float32[Array, "*b m k"], Summaries]:
    """dx = dy @ w.T"""
    lhs = self._prepare("dgrad.lhs", dy, -1)
    rhs = self._prepare("dgrad.rhs", w.read(self.recipe.dgrad.rhs.source), -1)
    return self.layout.dgrad(lhs, rhs), {"dgrad.lhs": lhs.summary, "dgrad.rhs": rhs.summary}

  def wgrad(
    self, x: ops.Tensor, dy: Float[Array, "*b m n"], rows: Int[Array, " m"] | None = None
  ) -> tuple[Float32[Array, "*b k n"], Summaries]:
    """dw = x.T @ dy"""
    x = self.layout.groups(take_rows(x.read(self.recipe.wgrad.lhs.source), rows))
    lhs = self._prepare("wgrad.lhs", x, -2)
    rhs = self._prepare("wgrad.rhs", self.layout.groups(dy), -2)
    return self.layout.wgrad(lhs, rhs), {"wgrad.lhs": lhs.summary, "wgrad.rhs": rhs.summary}

  def _prepare(self, role, x, axis):
    return ops.prepare(self.recipe, role, x, axis, self.key, self.tapped)


def take_rows(x: Shaped[Array, "t ..."], rows: Int[Array, " m"] | None) -> Shaped[Array, "m ..."]:
  """x[rows], zeros where a row is past the end; x for None."""
  return x if rows is None else x.at[rows].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear(
  recipe: Recipe,
  dtype: jnp.dtype,
  layout: Layout,
  lhs: Float[Array, "*b m k"],
  rhs: Float[Array, "*b k n"],
  key: jax.Array | None,
  tap: ops.Tap | None,
) -> Float[Array, "*b m n"]:
  """lhs @ rhs in `dtype`, with gradients as `recipe` says."""
  return _fwd(recipe, dtype, layout, lhs, rhs, key, tap)[0]


def _fwd(recipe, dtype, layout, lhs, rhs, key, tap):
  gemms = XlaGemms(recipe, layout, key, tap is not None)
  x = gemms.keep(layout.rows(lhs), recipe.residual.lhs)
  w = ops.Tensor.of(rhs, recipe.residual.rhs, axis=-2)
  out, summaries = gemms.fprop(x, w)
  saved = (
    layout,
    x.kept_for(recipe.wgrad.lhs.source),
    w.kept_for(recipe.dgrad.rhs.source),
    (jnp.empty(0, lhs.dtype), jnp.empty(0, rhs.dtype)),
    key,
    None if tap is None else summaries,
  )
  return out.astype(dtype), saved


def _bwd(recipe, dtype, saved, dy):
  layout, x, w, (lhs_like, rhs_like), key, summaries = saved
  gemms = XlaGemms(recipe, layout, key, summaries is not None)
  dy = gemms.gradient(layout.rows(dy))
  dx, dgrad_summaries = gemms.dgrad(dy, w)
  dw, wgrad_summaries = gemms.wgrad(x, dy)
  tap = None if summaries is None else ops.tap_of(summaries | dgrad_summaries | wgrad_summaries)
  return None, dx.astype(lhs_like.dtype), dw.astype(rhs_like.dtype), None, tap


linear.defvjp(_fwd, _bwd)
