"""FP4 numerics in JAX: what the numbers are.

`formats` are values, `quantize` and `decompose` take them as arguments, a `Recipe` says which
operand of which GEMM has which format, `dot_general(recipe)` runs it in any model.
"""

from fp4jax import nnx, recipes
from fp4jax.decomposition import ErrorDecomposition, ErrorSummary, decompose
from fp4jax.dot import dot_general
from fp4jax.formats import (
  FORMATS,
  FP8_BLOCK,
  FP8_BLOCK_2D,
  FP8_BLOCK_POW2,
  FP8_BLOCK_POW2_2D,
  FP8_TENSOR,
  MXFP4,
  MXFP8,
  NVFP4,
  BlockFormat,
)
from fp4jax.grouped import grouped_dot
from fp4jax.moe_ffn import moe_ffn
from fp4jax.operands import init_state, new_tap, read_tap
from fp4jax.packed_weights import pack_weights
from fp4jax.placement import shardings
from fp4jax.quantization import dequantize, fake_quantize, quantize
from fp4jax.quantized_array import QuantizedArray
from fp4jax.quantizers import Hadamard, Operand
from fp4jax.recipe import Gemm, Recipe, Residual
from fp4jax.transforms import hadamard

__version__ = "0.1.0"

__all__ = [
  "FORMATS",
  "FP8_BLOCK",
  "FP8_BLOCK_2D",
  "FP8_BLOCK_POW2",
  "FP8_BLOCK_POW2_2D",
  "FP8_TENSOR",
  "MXFP4",
  "MXFP8",
  "NVFP4",
  "BlockFormat",
  "ErrorDecomposition",
  "ErrorSummary",
  "Gemm",
  "Hadamard",
  "Operand",
  "QuantizedArray",
  "Recipe",
  "Residual",
  "decompose",
  "dequantize",
  "dot_general",
  "fake_quantize",
  "grouped_dot",
  "hadamard",
  "init_state",
  "moe_ffn",
  "new_tap",
  "nnx",
  "pack_weights",
  "quantize",
  "read_tap",
  "recipes",
  "shardings",
]
