"""Weights trained to be exact in MXFP4, under FP8 compute."""

import dataclasses

from fp4jax import formats
from fp4jax.recipe import Residual
from fp4jax.recipes.fp8 import FP8_POW2

# Both fprop and dgrad read FP8 of the projected weight, which changes nothing while the scales of
# a 128x128 tile spread over at most 14 binades: what is deployed in MXFP4 is what was trained.
FP8_MXFP4_WEIGHTS = dataclasses.replace(
  FP8_POW2.replace(
    {
      "residual": Residual(rhs=dataclasses.replace(formats.MXFP4, scale_rule="rceil")),
      "fprop.rhs.source": "residual",
      "dgrad.rhs.source": "residual",
    }
  ),
  name="fp8_mxfp4_weights",
  citation="quantization-aware training of MXFP4 weights as in TransformerEngine's pull request"
  " 3264: fp8_pow2 with weights projected to 1x32 blocks of truncation-free scales, straight"
  " through. Its scales are clamped to 2^-126 and 2^125, here to 2^-127 and 2^127",
)
