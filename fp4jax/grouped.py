"""Grouped matmul for mixture-of-experts: each expert's rows times that expert's weights.

Rows come sorted by expert. They are laid out in tiles of `TILE` rows that belong to one expert
each, a group's last tile filled up with zeros: every GEMM becomes a batch of equal products, and
neither a block along the tokens nor a Hadamard group ever reaches into another group's rows. In a
decoding step a tile has fewer rows, or each expert all tokens (`EqualGroups`). Each row draws by a
number of its own, and each expert's weights by theirs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Integer

from fp4jax import operands as ops
from fp4jax.arguments import to_arrays
from fp4jax.formats import Slices, is_format
from fp4jax.implementation import Implementation, choose
from fp4jax.linear import linear
from fp4jax.mosaic import gemms as mosaic
from fp4jax.products import gemm
from fp4jax.recipe import Recipe
from fp4jax.sharding import mesh_obstacle, spec_of, spread

TILE = 128  # rows; a multiple of every block and Hadamard group along the tokens


def grouped_dot(
  lhs: ArrayLike,
  rhs: ArrayLike,
  group_sizes: ArrayLike,
  recipe: Recipe,
  *,
  key: jax.Array | None = None,
  tap: ops.Tap | None = None,
  state: ops.State | None = None,
  row_ids: ArrayLike | None = None,
  implementation: Implementation | None = None,
) -> Float[Array, "m n"]:
  """Rows of lhs in consecutive groups, group i times rhs[i], all three GEMMs as `recipe` says.

  Rows past the last group are never read, whatever they hold; they and their gradients are zero in
  the result. Sizes may be zero. Args `key`, `tap`, `state` and `implementation` are those of
  `dot_general`. A scale of the whole slice is one expert's: of its rows, of its weights.

  Args:
    lhs: (m, k).
    rhs: (experts, k, n).
    group_sizes: (experts,) integers of any dtype.
    row_ids: (m,) int32, what each row draws by in place of its number, such as that of its token.
  Raises:
    ValueError: shapes that do not fit, sizes that are negative or sum to more than m, or what makes
      `implementation` impossible. Under jit, where sizes have no values yet, such sizes make the
      whole result NaN instead, and its gradients.
    TypeError: something is not a recipe or an array; lhs or rhs not float32, bfloat16 or float16.
  """
  ops.check_recipe_and_keys(recipe, [key])
  ops.check_state(recipe, state)
  lhs, rhs = ops.to_operands(lhs=lhs, rhs=rhs)
  (group_sizes,) = to_arrays(group_sizes=group_sizes)
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
  known = not isinstance(group_sizes, jax.core.Tracer)
  if known:
    _check_sizes(np.asarray(group_sizes), lhs.shape[0])
  key = key if recipe.is_stochastic else None
  row_ids = jnp.arange(len(lhs), dtype=jnp.int32) if row_ids is None else row_ids
  (row_ids,) = to_arrays(row_ids=row_ids)
  if row_ids.shape != lhs.shape[:1] or row_ids.dtype != jnp.int32:
    raise ValueError(f"row_ids are {row_ids.dtype} {row_ids.shape}, not {len(lhs)} of int32")
  operands = lhs, rhs, group_sizes, row_ids, ops.Keys.of(key, (lhs, group_sizes), rhs)
  options = recipe, implementation, known
  return spread(_grouped_dot, options, operands, (tap, state or {}), _result_spec(lhs, rhs))


def _grouped_dot(recipe, implementation, known, lhs, rhs, group_sizes, row_ids, keys, tap, state):
  sizes, valid = _read_sizes(group_sizes, lhs.shape[0])
  ids = _draw_ids(row_ids, len(rhs)) if recipe.is_stochastic else ops.DrawIds()
  tiles = Tiles.of(sizes, len(lhs), len(rhs), ids, None if known else valid)
  widths = {"k": rhs.shape[1], "n": rhs.shape[2]}
  watched = (tap, state or None)
  why = mosaic.obstacle(recipe, watched, lhs.shape[0], widths, lhs=lhs, rhs=rhs)
  implementation = choose(implementation, why or mesh_obstacle(lhs, rhs))
  layout = tiles if implementation == "xla" else tiles.slots()
  dtype = jnp.result_type(lhs, rhs)
  return linear(recipe, implementation, dtype, None, layout, lhs, rhs, keys, tap, state)


def _draw_ids(rows, experts):
  """Those of `moe_ffn`, whose tokens are all of part 0."""
  rows, weights = rows[:, None], jnp.arange(experts, dtype=jnp.int32)[:, None]
  with_part = lambda ids: jnp.pad(ids, [(0, 0), (1, 0)])  # noqa: E731
  return ops.DrawIds(with_part(rows), weights, with_part(weights))


def _result_spec(lhs, rhs):
  """Rows lie as those of lhs; columns as those of rhs, but over axes that rows leave."""
  rows, columns = spec_of(lhs)[0], spec_of(rhs)[2]
  shared = set(jax.tree.leaves(rows)) & set(jax.tree.leaves(columns))
  return PartitionSpec(rows, None if shared else columns)


def _read_sizes(
  sizes: Integer[Array, " e"], rows: int
) -> tuple[Int32[Array, " e"], Bool[Array, ""]]:
  """Sizes in int32, all zero where they are not valid, and whether they are.

  No sum leaves int32, whatever the sizes: it stays at rows + 1 once it is there.
  """
  too_many = rows + 1
  if sizes.dtype.itemsize >= 4:  # a narrower one holds no more than int32
    sizes = jnp.where(sizes > rows, too_many, sizes)
  sizes = jnp.where(sizes < 0, too_many, sizes.astype(jnp.int32))
  sizes = jnp.minimum(sizes, too_many)
  total = jax.lax.reduce(sizes, jnp.int32(0), _add_up_to(too_many), (0,))
  valid = total <= rows
  return jnp.where(valid, sizes, 0), valid


@functools.cache  # JAX compiles anew for each function that it is given
def _add_up_to(limit):
  return lambda a, b: jnp.minimum(a + b, jnp.int32(limit))


def _check_sizes(sizes, rows):
  if (sizes < 0).any():
    i = int(np.argmin(sizes))
    raise ValueError(f"group_sizes[{i}]={sizes[i]} is negative")
  total = sum(map(int, sizes))
  if total > rows:
    raise ValueError(f"group_sizes sum to {total}, more than the {rows} rows of lhs")


def check_recipe(recipe: Recipe) -> None:
  """Refuses a recipe whose blocks or transforms along the tokens would reach across experts."""
  tokens = {
    "fprop.lhs": recipe.fprop.lhs,
    "dgrad.lhs": recipe.dgrad.lhs,
    "wgrad.lhs": recipe.wgrad.lhs,
    "wgrad.rhs": recipe.wgrad.rhs,
  }
  for role, spec in tokens.items():
    if is_format(spec.format) and spec.format.block_shape and len(spec.format.block_shape) == 2:
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
  """Which row lies where: slot = number of the tile * rows of a tile + place within the tile."""

  group: Int[Array, " tile"]
  row_of_slot: Int[Array, " slot"]  # 0 where the slot is empty
  filled: Bool[Array, " slot"]
  slot_of_row: Int[Array, " m"]  # 0 past the last group
  used: Bool[Array, " m"]
  group_of_row: Int[Array, " m"]  # any past the last group
  group_sizes: Int[Array, " g"]
  ids: ops.DrawIds
  valid: Bool[Array, ""] | None  # see `Layout`
  experts: int = dataclasses.field(metadata={"static": True})
  tile: int = dataclasses.field(default=TILE, metadata={"static": True})  # its rows

  @classmethod
  def of(
    cls,
    group_sizes: Int[Array, " g"],
    rows: int,
    experts: int,
    ids: ops.DrawIds = ops.DrawIds(),  # noqa: B008
    valid: Bool[Array, ""] | None = None,
    tile: int = TILE,
  ) -> "Tiles":
    """Each of the experts has as many groups, one after the other."""
    groups = len(group_sizes)
    # Enough for any sizes: each group wastes less than one, and no tile is without a row.
    tiles = min(rows // tile + groups, rows)
    row_end = jnp.cumsum(group_sizes)
    row_start = row_end - group_sizes
    tile_end = jnp.cumsum(-(-group_sizes // tile))
    tile_start = tile_end - -(-group_sizes // tile)

    group = jnp.minimum(_group_of(jnp.arange(tiles), tile_end), groups - 1)
    place = jnp.arange(tiles * tile).reshape(tiles, tile) - (tile_start[group] * tile)[:, None]
    filled = place < group_sizes[group][:, None]
    row_of_slot = jnp.where(filled, row_start[group][:, None] + place, 0)

    row = jnp.arange(rows)
    used = row < row_end[-1]
    owner = jnp.minimum(_group_of(row, row_end), groups - 1)
    slot_of_row = jnp.where(used, tile_start[owner] * tile + row - row_start[owner], 0)
    if ids.groups is not None:  # and by the place within
      ids = ids._replace(
        groups=jnp.concatenate(
          [
            jnp.broadcast_to(ids.groups[group][:, None], (*place.shape, ids.groups.shape[1])),
            place[..., None],
          ],
          axis=-1,
        )
      )
    slots = row_of_slot.ravel(), filled.ravel()
    return cls(group, *slots, slot_of_row, used, owner, group_sizes, ids, valid, experts, tile)

  def slots(self) -> mosaic.Slots:
    """The same as the kernels read it, whose tiles are as long."""
    return mosaic.Slots(
      rows_in=jnp.where(self.filled, self.row_of_slot, self.used.size),
      rows_out=jnp.where(self.used, self.slot_of_row, self.filled.size),
      group_sizes=-(-self.group_sizes // TILE) * TILE,
      valid=self.valid,
    )

  rows_in = rows_out = None

  @property
  def slices(self) -> Slices:
    return Slices(owner=self.group_of_row, owners=self.group_sizes.size)

  @property
  def weight_slices(self) -> Slices:
    return Slices(leading=1)

  @property
  def group_slices(self) -> Slices:
    return Slices(owner=self.group, owners=self.group_sizes.size)

  @property
  def expert(self) -> Int[Array, " tile"]:
    return self.group // (self.group_sizes.size // self.experts)

  def rows(self, x: Float[Array, "m c"]) -> Float[Array, "m c"]:
    return jnp.where(self.used[:, None], x, 0)

  def groups(self, x: Float[Array, "m c"]) -> Float[Array, "tile row c"]:
    slots = jnp.where(self.filled[:, None], x[self.row_of_slot], 0)
    return slots.reshape(-1, self.tile, x.shape[1])

  def fprop(self, x: Float[Array, "m k"], w: Float[Array, "e k n"]) -> Float32[Array, "m n"]:
    return self._rows_times_weights(x, w, contract=1)

  def dgrad(self, dy: Float[Array, "m n"], w: Float[Array, "e k n"]) -> Float32[Array, "m k"]:
    return self._rows_times_weights(dy, w, contract=2)

  def wgrad(
    self, x: Float[Array, "tile row k"], dy: Float[Array, "tile row n"]
  ) -> Float32[Array, "e k n"]:
    by_tile = gemm(x, dy, (((1,), (1,)), ((0,), (0,))))
    return jax.ops.segment_sum(by_tile, self.expert, self.experts, indices_are_sorted=True)

  def _rows_times_weights(self, rows, weights, contract):
    out = gemm(self.groups(rows), weights[self.expert], (((2,), (contract,)), ((0,), (0,))))
    return self.rows(out.reshape(-1, out.shape[-1])[self.slot_of_row])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EqualGroups:
  """A layout in which every expert has as many rows, in its order: no weights are gathered."""

  ids: ops.DrawIds
  experts: int = dataclasses.field(metadata={"static": True})
  each: int = dataclasses.field(metadata={"static": True})  # rows of one

  rows_in = rows_out = valid = None
  weight_slices = Slices(leading=1)

  @property
  def slices(self) -> Slices:
    return Slices(owner=jnp.arange(self.experts * self.each) // self.each, owners=self.experts)

  def rows(self, x: Float[Array, "m c"]) -> Float[Array, "m c"]:
    return x

  def fprop(self, x: Float[Array, "m k"], w: Float[Array, "e k n"]) -> Float32[Array, "m n"]:
    groups = x.reshape(self.experts, self.each, -1)
    return gemm(groups, w, (((2,), (1,)), ((0,), (0,)))).reshape(len(x), -1)


def reads_all_experts(tokens: int, k: int, experts: int) -> bool:
  """Whether a decoding step does best to multiply all tokens by every expert.

  It then reads each expert's weights once, where tiles have those that they read gathered first: a
  read, a write and a read. Up to some 150 tokens a GPU multiplies them sooner than it reads the
  weights.
  """
  return tokens <= TILE and experts <= 3 * tokens * k


def few_rows_per_tile(rows: int, groups: int) -> int:
  """The power of two that holds a group's rows where all groups have as many; at most `TILE`.

  Less than three times the rows are then multiplied, and few weights are read more than once.
  """
  return min(TILE, 2 ** max(0, -(-rows // groups) - 1).bit_length())


def _group_of(position, ends):
  """Index of the group that `position` falls into; groups of size zero hold nothing."""
  return jnp.searchsorted(ends, position, side="right")
