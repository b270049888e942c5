"""The recipes of the field, each with its source."""

import dataclasses
import difflib

import jax.numpy as jnp

from fp4jax import formats
from fp4jax.quantizers import Hadamard, Operand
from fp4jax.recipe import Gemm, Recipe, Residual


def _high_precision(name: str, dtype) -> Recipe:
  gemm = Gemm(Operand(dtype), Operand(dtype))
  return Recipe(
    name=name,
    fprop=gemm,
    dgrad=gemm,
    wgrad=gemm,
    citation="operands cast to the dtype of the name, float32 accumulation",
  )


FP32 = _high_precision("fp32", jnp.float32)
BF16 = _high_precision("bf16", jnp.bfloat16)


def _fp8(name: str, rows: Operand, weights: Operand, citation: str) -> Recipe:
  gemm = Gemm(rows, weights)
  return Recipe(name=name, fprop=gemm, dgrad=gemm, wgrad=Gemm(rows, rows), citation=citation)


FP8 = _fp8(
  "fp8",
  Operand(formats.FP8_BLOCK),
  Operand(formats.FP8_BLOCK_2D),
  "DeepSeek-V3, arXiv 2412.19437: E4M3 in all GEMMs, 1x128 and 128x128 scales",
)

_FP8_POW2 = Operand(formats.FP8_BLOCK_POW2)
_FP8_POW2_WEIGHT = Operand(formats.FP8_BLOCK_POW2_2D)
FP8_POW2 = _fp8(
  "fp8_pow2",
  _FP8_POW2,
  _FP8_POW2_WEIGHT,
  "TransformerEngine's Float8BlockScaling: fp8 with scales rounded up to powers of two",
)

_MXFP4 = Operand(formats.MXFP4)
MXFP4 = Recipe(
  name="mxfp4",
  fprop=Gemm(_MXFP4, _MXFP4),
  dgrad=Gemm(_MXFP4, _MXFP4),
  wgrad=Gemm(_MXFP4, _MXFP4),
  citation="OCP Microscaling Formats v1.0, applied to all GEMMs as in arXiv 2310.10537",
)

_RCEIL = Operand(dataclasses.replace(formats.MXFP4, scale_rule="rceil"))
_RCEIL_SR = dataclasses.replace(_RCEIL, rounding="stochastic")
_RHT = Hadamard(block=32)
MXFP4_RHT_SR = Recipe(
  name="mxfp4_rht_sr",
  fprop=Gemm(_RCEIL, _RCEIL),
  dgrad=Gemm(_RCEIL_SR, _RCEIL),
  wgrad=Gemm(
    dataclasses.replace(_RCEIL, transform=_RHT), dataclasses.replace(_RCEIL_SR, transform=_RHT)
  ),
  citation="the MXFP4 recipe of arXiv 2604.08826 (truncation-free scales, RHT, stochastic rounding"
  " of gradients); RHT on the wgrad operands and fixed signs as in arXiv 2509.25149",
)

# Power-of-two scales make MXFP4 -> FP8 lossless while exponents stay within 14 binades.
_FP8_OF_KEPT = dataclasses.replace(_FP8_POW2, source="residual")
HOPPER_FP4 = Recipe(
  name="hopper_fp4",
  fprop=Gemm(_FP8_OF_KEPT, _FP8_POW2_WEIGHT),
  dgrad=Gemm(_FP8_POW2, _FP8_POW2_WEIGHT),
  wgrad=Gemm(_FP8_OF_KEPT, _FP8_POW2),
  residual=Residual(lhs=formats.MXFP4, hidden=formats.MXFP4),
  citation="arXiv 2603.02731: compute in FP8, keep and ship activations in MXFP4;"
  ' fprop.lhs.source="original" makes fprop read FP8 of the unrounded activation instead',
)

RECIPES = {r.name: r for r in (FP32, BF16, FP8, FP8_POW2, MXFP4, MXFP4_RHT_SR, HOPPER_FP4)}


def by_name(name: str) -> Recipe:
  """The recipe of that name; an unknown one is an error that names the near ones."""
  if name not in RECIPES:
    lower = name.lower()
    close = difflib.get_close_matches(lower, RECIPES, cutoff=0.4)
    near = [lower] if lower in RECIPES else close or list(RECIPES)
    raise ValueError(f"unknown recipe {name!r}; did you mean {', '.join(map(repr, near))}?")
  return RECIPES[name]
