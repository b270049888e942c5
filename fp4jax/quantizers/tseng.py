"""Stochastic rounding of three quarters (arXiv 2502.20586), so that nothing clips."""

import dataclasses

import jax.numpy as jnp

from fp4jax.formats import MXFP4
from fp4jax.formats.scales import Floor
from fp4jax.quantizers.quantizer import Composed, Operand


@dataclasses.dataclass(frozen=True)
class FloorOfFourThirds:
  """The scale that the rule "floor" gives 4/3 of amax: 3/4 of a block falls into [3, 6)."""

  def exponent(self, amax, grid):
    return Floor().exponent(amax + (1 << 22), grid)  # carries where the mantissa is 1.5 or more


MXFP4_THREE_QUARTERS = dataclasses.replace(
  MXFP4, name="MXFP4_THREE_QUARTERS", scale_rule=FloorOfFourThirds()
)


@dataclasses.dataclass(frozen=True)
class ThreeQuarters(Composed):
  """4/3 * SR(3/4 x) under the scale that OCP's floor rule gives x; its mean is x.

  The GEMM multiplies its accumulator by 4/3 for each such operand: by 16/9 where both are. The
  paper quantizes both operands of dgrad and wgrad so, after a Hadamard transform of 64 with fresh
  signs.
  """

  operand: Operand = Operand(MXFP4_THREE_QUARTERS, "stochastic")  # noqa: RUF009

  def read(self, x, axis, ctx):
    # The summary, of 3/4 x, is relative: it holds for x.
    read = self.operand.read(0.75 * x.astype(jnp.float32), axis, ctx)
    return read._replace(factor=4 / 3)
