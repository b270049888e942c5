"""Outlier clamping and compensation (arXiv 2501.17116): outliers bypass the quantizer."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fp4jax.quantizers.quantizer import Composed, Operand


@dataclasses.dataclass(frozen=True)
class OutlierClamp(Composed):
  """x clamped to signed quantiles of each row, then quantized; what was cut off is added exactly.

  With Y_c the clamped rows, a GEMM gives Q(Y_c) @ Q(w) + (Y - Y_c) @ w: the second product is
  sparse, about 2 (1 - alpha) of its values are not zero, and reads w before rounding. A row is
  what the GEMM contracts, n values without padding; its limits are the values number int(alpha n)
  and int((1 - alpha) n) in rising order. `compensated=False` drops what was cut off. The tap shows
  the error of Q(Y_c) - Y_c.
  """

  operand: Operand
  alpha: float = 0.99
  compensated: bool = True

  reads_whole_rows = True

  @property
  def has_exact(self) -> bool:
    return self.compensated

  def __post_init__(self):
    if not 0.5 < self.alpha <= 1:
      raise ValueError(f"alpha={self.alpha} is not in (0.5, 1]")

  def read(self, x, axis, ctx):
    clamped = self._clamp(x, axis, x.shape[axis] if ctx.length is None else ctx.length)
    read = self.operand.read(clamped, axis, ctx)
    original = self.operand.transformed(x, axis, ctx)
    if not self.compensated:
      return read._replace(original=original)
    cut = x.astype(jnp.float32) - clamped.astype(jnp.float32)
    return read._replace(exact=(self.operand.transformed(cut, axis, ctx),), original=original)

  def _clamp(self, x: Float[Array, "*s"], axis: int, n: int) -> Float[Array, "*s"]:
    """Each row to its limits; the padding after n values stays zero."""
    row = lax.slice_in_dim(x, 0, n, axis=axis)
    ordered = jnp.sort(row, axis)
    low, high = int((1 - self.alpha) * n), min(int(self.alpha * n), n - 1)
    low, high = (lax.slice_in_dim(ordered, i, i + 1, axis=axis) for i in (low, high))
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, x.shape[axis] - n)
    return jnp.pad(jnp.clip(row, low, high), padding)
