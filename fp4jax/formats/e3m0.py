"""Powers of two as elements: E3M0, the 1-3-0 float of LUQ (arXiv 2112.10769), in blocks as MX has.

OCP defines no E3M0. This one follows its other elements: bias 3 as in E3M2, exponent field 0 is
zero, as it has no mantissa. So the codes 0 to 7 are 0, 1/4, 1/2, 1, ..., 16: seven powers of two,
as LUQ has. To nearest, values change at 1.5 * 2^n, the arithmetic midpoint, a tie goes to the even
code; stochastically, each value is its own mean, those below 1/4 too.

The rule is "rceil": LUQ puts the largest magnitude on the largest element, and so nothing clips;
under "floor", which puts it anywhere in [16, 32), half of a block's largest values would clip.
"""

from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.grids import TableGrid
from fp4jax.formats.scales import E8M0

E3M0 = TableGrid("e3m0", (0, 1 / 4, 1 / 2, 1, 2, 4, 8, 16))

MXFP4_E3M0 = BlockFormat(
  name="MXFP4_E3M0", element_dtype=E3M0, block_shape=(32,), scale_dtype=E8M0, scale_rule="rceil"
)
