"""Grouped matmul for mixture-of-experts: each expert's rows times that expert's weights.

Rows come sorted by expert. They are laid out in tiles of `TILE` rows that belong to one expert
each, a group's last tile filled up with zeros, so that every GEMM becomes a batch of equal products
and neither a block along the tokens nor a Hadamard group ever reaches into another expert's rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from fp4jax import operands as ops
from fp4jax.arguments import check_arrays
from fp4jax.implementation import Implementation, choose
from fp4jax.linear import linear
from fp4jax.mosaic import gemms as mosaic_gemms
from fp4jax.mosaic import linear as mosaic_linear
from fp4jax.recipe import Recipe

TILE = 128  # rows; a multiple of every block and Hadamard group along the tokens


def grouped_dot(
  lhs: Float[Array, "m k"],
  rhs: Float[Array, "e k n"],
  group_sizes: Int[Array, " e"],
  recipe: Recipe,
  *,
  key: jax.Array | None = None,
  tap: ops.Tap | None = None,
  implementation: Implementation | None = None,
) -> Float[Array, "m n"]:
  """Rows of lhs in consecutive groups, group i times rhs[i], all three GEMMs as `recipe` says.

  Rows past the last group are never read, whatever they hold; they and their gradients are zero in
  the result. Sizes may be zero. Args `key`, `tap` and `implementation` are those of `dot_general`.

  Raises:
    ValueError: shapes that do not fit, sizes that are negative or sum to more than m, or what makes
      `implementation` impossible. Under jit, where sizes have no values yet, such sizes make the
      whole result NaN instead.
    TypeError: what is no recipe, or no array; lhs or rhs not float32, bfloat16 or float16.
  """
  ops.check_recipe_and_keys(recipe, [key])
  ops.check_operands(lhs=lhs, rhs=rhs)
  check_arrays(group_sizes=group_sizes)
  if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
    raise ValueError(f"lhs {lhs.shape} and rhs {rhs.shape} are not (m, k) and (experts, k, n)")
  if not len(lhs):
    raise ValueError(f"lhs {lhs.shape} has no rows")
  if group_sizes.shape != rhs.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise ValueError(
      f"group_sizes are {group_sizes.dtype} {group_sizes.shape}; rhs {rhs.shape} needs "
      f"{rhs.shape[0]} integers"
    )
  check_recipe(recipe)
  if not isinstance(group_sizes, jax.core.Tracer):
    _check_sizes(np.asarray(group_sizes), lhs.shape[0])
  group_sizes = jnp.asarray(group_sizes, jnp.int32)  # narrow or unsigned ones would wrap around
  valid = jnp.all(group_sizes >= 0) & (jnp.sum(group_sizes) <= lhs.shape[0])
  tiles = Tiles.of(jnp.where(valid, group_sizes, 0), lhs.shape[0])
  widths = {"k": rhs.shape[1], "n": rhs.shape[2]}
  obstacle = mosaic_gemms.obstacle(recipe, (tap,), lhs.shape[0], widths, lhs=lhs, rhs=rhs)
  if choose(implementation, obstacle) == "mosaic":
    out = mosaic_linear.linear(recipe, tiles.slots(), lhs, rhs)
  else:
    out = linear(recipe, jnp.result_type(lhs, rhs), tiles, lhs, rhs, key, tap)
  return jnp.where(valid, out, jnp.nan)


def _check_sizes(sizes, rows):
  if (sizes < 0).any():
    i = int(np.argmin(sizes))
    raise ValueError(f"group_sizes[{i}]={sizes[i]} is negative")
  if sizes.sum() > rows:
    raise ValueError(f"group_sizes sum to {sizes.sum()}, more than the {rows} rows of lhs")


def check_recipe(recipe: Recipe) -> None:
  """Refuses a recipe whose blocks or transforms along the tokens would reach across experts."""
  tokens = {
    "fprop.lhs": recipe.fprop.lhs,
    "dgrad.lhs": recipe.dgrad.lhs,
    "wgrad.lhs": recipe.wgrad.lhs,
    "wgrad.rhs": recipe.wgrad.rhs,
  }
  for role, spec in tokens.items():
    if spec.is_quantized and spec.format.block_shape and len(spec.format.block_shape) == 2:
      raise ValueError(
        f"{recipe.name}: 2-D blocks of {spec.format.name} in {role} would cross experts"
      )
  multiple = ops.contraction_multiple(recipe.wgrad)
  if TILE % multiple:
    raise ValueError(
      f"{recipe.name}: wgrad blocks of {multiple} do not divide tiles of {TILE} rows"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
  """Which row lies where: slot = tile * TILE + place within the tile."""

  expert: Int[Array, " tile"]
  row_of_slot: Int[Array, " slot"]  # 0 where the slot is empty
  filled: Bool[Array, " slot"]
  slot_of_row: Int[Array, " m"]  # 0 past the last group
  used: Bool[Array, " m"]
  group_sizes: Int[Array, " e"]

  @classmethod
  def of(cls, group_sizes: Int[Array, " e"], rows: int) -> "Tiles":
    experts = group_sizes.shape[0]
    tiles = rows // TILE + experts  # enough for any sizes: each group wastes < 1
    row_end = jnp.cumsum(group_sizes)
    row_start = row_end - group_sizes
    tile_end = jnp.cumsum(-(-group_sizes // TILE))
    tile_start = tile_end - -(-group_sizes // TILE)

    expert = jnp.minimum(_group_of(jnp.arange(tiles), tile_end), experts - 1)
    place = jnp.arange(tiles * TILE).reshape(tiles, TILE) - (tile_start[expert] * TILE)[:, None]
    filled = place < group_sizes[expert][:, None]
    row_of_slot = jnp.where(filled, row_start[expert][:, None] + place, 0)

    row = jnp.arange(rows)
    used = row < row_end[-1]
    owner = jnp.minimum(_group_of(row, row_end), experts - 1)
    slot_of_row = jnp.where(used, tile_start[owner] * TILE + row - row_start[owner], 0)
    return cls(expert, row_of_slot.ravel(), filled.ravel(), slot_of_row, used, group_sizes)

  def slots(self) -> mosaic_linear.Slots:
    """The same as the kernels read it, whose tiles are as long."""
    return mosaic_linear.Slots(
      row_of_slot=jnp.where(self.filled, self.row_of_slot, self.used.size),
      slot_of_row=jnp.where(self.used, self.slot_of_row, self.filled.size),
      group_sizes=-(-self.group_sizes // TILE) * TILE,
    )

  def rows(self, x: Float[Array, "m c"]) -> Float[Array, "m c"]:
    return jnp.where(self.used[:, None], x, 0)

  def groups(self, x: Float[Array, "m c"]) -> Float[Array, "tile row c"]:
    slots = jnp.where(self.filled[:, None], x[self.row_of_slot], 0)
    return slots.reshape(-1, TILE, x.shape[1])

  def fprop(self, x: ops.Prepared, w: ops.Prepared) -> Float32[Array, "m n"]:
    return self._rows_times_weights(x, w, contract=1)

  def dgrad(self, dy: ops.Prepared, w: ops.Prepared) -> Float32[Array, "m k"]:
    return self._rows_times_weights(dy, w, contract=2)

  def wgrad(self, x: ops.Prepared, dy: ops.Prepared) -> Float32[Array, "e k n"]:
    by_tile = ops.gemm(x, dy, (((1,), (1,)), ((0,), (0,))))
    experts = self.group_sizes.size
    return jax.ops.segment_sum(by_tile, self.expert, experts, indices_are_sorted=True)

  def _rows_times_weights(self, rows, weights, contract):
    tiles = dataclasses.replace(rows, values=self.groups(rows.values))
    weights = dataclasses.replace(weights, values=weights.values[self.expert])
    out = ops.gemm(tiles, weights, (((2,), (contract,)), ((0,), (0,))))
    return self.rows(out.reshape(-1, out.shape[-1])[self.slot_of_row])


def _group_of(position, ends):
  """Index of the group that `position` falls into; groups of size zero hold nothing."""
  return jnp.searchsorted(ends, position, side="right")
