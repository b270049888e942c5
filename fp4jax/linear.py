"""Three GEMMs, six operands: the one place where a recipe's products are formed.

`linear` is the custom_vjp behind `dot_general` and `grouped_dot`. A backend forms the products, in
XLA (`XlaGemms`) or by the Hopper kernels; a `Layout` says how rows of tokens meet weights.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from fp4jax import operands as ops
from fp4jax.formats import Format
from fp4jax.implementation import Implementation
from fp4jax.mosaic.gemms import MosaicGemms
from fp4jax.operands import Forward, Summaries, for_pull, take_rows
from fp4jax.products import Layout, XlaLayout, multiply
from fp4jax.recipe import Recipe
from fp4jax.sharding import (
  gather_columns,
  one_program,
  own_columns,
  refuse_shared,
  vary,
  varying_axes,
)


@dataclasses.dataclass(frozen=True)
class XlaGemms:
  """The three GEMMs of one linear layer, each with the tap's rows and next states of its operands.

  `rows` says which row of x lies in each row of the product; None: the rows as they are.
  """

  recipe: Recipe
  layout: XlaLayout
  keys: ops.Keys | None
  tapped: bool
  state: ops.State
  weight_axis: str | None = None  # see `moe_ffn`

  def keep(self, x: Float[Array, "*s"], fmt: Format | None) -> ops.Tensor:
    """x, and packed in blocks along its last axis where `fmt` is one."""
    return ops.Tensor.of(x, fmt, slices=self.layout.slices)

  def keep_weights(self, w: Float[Array, "*b k n"]) -> ops.Tensor:
    return ops.Tensor.of(w, self.recipe.residual.rhs, -2, self.layout.weight_slices)

  def fprop(
    self, x: ops.Tensor, w: ops.Tensor, rows: Int[Array, " m"] | None = None
  ) -> tuple[Float32[Array, "*b m n"], Forward]:
    """y = x @ w"""
    slices = self.layout.slices, self.layout.weight_slices
    lhs = take_rows(x.read(self.recipe.fprop.lhs.source), rows)
    lhs = self._read("fprop.lhs", lhs, -1, slices[0], self.layout.ids.rows)
    rhs = w.read(self.recipe.fprop.rhs.source)
    rhs = self._read("fprop.rhs", rhs, -2, slices[1], self.layout.ids.weights, self._gather)
    summaries = {
      "fprop.lhs": lhs.summary,
      "fprop.rhs": rhs.summary,
      "residual.lhs": ops.residual_summary(x, self.tapped, slices[0]),
      "residual.rhs": ops.residual_summary(w, self.tapped, slices[1]),
    }
    states = self._states({"fprop.lhs": lhs, "fprop.rhs": rhs})
    return multiply(lhs, rhs, self.layout.fprop), Forward(lhs, rhs, summaries, states)

  def gradient(self, dy: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """dy as `dgrad` and `wgrad` take it."""
    return dy

  def dgrad(
    self, dy: Float[Array, "*b m n"], w: ops.Tensor, forward: Forward
  ) -> tuple[Float32[Array, "*b m k"], Summaries, ops.State]:
    """dx = dy @ w.T, pulled through fprop.lhs."""
    layout = self.layout
    lhs = self._read("dgrad.lhs", dy, -1, layout.slices, layout.ids.rows)
    rhs = w.read(self.recipe.dgrad.rhs.source)
    of_weights = layout.weight_slices, layout.ids.weights, self._gather
    rhs = self._read("dgrad.rhs", rhs, -1, *of_weights)
    dx = multiply(lhs, rhs, layout.dgrad)
    learned = ops.pull_state(self.recipe, "fprop.lhs", forward.lhs, dx)
    dx = ops.pull(self.recipe, "fprop.lhs", forward.lhs, dx, -1, self.keys)
    reads = {"dgrad.lhs": lhs, "dgrad.rhs": rhs}
    return dx[..., : w.shape[-2]], _summaries(reads), self._states(reads) | learned

  def wgrad(
    self,
    x: ops.Tensor,
    dy: Float[Array, "*b m n"],
    forward: Forward,
    rows: Int[Array, " m"] | None = None,
  ) -> tuple[Float32[Array, "... k _"], Summaries, ops.State]:
    """dw = x.T @ dy, pulled through fprop.rhs."""
    source = self.recipe.wgrad.lhs.source
    rows = None if source == "fprop" else rows  # fprop read them where they lie
    layout, how = self.layout, (-2, self.layout.group_slices, self.layout.ids.groups)
    lhs = self._read("wgrad.lhs", layout.groups(take_rows(x.read(source), rows)), *how)
    rhs = self._read("wgrad.rhs", layout.groups(dy), *how)
    dw = multiply(lhs, rhs, layout.wgrad)
    learned = ops.pull_state(self.recipe, "fprop.rhs", forward.rhs, dw)
    dw = ops.pull(self.recipe, "fprop.rhs", forward.rhs, dw, -2, self.keys)
    reads = {"wgrad.lhs": lhs, "wgrad.rhs": rhs}
    return dw[..., : x.shape[-1], :], _summaries(reads), self._states(reads) | learned

  @property
  def _gather(self):
    if self.weight_axis is None:
      return None
    return functools.partial(gather_columns, axis=self.weight_axis)

  def _read(self, role, x, axis, slices, ids, gather=None):
    how = self.keys, self.tapped, self.state, slices, ids, gather
    return ops.read(self.recipe, role, x, axis, *how)

  def _states(self, reads):
    return {role: read.state for role, read in reads.items() if role in self.state}


def nan_unless(valid: Bool[Array, ""] | None, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
  """x; NaN where not `valid`. None: nothing can be wrong with x.

  A select can keep XLA from fusing a cast with what follows, which changes bits: it belongs where
  `test_looking_for_bad_sizes_and_experts_changes_no_bit` finds none.
  """
  return x if valid is None else jnp.where(valid, x, jnp.nan)


def _summaries(reads):
  return {role: read.summary for role, read in reads.items()}


def make_gemms(
  recipe: Recipe,
  implementation: Implementation,
  layout: Layout,
  keys: ops.Keys | None,
  tapped: bool,
  state: ops.State,
  weight_dtype: jnp.dtype,
  weight_axis: str | None,
):
  """The backend: what forms the products."""
  if implementation == "xla":
    return XlaGemms(recipe, layout, keys, tapped, state, weight_axis)
  return MosaicGemms(recipe, layout.group_sizes, jnp.dtype(weight_dtype), weight_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def linear(
  recipe: Recipe,
  implementation: Implementation,
  dtype: jnp.dtype,
  weight_axis: str | None,
  layout: Layout,
  lhs: Float[Array, "*r k"],
  rhs: Float[Array, "*b k _"],
  keys: ops.Keys | None,
  tap: ops.Tap | None,
  state: ops.State,
) -> Float[Array, "*r n"]:
  """lhs @ rhs in `dtype`, with gradients as `recipe` says; `weight_axis` as in `moe_ffn`."""
  return _fwd(recipe, implementation, dtype, weight_axis, layout, lhs, rhs, keys, tap, state)[0]


@one_program(4)
def _fwd(recipe, implementation, dtype, weight_axis, layout, lhs, rhs, keys, tap, state):
  tap, state = refuse_shared("tap", tap, lhs, rhs), refuse_shared("state", state, lhs, rhs)
  of_weights = rhs.dtype, weight_axis
  gemms = make_gemms(recipe, implementation, layout, keys, tap is not None, state, *of_weights)
  x = gemms.keep(layout.rows(lhs), recipe.residual.lhs)
  w = gemms.keep_weights(rhs)
  out, forward = gemms.fprop(x, w, layout.rows_in)
  saved = (
    layout,
    x.kept_for(recipe.wgrad.lhs.source, forward.lhs),
    w.kept_for(recipe.dgrad.rhs.source, forward.rhs),
    (jnp.empty(0, lhs.dtype), jnp.empty(0, rhs.dtype)),
    (keys, state),
    None if tap is None else forward.summaries,
    for_pull(forward)._replace(summaries=None),
  )
  out = nan_unless(layout.valid, take_rows(out, layout.rows_out))
  # JAX takes what a kernel returns for the same on every shard.
  return vary(out.astype(dtype), varying_axes(lhs, rhs)), saved


@one_program(4)
def _bwd(recipe, implementation, dtype, weight_axis, saved, dy):
  layout, x, w, (lhs_like, rhs_like), (keys, state), summaries, forward = saved
  tapped, of_weights = summaries is not None, (rhs_like.dtype, weight_axis)
  gemms = make_gemms(recipe, implementation, layout, keys, tapped, state, *of_weights)
  if weight_axis is not None:  # XLA would keep what the forward pass gathered
    w, dy = lax.optimization_barrier((w, dy))
  axes = varying_axes(dy)
  dy = gemms.gradient(take_rows(layout.rows(dy), layout.rows_in))
  dx, of_dgrad, dgrad_states = gemms.dgrad(dy, w, forward)
  dw, of_wgrad, wgrad_states = gemms.wgrad(x, dy, forward, layout.rows_in)
  tap = ops.tap_of(summaries | of_dgrad | of_wgrad) if tapped else None
  dx = nan_unless(layout.valid, take_rows(dx, layout.rows_out)).astype(lhs_like.dtype)
  # The layer below begins after both: XLA would put dw off, and hold what it reads.
  dx, dw = lax.optimization_barrier((dx, dw))
  dw = own_columns(nan_unless(layout.valid, dw), weight_axis).astype(rhs_like.dtype)
  states = forward.states | dgrad_states | wgrad_states
  dx, dw, tap, states = vary((dx, dw, tap, states), axes)
  return None, dx, dw, None, tap, states


linear.defvjp(_fwd, _bwd)
