"""OCP Microscaling Formats v1.0: blocks of 32 with an E8M0 scale, rule "floor"."""

from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.grids import E2M1, E4M3
from fp4jax.formats.scales import E8M0

MXFP4 = BlockFormat(
  name="MXFP4", element_dtype=E2M1, block_shape=(32,), scale_dtype=E8M0, scale_rule="floor"
)
MXFP8 = BlockFormat(
  name="MXFP8", element_dtype=E4M3, block_shape=(32,), scale_dtype=E8M0, scale_rule="floor"
)
