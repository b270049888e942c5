"""The formats among which LLM-FP4 (arXiv 2310.16836) chooses: FP4 with a real exponent bias.

With 4 bits, e of them for the exponent and 3 - e for the mantissa, and exponent bias b, a value is

    sign * 2^(E - b) * (1 + M / 2^(3 - e)),   E = 1 ... 2^e - 1
    sign * 2^(1 - b) * M / 2^(3 - e)          E = 0

b is a real number, so that 2^-b is a float32 scale and e chooses the grid: E1M2 is even, E2M1 is
OCP's, E3M0 is powers of two. How b and e are found is no rule of a block: `quantizers/llm_fp4.py`.
"""

from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.e3m0 import E3M0
from fp4jax.formats.grids import E2M1, TableGrid
from fp4jax.formats.scales import FP32

E1M2 = TableGrid("e1m2", tuple(m / 4 for m in range(8)))

# One scale for a slice. By exponent bits, 1 to 3.
FP4_E1M2, FP4_E2M1, FP4_E3M0 = LLM_FP4 = tuple(
  BlockFormat(
    name=f"FP4_{name}", element_dtype=grid, block_shape=None, scale_dtype=FP32, scale_rule="nearest"
  )
  for name, grid in (("E1M2", E1M2), ("E2M1", E2M1), ("E3M0", E3M0))
)
