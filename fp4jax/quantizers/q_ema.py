"""Q-EMA (TetraJet, arXiv 2502.20853): a moving average decides which way a weight is rounded."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from fp4jax import quantization as qz
from fp4jax.formats.roundings import as_rounding
from fp4jax.quantizers.quantizer import Composed, Operand, Read, pad_to_blocks

_FIRST_STEP = 10  # until then the average knows too little


@dataclasses.dataclass(frozen=True)
class QEma(Composed):
  """Of the two elements around w / scale, the one nearer to ema / scale; of equals the upper one.

  So a weight near a threshold does not flicker between two values. The scale is that of w. The
  state is the average, ema <- beta ema + (1 - beta) w in each call, which the first call starts at
  w, and the number of calls; the first ten round plainly. The paper takes beta = 0.9983 to 0.999,
  and casts both w and ema to bfloat16, which is not done here. For a block format.
  """

  operand: Operand
  beta: float = 0.998

  def __post_init__(self):
    if as_rounding(self.rounding).needs_key:
      raise ValueError(f"rounding={self.rounding!r}: Q-EMA rounds to nearest")

  def init(self, shape):
    return {"ema": jnp.zeros(shape, jnp.float32), "step": jnp.float32(0)}

  def read(self, x, axis, ctx):
    ema, step = ctx.state["ema"], ctx.state["step"]
    w = x.astype(jnp.float32)
    ema = jnp.pad(ema, [(0, n - m) for n, m in zip(w.shape, ema.shape, strict=True)])
    ema = jnp.where(step == 0, w, self.beta * ema + (1 - self.beta) * w)
    unpadded = tuple(slice(n) for n in ctx.state["ema"].shape)
    state = {"ema": ema[unpadded], "step": step + 1}
    w, ema = (self.operand.transformed(v, axis, ctx) for v in (w, ema))
    plain = self.operand.rounded(w, axis, ctx)
    values = jnp.where(step < _FIRST_STEP, plain, self._rounded(w, ema, axis, ctx))
    summary = self.operand.summary(w, axis, ctx, values)
    return Read((values,), original=w, state=state, summary=summary)

  def _rounded(self, w, ema, axis, ctx) -> Float[Array, "*s"]:
    fmt, shape = self.format, w.shape
    w, ema = (pad_to_blocks(v, fmt, axis) for v in (w, ema))
    r = qz.round_blocks(w, fmt, axis, "nearest", None, ctx.slices)
    reciprocal = fmt.codec.reciprocal(r.scales)
    if r.slice_scale is not None:
      reciprocal = reciprocal * (1 / r.slice_scale)
    negative = jnp.signbit(r.elements)
    target = ema.reshape(r.elements.shape) * reciprocal
    target = jnp.where(negative, -target, target)  # now w > 0, and the upper of equals the lower
    low, high = self._neighbours(r.scaled)
    middle = (low + high) / 2
    up = jnp.where(negative, target > middle, target >= middle)
    elements = jnp.copysign(jnp.where(up, high, low), r.elements)
    values = fmt.values(r._replace(elements=elements)).astype(fmt.dequantized_dtype)
    return values[tuple(slice(n) for n in shape)]

  def _neighbours(self, scaled):
    """The grid's magnitudes next to magnitudes in units of the scale; equal on the grid itself."""
    low, high = jnp.zeros_like(scaled), jnp.full_like(scaled, self.format.grid.max)
    for m in self.format.grid.magnitudes:
      low = jnp.where(scaled >= m, m, low)
    for m in reversed(self.format.grid.magnitudes):
      high = jnp.where(scaled <= m, m, high)
    return low, high
