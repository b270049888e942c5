"""The feed-forward of a mixture of experts, under one custom_vjp.

    h = x[token of row] @ w13          rows sorted by expert, each expert's rows times its weights
    a = silu(gate) * up                gate and up are the halves of h
    y = a @ w2
    out = sum of weight * y over the choices of a token

What is kept for the backward pass: x once per token, not once per row, and h, each as the recipe's
`residual` says (`lhs` and `hidden`), or as it is. Beside them only the order of the rows, and w13,
w2 and the routing weights as they were passed. Recomputed: the permuted x, a from the kept h, every
quantized operand. Bytes a token at d=7168, f=2048, top-2:

|       | x      | h      | both               |
|-------|--------|--------|--------------------|
| bf16  | 14,336 | 16,384 | 30,720             |
| MXFP4 | 3,808  | 4,352  | 8,160, 0.266 of it |

What is read. GEMM 1 reads x, or x as kept, as `source` of fprop.lhs and wgrad.lhs says. SwiGLU's
backward pass reads h as kept. GEMM 2 reads a; where the recipe has `residual.hidden`, its lhs of
`source="residual"` is SwiGLU of the kept h, so that HOPPER_FP4 rounds h once and its forward and
backward pass see one a. y is not kept: with g = dout @ w2.T from dgrad, a weight's gradient is
<dout, a @ w2> = <g, a>; it has the rounding of dgrad's operands in place of fprop's.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, Int32, Integer

from fp4jax import operands as ops
from fp4jax.arguments import to_arrays
from fp4jax.formats import Format
from fp4jax.grouped import Tiles, check_recipe
from fp4jax.implementation import Implementation, choose
from fp4jax.linear import XlaGemms, nan_unless
from fp4jax.mosaic import gemms as mosaic
from fp4jax.operands import Forward, Summaries, for_pull, take_rows
from fp4jax.quantizers import Source
from fp4jax.recipe import Recipe
from fp4jax.sharding import one_program, refuse_shared, spec_of, spread, vary, varying_axes
from fp4jax.swiglu import swiglu, swiglu_backward

# A weight below this is multiplied in after dgrad: before it, dgrad's result is divided by it.
SMALLEST_DIVISOR = 2.0**-64
TWO_KEYS = "keys=, such as jax.random.split(jax.random.key(0)), new ones each step"


@runtime_checkable
class Gemms(Protocol):
  """The three GEMMs of one grouped linear layer, each with its rows of the tap; see `XlaGemms`."""

  recipe: Recipe

  def keep(self, x: Float[Array, "t k"], fmt: Format | None) -> ops.Tensor: ...

  def keep_weights(self, w: Float[Array, "e k n"]) -> ops.Tensor: ...

  def activation(self, h: ops.Tensor, source: Source) -> Any:
    """SwiGLU of h, or of h as kept, in the form that `fprop` takes."""

  def fprop(
    self, x: Any, w: ops.Tensor, rows: Int[Array, " m"] | None = None
  ) -> tuple[Float[Array, "m n"], Forward]: ...

  def gradient(self, dy: Float[Array, "m n"]) -> Any:
    """dy in the implementation's own form, made in one read for both `dgrad` and `wgrad`."""

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


class Order(NamedTuple):
  """Choice `token * k + j` is the j-th of a token; rows are choices sorted by expert, stably.

  The rows of each expert are filled up to a multiple of `tile`, and so are the rows after the last
  expert's to a fixed number. An empty row holds choice `token * k`, one more than there are: it
  gathers zeros.
  """

  choice_of_row: Int[Array, " row"]
  row_of_choice: Int[Array, " choice"]
  group_sizes: Int[Array, " e"]  # in rows, the filling included

  @classmethod
  def of(cls, experts: Int[Array, "token k"], num_experts: int, tile: int = 1) -> "Order":
    expert = experts.ravel()
    order = jnp.argsort(expert, stable=True)
    place = jnp.argsort(order).astype(jnp.int32)  # of each choice among the sorted
    sizes = jnp.bincount(expert, length=num_experts).astype(jnp.int32)
    if tile == 1:
      return cls(order, place, sizes)
    filled = -(-sizes // tile) * tile
    moved = (jnp.cumsum(filled) - filled) - (jnp.cumsum(sizes) - sizes)
    row = place + moved[expert]
    rows = tile * (expert.size // tile + num_experts)
    choice = jnp.full(rows, expert.size).at[row].set(jnp.arange(expert.size))
    return cls(choice, row, filled)


def moe_ffn(
  x: ArrayLike,
  w13: ArrayLike,
  w2: ArrayLike,
  experts: ArrayLike,
  weights: ArrayLike,
  recipe: Recipe,
  *,
  keys: tuple[jax.Array | None, jax.Array | None] | jax.Array = (None, None),
  taps: tuple[ops.Tap | None, ops.Tap | None] = (None, None),
  states: tuple[ops.State | None, ops.State | None] = (None, None),
  implementation: Implementation | None = None,
) -> Float[Array, "token d"]:
  """sum_j weights[t, j] * (swiglu(x[t] @ w13[experts[t, j]]) @ w2[experts[t, j]]), in x's dtype.

  Gradients go to x, w13, w2 and weights. The weights of the experts may have another dtype than x,
  to which they are cast before anything else; their gradients come in their own.

  Args:
    x: (token, d).
    w13: (e, d, 2 f), gate and up.
    w2: (e, f, d).
    experts: (token, k), integers of any dtype.
    weights: (token, k) float32.
    recipe: the numerics of both GEMMs.
    keys, taps, states: of GEMM 1 and GEMM 2, as in `dot_general`. The tap's row `residual.lhs` of
      GEMM 2 is the error of h as it is kept, where the recipe has `residual.hidden`.
    implementation: see `fp4jax.implementation`; taps and states are read by "xla" alone.
  Raises:
    ValueError: shapes that do not fit, an expert that does not exist (under jit the result is NaN
      instead, and so are its gradients), a stochastic recipe without keys, or what makes
      `implementation` impossible.
    TypeError: something is not a recipe, or not an array of the dtypes above.
  """
  ops.check_recipe_and_keys(recipe, keys, TWO_KEYS)
  for state in states:
    ops.check_state(recipe, state, "each of states=")
  x, w13, w2 = ops.to_operands(x=x, w13=w13, w2=w2)
  experts, weights = to_arrays(experts=experts, weights=weights)
  _check_shapes(x, w13, w2, experts, weights)
  check_recipe(recipe)
  num_experts = w13.shape[0]
  known = not isinstance(experts, jax.core.Tracer)
  if known:
    _check_experts(np.asarray(experts), num_experts)
  keys = keys if recipe.is_stochastic else (None, None)
  keys = (
    ops.Keys.of(keys[0], (x, experts), w13, w2, weights, keys[1]),
    ops.Keys.of(keys[1], (x, experts, w13), w2, weights, keys[0]),
  )
  options = recipe, implementation, known
  operands, states = (x, w13, w2, weights, experts, keys), tuple(state or {} for state in states)
  return spread(_moe_ffn, options, operands, (taps, states), spec_of(x))


def _moe_ffn(recipe, implementation, known, x, w13, w2, weights, experts, keys, taps, states):
  num_experts = w13.shape[0]
  experts = _read_experts(experts, num_experts)
  widths = {"d": x.shape[1], "f": w2.shape[1]}
  watched = (*taps, *(state or None for state in states))
  implementation = choose(implementation, mosaic.obstacle(recipe, watched, len(x), widths, x=x))
  order = Order.of(experts, num_experts, 1 if implementation == "xla" else mosaic.BLOCK)
  valid = None if known else jnp.all(experts < num_experts)
  return _ffn(recipe, implementation, x, w13, w2, weights, valid, order, keys, taps, states)


def _read_experts(experts: Integer[Array, "token k"], num_experts: int) -> Int32[Array, "token k"]:
  """Experts in int32; one that does not exist is `num_experts`, whatever its dtype made of it."""
  if experts.dtype.itemsize >= 4:
    experts = jnp.where((experts < 0) | (experts >= num_experts), num_experts, experts)
  experts = experts.astype(jnp.int32)
  return jnp.where((experts < 0) | (experts >= num_experts), num_experts, experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ffn(recipe, implementation, x, w13, w2, weights, valid, order, keys, taps, states):
  return _fwd(recipe, implementation, x, w13, w2, weights, valid, order, keys, taps, states)[0]


@one_program(2)
def _fwd(recipe, implementation, x, w13, w2, weights, valid, order, keys, taps, states):
  operands = x, w13, w2, weights, order
  taps, states = refuse_shared("taps", taps, operands), refuse_shared("states", states, operands)
  tapped, dtype, residual = [tap is not None for tap in taps], x.dtype, recipe.residual
  dtypes = w13.dtype, w2.dtype
  first, second = _gemms(recipe, implementation, order, keys, tapped, states, dtypes)
  token = order.choice_of_row // weights.shape[1]
  w13_read, w2_read = first.keep_weights(w13.astype(dtype)), second.keep_weights(w2.astype(dtype))

  x = first.keep(x, residual.lhs)
  h, of_first = first.fprop(x, w13_read, token)
  h = first.keep(h.astype(dtype), residual.hidden)
  a = second.activation(h, recipe.fprop.lhs.source)
  y, of_second = second.fprop(a, w2_read)
  if residual.hidden is not None and tapped[1]:
    of_second.summaries["residual.lhs"] = ops.residual_summary(h, True)
  choices = y.astype(dtype)[order.row_of_choice].reshape(*weights.shape, -1)
  # Not an einsum: a GPU would round float32 to TF32 there.
  out = jnp.sum(choices.astype(jnp.float32) * weights[..., None], axis=1).astype(dtype)

  def keep_weights(w, tensor, forward):  # as they were passed, not their copy in x's dtype
    tensor = dataclasses.replace(tensor, original=w)
    return tensor.kept_for(recipe.dgrad.rhs.source, forward.rhs)

  kept_h = "original" if residual.hidden is None else "residual"
  as_read = recipe.wgrad.lhs.source == "fprop"
  saved = (
    checkpoint_name(x.kept_for(recipe.wgrad.lhs.source, of_first.lhs), "experts.x"),
    checkpoint_name(h.kept_for(kept_h), "experts.h"),
    a.kept_for("fprop", of_second.lhs) if as_read else None,
    (keep_weights(w13, w13_read, of_first), keep_weights(w2, w2_read, of_second)),
    (jnp.empty(0, w13.dtype), jnp.empty(0, w2.dtype)),
    (weights, valid, checkpoint_name(order, "experts.order"), keys, states),
    tuple(f.summaries if t else None for f, t in zip((of_first, of_second), tapped, strict=True)),
    tuple(for_pull(f)._replace(summaries=None) for f in (of_first, of_second)),
  )
  # Here and not after `_ffn`, where differentiating a select would save its zeros.
  return nan_unless(valid, out), saved


@one_program(2)
def _bwd(recipe, implementation, saved, dout):
  x, h, a_read, (w13, w2), likes, (weights, valid, order, keys, states), summaries, forwards = saved
  w13_like, w2_like = likes
  tapped, dtype = [s is not None for s in summaries], dout.dtype
  dtypes = w13_like.dtype, w2_like.dtype
  first, second = _gemms(recipe, implementation, order, keys, tapped, states, dtypes)
  token = order.choice_of_row // weights.shape[1]

  # g = dgrad(weight * dout) has the numbers of the composed layers, but a weight of zero would hide
  # <dout, y> from its own gradient; so tiny ones go to the other side of the products.
  weight = take_rows(weights.reshape(-1, 1), order.choice_of_row)
  divisible = jnp.abs(weight) >= SMALLEST_DIVISOR
  before, after = jnp.where(divisible, weight, 1), jnp.where(divisible, 1, weight)
  dy = second.gradient((take_rows(dout, token).astype(jnp.float32) * before).astype(dtype))
  g, dgrad_2, dgrad_states_2 = second.dgrad(dy, w2.cast(dtype), forwards[1])

  a, dh, products = second.swiglu_backward(h, g.astype(dtype), after)
  dweights = (products / before[:, 0])[order.row_of_choice].reshape(weights.shape)
  a = a if a_read is None else a_read
  dw2, wgrad_2, wgrad_states_2 = second.wgrad(a, dy, forwards[1])

  dx, dgrad_1, dgrad_states_1 = first.dgrad(dh, w13.cast(dtype), forwards[0])
  dw13, wgrad_1, wgrad_states_1 = first.wgrad(x, dh, forwards[0], token)
  # Not the sum over choices: a select there keeps XLA from fusing what follows.
  dx, dw13, dw2, dweights = (nan_unless(valid, g) for g in (dx, dw13, dw2, dweights))
  dx = dx.astype(dtype)[order.row_of_choice].reshape(*weights.shape, -1)
  dx = jnp.sum(dx.astype(jnp.float32), axis=1).astype(dtype)

  backward = (dgrad_1 | wgrad_1, dgrad_2 | wgrad_2)
  taps = tuple(s and ops.tap_of(s | b) for s, b in zip(summaries, backward, strict=True))
  states = (
    forwards[0].states | dgrad_states_1 | wgrad_states_1,
    forwards[1].states | dgrad_states_2 | wgrad_states_2,
  )
  gradients = dx, dw13.astype(w13_like.dtype), dw2.astype(w2_like.dtype), dweights
  return *gradients, None, None, None, *vary((taps, states), varying_axes(dout))


_ffn.defvjp(_fwd, _bwd)


class XlaFfnGemms(XlaGemms):
  def activation(self, h: ops.Tensor, source: Source) -> ops.Tensor:
    return self._activated(h, swiglu(_read_hidden(h, source, h.original.dtype)))

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


def _gemms(recipe, implementation, order, keys, tapped, states, dtypes) -> tuple[Gemms, Gemms]:
  if implementation == "mosaic":
    return tuple(mosaic.MosaicGemms(recipe, order.group_sizes, dtype) for dtype in dtypes)
  tiles = Tiles.of(order.group_sizes, order.choice_of_row.size)
  layers = zip(keys, tapped, states, strict=True)
  return tuple(XlaFfnGemms(recipe, tiles, *layer) for layer in layers)


def _check_shapes(x, w13, w2, experts, weights):
  if x.ndim != 2 or w2.ndim != 3 or w13.shape != (w2.shape[0], x.shape[1], 2 * w2.shape[1]):
    raise ValueError(
      f"x {x.shape}, w13 {w13.shape} and w2 {w2.shape} are not (token, d), (e, d, 2 f), (e, f, d)"
    )
  if not len(x):
    raise ValueError(f"x {x.shape} has no tokens")
  if w2.shape[2] != x.shape[1]:
    raise ValueError(f"w2 {w2.shape} does not return to the {x.shape[1]} features of x {x.shape}")
  if experts.ndim != 2 or experts.shape != weights.shape or len(experts) != len(x):
    raise ValueError(
      f"experts {experts.shape} and weights {weights.shape} are not both ({len(x)} tokens, k)"
    )
  if not jnp.issubdtype(experts.dtype, jnp.integer) or weights.dtype != jnp.float32:
    raise TypeError(
      f"experts are {experts.dtype} and weights {weights.dtype}, not integers and float32"
    )


def _check_experts(experts, num_experts):
  bad = experts[(experts < 0) | (experts >= num_experts)]
  if bad.size:
    raise ValueError(f"experts name {bad[0]}, which is not one of the {num_experts} experts")
