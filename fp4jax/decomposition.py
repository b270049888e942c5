"""The exact decomposition of the quantization error into scale bias, deadzone and grid noise.

With Q the quantizer, s* = amax / q_max the ideal scale of a block and Q* the same rounding on the
grid of s* instead of the stored scale, the error splits without a remainder (arXiv 2605.20402):

    Q(x) - x = [Q(x) - Q*(x)] + [Q*(x) - x] on D + [Q*(x) - x] off D
    total    =   scale bias   +   deadzone       +   grid noise

D, the dead zone, holds the values that the ideal grid rounds to zero: |x| < q_min / 2 * s*, which
is amax / 24 for E2M1. Deadzone and grid noise have disjoint support, so they are orthogonal for
every format. Scale bias is orthogonal to the deadzone too where the stored scale is never below
s*, that is under `scale_rule="rceil"`: there Q is zero on D as well. Under "floor", "even", "oas"
and rounded scales ("nearest") Q can be nonzero on D, and that cross term is small but not zero. One
cross term is left in any case, between scale bias and grid noise, and it is negative in practice:

    1 = scale_bias + deadzone + grid_noise + cross_scale_grid + cross_scale_deadzone   (shares)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from fp4jax import quantization as qz
from fp4jax.formats import WHOLE, Format, Rounding, Slices
from fp4jax.sharding import spec_of, spread


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorSummary:
  """Scalars of one decomposition; shares are of the squared error."""

  scale_bias: Float[Array, ""]
  deadzone: Float[Array, ""]
  grid_noise: Float[Array, ""]
  cross_scale_grid: Float[Array, ""]  # 2 <scale_bias, grid_noise>
  cross_scale_deadzone: Float[Array, ""]  # 2 <scale_bias, deadzone>
  cosine: Float[Array, ""]  # between scale bias and grid noise
  sqnr_db: Float[Array, ""]  # 10 log10(|x|^2 / |error|^2)
  gain: Float[Array, ""]  # <x, Q(x)> / <x, x>
  flushed: Float[Array, ""]  # fraction of the nonzero values that became zero
  clipped: Float[Array, ""]  # fraction of the nonzero values beyond q_max * scale


SUMMARY_FIELDS = tuple(f.name for f in dataclasses.fields(ErrorSummary))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorDecomposition:
  """Arrays of x's shape: total = scale_bias + deadzone + grid_noise."""

  x: Float[Array, "*s"]
  total: Float[Array, "*s"]
  scale_bias: Float[Array, "*s"]
  deadzone: Float[Array, "*s"]
  grid_noise: Float[Array, "*s"]
  clipped: Bool[Array, "*s"]

  def summary(self) -> ErrorSummary:
    """Shares, cosine, SQNR, gain and fractions. Where nothing was lost, shares are 0."""
    # Taken relative to the largest value, so that no square leaves the range of float32.
    largest = jnp.max(jnp.abs(self.x), initial=0)
    unit = jnp.where(largest > 0, largest, 1.0)
    x, total, scale, dead, grid = (
      t / unit for t in (self.x, self.total, self.scale_bias, self.deadzone, self.grid_noise)
    )
    nonzero = x != 0
    (
      energy,
      error,
      x_error,
      scale_2,
      dead_2,
      grid_2,
      scale_grid,
      scale_dead,
      flushed,
      clipped,
      count,
    ) = _sums(
      x * x,
      total * total,
      x * total,
      scale * scale,
      dead * dead,
      grid * grid,
      scale * grid,
      scale * dead,
      nonzero & (self.x + self.total == 0),  # unscaled: a fused multiply-add would not give 0
      self.clipped,
      nonzero,
    )
    return ErrorSummary(
      scale_bias=_ratio(scale_2, error),
      deadzone=_ratio(dead_2, error),
      grid_noise=_ratio(grid_2, error),
      cross_scale_grid=_ratio(2 * scale_grid, error),
      cross_scale_deadzone=_ratio(2 * scale_dead, error),
      cosine=_ratio(scale_grid, jnp.sqrt(scale_2) * jnp.sqrt(grid_2)),
      sqnr_db=_decibels(energy, error),
      gain=1 + _ratio(x_error, energy),
      flushed=_ratio(flushed, count),
      clipped=_ratio(clipped, count),
    )


def _sums(*terms: Array) -> tuple[Float[Array, ""], ...]:
  """The sum of each term, all in one pass over memory and one loop to compile.

  Along the last axis first, so that no accumulator outgrows its addends by much.
  """
  rows = math.prod(terms[0].shape[:-1])
  terms = tuple(t.astype(terms[0].dtype).reshape(rows, t.shape[-1]) for t in terms)
  zeros = tuple(jnp.zeros((), t.dtype) for t in terms)
  sums = lax.reduce(terms, zeros, lambda a, b: tuple(map(lax.add, a, b)), (1,))
  return tuple(jnp.sum(jnp.stack(sums), axis=1))


def _ratio(numerator, denominator):
  """numerator / denominator; 0 / 0 is 0, for there was nothing to share out."""
  return jnp.where(denominator == 0, 0.0, numerator / jnp.where(denominator == 0, 1, denominator))


def _decibels(energy, error):
  """10 log10(energy / error); infinite where nothing was lost."""
  exact = error == 0
  ratio = jnp.log10(energy) - jnp.log10(jnp.where(exact, 1, error))
  return 10 * jnp.where(exact, jnp.inf, ratio)


def decompose(
  x: ArrayLike,
  fmt: Format,
  axis: int = -1,
  *,
  rounding: str | Rounding = "nearest",
  key: jax.Array | None = None,
  dtype: DTypeLike = jnp.float32,
) -> ErrorDecomposition:
  """Splits the error of `fake_quantize(x, fmt, axis, ...)`.

  Stochastic rounding draws the same uniforms for Q and Q*, so that scale bias stays the effect of
  the scale alone; on D, Q* is then zero only on average.

  Args:
    x: float32, bfloat16 or float16, as for `quantize`.
    fmt: the format.
    axis: the quantized axis.
    rounding: as for `quantize`.
    key: as for `quantize`.
    dtype: dtype of the differences: float32, in which the parts sum to the total within one ulp of
      x, or float64 (under jax_enable_x64), in which they sum exactly.
  """
  x, axis = qz.check_arguments(x, fmt, axis, rounding, key)
  if jnp.dtype(dtype) == jnp.float64 and not jax.config.jax_enable_x64:
    raise ValueError("dtype=float64 needs jax.config.update('jax_enable_x64', True)")
  options = fmt, axis, rounding, jnp.dtype(dtype)
  return spread(_decompose, options, (x, key), spec=spec_of(x))


def _decompose(fmt, axis, rounding, dtype, x, key):
  return decompose_slices(x, fmt, axis, rounding, key, WHOLE, dtype)


def decompose_slices(
  x: Float[Array, "*s"],
  fmt: Format,
  axis: int,
  rounding: str | Rounding,
  key: jax.Array | None,
  slices: Slices,
  dtype: DTypeLike = jnp.float32,
  values: Float[Array, "*s"] | None = None,
) -> ErrorDecomposition:
  """`decompose` where several slices have a scale each. Arguments as `check_arguments` passes.

  `values` are what x became, where that is not what `fmt` makes of it: under a scale or a choice of
  a quantizer's own. Scale bias is then all that sets them apart from the ideal ones.
  """
  r = qz.round_blocks(x, fmt, axis, rounding, key, slices)
  ideal, in_deadzone = fmt.ideal(r)
  quantized = fmt.values(r) if values is None else values
  x, quantized, ideal = (a.astype(dtype) for a in (x, quantized, ideal))
  ideal_error = ideal - x
  return ErrorDecomposition(
    x=x,
    total=quantized - x,
    scale_bias=quantized - ideal,
    deadzone=jnp.where(in_deadzone, ideal_error, 0),
    grid_noise=jnp.where(in_deadzone, 0, ideal_error),
    clipped=fmt.clipped(r),
  )
