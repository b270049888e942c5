"""Delayed scaling (TransformerEngine): the scale of a tensor comes from the steps before."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32

from fp4jax.formats import FP8_TENSOR
from fp4jax.formats.roundings import as_rounding
from fp4jax.quantizers.quantizer import Composed, Operand, Read

_LIMIT = 2.0**126  # of the multiplier, so that neither it nor its reciprocal leaves float32


@dataclasses.dataclass(frozen=True)
class DelayedScaling(Composed):
  """Rounds x * multiplier to the elements of the operand's format; saturates where amax has grown.

  The state is the multiplier and the last `history` values of amax, newest first. The next
  multiplier is q_max / (their maximum) / 2^margin; a maximum of 0 or one that is not finite leaves
  it as it is. One scale serves the whole operand, a stack of experts too.
  """

  operand: Operand = Operand(FP8_TENSOR)  # noqa: RUF009
  history: int = 1024
  margin: int = 0

  def __post_init__(self):
    if self.history < 1:
      raise ValueError(f"history={self.history} is not positive")
    if as_rounding(self.rounding).needs_key:
      raise ValueError(f"rounding={self.rounding!r}: delayed scaling rounds to nearest")

  def init(self, shape):
    return {"multiplier": jnp.float32(1), "history": jnp.zeros(self.history, jnp.float32)}

  def read(self, x, axis, ctx):
    x = self.operand.transformed(x, axis, ctx).astype(jnp.float32)
    multiplier, history = ctx.state["multiplier"], ctx.state["history"]
    rounded = self.format.grid.round(jnp.abs(x) * multiplier, None)
    values = jnp.copysign(rounded, x) * (1 / multiplier)
    history = jnp.concatenate([jnp.max(jnp.abs(x), initial=0).reshape(1), history[:-1]])
    return Read(
      (values,),
      original=x,
      state={"multiplier": self._next(jnp.max(history), multiplier), "history": history},
      summary=self.operand.summary(x, axis, ctx, values),
    )

  def _next(self, amax: Float32[Array, ""], multiplier) -> Float32[Array, ""]:
    usable = (amax > 0) & jnp.isfinite(amax)
    amax = jnp.where(usable, amax, 1.0)
    found = jnp.minimum(self.format.grid.max / amax / 2.0**self.margin, _LIMIT)
    return jnp.where(usable, found, multiplier)
