"""NVFP4 (arXiv 2509.25149): blocks of 16 with an E4M3 scale, and a float32 scale per slice.

The slice's scale maps its amax to 6 * 448.
"""

from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.grids import E2M1, E4M3

NVFP4 = BlockFormat(
  name="NVFP4",
  element_dtype=E2M1,
  block_shape=(16,),
  scale_dtype=E4M3,
  scale_rule="nearest",
  has_tensor_scale=True,
)
