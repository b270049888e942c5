"""The recipes of the field, each with its source: one file a family, `RECIPES` by name."""

import difflib

from fp4jax.recipe import Recipe
from fp4jax.recipes.dispatched import FP8_DISPATCH, HOPPER_FP4_DISPATCH
from fp4jax.recipes.fp8 import FP8, FP8_POW2
from fp4jax.recipes.high_precision import BF16, FP32
from fp4jax.recipes.hopper import HOPPER_FP4
from fp4jax.recipes.mxfp4 import MXFP4, MXFP4_RHT_SR
from fp4jax.recipes.mxfp4_weights import FP8_MXFP4_WEIGHTS

RECIPES = {
  r.name: r
  for r in (
    FP32,
    BF16,
    FP8,
    FP8_POW2,
    MXFP4,
    MXFP4_RHT_SR,
    HOPPER_FP4,
    FP8_MXFP4_WEIGHTS,
    FP8_DISPATCH,
    HOPPER_FP4_DISPATCH,
  )
}

__all__ = [
  "BF16",
  "FP8",
  "FP8_DISPATCH",
  "FP8_MXFP4_WEIGHTS",
  "FP8_POW2",
  "FP32",
  "HOPPER_FP4",
  "HOPPER_FP4_DISPATCH",
  "MXFP4",
  "MXFP4_RHT_SR",
  "RECIPES",
  "by_name",
]


def by_name(name: str) -> Recipe:
  """The recipe of that name; an unknown one is an error that names the near ones."""
  if name not in RECIPES:
    lower = name.lower()
    close = difflib.get_close_matches(lower, RECIPES, cutoff=0.4)
    near = [lower] if lower in RECIPES else close or list(RECIPES)
    raise ValueError(f"unknown recipe {name!r}; did you mean {', '.join(map(repr, near))}?")
  return RECIPES[name]
