"""Weights that are quantized once and read many times, as in a rollout.

w = pack_weights(w, recipe)                            # after each update
y = dot_general(recipe)(x, w, (((1,), (0,)), ((), ())))  # that of the array

"xla" gives it to the bit; "mosaic" up to the order of float32 sums, see `fp4jax.mosaic.few_rows`.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from fp4jax import operands as ops
from fp4jax import quantization as qz
from fp4jax.arguments import check_type
from fp4jax.formats import Format, Slices
from fp4jax.formats.format import block_axes
from fp4jax.formats.packing import codes_per_group
from fp4jax.quantized_array import QuantizedArray
from fp4jax.quantizers import Composed, Operand, OutlierFallback
from fp4jax.quantizers.fallback import TwoTerms
from fp4jax.quantizers.quantizer import Read, pad
from fp4jax.recipe import Recipe
from fp4jax.sharding import one_program


@dataclasses.dataclass(frozen=True)
class Unpacked(Composed):
  """Reads by `operand` weights that were packed: they keep the dtype that holds their values.

  Several terms come side by side, along the last axis.
  """

  operand: Operand
  contracted: int  # `multiple` of what reads the original, so that as long an axis is contracted
  terms: int = 1

  @property
  def multiple(self):
    return math.lcm(self.operand.multiple, self.contracted)

  def read(self, x, axis, ctx):
    if self.terms == 1:
      return self.operand.read(x, axis, ctx)
    return Read(tuple(jnp.split(x, self.terms, axis=-1)))

  def pull(self, saved, g):
    return jnp.concatenate([g] * self.terms, axis=-1)


def without_terms(shape: tuple[int, ...], recipe: Recipe) -> tuple[int, ...]:
  """Of weights that `recipe` reads, from the shape of what `read_packed` made of them."""
  rhs = recipe.fprop.rhs
  return (*shape[:-1], shape[-1] // rhs.terms) if isinstance(rhs, Unpacked) else shape


def pack_weights(w: ArrayLike, recipe: Recipe) -> QuantizedArray:
  """w (*b, k, n) in the format in which `recipe` keeps or else reads it in the forward GEMM; both
  passes of an `OutlierFallback`.

  A call with arrays casts them to the dtype of x before anything else: so does who packs.

  Raises:
    ValueError: a recipe whose forward GEMM reads weights otherwise than rounded to a format, or n
      that is not a multiple of its blocks.
  """
  (w,) = ops.to_operands(w=w)
  check_type("recipe", recipe, Recipe, " such as fp4jax.recipes.MXFP4")
  if w.ndim < 2:
    raise ValueError(f"w {w.shape} is not (*b, k, n)")
  if obstacle := why_not_packed(recipe, w.shape):
    raise ValueError(obstacle)
  return _pack(_packed_format(recipe), w)


def why_not_packed(recipe: Recipe, shape: tuple[int, ...] | None = None) -> str | None:
  """Why weights, of that shape, can't be packed for `recipe`; None: they can."""
  rhs = recipe.fprop.rhs
  packs = isinstance(rhs, Operand | OutlierFallback)
  if not packs or rhs.transform is not None or rhs.needs_key:
    return (
      f"recipe {recipe.name!r} reads fprop.rhs by {rhs}: packed weights are rounded to nearest, and"
      " nothing else is done to them"
    )
  if getattr(recipe.fprop.lhs, "has_exact", False):
    return (
      f"recipe {recipe.name!r} reads fprop.lhs by {recipe.fprop.lhs}, whose exact term meets"
      " weights as they were before rounding"
    )
  if rhs.source != "residual" and not rhs.is_quantized:
    return f"recipe {recipe.name!r} reads fprop.rhs in {rhs.format}, which is not packed"
  fmt = _packed_format(recipe)
  if isinstance(fmt, TwoTerms):
    if obstacle := fmt.obstacle():
      return f"recipe {recipe.name!r} reads fprop.rhs by {rhs}: {obstacle}"
    if rhs.source != "original" or recipe.dgrad.rhs.source != "fprop":
      return (
        f"recipe {recipe.name!r} reads fprop.rhs in two terms: they are packed where fprop reads"
        " the original and dgrad.rhs what fprop read"
      )
  columns = block_axes(fmt, -2).get(-1, 1)
  if shape is not None and shape[-1] % columns:
    return f"w {shape}: {shape[-1]} is not a multiple of {fmt.name}'s {columns}"
  return None


@one_program(1)
def _pack(fmt, w):
  together = math.lcm(block_axes(fmt, -2).get(-2, 1), codes_per_group(fmt.element_bits))
  filled = pad(w, -2, together)
  packed = qz.pack_blocks(filled, fmt, -2, slices=Slices(w.ndim - 2))
  k = w.shape[-2]
  return packed if filled.shape[-2] == k else dataclasses.replace(packed, length=k)


def read_packed(name: str, w: Any, recipe: Recipe) -> tuple[Any, Recipe]:
  """The values of packed weights, and the recipe that reads them as `recipe` reads the original.

  Other weights, and their recipe, are returned as they are.

  Raises:
    ValueError: see `check_packed`.
  """
  if not isinstance(w, QuantizedArray):
    return w, recipe
  check_packed(name, w, recipe)
  fmt, contracted = w.fmt, recipe.fprop.rhs.multiple
  if isinstance(fmt, TwoTerms):
    terms = [w.unfilled(term) for term in fmt.terms(w.codes, w.scales, w.tensor_scale)]
    rhs = Unpacked(Operand(terms[0].dtype), contracted, len(terms))
    fprop = dataclasses.replace(recipe.fprop, rhs=rhs)
    return jnp.concatenate(terms, axis=-1), dataclasses.replace(recipe, fprop=fprop)
  values = qz.dequantize(w, fmt.dequantized_dtype, implementation="xla")
  rhs, residual, dgrad = recipe.fprop.rhs, recipe.residual, recipe.dgrad
  if rhs.source == "original":
    rhs = Operand(jnp.dtype(fmt.dequantized_dtype))
  else:  # what is kept is what came
    rhs = dataclasses.replace(rhs, source="original")
    residual = dataclasses.replace(residual, rhs=None)
    if dgrad.rhs.source == "residual":
      dgrad = dataclasses.replace(dgrad, rhs=dataclasses.replace(dgrad.rhs, source="original"))
  fprop = dataclasses.replace(recipe.fprop, rhs=Unpacked(rhs, contracted))
  return values, dataclasses.replace(recipe, fprop=fprop, dgrad=dgrad, residual=residual)


def check_packed(name: str, w: QuantizedArray, recipe: Recipe) -> None:
  """Refuses what `pack_weights` does not make for `recipe`.

  Raises:
    ValueError: weights in another format, or along another axis.
  """
  if obstacle := why_not_packed(recipe):
    raise ValueError(obstacle)
  fmt = _packed_format(recipe)
  if w.fmt != fmt or w.axis != -2:
    raise ValueError(
      f"{name} is packed in {w.fmt.name} along axis {w.axis}; recipe {recipe.name!r} needs"
      f" {fmt.name} along axis -2, as fp4jax.pack_weights makes it"
    )


def _packed_format(recipe: Recipe) -> Format:
  rhs = recipe.fprop.rhs
  if isinstance(rhs, OutlierFallback):
    return rhs.packed_format
  return recipe.residual.rhs if rhs.source == "residual" else rhs.format
