"""The operands of a recipe's GEMMs, shared by `dot_general`, `grouped_dot` and `moe_ffn`.

Where an operand is read from, its key and its state, its row of the tap; `read` hands it to the
quantizer of its role.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Shaped

from fp4jax import quantization as qz
from fp4jax import recipe as recipe_lib
from fp4jax import sharding
from fp4jax.arguments import check_key, check_type, to_arrays
from fp4jax.decomposition import SUMMARY_FIELDS, ErrorSummary
from fp4jax.formats import WHOLE, Format, Slices, is_format
from fp4jax.formats.format import block_axes
from fp4jax.formats.roundings import fold_in, typed
from fp4jax.quantized_array import QuantizedArray
from fp4jax.quantizers.quantizer import (
  Context,
  Read,
  Source,
  Summary,
  error_summary,
  pad,
  pad_to_blocks,
)
from fp4jax.recipe import Gemm, Recipe

# Rows of a tap.
ROLES = (*recipe_lib.ROLES, "residual.lhs", "residual.rhs")
_GEMM_SEEDS = {"fprop": 100, "dgrad": 101, "wgrad": 102}

Tap = Float32[Array, "role field"]
Ids = Int[Array, "*n i"]


class DrawIds(NamedTuple):
  """What each row, the weights of each expert, and the rows of each group draw by: numbers that
  are theirs wherever they lie. None: all of an operand draws as one array."""

  rows: Ids | None = None
  weights: Ids | None = None
  groups: Ids | None = None


State = dict[str, Any]  # of the quantizers that have one, by role


def new_tap() -> Tap:
  """What `tap=` takes: differentiate the loss by it to get every operand's error summary.

  The "gradient" has a row for each of `ROLES` and a column for each of `SUMMARY_FIELDS`, from the
  tensors that the GEMMs read in that very pass. Rows of what is not quantized are zero; `read_tap`
  gives the others by role. The loss does not depend on a tap.

  A tap belongs to one call: the gradients of a tap that two calls share are added.
  """
  return jnp.zeros((len(ROLES), len(SUMMARY_FIELDS)), jnp.float32)


def read_tap(tap: Tap, recipe: Recipe) -> dict[str, ErrorSummary]:
  """What the "gradient" of a tap says of each role that `recipe` quantizes, "fprop.lhs"."""
  check_tap(tap)
  return {role: ErrorSummary(*tap[ROLES.index(role)]) for role in quantized_roles(recipe)}


def check_tap(tap: Tap | None) -> None:
  """Refuses what `new_tap` does not make."""
  shape = len(ROLES), len(SUMMARY_FIELDS)
  if tap is not None and (getattr(tap, "shape", None), jnp.result_type(tap)) != (
    shape,
    jnp.float32,
  ):
    found = f"{jnp.result_type(tap)} {getattr(tap, 'shape', ())}"
    raise ValueError(f"tap is {found}, not float32 {shape}: fp4jax.new_tap() makes one")


def init_state(recipe: Recipe, lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...]) -> State:
  """What `state=` takes: the first state of every quantizer that has one, by role.

  Differentiate the loss by it: the "gradient" is the next state, which replaces it, but for a
  quantizer that learns its state, whose gradient it is. A recipe without state has {}.

  Args:
    recipe: the numerics.
    lhs_shape: (*b, m, k), of the rows.
    rhs_shape: (*b, k, n), of the weights; (experts, k, n) in `grouped_dot` and `moe_ffn`.
  """
  dy_shape = (*lhs_shape[:-1], rhs_shape[-1])
  shapes = {"lhs": lhs_shape, "rhs": rhs_shape}
  gradients = ("dgrad.lhs", "wgrad.rhs")
  states = {
    role: quantizer.init(dy_shape if role in gradients else shapes[role[-3:]])
    for role, quantizer in recipe.operands()
  }
  return {role: state for role, state in states.items() if jax.tree.leaves(state)}


class Keys(NamedTuple):
  """The keys of a call: one for what is read of x, of w and of dy, one for what GEMMs share.

  They are one key, but where shards of an operand have to draw apart.
  """

  lhs: jax.Array
  rhs: jax.Array
  dy: jax.Array
  shared: jax.Array

  @classmethod
  def of(cls, key: jax.Array | None, lhs: Any, rhs: Any, *others: Any) -> "Keys | None":
    """From one key: inside `shard_map` an operand that varies draws on each shard by a key of its
    own, one that is replicated by the same. `others` are what dy depends on beside them."""
    if key is None:
      return None
    key = typed(key)
    of_lhs, of_rhs = sharding.varying_axes(lhs), sharding.varying_axes(rhs)
    of_dy = sharding.varying_axes(lhs, rhs, key, others)
    of_both = tuple(axis for axis in of_lhs if axis in of_rhs)
    return cls(*(sharding.fold_in_axes(key, axes) for axes in (of_lhs, of_rhs, of_dy, of_both)))

  def of_role(self, role: str, ids: Ids | None = None) -> jax.Array:
    """One key; with `ids`, one for each entry of the operand's leading axes."""
    gradient = role in ("dgrad.lhs", "wgrad.rhs")
    key = self.dy if gradient else getattr(self, role[-3:])
    key = jax.random.fold_in(key, recipe_lib.ROLES[role])
    return key if ids is None else fold_in(key, *jnp.moveaxis(ids, -1, 0))

  def of_gemm(self, gemm: str) -> jax.Array:
    return jax.random.fold_in(self.shared, _GEMM_SEEDS[gemm])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tensor:
  """What an operand is read from: x, w or dy as it is, as kept, or as fprop read it."""

  original: Float[Array, "*s"] | None
  packed: QuantizedArray | None = None
  shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
  as_read: Float[Array, "*t"] | None = None
  # The original was made from what is kept, so that it stands for its own residual.
  of_kept: bool = dataclasses.field(default=False, metadata={"static": True})

  @classmethod
  def of(
    cls,
    x: Float[Array, "*s"],
    residual: Format | None = None,
    axis: int = -1,
    slices: Slices = WHOLE,
  ) -> "Tensor":
    """x with its residual in the format `residual`, in blocks along `axis`."""
    packed = None
    if residual is not None:
      padded = pad_to_blocks(x, residual, axis)
      packed = qz.pack_blocks(padded, residual, axis, slices=slices)
    return cls(x, packed, x.shape)

  def read(self, source: Source) -> Float[Array, "*s"]:
    if source == "original" or (source == "residual" and self.of_kept):
      return self.original
    if source == "fprop":
      return self.as_read
    dtype = self.packed.fmt.dequantized_dtype
    values = qz.dequantize(self.packed, dtype, implementation="xla")
    return values[tuple(slice(n) for n in self.shape)]

  def cast(self, dtype: DTypeLike) -> "Tensor":
    """The original in another dtype."""
    original = None if self.original is None else self.original.astype(dtype)
    return dataclasses.replace(self, original=original)

  def kept_for(self, source: Source, read: Read | None = None) -> "Tensor":
    """Only what a backward operand with that `source` reads: this is what is saved."""
    match source:
      case "original":
        return Tensor(self.original, None, self.shape)
      case "residual":
        return Tensor(None, self.packed, self.shape)
      case "fprop":
        return Tensor(None, None, self.shape, whole(read))


def read(
  recipe: Recipe,
  role: str,
  x: Float[Array, "*s"],
  axis: int,
  keys: Keys | None,
  tapped: bool = False,
  state: State | None = None,
  slices: Slices = WHOLE,
  ids: Ids | None = None,
  gather: Callable[[Any], Any] | None = None,
) -> Read:
  """The operand `role` ("dgrad.rhs") of x, which its GEMM contracts along `axis`.

  The contracted axis is padded with zeros to what the blocks and transforms of both operands of
  the GEMM need; zeros change neither blocks nor products.
  """
  gemm, length = role.split(".")[0], x.shape[axis]
  x = pad(x, axis, contraction_multiple(getattr(recipe, gemm)))
  key, gemm_key = (None, None) if keys is None else (keys.of_role(role, ids), keys.of_gemm(gemm))
  ctx = Context(key, gemm_key, (state or {}).get(role, ()), slices, tapped, length, gather)
  return recipe.operand(role).read(x, axis, ctx)


def pull(
  recipe: Recipe, role: str, read: Read, g: Float32[Array, "*t"], axis: int, keys: Keys | None
) -> Float32[Array, "..."]:
  """The gradient of an fprop operand from `g`, that of what its backward partner's GEMM gave.

  `g` lies in the space of fprop's transform where that partner read what fprop read.
  """
  quantizer = recipe.operand(role)
  g = quantizer.pull(read.saved, g)
  partner = {"fprop.lhs": "dgrad.rhs", "fprop.rhs": "wgrad.lhs"}[role]
  if quantizer.transform is not None and recipe.operand(partner).source == "fprop":
    g = quantizer.transform.invert(g, axis, None if keys is None else keys.of_gemm("fprop"))
  return g


def pull_state(recipe: Recipe, role: str, read: Read, g: Float32[Array, "*t"]) -> State:
  """The gradient of the state of an fprop operand whose quantizer learns it, {} for others: from
  `g`, that of what was read. It takes the place of the next state."""
  quantizer = recipe.operand(role)
  if not getattr(quantizer, "learns_state", False):
    return {}
  return {role: quantizer.pull_state(read.saved, g)}


def whole(read: Read) -> Float[Array, "*s"]:
  """An operand as one array."""
  (first, *others) = (*read.terms, *read.exact)
  if not others and isinstance(read.factor, float) and read.factor == 1:
    return first
  total = first.astype(jnp.float32)
  for term in others:
    total += term.astype(jnp.float32)
  return total * read.factor


Summaries = dict[str, Summary | None]  # rows of a tap, by role


class Forward(NamedTuple):
  """What fprop leaves for the backward pass, beside its operands."""

  lhs: Read | None = None  # its `saved` for `pull`; terms only where a backward operand reads them
  rhs: Read | None = None
  summaries: Summaries | None = None
  states: dict[str, Any] = {}  # noqa: RUF012
  weights: Any = None  # what dgrad multiplies, where it was made with what fprop does


def for_pull(forward: Forward) -> Forward:
  """What of `forward` the backward pass needs: no operands, which `Tensor.kept_for` keeps."""
  only_saved = lambda read: read and Read((), factor=(), saved=read.saved)  # noqa: E731
  lhs, rhs = only_saved(forward.lhs), only_saved(forward.rhs)
  return forward._replace(lhs=lhs, rhs=rhs, weights=None)


def take_rows(x: Shaped[Array, "t ..."], rows: Int[Array, "*m"] | None) -> Shaped[Array, "..."]:
  """x[rows], zeros where a row is past the end; x for None."""
  return x if rows is None else x.at[rows].get(mode="fill", fill_value=0)


def scaled_rows(
  x: Float[Array, "t k"], rows: Int[Array, " m"], factors: Float32[Array, "m 1"]
) -> Float[Array, "m k"]:
  """factors * x[rows], in x's dtype."""
  return (take_rows(x, rows).astype(jnp.float32) * factors).astype(x.dtype)


def quantized_roles(recipe: Recipe) -> dict[str, Format]:
  """The format of each role that `recipe` quantizes, in the order of `ROLES`: a tap's live rows."""
  found = {}
  for role in ROLES:
    kind, side = role.split(".")
    fmt = getattr(recipe.residual, side) if kind == "residual" else recipe.operand(role).format
    if is_format(fmt):
      found[role] = fmt
  return found


def residual_summary(x: Tensor, tapped: bool, slices: Slices = WHOLE) -> Summary | None:
  """The tap's row of a packed residual."""
  if not tapped or x.packed is None:
    return None
  fmt, axis = x.packed.fmt, x.packed.axis
  return error_summary(pad_to_blocks(x.original, fmt, axis), fmt, axis, slices=slices)


def tap_of(summaries: dict[str, Summary | None]) -> Tap:
  """The "gradient" of a tap from the summaries by role."""
  nothing = jnp.zeros(len(SUMMARY_FIELDS), jnp.float32)
  rows = [summaries.get(role) for role in ROLES]
  return jnp.stack([nothing if row is None else row for row in rows])


def contraction_multiple(gemm: Gemm) -> int:
  """What the length of the contracted axis must be a multiple of."""
  return math.lcm(gemm.lhs.multiple, gemm.rhs.multiple)


def token_multiple(recipe: Recipe) -> int | None:
  """What the last axis of tokens must be a multiple of for its blocks to be those of all tokens.

  None where a quantizer reads all tokens at once, in one row.
  """
  if any(operand.reads_whole_rows for operand in (recipe.wgrad.lhs, recipe.wgrad.rhs)):
    return None
  multiples = [contraction_multiple(recipe.wgrad)]
  axes = {"fprop.lhs": -1, "dgrad.lhs": -1, "wgrad.lhs": -2, "wgrad.rhs": -2}
  formats = [(recipe.operand(role).format, axis) for role, axis in axes.items()]
  for fmt, axis in (*formats, (recipe.residual.lhs, -1)):
    if is_format(fmt):
      multiples.append(block_axes(fmt, axis).get(-2, 1))
  return math.lcm(*multiples)


ONE_KEY = "key=, such as jax.random.key(0), another one each step"


def check_recipe_and_keys(
  recipe: Recipe, keys: Iterable[jax.Array | None], needed: str = ONE_KEY
) -> None:
  """Refuses what is not a recipe or a key, and a stochastic recipe without keys."""
  check_type("recipe", recipe, Recipe, " such as fp4jax.recipes.MXFP4")
  for key in keys:
    if key is not None:
      check_key(key=key)
    elif recipe.is_stochastic:
      raise ValueError(f"recipe {recipe.name!r} rounds stochastically and needs {needed}")


def check_state(recipe: Recipe, state: State | None, needed: str = "state=") -> None:
  """Refuses a recipe that has state without one."""
  roles = [role for role, quantizer in recipe.operands() if jax.tree.leaves(quantizer.init((1, 1)))]
  if sorted(state or {}) != sorted(roles):
    raise ValueError(
      f"recipe {recipe.name!r} keeps state in {roles or 'no role'}, {needed} has "
      f"{sorted(state or {})}:"
      " fp4jax.init_state makes the first one"
    )


def to_operands(**operands: Any) -> list[jax.Array]:
  """The operands as jax.Arrays; refuses, before any compute, what no GEMM of a recipe can take."""
  arrays = to_arrays(**operands)
  for name, x in zip(operands, arrays, strict=True):
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
      raise TypeError(f"{name} is {x.dtype}; a recipe takes float32, bfloat16 or float16")
  return arrays
