"""Formats as values, `FORMATS` by name. `format.py` says what a format is."""

from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.e3m0 import MXFP4_E3M0
from fp4jax.formats.format import WHOLE, Format, Slices, is_format
from fp4jax.formats.four_over_six import NVFP4_4O6
from fp4jax.formats.fp8 import (
  FP8_BLOCK,
  FP8_BLOCK_2D,
  FP8_BLOCK_POW2,
  FP8_BLOCK_POW2_2D,
  FP8_TENSOR,
)
from fp4jax.formats.grids import E2M1, E2M3, E3M2, E4M3, E5M2, FloatGrid, Grid, TableGrid
from fp4jax.formats.hif4 import HIF4
from fp4jax.formats.macro_block import MXFP4_MBS_D, MXFP4_MBS_S
from fp4jax.formats.mx import MXFP4, MXFP8
from fp4jax.formats.mxfp6 import MXFP6_E2M3, MXFP6_E3M2
from fp4jax.formats.mxint8 import MXINT8
from fp4jax.formats.nvfp4 import NVFP4
from fp4jax.formats.radix4 import RADIX4_EVEN, RADIX4_ODD
from fp4jax.formats.roundings import ROUNDINGS, Rounding, Stochastic
from fp4jax.formats.scales import E8M0, FP32, RULES, ScaleCodec
from fp4jax.formats.ue5m3 import NVFP4_UE5M3

FORMATS = {
  f.name: f
  for f in (
    MXFP4,
    MXFP8,
    NVFP4,
    FP8_BLOCK,
    FP8_BLOCK_2D,
    FP8_BLOCK_POW2,
    FP8_BLOCK_POW2_2D,
    FP8_TENSOR,
    HIF4,
    MXFP4_E3M0,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXINT8,
    RADIX4_EVEN,
    RADIX4_ODD,
    NVFP4_UE5M3,
    MXFP4_MBS_S,
    MXFP4_MBS_D,
    NVFP4_4O6,
  )
}

__all__ = [
  "E2M1",
  "E2M3",
  "E3M2",
  "E4M3",
  "E5M2",
  "E8M0",
  "FORMATS",
  "FP8_BLOCK",
  "FP8_BLOCK_2D",
  "FP8_BLOCK_POW2",
  "FP8_BLOCK_POW2_2D",
  "FP8_TENSOR",
  "FP32",
  "HIF4",
  "MXFP4",
  "MXFP4_E3M0",
  "MXFP4_MBS_D",
  "MXFP4_MBS_S",
  "MXFP6_E2M3",
  "MXFP6_E3M2",
  "MXFP8",
  "MXINT8",
  "NVFP4",
  "NVFP4_4O6",
  "NVFP4_UE5M3",
  "RADIX4_EVEN",
  "RADIX4_ODD",
  "ROUNDINGS",
  "RULES",
  "WHOLE",
  "BlockFormat",
  "FloatGrid",
  "Format",
  "Grid",
  "Rounding",
  "ScaleCodec",
  "Slices",
  "Stochastic",
  "TableGrid",
  "is_format",
]
