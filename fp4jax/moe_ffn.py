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

Where a mesh axis divides the experts (`fp4jax.dispatch`), rows travel at both ends, within the one
custom_vjp: x forth and partial sums of the result back, then dout forth and those of dx back. What
arrived is what is kept.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int32, Integer

from fp4jax import operands as ops
from fp4jax.arguments import to_arrays
from fp4jax.dispatch import AllToAll, Choices, Dispatch, Order, Whole
from fp4jax.expert_mesh import ExpertMesh
from fp4jax.ffn_gemms import make_gemms
from fp4jax.grouped import check_recipe, few_rows_per_tile, reads_all_experts
from fp4jax.implementation import Implementation, choose
from fp4jax.linear import nan_unless
from fp4jax.mosaic import dispatch as peer_memory
from fp4jax.mosaic import few_rows as few_rows_kernel
from fp4jax.mosaic import gemms as mosaic
from fp4jax.operands import for_pull, take_rows
from fp4jax.packed_weights import Unpacked, read_packed, without_terms
from fp4jax.quantized_array import QuantizedArray
from fp4jax.recipe import Recipe
from fp4jax.sharding import (
  mesh_obstacle,
  one_program,
  own_columns,
  refuse_shared,
  spec_of,
  spread,
  vary,
  varying_axes,
)

# A weight below this is multiplied in after dgrad: before it, dgrad's result is divided by it.
SMALLEST_DIVISOR = 2.0**-64
TWO_KEYS = "keys=, such as jax.random.split(jax.random.key(0)), new ones each step"


def moe_ffn(
  x: ArrayLike,
  w13: ArrayLike | QuantizedArray,
  w2: ArrayLike | QuantizedArray,
  experts: ArrayLike,
  weights: ArrayLike,
  recipe: Recipe,
  *,
  keys: tuple[jax.Array | None, jax.Array | None] | jax.Array = (None, None),
  taps: tuple[ops.Tap | None, ops.Tap | None] = (None, None),
  states: tuple[ops.State | None, ops.State | None] = (None, None),
  token_parts: int = 1,
  expert_axis: str | None = None,
  weight_axis: str | None = None,
  capacity_factor: float | None = None,
  implementation: Implementation | None = None,
  exchange: Implementation | None = None,
  few_rows: bool = False,
  weights_once: bool = False,
) -> Float[Array, "token d"] | tuple[Float[Array, "token d"], Int32[Array, ""]]:
  """sum_j weights[t, j] * (swiglu(x[t] @ w13[experts[t, j]]) @ w2[experts[t, j]]), in x's dtype.

  Gradients go to x, w13, w2 and weights. The weights of the experts may have another dtype than x,
  to which they are cast before anything else; their gradients come in their own.

  Inside `jax.shard_map` a call has the numbers of its tokens' part of one call on one device, where
  `token_parts` is the number of shards: the i-th shard is the i-th part.

  Args:
    x: (token, d).
    w13: (e, d, 2 f), gate and up.
    w2: (e, f, d). Both may be what `pack_weights` makes of weights in x's dtype: "xla" reads them
      as the recipe reads the original, and in a backward pass, for x alone, their values; see
      few_rows, too.
    experts: (token, k), integers of any dtype.
    weights: (token, k) float32.
    recipe: the numerics of both GEMMs.
    keys, taps, states: of GEMM 1 and GEMM 2, as in `dot_general`. The tap's row `residual.lhs` of
      GEMM 2 is the error of h as it is kept, where the recipe has `residual.hidden`.
    token_parts: equal parts of the tokens, in order. No block along the tokens, and no scale of a
      whole slice, reaches from one into another.
    expert_axis: a mesh axis of `jax.shard_map` along which w13 and w2 are divided; `experts` are
      among those of all its devices. Rows go to the devices of their experts as
      `fp4jax.dispatch.AllToAll` says, in the formats of `recipe.payload`.
    weight_axis: another one along which the last axis of w13 and w2 is divided. Each device packs
      its part as the recipe reads it, and codes and scales are gathered for each GEMM; a weight's
      gradient is summed over the axis, each device keeping its part.
    capacity_factor: how many choices a device has room for, in tokens * k, its share where all
      experts are asked alike. What finds no room counts as zero. None: room for all there could
      be, as many as `expert_axis` has devices.
    implementation: see `fp4jax.implementation`; taps and states are read by "xla" alone.
    exchange: how rows travel along `expert_axis`. "xla": `lax.all_to_all` of padded buffers.
      "mosaic": kernels that store into the memory of the peers, among the GPUs of one host and one
      process, for GEMMs of "mosaic"; the mesh of `jax.shard_map`, or of `jax.set_mesh`, then says
      which GPUs they are. None: "mosaic" where it can run. The numbers are the same.
    few_rows: "xla" multiplies all tokens by every expert, or tiles of as many rows as each expert
      has evenly, not of 128, whichever reads the weights less: for a decoding step, which has no
      backward pass. "mosaic" multiplies packed weights as they lie. The numbers are the same up to
      the order of float32 sums.
    weights_once: where fprop and dgrad read the weights alike in FP8, "mosaic" quantizes them for
      both in one read and keeps the codes of dgrad, a byte a value, by the name "experts.weights"
      of `jax.ad_checkpoint`; otherwise the backward pass reads the weights again. The numbers are
      the same.
  Returns:
    The sum; with a capacity_factor also how many choices this device dropped.
  Raises:
    ValueError: shapes that do not fit, an expert that does not exist (under jit the result is NaN
      instead, and so are its gradients), a stochastic recipe without keys, what makes
      `implementation` impossible, or a gradient with few_rows.
    TypeError: something is not a recipe, or not an array of the dtypes above.
  """
  ops.check_recipe_and_keys(recipe, keys, TWO_KEYS)
  for state in states:
    ops.check_state(recipe, state, "each of states=")
  if isinstance(w13, QuantizedArray) != isinstance(w2, QuantizedArray):
    raise ValueError("one of w13 and w2 is packed and the other is not")
  packed, given_recipe = (w13, w2), recipe
  (w13, _), (w2, recipe) = read_packed("w13", w13, recipe), read_packed("w2", w2, recipe)
  x, w13, w2 = ops.to_operands(x=x, w13=w13, w2=w2)
  experts, weights = to_arrays(experts=experts, weights=weights)
  axes = varying_axes(x, experts)
  mesh = ExpertMesh(token_parts, expert_axis, weight_axis, capacity_factor, axes)
  mesh.check_axes()
  shapes = [without_terms(mesh.whole(w).shape, recipe) for w in (w13, w2)]
  _check_shapes(x, *shapes, experts, weights)
  check_recipe(recipe)
  mesh.check(recipe, len(x), w13, w2)
  known = not isinstance(experts, jax.core.Tracer)
  if known:
    _check_experts(np.asarray(experts), len(w13) * mesh.peers)
  if few_rows and isinstance(packed[0], QuantizedArray):
    watched = (*taps, *(state or None for state in states))
    why = few_rows_kernel.experts_obstacle(given_recipe, watched, x, packed)
    if expert_axis is not None:
      why = why or f"the experts are divided along {expert_axis=}"
    if capacity_factor is not None and capacity_factor < 1:
      why = why or f"{capacity_factor=} may leave choices no room"
    implementation = choose(implementation, why)
    if implementation == "mosaic":
      choose(exchange, peer_memory.obstacle(implementation, None, x), "exchange")  # or refuse it
      chosen = _read_experts(experts, len(w13))
      out = few_rows_kernel.multiply_experts(given_recipe, x, *packed, chosen, weights)
      return out if capacity_factor is None else (out, jnp.int32(0))
  keys = tuple(mesh.keys(key, w) for key, w in zip(keys, (w13, w2), strict=True))
  options = recipe, implementation, exchange, known, few_rows, weights_once, mesh
  operands, states = (x, w13, w2, weights, experts), tuple(state or {} for state in states)
  keys = keys if recipe.is_stochastic else (None, None)
  out, dropped = spread(_moe_ffn, options, (*operands, keys), (taps, states), (spec_of(x), P()))
  return out if capacity_factor is None else (out, dropped)


def _moe_ffn(
  recipe,
  implementation,
  exchange,
  known,
  few_rows,
  weights_once,
  mesh,
  x,
  w13,
  w2,
  weights,
  experts,
  keys,
  taps,
  states,
):
  (tokens, k), here = experts.shape, len(w13)
  experts = _read_experts(experts, here * mesh.peers)
  widths = {"d": x.shape[1], "f": w2.shape[1]}
  watched = (*taps, *(state or None for state in states))
  why = mosaic.obstacle(recipe, watched, tokens, widths, x=x) or mesh_obstacle(x)
  implementation = choose(implementation, why)
  why = peer_memory.obstacle(implementation, mesh.expert_axis, x)
  exchange = choose(exchange, why, "exchange")
  valid = None if known else jnp.all(experts < here * mesh.peers)
  choices, dispatch = mesh.choices(experts), Whole()
  if mesh.expert_axis is not None:
    if valid is not None:
      valid = lax.pmin(valid.astype(jnp.int32), mesh.expert_axis) > 0
    room = mesh.capacity_factor
    slots = tokens if room is None else min(tokens, math.ceil(room * tokens * k / mesh.peers))
    kind = AllToAll if exchange == "xla" else peer_memory.PeerMemory
    dispatch, choices = kind.of(choices, mesh.expert_axis, here, slots)
  rows = choices.experts.size
  if mesh.capacity_factor is not None:
    rows = min(rows, math.ceil(mesh.capacity_factor * tokens * k))
  tile = 1 if implementation == "xla" else mosaic.BLOCK
  few_rows = few_rows and implementation == "xla"
  # Of all tokens an expert has one row each: not of choices that draw apart, or may find no room.
  apart = recipe.fprop.lhs.needs_key or rows < choices.experts.size or len(choices.part_ids) > 1
  if few_rows and not apart and reads_all_experts(*choices.experts.shape, here):
    order = Order.of_all_tokens(choices, here)
  else:
    order = Order.of(choices, here, tile, rows)
    if few_rows:
      order = dataclasses.replace(order, rows_per_tile=few_rows_per_tile(rows, order.groups))
  dropped = order.dropped(choices) + dispatch.dropped()
  if valid is not None:  # a choice of no expert has no row: it takes one that is NaN
    order = dataclasses.replace(order, row_of_choice=jnp.where(valid, order.row_of_choice, 0))
  if not recipe.is_stochastic or mesh.expert_axis is None:
    choices = None  # not needed again, or made again from their number alone
  where = _Rows(dispatch, order, choices, valid)
  options = recipe, implementation, mesh, weights_once
  out = _ffn(*options, x, w13, w2, weights, where, keys, taps, states)
  return out, dropped


def _read_experts(experts: Integer[Array, "token k"], num_experts: int) -> Int32[Array, "token k"]:
  """Experts in int32; one that does not exist is `num_experts`, whatever its dtype made of it."""
  if experts.dtype.itemsize >= 4:
    experts = jnp.where((experts < 0) | (experts >= num_experts), num_experts, experts)
  experts = experts.astype(jnp.int32)
  return jnp.where((experts < 0) | (experts >= num_experts), num_experts, experts)


class _Rows(NamedTuple):
  """Where the rows of tokens lie, and whether every expert that is asked for exists."""

  dispatch: Dispatch
  order: Order
  choices: Choices | None  # what stochastic rounding needs to know of rows from elsewhere
  valid: Bool[Array, ""] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _ffn(recipe, implementation, mesh, weights_once, *operands):
  del weights_once  # no backward pass will read them again
  return _fwd(recipe, implementation, mesh, False, *operands)[0]


@one_program(4)
def _fwd(
  recipe, implementation, mesh, weights_once, x, w13, w2, weights, where, keys, taps, states
):
  dispatch, order, _, valid = where
  operands = x, w13, w2, weights, order
  taps, states = refuse_shared("taps", taps, operands), refuse_shared("states", states, operands)
  tapped, dtype, residual = [tap is not None for tap in taps], x.dtype, recipe.residual
  dtypes = w13.dtype, w2.dtype
  drawing = mesh.with_ids(recipe, order, where.choices, weights.shape)
  first, second = make_gemms(
    recipe, implementation, drawing, keys, tapped, states, dtypes, mesh.weight_axis, weights_once
  )
  token = order.choice_of_row // weights.shape[1]
  in_13, in_2 = _read_in(recipe, implementation, dtypes, dtype)
  w13_read, w2_read = first.keep_weights(w13.astype(in_13)), second.keep_weights(w2.astype(in_2))

  x = _sent(recipe, implementation, dispatch, first, x, tapped[0])
  h, of_first = first.fprop(x, w13_read, token)
  h, a = second.hidden(h.astype(dtype))
  y, of_second = second.fprop(a, w2_read)
  if residual.hidden is not None and tapped[1]:
    of_second.summaries["residual.lhs"] = ops.residual_summary(h, True)
  arrived = dispatch.send(weights)
  choices = take_rows(y.astype(dtype), order.row_of_choice).reshape(*arrived.shape, -1)
  # Not an einsum: a GPU would round float32 to TF32 there.
  out = jnp.sum(choices.astype(jnp.float32) * arrived[..., None], axis=1)
  out = dispatch.collect(out, recipe.payload.sums, dtype)

  def keep_weights(w, tensor, forward):  # as they were passed, not their copy in x's dtype
    tensor = dataclasses.replace(tensor, original=w)
    tensor = tensor.kept_for(recipe.dgrad.rhs.source, forward.rhs)
    if forward.weights is None:
      return tensor
    as_read = checkpoint_name(forward.weights, "experts.weights")
    return dataclasses.replace(tensor, original=None, packed=None, as_read=as_read)

  kept_h = "original" if residual.hidden is None else "residual"
  as_read = recipe.wgrad.lhs.source == "fprop"
  x = x.kept_for(recipe.wgrad.lhs.source, of_first.lhs)
  saved = (
    checkpoint_name(x, "experts.x") if x.original is None else x,
    checkpoint_name(h.kept_for(kept_h), "experts.h"),
    a.kept_for("fprop", of_second.lhs) if as_read else None,
    (keep_weights(w13, w13_read, of_first), keep_weights(w2, w2_read, of_second)),
    (jnp.empty(0, w13.dtype), jnp.empty(0, w2.dtype)),
    (arrived, checkpoint_name(where, "experts.order"), keys, states),
    tuple(f.summaries if t else None for f, t in zip((of_first, of_second), tapped, strict=True)),
    tuple(for_pull(f)._replace(summaries=None) for f in (of_first, of_second)),
  )
  # Here and not after `_ffn`, where differentiating a select would save its zeros.
  out = nan_unless(valid, out)
  # JAX takes what a kernel returns for the same on every shard.
  (out, tensors), others = vary((out, saved[:4]), varying_axes(operands)), saved[4:]
  return out, (*tensors, *others)


@one_program(4)
def _bwd(recipe, implementation, mesh, weights_once, saved, dout):
  del weights_once
  x, h, a_read, (w13, w2), likes, others, summaries, forwards = saved
  weights, where, keys, states = others
  dispatch, order, _, valid = where
  if order.rows_per_tile is not None:
    raise ValueError("few_rows=True has no backward pass: blocks along the tokens need whole tiles")
  if mesh.weight_axis is not None:  # XLA would keep what the forward pass gathered
    w13, w2, dout = lax.optimization_barrier((w13, w2, dout))
  w13_like, w2_like = likes
  tapped, dtype = [s is not None for s in summaries], dout.dtype
  dtypes = w13_like.dtype, w2_like.dtype
  drawing = mesh.with_ids(recipe, order, where.choices, weights.shape)
  first, second = make_gemms(
    recipe, implementation, drawing, keys, tapped, states, dtypes, mesh.weight_axis
  )
  token = order.choice_of_row // weights.shape[1]

  # g = dgrad(weight * dout) has the numbers of the composed layers, but a weight of zero would hide
  # <dout, y> from its own gradient; so tiny ones go to the other side of the products.
  dout_sent = _as_sent(recipe.payload.backward, implementation, dispatch, dout)
  weight = take_rows(weights.reshape(-1, 1), order.choice_of_row)
  divisible = jnp.abs(weight) >= SMALLEST_DIVISOR
  before, after = jnp.where(divisible, weight, 1), jnp.where(divisible, 1, weight)
  dy = second.gradient_of_rows(dout_sent, token, before)
  in_13, in_2 = _read_in(recipe, implementation, dtypes, dtype)
  g, dgrad_2, dgrad_states_2 = second.dgrad(dy, w2.cast(in_2), forwards[1])

  a, dh, products = second.swiglu_backward(h, g.astype(dtype), after)
  dweights = take_rows(products / before[:, 0], order.row_of_choice).reshape(weights.shape)
  dweights = dispatch.collect_choices(dweights)
  a = a if a_read is None else a_read
  dw2, wgrad_2, wgrad_states_2 = second.wgrad(a, dy, forwards[1])

  # One product after the other: what each reads is not needed after it. XLA would run them last.
  dh, dw2 = lax.optimization_barrier((dh, dw2))
  dx, dgrad_1, dgrad_states_1 = first.dgrad(dh, w13.cast(in_13), forwards[0])
  dh, dx = lax.optimization_barrier((dh, dx))
  dw13, wgrad_1, wgrad_states_1 = first.wgrad(x, dh, forwards[0], token)
  # The layer below begins after both; where dx travels it does so beside wgrad.
  if mesh.expert_axis is None:
    dx, dw13 = lax.optimization_barrier((dx, dw13))
  # Not the sum over choices: a select there keeps XLA from fusing what follows.
  dx = take_rows(nan_unless(valid, dx).astype(dtype), order.row_of_choice)
  dx = jnp.sum(dx.reshape(*weights.shape, -1).astype(jnp.float32), axis=1)
  dx = dispatch.collect(dx, recipe.payload.sums, dtype, hidden=True)  # by wgrad
  if mesh.expert_axis is not None:
    dx, dw13 = lax.optimization_barrier((dx, dw13))
  dw13, dw2, dweights = (nan_unless(valid, g) for g in (dw13, dw2, dweights))
  dw13, dw2 = (own_columns(dw, mesh.weight_axis) for dw in (dw13, dw2))

  backward = (dgrad_1 | wgrad_1, dgrad_2 | wgrad_2)
  taps = tuple(s and ops.tap_of(s | b) for s, b in zip(summaries, backward, strict=True))
  states = (
    forwards[0].states | dgrad_states_1 | wgrad_states_1,
    forwards[1].states | dgrad_states_2 | wgrad_states_2,
  )
  gradients = dx, dw13.astype(w13_like.dtype), dw2.astype(w2_like.dtype), dweights
  gradients, taps, states = vary((gradients, taps, states), varying_axes(dout))
  return *gradients, None, None, taps, states


_ffn.defvjp(_fwd, _bwd)


def _read_in(recipe, implementation, dtypes, dtype):
  """In which dtypes the GEMMs are given the weights: kernels round them to x's as they read."""
  as_they_are = implementation == "mosaic" or isinstance(recipe.fprop.rhs, Unpacked)
  return dtypes if as_they_are else (dtype, dtype)


def _sent(recipe, implementation, dispatch, gemms, x, tapped) -> ops.Tensor:
  """x as it arrives at the experts, and as it is kept there.

  Where all that is read of x is what is kept, that is what travels.
  """
  kept, fmt = recipe.residual.lhs, recipe.payload.forward
  read = {recipe.fprop.lhs.source, recipe.wgrad.lhs.source}
  if isinstance(dispatch, Whole) and fmt in (None, kept):
    return gemms.keep(x, kept)
  if kept is not None and fmt in (None, kept) and "original" not in read and not tapped:
    packed = dispatch.send_rows(x, kept, implementation)
    return ops.Tensor(None, packed, packed.shape[:1] + x.shape[1:])
  return gemms.keep(_as_sent(fmt, implementation, dispatch, x), kept)


def _as_sent(fmt, implementation, dispatch, x) -> Float[Array, "token d"]:
  """x as it arrives, in its dtype: with a format, rounded to it before."""
  packed = dispatch.send_rows(x, fmt, implementation)
  if fmt is None:
    return packed
  return ops.Tensor(None, packed, packed.shape[:1] + x.shape[1:]).read("residual").astype(x.dtype)


def _check_shapes(x, w13, w2, experts, weights):
  if x.ndim != 2 or len(w2) != 3 or w13 != (w2[0], x.shape[1], 2 * w2[1]):
    raise ValueError(
      f"x {x.shape}, w13 {w13} and w2 {w2} are not (token, d), (e, d, 2 f), (e, f, d)"
    )
  if not len(x):
    raise ValueError(f"x {x.shape} has no tokens")
  if w2[2] != x.shape[1]:
    raise ValueError(f"w2 {w2} does not return to the {x.shape[1]} features of x {x.shape}")
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
