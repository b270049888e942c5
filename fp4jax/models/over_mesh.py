"""The GEMMs of a model over a mesh: each device has its part of the tokens and its experts.

The mesh is the one around the call. Its axes have these names, in this order; any may be missing.

    data      divides the tokens
    fsdp      divides the tokens, and the columns of each weight where it is kept: experts and
              kernels gather what their GEMMs read, as `moe_ffn` says of its weight_axis; XLA does
              what it likes with the others
    expert    divides the tokens, and the experts
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fp4jax.dot import DotGeneral, multiply_by_kernels
from fp4jax.dot import obstacle as dot_obstacle
from fp4jax.expert_mesh import columns_obstacle
from fp4jax.implementation import choose
from fp4jax.moe_ffn import moe_ffn
from fp4jax.operands import init_state, token_multiple
from fp4jax.quantized_array import QuantizedArray
from fp4jax.recipe import Recipe
from fp4jax.sharding import mesh_obstacle, vary

AXES = ("data", "fsdp", "expert")
FSDP, EXPERT = "fsdp", "expert"


def moe_ffn_over_mesh(
  x: Float[Array, "token d"],
  w13: Float[Array, "e d f2"] | QuantizedArray,
  w2: Float[Array, "e f d"] | QuantizedArray,
  experts: Int[Array, "token k"],
  weights: Float[Array, "token k"],
  recipe: Recipe,
  *,
  keys: tuple,
  taps: tuple,
  states: tuple,
  token_parts: int = 1,
  **options: Any,
) -> Any:
  """`moe_ffn` of all tokens and all experts, computed where they are; packed on one device.

  A tap holds the mean of the devices' rows, the next state of a quantizer the largest of theirs, or
  their sum, the gradient, of one that it learns.

  Raises:
    ValueError: tokens, parts or experts that the devices do not divide; packed weights over several
      devices.
  """
  mesh, axes, devices = _mesh()
  if devices == 1:
    how = {"keys": keys, "taps": taps, "states": states, "token_parts": token_parts}
    return moe_ffn(x, w13, w2, experts, weights, recipe, **how, **options)
  if isinstance(w13, QuantizedArray):
    raise ValueError(f"packed weights of experts over the {devices} devices of the axes {axes}")
  expert_axis = EXPERT if EXPERT in axes and mesh.shape[EXPERT] > 1 else None
  _check(mesh, axes, devices, len(x), len(w13), token_parts)
  weight_axis = FSDP if FSDP in axes and mesh.shape[FSDP] > 1 else None
  tokens, of_experts = P(axes), P(expert_axis, None, weight_axis)
  taps = jax.tree.map(lambda tap: jnp.broadcast_to(tap / devices, (devices, *tap.shape)), taps)
  others = tuple(a for a in axes if a != expert_axis)
  fewer = math.prod(mesh.shape[a] for a in others)
  states = tuple(state or {} for state in states)
  learned = tuple(
    {role: jax.tree.map(lambda _, r=role: _is_learned(recipe, r), own) for role, own in s.items()}
    for s in states
  )
  pairs = zip(states, (w13, w2), strict=True)
  of_each = tuple(_of_each_expert(recipe, state, x, w) for state, w in pairs)
  specs = jax.tree.map(lambda each: P(others, expert_axis) if each else tokens, of_each)
  copies = jax.tree.map(lambda each: fewer if each else devices, of_each)
  states = jax.tree.map(_copies_of_state, copies, learned, states)

  def on_device(x, w13, w2, experts, weights, keys, taps, states):
    own = {"taps": taps, "states": states}
    own = jax.tree.map(lambda v: v[0], own)
    how = {"keys": keys, "token_parts": token_parts // devices, "expert_axis": expert_axis}
    how["weight_axis"] = weight_axis
    out = moe_ffn(x, w13, w2, experts, weights, recipe, **how, **own, **options)
    return out if isinstance(out, jax.Array) else (out[0], out[1][None])

  # Weights that are cast to vary are no longer the caller's: a scan over layers would keep copies.
  on_device = jax.checkpoint(on_device, prevent_cse=False, policy=_keep_all_but_casts)
  bounded = options.get("capacity_factor") is not None
  out = jax.shard_map(
    on_device,
    in_specs=(tokens, of_experts, of_experts, tokens, tokens, P(), tokens, specs),
    out_specs=(tokens, tokens) if bounded else tokens,
    axis_names=set(axes),
  )(x, w13, w2, experts, weights, keys, taps, states)
  return (out[0], jnp.sum(out[1])) if bounded else out


def matmul_over_mesh(
  dot: DotGeneral, x: Float[Array, "b *t k"], w: Float[Array, "k n"] | QuantizedArray
) -> Array:
  """x @ w by `dot`, with w cast to x's dtype, or packed; each device has its part of the b.

  XLA divides no kernel. So each device multiplies its tokens by one of its own, and the gradients
  of w are added in float32; by kernels they are not rounded to x's dtype first. What the kernels
  can't do is left to XLA, or raises where `dot` names "mosaic".
  """
  mesh, axes, devices = _mesh()
  contract = (((x.ndim - 1,), (0,)), ((), ()))
  if isinstance(w, QuantizedArray):
    return _where_tokens_are(dot(_where_tokens_are(x), w, contract))
  why = _kernel_obstacle(mesh, axes, devices, dot, x, w)
  if (devices == 1 and why) or choose(dot.implementation, why) == "xla":
    return _where_tokens_are(dot(_where_tokens_are(x), w.astype(x.dtype), contract))
  if devices == 1:
    return multiply_by_kernels(dot.recipe, x, w)
  fsdp = FSDP if FSDP in axes and mesh.shape[FSDP] > 1 else None

  def on_device(x, w):
    w = vary(w.astype(jnp.float32), axes)  # in which gradients are added
    return multiply_by_kernels(dot.recipe, x, w, fsdp)

  on_device = jax.checkpoint(on_device, prevent_cse=False, policy=_keep_all_but_copies)
  specs = P(axes), P(None, fsdp)
  return jax.shard_map(on_device, in_specs=specs, out_specs=P(axes), axis_names=set(axes))(x, w)


def _kernel_obstacle(mesh, axes, devices, dot, x, w):
  """Why each device can't multiply its part of x by a kernel, to the numbers of one device."""
  if x.shape[-1] != w.shape[0]:
    return f"x {x.shape} does not have the {w.shape[0]} rows of w"
  lhs = jax.ShapeDtypeStruct((len(x) // devices, *x.shape[1:]), x.dtype)
  rhs = jax.ShapeDtypeStruct(w.shape, x.dtype)
  if why := dot_obstacle(dot.recipe, (dot.tap, dot.state or None), lhs, rhs, x.dtype):
    return why
  others = [a for a in mesh.axis_names if a not in (*axes, *mesh.manual_axes) and mesh.shape[a] > 1]
  if mesh.explicit_axes:
    return f"the mesh axes {mesh.explicit_axes} are Explicit"
  if others:
    return f"the mesh axes {others} divide what XLA computes, and it divides no kernel"
  if len(x) % devices:
    return f"{devices} devices do not divide the {len(x)} rows of x {x.shape}"
  parts = mesh.shape[FSDP] if FSDP in axes else 1
  if w.shape[1] % parts:
    return f"{parts} devices of {FSDP!r} do not divide the {w.shape[1]} columns of w"
  if parts > 1 and (why := columns_obstacle(dot.recipe, {"w": w.shape[1] // parts})):
    return why
  tokens, multiple = math.prod(lhs.shape[:-1]), token_multiple(dot.recipe)
  if devices == 1:
    return mesh_obstacle(x, w)  # where they lie, if none is around the call
  if tokens % multiple:
    return f"{tokens} tokens of a device, no multiple of the {multiple} that share a scale"
  return None


def _mesh():
  """The mesh around the call, those of its axes that divide tokens here, and their devices."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(a for a in AXES if a in mesh.axis_names and a not in mesh.manual_axes)
  return mesh, axes, math.prod(mesh.shape[a] for a in axes)


def _where_tokens_are(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
  """x, and its gradient, with the first axis divided among all devices of the mesh around the call.

  Of a GEMM with weights in parts, XLA may otherwise bring all tokens to each part of the weights.
  """
  mesh, axes, devices = _mesh()
  if devices == 1 or mesh.explicit_axes or len(x) % devices:
    return x
  return jax.lax.with_sharding_constraint(x, P(axes))


def _is_learned(recipe, role):
  return getattr(recipe.operand(role), "learns_state", False)


def _of_each_expert(recipe, state, x, w):
  """Of each leaf of a state whether its first axis is that of the experts."""

  def shapes(experts):
    return jax.eval_shape(lambda: init_state(recipe, x.shape, (experts, *w.shape[1:])))

  of_one, of_two = shapes(1), shapes(2)
  return jax.tree.map(lambda s, a, b: a.shape != b.shape, state, of_one, of_two)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _copies_of_state(copies, learned, state):
  """For each device one; the next state is the largest of theirs, as that of an amax is, and a
  gradient their sum."""
  return jnp.broadcast_to(state, (copies, *state.shape))


def _copies_fwd(copies, learned, state):
  return _copies_of_state(copies, learned, state), None


def _copies_bwd(copies, learned, _, following):
  return (jnp.sum(following, axis=0) if learned else jnp.max(following, axis=0),)


_copies_of_state.defvjp(_copies_fwd, _copies_bwd)


def _keep_all_but_casts(primitive, *_, **__):
  return primitive.name != "pvary"


def _keep_all_but_copies(primitive, *_, **__):
  """All but w in float32, or cast to vary, in any shape."""
  return primitive.name not in ("pvary", "convert_element_type", "reshape", "broadcast_in_dim")


def _check(mesh, axes, devices, tokens, experts, token_parts):
  if tokens % devices or token_parts % devices:
    raise ValueError(
      f"{tokens} tokens in token_parts={token_parts} over the {devices} devices of the mesh axes"
      f" {axes}: each needs as many tokens, and as many parts of them"
    )
  if EXPERT in axes and experts % mesh.shape[EXPERT]:
    raise ValueError(f"{experts} experts over {mesh.shape[EXPERT]} devices of the axis {EXPERT!r}")
