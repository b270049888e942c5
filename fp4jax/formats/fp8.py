"""FP8: E4M3 elements with float32 scales."""

import dataclasses

from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.grids import E4M3
from fp4jax.formats.scales import FP32

# DeepSeek-V3 (arXiv 2412.19437): 1x128 for activations and gradients, 128x128 for weights.
FP8_BLOCK = BlockFormat(
  name="FP8_BLOCK",
  element_dtype=E4M3,
  block_shape=(128,),
  scale_dtype=FP32,
  scale_rule="nearest",
)
FP8_BLOCK_2D = dataclasses.replace(FP8_BLOCK, name="FP8_BLOCK_2D", block_shape=(128, 128))
# TransformerEngine's blockwise recipe: the same blocks, scales rounded up to a power of two.
FP8_BLOCK_POW2 = dataclasses.replace(FP8_BLOCK, name="FP8_BLOCK_POW2", scale_rule="rceil")
FP8_BLOCK_POW2_2D = dataclasses.replace(FP8_BLOCK_2D, name="FP8_BLOCK_POW2_2D", scale_rule="rceil")
# Current scaling: one scale from this slice's own amax.
FP8_TENSOR = dataclasses.replace(FP8_BLOCK, name="FP8_TENSOR", block_shape=None)
