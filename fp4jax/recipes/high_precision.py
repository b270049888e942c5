"""Operands cast to a float dtype, products accumulated in float32: the baselines."""

import jax.numpy as jnp

from fp4jax.quantizers import Operand
from fp4jax.recipe import Gemm, Recipe


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
