"""MXFP4 in all three GEMMs."""

import dataclasses

from fp4jax import formats
from fp4jax.quantizers import Hadamard, Operand
from fp4jax.recipe import Gemm, Recipe

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
