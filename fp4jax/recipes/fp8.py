"""FP8 in all three GEMMs: rows in 1x128 blocks, weights in 128x128 ones."""

from fp4jax import formats
from fp4jax.quantizers import Operand
from fp4jax.recipe import Gemm, Recipe


def _fp8(name: str, rows: Operand, weights: Operand, citation: str) -> Recipe:
  gemm = Gemm(rows, weights)
  return Recipe(name=name, fprop=gemm, dgrad=gemm, wgrad=Gemm(rows, rows), citation=citation)


FP8 = _fp8(
  "fp8",
  Operand(formats.FP8_BLOCK),
  Operand(formats.FP8_BLOCK_2D),
  "DeepSeek-V3, arXiv 2412.19437: E4M3 in all GEMMs, 1x128 and 128x128 scales",
)
FP8_POW2 = _fp8(
  "fp8_pow2",
  Operand(formats.FP8_BLOCK_POW2),
  Operand(formats.FP8_BLOCK_POW2_2D),
  "TransformerEngine's Float8BlockScaling: fp8 with scales rounded up to powers of two",
)
