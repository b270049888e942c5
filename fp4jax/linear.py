"""The one custom_vjp behind `dot_general` and `grouped_dot`: three GEMMs, six operands.

A `Layout` says how the products are formed; the recipe says what they read. Every product goes
through `operands.gemm`.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from fp4jax import operands as ops
from fp4jax.recipe import Recipe


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
  tapped = tap is not None
  x = ops.Tensor.of(layout.rows(lhs), recipe.residual.lhs, axis=-1)
  w = ops.Tensor.of(rhs, recipe.residual.rhs, axis=-2)
  fprop_lhs = ops.prepare(recipe, "fprop.lhs", x.read(recipe.fprop.lhs.source), -1, key, tapped)
  fprop_rhs = ops.prepare(recipe, "fprop.rhs", w.read(recipe.fprop.rhs.source), -2, key, tapped)
  summaries = {
    "fprop.lhs": fprop_lhs.summary,
    "fprop.rhs": fprop_rhs.summary,
    "residual.lhs": ops.residual_summary(x, tapped),
    "residual.rhs": ops.residual_summary(w, tapped),
  }
  saved = (
    layout,
    x.kept_for(recipe.wgrad.lhs.source),
    w.kept_for(recipe.dgrad.rhs.source),
    (jnp.empty(0, lhs.dtype), jnp.empty(0, rhs.dtype)),
    key,
    summaries if tapped else None,
  )
  return layout.fprop(fprop_lhs, fprop_rhs).astype(dtype), saved


def _bwd(recipe, dtype, saved, dy):
  layout, x, w, (lhs_like, rhs_like), key, summaries = saved
  tapped = summaries is not None
  dy = layout.rows(dy)
  w = w.read(recipe.dgrad.rhs.source)
  dgrad_lhs = ops.prepare(recipe, "dgrad.lhs", dy, -1, key, tapped)
  dgrad_rhs = ops.prepare(recipe, "dgrad.rhs", w, -1, key, tapped)
  dx = layout.dgrad(dgrad_lhs, dgrad_rhs).astype(lhs_like.dtype)
  x = layout.groups(x.read(recipe.wgrad.lhs.source))
  wgrad_lhs = ops.prepare(recipe, "wgrad.lhs", x, -2, key, tapped)
  wgrad_rhs = ops.prepare(recipe, "wgrad.rhs", layout.groups(dy), -2, key, tapped)
  dw = layout.wgrad(wgrad_lhs, wgrad_rhs).astype(rhs_like.dtype)
  tap = None
  if tapped:
    summaries |= {
      "dgrad.lhs": dgrad_lhs.summary,
      "dgrad.rhs": dgrad_rhs.summary,
      "wgrad.lhs": wgrad_lhs.summary,
      "wgrad.rhs": wgrad_rhs.summary,
    }
    tap = jnp.stack([summaries[role] for role in ops.ROLES])
  return None, dx, dw, None, tap


linear.defvjp(_fwd, _bwd)
