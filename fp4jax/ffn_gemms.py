"""The two grouped linear layers of `moe_ffn` with SwiGLU between them, in XLA or by the kernels."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Float32, Int

from fp4jax import operands as ops
from fp4jax.dispatch import Order
from fp4jax.formats import Format
from fp4jax.grouped import TILE, EqualGroups, Tiles
from fp4jax.linear import XlaGemms
from fp4jax.mosaic import gemms as mosaic
from fp4jax.operands import Forward, Summaries, scaled_rows
from fp4jax.recipe import Recipe
from fp4jax.swiglu import swiglu, swiglu_backward


@runtime_checkable
class Gemms(Protocol):
  """The three GEMMs of one grouped linear layer, each with its rows of the tap; see `XlaGemms`."""

  recipe: Recipe

  def keep(self, x: Float[Array, "t k"], fmt: Format | None) -> ops.Tensor: ...

  def keep_weights(self, w: Float[Array, "e k n"]) -> ops.Tensor: ...

  def hidden(self, h: Float[Array, "m f2"]) -> tuple[ops.Tensor, Any]:
    """h as `residual.hidden` keeps it, and SwiGLU of it, or of h as it was where fprop.lhs says so,
    in the form that `fprop` takes."""

  def fprop(
    self, x: Any, w: ops.Tensor, rows: Int[Array, " m"] | None = None
  ) -> tuple[Float[Array, "m n"], Forward]: ...

  def gradient(self, dy: Float[Array, "m n"]) -> Any:
    """dy in the implementation's own form, made in one read for both `dgrad` and `wgrad`."""

  def gradient_of_rows(
    self, dy: Float[Array, "t n"], rows: Int[Array, " m"], factors: Float32[Array, "m 1"]
  ) -> Any:
    """`gradient` of factors * dy[rows] in dy's dtype; zeros for a row past the end."""

  def dgrad(
    self, dy: Any, w: ops.Tensor, forward: Forward
  ) -> tuple[Float[Array, "m k"], Summaries, ops.State]: ...

  def swiglu_backward(
    self, h: ops.Tensor, g: Float[Array, "m f"], after: Float32[Array, "m 1"]
  ) -> tuple[Any, Any, Float32[Array, " m"]]:
    """For a = SwiGLU of h as kept: a * after as `wgrad` takes it, the gradient of h that follows
    from g * after as `gradient` returns it, and <a, g> of each row."""

  def wgrad(
    self, x: Any, dy: Any, forward: Forward, rows: Int[Array, " m"] | None = None
  ) -> tuple[Float[Array, "e k n"], Summaries, ops.State]: ...


class XlaFfnGemms(XlaGemms):
  def hidden(self, h: Float[Array, "m f2"]) -> tuple[ops.Tensor, ops.Tensor]:
    kept = self.keep(h, self.recipe.residual.hidden)
    read = _read_hidden(kept, self.recipe.fprop.lhs.source, h.dtype)
    return kept, self._activated(kept, swiglu(read))

  def gradient_of_rows(
    self, dy: Float[Array, "t n"], rows: Int[Array, " m"], factors: Float32[Array, "m 1"]
  ) -> Float[Array, "m n"]:
    return self.gradient(scaled_rows(dy, rows, factors))

  def swiglu_backward(
    self, h: ops.Tensor, g: Float[Array, "m f"], after: Float32[Array, "m 1"]
  ) -> tuple[ops.Tensor, Float[Array, "m f2"], Float32[Array, " m"]]:
    a, dh, products = swiglu_backward(_read_hidden(h, "residual", g.dtype), g, after)
    return self._activated(h, a), dh, products

  def _activated(self, h, a):
    if h.packed is None:
      return self.keep(a, self.recipe.residual.lhs)
    return ops.Tensor(a, None, a.shape, of_kept=True)


def _read_hidden(h, source, dtype):
  """h as the `source` of GEMM 2's lhs says; without `residual.hidden` the kept h is h."""
  return h.read("original" if h.packed is None else source).astype(dtype)


def make_gemms(
  recipe, implementation, order, keys, tapped, states, dtypes, weight_axis, weights_once=False
) -> tuple[Gemms, Gemms]:
  """Of GEMM 1 and GEMM 2."""
  if implementation == "mosaic":
    return tuple(
      mosaic.MosaicGemms(recipe, order.expert_sizes, dtype, weight_axis, weights_once)
      for dtype in dtypes
    )
  layers = zip(keys, tapped, states, strict=True)
  layout = _layout(order)
  return tuple(XlaFfnGemms(recipe, layout, *layer, weight_axis) for layer in layers)


def _layout(order: Order) -> EqualGroups | Tiles:
  if order.of_all:
    return EqualGroups(order.ids, order.experts, order.rows_per_tile)
  tile, rows = order.rows_per_tile or TILE, order.choice_of_row.size
  return Tiles.of(order.group_sizes, rows, order.experts, order.ids, tile=tile)
