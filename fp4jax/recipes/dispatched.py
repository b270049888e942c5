"""Recipes whose rows also travel to their experts in FP8.

What is sent is rounded before every GEMM, on one device too, so that the numbers do not depend on
how many there are: wgrad, which quantizes along the tokens, rounds a second time. What returns is
summed in float32 on a device, and sent in bf16.
"""

import dataclasses

import jax.numpy as jnp

from fp4jax import formats
from fp4jax.recipe import Payload
from fp4jax.recipes.fp8 import FP8_POW2
from fp4jax.recipes.hopper import HOPPER_FP4

_ROWS = formats.FP8_BLOCK_POW2
FP8_DISPATCH = dataclasses.replace(
  FP8_POW2,
  name="fp8_dispatch",
  payload=Payload(forward=_ROWS, backward=_ROWS, sums=jnp.bfloat16),
  citation="DeepSeek-V3, arXiv 2412.19437: experts' inputs and the gradients of their outputs sent"
  " in E4M3 with scales of powers of two, results in bf16; here under fp8_pow2",
)
HOPPER_FP4_DISPATCH = dataclasses.replace(
  HOPPER_FP4,
  name="hopper_fp4_dispatch",
  payload=Payload(forward=formats.MXFP4, backward=_ROWS, sums=jnp.bfloat16),
  citation="arXiv 2603.02731: MXFP4 in the forward all-to-all, FP8 in the backward one; in what"
  " results return it does not say, here bf16",
)
