"""Powers of four as elements: the gradients of Sun et al., Ultra-Low Precision 4-bit Training.

The even grid holds 4^n, the odd one 2 * 4^n, n = -3..3, and both hold zero; Q_odd(x) is
2 Q_even(x / 2). Values change at the arithmetic midpoints, 0.625 * 4^n, and a tie goes down, as
published; below the smallest element that is half of it, which the paper leaves open. The paper
rounds one gradient on the even grid for dgrad and on the odd one for wgrad ("two-phase rounding"),
so that the errors of the two complement each other.

One power-of-two scale per slice puts the largest magnitude into (32, 64] on both grids. That is
where the paper's GradScale settles for the even one; on a scale of its own the odd grid would round
to the same values as the even one. `dataclasses.replace(RADIX4_EVEN, block_shape=(32,))` has
blocks. The ideal scale of a decomposition puts amax on the largest element, 64 or 128.
"""

import dataclasses

from fp4jax import float_bits as fb
from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.grids import TableGrid
from fp4jax.formats.scales import E8M0

EVEN = TableGrid("radix4_even", (0, *(4.0**n for n in range(-3, 4))), ties="down")
ODD = TableGrid("radix4_odd", (0, *(2 * 4.0**n for n in range(-3, 4))), ties="down")


@dataclasses.dataclass(frozen=True)
class Into64:
  """2^(ceil(log2 amax) - 6), whatever the grid: amax / scale is in (32, 64]."""

  def exponent(self, amax, grid):
    return (amax + fb.MANTISSA_MASK >> 23) - 127 - 6


RADIX4_EVEN = BlockFormat(
  name="RADIX4_EVEN", element_dtype=EVEN, block_shape=None, scale_dtype=E8M0, scale_rule=Into64()
)
RADIX4_ODD = dataclasses.replace(RADIX4_EVEN, name="RADIX4_ODD", element_dtype=ODD)
