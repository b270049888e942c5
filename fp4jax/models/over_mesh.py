"""The experts of a model over a mesh: each device has its part of the tokens and its experts.

The mesh is the one around the call. Its axes have these names, in this order; any may be missing.

    data      divides the tokens
    fsdp      divides the tokens, and the columns of each weight where it is kept: those of experts
              are gathered in codes and scales, as `moe_ffn` says of its weight_axis
    expert    divides the tokens, and the experts
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fp4jax.moe_ffn import moe_ffn
from fp4jax.quantized_array import QuantizedArray
from fp4jax.recipe import Recipe

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

  A tap holds the mean of the devices' rows, the next state of a quantizer the largest of theirs.

  Raises:
    ValueError: tokens, parts or experts that the devices do not divide; packed weights over several
      devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(a for a in AXES if a in mesh.axis_names and a not in mesh.manual_axes)
  devices = math.prod(mesh.shape[a] for a in axes)
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
  copies, specs = jax.tree.map(lambda s: devices, states), jax.tree.map(lambda s: tokens, states)
  if expert_axis is not None:
    others = tuple(a for a in axes if a != EXPERT)
    is_stack = lambda s: s.ndim == 3 and len(s) == len(w13)  # noqa: E731
    specs = jax.tree.map(lambda s: P(others, EXPERT) if is_stack(s) else tokens, states)
    fewer = devices // mesh.shape[EXPERT]
    copies = jax.tree.map(lambda s: fewer if is_stack(s) else devices, states)
  states = jax.tree.map(_copies_of_state, copies, states)

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _copies_of_state(copies, state):
  """For each device one; the next state is the largest of theirs, as that of an amax is."""
  return jnp.broadcast_to(state, (copies, *state.shape))


def _copies_fwd(copies, state):
  return _copies_of_state(copies, state), None


def _copies_bwd(copies, _, following):
  return (jnp.max(following, axis=0),)


_copies_of_state.defvjp(_copies_fwd, _copies_bwd)


def _keep_all_but_casts(primitive, *_, **__):
  return primitive.name != "pvary"


def _check(mesh, axes, devices, tokens, experts, token_parts):
  if tokens % devices or token_parts % devices:
    raise ValueError(
      f"{tokens} tokens in token_parts={token_parts} over the {devices} devices of the mesh axes"
      f" {axes}: each needs as many tokens, and as many parts of them"
    )
  if EXPERT in axes and experts % mesh.shape[EXPERT]:
    raise ValueError(f"{experts} experts over {mesh.shape[EXPERT]} devices of the axis {EXPERT!r}")
