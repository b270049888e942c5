"""The differentiable gradient estimator (arXiv 2501.17116) in place of the straight-through one."""

import dataclasses
import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float32

from fp4jax import quantization as qz
from fp4jax.quantizers.quantizer import Composed, Operand, pad_to_blocks


@dataclasses.dataclass(frozen=True)
class DifferentiableEstimator(Composed):
  """Rounds as `operand` does; the gradient is multiplied by f'(x / scale).

  f is smooth and passes through the grid's values and midpoints: in an interval of width d, t from
  its lower end, f'(t) = |2 t / d - 1|^(1/k - 1) / k, at most `limit`. f' is 1/k on the grid's
  values, and 0 beyond the largest on both sides, where f is flat. (The published code is not
  symmetric: it goes on extrapolating below -6.) Its mean is 1, but with limit=3 it is 0.59.

  One float32 per value is kept for the backward pass.
  """

  operand: Operand
  k: float = 5.0
  limit: float = 3.0

  @property
  def pulls_transformed(self) -> bool:
    return self.transform is not None

  def read(self, x, axis, ctx):
    read = self.operand.read(x, axis, ctx)
    padded = pad_to_blocks(read.original, self.format, axis)
    r = qz.round_blocks(padded, self.format, axis, self.rounding, ctx.key, ctx.slices)
    return read._replace(saved=self._slope(r.scaled).reshape(padded.shape))

  def pull(self, saved, g):
    return g * saved[tuple(slice(n) for n in g.shape)]  # g may lack the padding

  def _slope(self, scaled: Float32[Array, "*v"]) -> Float32[Array, "*v"]:
    """f' of magnitudes in units of the scale."""
    distance = jnp.full_like(scaled, jnp.inf)  # from the middle of an interval, in half widths
    for low, high in itertools.pairwise(self.format.grid.magnitudes):
      inside = (scaled >= low) & (scaled <= high)
      distance = jnp.where(inside, jnp.abs(2 * (scaled - low) / (high - low) - 1), distance)
    slope = jnp.minimum(distance ** (1 / self.k - 1) / self.k, self.limit)
    return jnp.where(scaled > self.format.grid.max, 0.0, slope)
