"""GradScale (Sun et al. 2020, Ultra-Low Precision 4-bit Training): a power of two that adapts."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32

from fp4jax.formats.roundings import as_rounding
from fp4jax.quantizers.quantizer import Composed, Operand, Read

_LIMIT = 2.0**100  # of the multiplier, far from where float32 ends


@dataclasses.dataclass(frozen=True)
class GradScale(Composed):
  """Rounds x * multiplier to the elements of the operand's format; saturates at the largest, q_max.

  The state is the multiplier. It halves after a step whose max|x * multiplier| was beyond q_max,
  doubles where that was at most q_max / 2 but not 0, and so settles where it lies in
  (q_max / 2, q_max].
  """

  operand: Operand

  def init(self, shape):
    return jnp.float32(1)

  def read(self, x, axis, ctx):
    x = self.operand.transformed(x, axis, ctx).astype(jnp.float32)
    multiplier, grid = ctx.state, self.format.grid
    random_bits = as_rounding(self.rounding).draw(ctx.key, x.shape)
    scaled = jnp.abs(x) * multiplier
    values = jnp.copysign(grid.round(scaled, random_bits), x) * (1 / multiplier)
    return Read(
      (values,),
      original=x,
      state=_next(jnp.max(scaled, initial=0), multiplier, grid.max),
      summary=self.operand.summary(x, axis, ctx, values),
    )


def _next(amax, multiplier, q_max) -> Float32[Array, ""]:
  grown = (amax > 0) & (amax <= q_max / 2)
  step = jnp.where(amax > q_max, 0.5, jnp.where(grown, 2.0, 1.0))
  return jnp.clip(multiplier * step, 1 / _LIMIT, _LIMIT)
