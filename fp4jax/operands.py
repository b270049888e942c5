"""The operands of a recipe's GEMMs, shared by `dot_general`, `grouped_dot` and `moe_ffn`.

Everything that a recipe says of one operand happens in `prepare`: where it is read from, padding,
transform, rounding, and the probe of its error.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from fp4jax import quantization as qz
from fp4jax.arguments import check_arrays, check_type
from fp4jax.decomposition import SUMMARY_FIELDS, decompose
from fp4jax.formats import BlockFormat
from fp4jax.recipe import Gemm, Recipe, Source
from fp4jax.transforms import hadamard

# Rows of a tap; an operand's place here also seeds its stochastic rounding.
ROLES = (
  "fprop.lhs",
  "fprop.rhs",
  "dgrad.lhs",
  "dgrad.rhs",
  "wgrad.lhs",
  "wgrad.rhs",
  "residual.lhs",
  "residual.rhs",
)

Tap = Float32[Array, "role field"]


def new_tap() -> Tap:
  """What `tap=` takes: differentiate the loss by it to get every operand's error summary.

  The "gradient" has a row for each of `ROLES` and a column for each of `SUMMARY_FIELDS`, from the
  tensors that the GEMMs read in that very pass. Rows of what is not quantized are NaN. The loss
  does not depend on a tap.
  """
  return jnp.zeros((len(ROLES), len(SUMMARY_FIELDS)), jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tensor:
  """x, w or dy as an operand is read from it: as it is, and as its packed residual."""

  original: Float[Array, "*s"] | None
  packed: qz.QuantizedArray | None = None
  shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

  @classmethod
  def of(cls, x: Float[Array, "*s"], residual: BlockFormat | None = None, axis: int = -1):
    """x with its residual in the format `residual`, in blocks along `axis`."""
    packed = None
    if residual is not None:
      padded = pad_to_blocks(x, residual, axis)
      packed = qz.quantize(padded, residual, axis, implementation="xla")
    return cls(x, packed, x.shape)

  def read(self, source: Source) -> Float[Array, "*s"]:
    if source == "original":
      return self.original
    dtype = self.packed.fmt.dequantized_dtype
    values = qz.dequantize(self.packed, dtype, implementation="xla")
    return values[tuple(slice(n) for n in self.shape)]

  def cast(self, dtype: DTypeLike) -> "Tensor":
    """The original in another dtype."""
    original = None if self.original is None else self.original.astype(dtype)
    return Tensor(original, self.packed, self.shape)

  def kept_for(self, source: Source) -> "Tensor":
    """Only what a backward operand with that `source` reads: this is what is saved."""
    if source == "original":
      return Tensor(self.original, None, self.shape)
    return Tensor(None, self.packed, self.shape)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An operand as its GEMM reads it, and its row of the tap."""

  values: Float[Array, "*s"]
  summary: Float32[Array, " field"] | None  # None where no tap is asked for


def prepare(
  recipe: Recipe,
  role: str,
  x: Float[Array, "*s"],
  axis: int,
  key: jax.Array | None,
  tapped: bool,
) -> Prepared:
  """The operand `role` ("dgrad.rhs") of x, which its GEMM contracts along `axis`.

  The contracted axis is padded with zeros to what the blocks and transforms of both operands of
  the GEMM need; zeros change neither blocks nor products.
  """
  spec = recipe.operand(role)
  values = _pad(x, axis, contraction_multiple(getattr(recipe, role.split(".")[0])))
  if spec.transform is not None:
    signs = spec.transform.signs()
    signs = None if signs is None else jnp.asarray(signs)
    values = hadamard(values.astype(jnp.float32), axis, spec.transform.block, signs)
  if not spec.is_quantized:
    return Prepared(values.astype(spec.format), _nan_summary() if tapped else None)
  free_shape = values.shape
  values = pad_to_blocks(values, spec.format, axis).astype(jnp.float32)
  rounding = {"rounding": spec.rounding}
  if spec.rounding == "stochastic":
    rounding["key"] = jax.random.fold_in(key, ROLES.index(role))
  summary = error_summary(values, spec.format, axis, **rounding) if tapped else None
  values = qz.fake_quantize(values, spec.format, axis, **rounding)
  values = values.astype(spec.format.dequantized_dtype)
  return Prepared(values[tuple(slice(n) for n in free_shape)], summary)


def quantized_roles(recipe: Recipe) -> dict[str, BlockFormat]:
  """The format of each role that `recipe` quantizes, in the order of `ROLES`: a tap's live rows."""
  found = {}
  for role in ROLES:
    kind, side = role.split(".")
    fmt = getattr(recipe.residual, side) if kind == "residual" else recipe.operand(role).format
    if isinstance(fmt, BlockFormat):
      found[role] = fmt
  return found


def residual_summary(x: Tensor, tapped: bool) -> Float32[Array, " field"] | None:
  """The tap's row of a packed residual."""
  if not tapped:
    return None
  if x.packed is None:
    return _nan_summary()
  fmt, axis = x.packed.fmt, x.packed.axis
  return error_summary(pad_to_blocks(x.original, fmt, axis), fmt, axis)


def tap_of(summaries: dict[str, Float32[Array, " field"]]) -> Tap:
  """The "gradient" of a tap from the summaries by role."""
  return jnp.stack([summaries[role] for role in ROLES])


def error_summary(x, fmt, axis, **rounding) -> Float32[Array, " field"]:
  summary = decompose(x, fmt, axis, **rounding).summary()
  return jnp.stack([getattr(summary, name) for name in SUMMARY_FIELDS])


def _nan_summary():
  return jnp.full(len(SUMMARY_FIELDS), jnp.nan, jnp.float32)


def contraction_multiple(gemm: Gemm) -> int:
  """What the length of the contracted axis must be a multiple of."""
  multiples = [1]
  for spec in (gemm.lhs, gemm.rhs):
    if spec.is_quantized and spec.format.block_size is not None:
      multiples.append(spec.format.block_size)
    if spec.transform is not None:
      multiples.append(spec.transform.block)
  return math.lcm(*multiples)


def pad_to_blocks(x: Float[Array, "*s"], fmt: BlockFormat, axis: int) -> Float[Array, "*t"]:
  for a, block in qz.block_axes(fmt, axis).items():
    x = _pad(x, a, block)
  return x


def _pad(x, axis, multiple):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, padding)


def gemm(
  lhs: Prepared, rhs: Prepared, dimension_numbers: lax.DotDimensionNumbers
) -> Float32[Array, "*s"]:
  """The product of two prepared operands, accumulated in float32.

  In bf16 where both operands are exact in it (their products are exact in float32), else in
  float32.
  """
  dtype = lhs.values.dtype if lhs.values.dtype == rhs.values.dtype else jnp.dtype(jnp.float32)
  return lax.dot_general(
    lhs.values.astype(dtype),
    rhs.values.astype(dtype),
    dimension_numbers,
    precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


ONE_KEY = "key=, such as jax.random.key(0), another one each step"


def check_recipe_and_keys(
  recipe: Recipe, keys: Iterable[jax.Array | None], needed: str = ONE_KEY
) -> None:
  """Refuses what is no recipe, and a stochastic one without keys; `needed` says what it needs."""
  check_type("recipe", recipe, Recipe, " such as fp4jax.recipes.MXFP4")
  if recipe.is_stochastic and any(key is None for key in keys):
    raise ValueError(f"recipe {recipe.name!r} rounds stochastically and needs {needed}")


def check_operands(**operands: Array) -> None:
  """Refuses, before any compute, what no GEMM of a recipe can take."""
  check_arrays(**operands)
  for name, x in operands.items():
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
      raise TypeError(f"{name} is {x.dtype}; a recipe takes float32, bfloat16 or float16")
