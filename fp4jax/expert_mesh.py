"""Where a call of `moe_ffn` runs: its parts of the tokens, of the experts, and of their columns."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from fp4jax import operands as ops
from fp4jax.dispatch import Choices, Order
from fp4jax.formats import is_format
from fp4jax.formats.format import block_axes
from fp4jax.formats.roundings import typed
from fp4jax.quantizers import Operand
from fp4jax.recipe import Recipe, moves_by_rows
from fp4jax.sharding import Axes, fold_in_axes, varying_axes


class ExpertMesh(NamedTuple):
  """The arguments of `moe_ffn` that say where it runs."""

  token_parts: int
  expert_axis: str | None
  weight_axis: str | None
  capacity_factor: float | None
  axes: Axes  # that divide the tokens

  @property
  def peers(self) -> int:
    return 1 if self.expert_axis is None else lax.axis_size(self.expert_axis)

  def check_axes(self) -> None:
    for name in ("expert_axis", "weight_axis"):
      axis = getattr(self, name)
      if axis is not None and axis not in jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(f"{name}={axis!r} is no mesh axis of a jax.shard_map around this call")

  def whole(self, w: Array) -> jax.ShapeDtypeStruct:
    """w with all of its columns."""
    parts = 1 if self.weight_axis is None else lax.axis_size(self.weight_axis)
    return jax.ShapeDtypeStruct((*w.shape[:-1], w.shape[-1] * parts), w.dtype)

  def keys(self, key: jax.Array | None, w: Array) -> ops.Keys | None:
    """Rows draw by their place among all tokens, weights by their expert among all of the axis."""
    if key is None:
      return None
    key = typed(key)
    known = (self.expert_axis, self.weight_axis)
    of_weights = fold_in_axes(key, tuple(a for a in varying_axes(w) if a not in known))
    return ops.Keys(lhs=key, rhs=of_weights, dy=key, shared=of_weights)

  def choices(self, experts: Int32[Array, "token k"]) -> Choices:
    (tokens, k), parts = experts.shape, self.token_parts
    part, place = jnp.divmod(jnp.arange(tokens, dtype=jnp.int32), tokens // parts)
    places = place[:, None] * k + jnp.arange(k, dtype=jnp.int32)[None]
    first = lax.axis_index(self.axes) * parts if self.axes else 0
    return Choices(experts, part, places, first + jnp.arange(parts, dtype=jnp.int32))

  def with_ids(
    self, recipe: Recipe, order: Order, choices: Choices | None, shape: tuple[int, ...]
  ) -> Order:
    """The order with what a stochastic recipe draws by; `shape` is that of all choices, which are
    those of this device where `choices` is None."""
    if not recipe.is_stochastic:
      return order
    experts = order.experts
    choices = self.choices(jnp.zeros(shape, jnp.int32)) if choices is None else choices
    first = 0 if self.expert_axis is None else lax.axis_index(self.expert_axis) * experts
    return order.with_ids(choices, first + jnp.arange(experts, dtype=jnp.int32))

  def check(self, recipe: Recipe, tokens: int, w13: Array, w2: Array) -> None:
    """Raises ValueError for what can't be divided so."""
    parts, axis, room = self.token_parts, self.expert_axis, self.capacity_factor
    if parts < 1 or tokens % parts:
      raise ValueError(f"token_parts={parts} does not divide {tokens} tokens")
    if axis is not None and axis not in varying_axes(w13):
      raise ValueError(f"w13 is whole on each device of expert_axis={axis!r}: in_specs divides it")
    if self.weight_axis is not None:
      columns = {"w13": w13.shape[-1], "w2": w2.shape[-1]}
      if why := columns_obstacle(recipe, columns):
        raise ValueError(f"weight_axis={self.weight_axis!r}: {why}")
    if room is not None and not room > 0:
      raise ValueError(f"capacity_factor={room} is not above 0")
    kept = recipe.residual.lhs
    if (parts > 1 or axis is not None) and kept is not None and not moves_by_rows(kept):
      raise ValueError(
        f"{recipe.name}: residual.lhs={kept.name} has scales that several tokens share, and"
        f" token_parts={parts}, expert_axis={axis!r} part them"
      )


def columns_obstacle(recipe: Recipe, columns: dict[str, int]) -> str | None:
  """Why a part of a weight's columns is not read as it is read within all of them.

  `columns` are how many of each weight a device has, by its name.
  """
  multiple = ops.contraction_multiple(recipe.dgrad)  # which contracts the columns
  formats = {"residual.rhs": (recipe.residual.rhs, -2)}
  for role, axis in (("fprop.rhs", -2), ("dgrad.rhs", -1)):
    quantizer = recipe.operand(role)
    partner = recipe.operand(f"{role[:5]}.lhs")
    if not all(isinstance(q, Operand) for q in (quantizer, partner)) or quantizer.needs_key:
      return (
        f"recipe {recipe.name!r} reads {role} by {quantizer}, and what it meets by {partner}; parts"
        " of a weight are read by plain operands rounded to nearest"
      )
    formats[role] = quantizer.format, axis
  for role, (fmt, axis) in formats.items():
    if not is_format(fmt):
      continue
    if fmt.block_shape is None or fmt.has_tensor_scale:
      return f"{fmt.name} in {role} has one scale for a weight"
    multiple = math.lcm(multiple, block_axes(fmt, axis).get(-1, 1))
  for name, own in columns.items():
    if own % multiple:
      return (
        f"the {own} columns of {name} on a device are no multiple of {multiple}, the blocks of"
        f" recipe {recipe.name!r} along them"
      )
  return None
