"""Compute in FP8, keep and send in MXFP4: what a Hopper GPU, without FP4 tensor cores, can do."""

import dataclasses

from fp4jax import formats
from fp4jax.quantizers import Operand
from fp4jax.recipe import Gemm, Recipe, Residual

_ROWS = Operand(formats.FP8_BLOCK_POW2)
_WEIGHTS = Operand(formats.FP8_BLOCK_POW2_2D)
# Power-of-two scales make MXFP4 -> FP8 lossless while exponents stay within 14 binades.
_KEPT = dataclasses.replace(_ROWS, source="residual")
# It multiplies FP8: FP4 is what it keeps.
HOPPER_FP4 = Recipe(
  name="hopper_fp4",
  fprop=Gemm(_KEPT, _WEIGHTS),
  dgrad=Gemm(_ROWS, _WEIGHTS),
  wgrad=Gemm(_KEPT, _ROWS),
  residual=Residual(lhs=formats.MXFP4, hidden=formats.MXFP4),
  citation="arXiv 2603.02731: compute in FP8, keep and ship activations in MXFP4;"
  ' fprop.lhs.source="original" makes fprop read FP8 of the unrounded activation instead',
)
