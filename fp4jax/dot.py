"""`lax.dot_general` whose three GEMMs run a recipe.

    dot = fp4jax.dot_general(recipes.MXFP4)
    y = dot(x, w, (((1,), (0,)), ((), ())))         # plain JAX
    nn.Dense(features, dot_general=dot)             # Flax Linen

Any dimension numbers are brought to batch x m x k times batch x k x n (`canonical`); what a recipe
calls tokens is m, the free axes of lhs. On several devices: `fp4jax.sharding`.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, BFloat16, Float

from fp4jax import operands as ops
from fp4jax.canonical import canonical
from fp4jax.formats import is_format
from fp4jax.implementation import Implementation, choose, device_obstacle
from fp4jax.linear import linear
from fp4jax.mosaic import few_rows
from fp4jax.mosaic import gemms as mosaic
from fp4jax.packed_weights import check_packed, read_packed
from fp4jax.products import OneMatrix
from fp4jax.quantized_array import QuantizedArray
from fp4jax.recipe import Recipe
from fp4jax.sharding import mesh_obstacle, on_mesh, spread, vary, varying_axes


def dot_general(
  recipe: Recipe,
  *operands: Any,
  key: jax.Array | None = None,
  tap: ops.Tap | None = None,
  state: ops.State | None = None,
  implementation: Implementation | None = None,
  **unknown: Any,
) -> "DotGeneral":
  """A drop-in for `lax.dot_general` that computes forward and backward as `recipe` says.

  Args:
    recipe: the numerics.
    operands, unknown: none; they are arguments of the function that is returned.
    key: seeds stochastic rounding; give each call of each step its own. Operands and GEMMs of one
      call draw apart from each other.
    tap: see `new_tap`; read by "xla" alone.
    state: of quantizers that have one, see `init_state`; read by "xla" alone.
    implementation: see `fp4jax.implementation`. "mosaic" serves recipes with FP8 operands, in
      bfloat16 without batch axes; plain dtypes are left to XLA's own matmul.
  Returns:
    A function of (lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None,
    out_sharding=None). Its result has the dtype and the sharding that `lax.dot_general` would give
    it; `precision` must be left None. rhs may be what `pack_weights` makes of weights in lhs's
    dtype, with axis -2 contracted: "xla" then reads it as the recipe reads the original, and in a
    backward pass, for lhs alone, its values; "mosaic" multiplies up to 128 rows with MXFP4 codes as
    they lie in memory.
  Raises:
    ValueError: a stochastic recipe without a key, one with state without it, or what makes
      `implementation` impossible.
    TypeError: something is not a recipe or a key; operands that are not arrays of float32,
      bfloat16 or float16, or that `lax.dot_general` itself refuses.
  """
  if operands or unknown:
    raise TypeError(
      "dot_general takes the recipe: call dot_general(recipe)(x, w, dimension_numbers), or give a"
      " layer dot_general=dot_general(recipe)"
    )
  ops.check_recipe_and_keys(recipe, [key])
  ops.check_state(recipe, state)
  ops.check_tap(tap)
  return DotGeneral(recipe, key, tap, state, implementation)


@dataclasses.dataclass(frozen=True, eq=False)
class DotGeneral:
  """What `dot_general` returns. Equal to another of the same recipe, and hashable.

  So two models with equal recipes are equal and share a trace. Keys, taps and states are compared
  by identity, for arrays have no equality.
  """

  recipe: Recipe
  key: jax.Array | None = None
  tap: ops.Tap | None = None
  state: ops.State | None = None
  implementation: Implementation | None = None

  def _identity(self):
    return self.recipe, self.implementation, id(self.key), id(self.tap), id(self.state)

  def __eq__(self, other):
    return isinstance(other, DotGeneral) and self._identity() == other._identity()

  def __hash__(self):
    return hash(self._identity())

  def __call__(
    self,
    lhs: ArrayLike,
    rhs: ArrayLike | QuantizedArray,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: None = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    **unsupported,
  ) -> Array:
    is_packed = isinstance(rhs, QuantizedArray)
    if is_packed:
      check_packed("rhs", rhs, self.recipe)
      (lhs,) = ops.to_operands(lhs=lhs)
      original = jax.ShapeDtypeStruct(rhs.shape, lhs.dtype)
    else:
      lhs, rhs = ops.to_operands(lhs=lhs, rhs=rhs)
      original = rhs
    if precision is not None:
      raise ValueError(f"{precision=}: recipe {self.recipe.name!r} sets the precision of each GEMM")
    for name, value in unsupported.items():
      if value is not None:
        raise ValueError(f"dot_general with a recipe does not support {name}={value!r}")
    axes, result = _as_lax(lhs, original, dimension_numbers, preferred_element_type, out_sharding)
    spec = result.sharding and result.sharding.spec
    if not is_packed:
      return self._product(self.recipe, lhs, rhs, axes, result, spec)
    if axes[0][1] != (len(rhs.shape) - 2,):
      raise ValueError(f"{dimension_numbers=} contracts rhs {rhs.shape} along another axis than -2")
    watched = self.tap, self.state or None
    why_not = few_rows.obstacle(self.recipe, watched, lhs, rhs, axes, result.dtype)
    if choose(self.implementation, why_not) == "mosaic":
      xla = _OfPacked(DotGeneral(self.recipe, implementation="xla"), axes, result.dtype)
      return spread(few_rows.multiply, (xla, self.recipe, axes[0][0][0]), (lhs, rhs), spec=spec)
    values, recipe = read_packed("rhs", rhs, self.recipe)
    xla = dataclasses.replace(self, implementation="xla")
    return xla._product(recipe, lhs, values, axes, result, spec)

  def _product(self, recipe, lhs, rhs, axes, result, spec):
    key = self.key if recipe.is_stochastic else None
    operands = lhs, rhs, ops.Keys.of(key, lhs, rhs)
    options = recipe, self.implementation, axes, result.shape, result.dtype
    return spread(_dot_general, options, operands, (self.tap, self.state or {}), spec)


class _OfPacked(NamedTuple):
  """A product of packed weights as XLA computes it, and differentiates it."""

  dot: DotGeneral
  dimension_numbers: tuple
  dtype: jnp.dtype

  def __call__(self, lhs, rhs):
    return self.dot(lhs, rhs, self.dimension_numbers, preferred_element_type=self.dtype)


def _dot_general(
  recipe, implementation, dimension_numbers, shape, dtype, lhs, rhs, keys, tap, state
):
  multiple = ops.token_multiple(recipe) if on_mesh(lhs, rhs) else None
  lhs, rhs, batch = canonical(lhs, rhs, dimension_numbers, multiple)
  why_not = obstacle(recipe, (tap, state or None), lhs, rhs, dtype) or mesh_obstacle(lhs, rhs)
  implementation = choose(implementation, why_not)
  if implementation == "mosaic":
    return multiply_by_kernels(recipe, lhs, rhs).reshape(shape)
  layout = OneMatrix(batch)
  out = linear(recipe, "xla", dtype, None, layout, lhs, rhs, keys, tap, state)
  return out.reshape(shape)


def multiply_by_kernels(
  recipe: Recipe, x: BFloat16[Array, "*m k"], w: Float[Array, "k _"], weight_axis: str | None = None
) -> BFloat16[Array, "*m n"]:
  """x @ w, where there is no `obstacle` to it; the kernels round w to bf16 as they read it.

  The gradient of w comes in its own dtype. `weight_axis` as in `moe_ffn`.
  """
  x, w = vary((x, w), varying_axes(x, w))
  rows = x.reshape(-1, x.shape[-1])
  layout, nothing = mosaic.Slots.of_one_matrix(len(rows)), (None, None, {})
  out = linear(recipe, "mosaic", x.dtype, weight_axis, layout, rows, w[None], *nothing)
  return out.reshape(*x.shape[:-1], -1)


def obstacle(
  recipe: Recipe,
  watched: tuple,
  lhs: Array | jax.ShapeDtypeStruct,
  rhs: Array | jax.ShapeDtypeStruct,
  dtype: jnp.dtype,
) -> str | None:
  """Why the kernels can't compute lhs (*b, m, k) @ rhs (*b, k, n) in `dtype`, whole on one device;
  None if they can."""
  if why := device_obstacle():
    return why
  if rhs.ndim > 2:
    return "the kernels take no batch axes"
  if not any(is_format(quantizer.format) for _, quantizer in recipe.operands()):
    return f"recipe {recipe.name!r} quantizes nothing: XLA's own matmul serves it"
  if dtype != jnp.bfloat16:
    return f"the kernels return bfloat16, not {dtype.name}"
  m, (k, n) = math.prod(lhs.shape[:-1]), rhs.shape
  return mosaic.obstacle(recipe, watched, m, {"k": k, "n": n}, lhs=lhs, rhs=rhs)


def _as_lax(lhs, rhs, dimension_numbers, preferred_element_type, out_sharding):
  """The axes as tuples, and shape, dtype, sharding of `lax.dot_general`, which refuses the rest."""
  try:
    axes = tuple(tuple(map(tuple, pair)) for pair in dimension_numbers)
    dot = functools.partial(
      lax.dot_general,
      dimension_numbers=axes,
      preferred_element_type=preferred_element_type,
      out_sharding=out_sharding,
    )
    return axes, jax.eval_shape(dot, lhs, rhs)
  except (TypeError, ValueError) as error:
    raise TypeError(f"lhs {lhs.shape}, rhs {rhs.shape}, {dimension_numbers=}: {error}") from None
