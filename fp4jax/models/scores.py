"""The recipes of the two products of causal attention, which a policy gives as `scores`.

A token's output may depend on nothing after the token. A scale that tokens share would break that:
a large value to come would move it, and with it the codes of values before. So the two products of
attention do not run a policy's recipe `scores` as linear layers run theirs:

- q k^T, "scores.qk", reads both operands as activations, with scales along the head's features.
  What would share a scale even so is refused: 2-D blocks, one scale for a whole array.
- Probabilities times v, "scores.av", sums over tokens, and so blocks would lie along them. It never
  quantizes: it is bf16 where the recipe quantizes anything, else it runs the recipe.
"""

import dataclasses
from typing import Any

from fp4jax import recipes
from fp4jax.formats import BlockFormat
from fp4jax.quantizers import Composed, Operand, Quantizer
from fp4jax.recipe import Recipe, Residual

_LOOKS_AHEAD = "the output of a causal model would depend on tokens to come"


def causal_recipe(name: str, recipe: Recipe) -> Recipe:
  """What the product `name` runs where the policy says `recipe`."""
  match name:
    case "scores.qk":
      recipe = recipe_of_qk(recipe)
    case "scores.av":
      recipe = recipe_of_av(recipe)
  check_causal(name, recipe)
  return recipe


def recipe_of_qk(recipe: Recipe) -> Recipe:
  """`recipe` with rhs read and kept as its activation, lhs, is: k is not a weight.

  What dgrad contracts are tokens, which only gradients feel.
  """
  lhs = recipe.fprop.lhs
  backward = {"source": recipe.wgrad.lhs.source, "transform": recipe.dgrad.lhs.transform}
  both = dataclasses.replace(
    recipe,
    fprop=dataclasses.replace(recipe.fprop, rhs=lhs),
    dgrad=dataclasses.replace(recipe.dgrad, rhs=_with_operand(lhs, backward)),
    residual=Residual(lhs=recipe.residual.lhs, rhs=recipe.residual.lhs),
  )
  return both if both == recipe else dataclasses.replace(both, name=f"{recipe.name}[q k^T]")


def _with_operand(quantizer: Quantizer, changes: dict[str, Any]) -> Quantizer:
  """With changes to the `Operand` that it is, or that it rounds by."""
  if all(getattr(quantizer, field) == value for field, value in changes.items()):
    return quantizer
  if isinstance(quantizer, Composed):
    return dataclasses.replace(quantizer, operand=_with_operand(quantizer.operand, changes))
  if not isinstance(quantizer, Operand):
    raise ValueError(f"scores.qk: {type(quantizer).__name__} can't read k in dgrad with {changes}")
  return dataclasses.replace(quantizer, **changes)


def recipe_of_av(recipe: Recipe) -> Recipe:
  """`recipe` where it quantizes nothing, else BF16."""
  gemms = (recipe.fprop, recipe.dgrad, recipe.wgrad)
  quantizes = any(gemm.lhs.is_quantized or gemm.rhs.is_quantized for gemm in gemms)
  return recipes.BF16 if quantizes else recipe


def check_causal(name: str, recipe: Recipe) -> None:
  """Refuses a recipe under which the product `name` of causal attention would look ahead."""
  for side in ("lhs", "rhs"):
    spec = getattr(recipe.fprop, side)
    if not spec.is_quantized:
      continue
    if name == "scores.av":
      raise ValueError(
        f"{name} sums over tokens, along which recipe {recipe.name!r} has blocks of"
        f" {spec.format.name}: {_LOOKS_AHEAD}"
      )
    kept = (getattr(recipe.residual, side),) if spec.source == "residual" else ()
    for fmt in (spec.format, *kept):
      if shared := _shared_by_tokens(fmt):
        raise ValueError(
          f"{name}: recipe {recipe.name!r} reads fprop.{side} in {fmt.name}, which has {shared}:"
          f" {_LOOKS_AHEAD}"
        )


def _shared_by_tokens(fmt: BlockFormat) -> str | None:
  if fmt.block_shape is None or fmt.has_tensor_scale:
    return "one scale for the whole array"
  return "blocks of more than one token" if len(fmt.block_shape) == 2 else None
