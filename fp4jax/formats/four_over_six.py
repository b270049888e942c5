"""Four over six (arXiv 2512.02010): NVFP4 that puts the largest value of a block on 6 or on 4.

E2M1 has nothing between 4 and 6, where scaling to 6 leaves the block's second largest values.
Scaled to 4 they lie closer, and the scale is 1.5 times as large. The scale of the slice maps its
amax to 6 * 256 rather than 6 * 448, so that the larger one, up to 384, fits in E4M3.
"""

import dataclasses

import jax.numpy as jnp

from fp4jax import names
from fp4jax.formats.based import Based
from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.format import WHOLE, Rounded
from fp4jax.formats.grids import E2M1, E4M3, FloatGrid
from fp4jax.formats.scales import Nearest, SmallFloat
from fp4jax.formats.search import squared_error


@dataclasses.dataclass(frozen=True)
class _E4M3To256(SmallFloat):
  """E4M3 scales, of which the scale of the slice makes the largest 256."""

  @property
  def max(self) -> float:
    return 256.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourOverSix(Based):
  """The candidate with the smaller squared error to nearest, for each block; 6 if they are equal.

  Stochastic rounding rounds under the scale so chosen. The ideal scale is amax / 6, as NVFP4's.
  A tile, `block_shape=(16, 16)`, makes one choice.
  """

  name: str = dataclasses.field(compare=False)
  block_shape: tuple[int, ...] = (16,)

  def __post_init__(self):
    self.to(6.0)  # checks the shape
    names.settle(self)

  scale_rule = "four over six"

  def to(self, target: float) -> BlockFormat:
    """The format that puts amax on `target`."""
    return BlockFormat(
      name="candidate",
      element_dtype=E2M1,
      block_shape=self.block_shape,
      scale_dtype=_E4M3To256(FloatGrid(E4M3), nan=127),
      scale_rule=Nearest(target),
      has_tensor_scale=True,
    )

  @property
  def base(self) -> BlockFormat:
    return self.to(6.0)

  def round(self, x, axis, random_bits=None, slices=WHOLE) -> Rounded:
    candidates = self.to(6.0), self.to(4.0)

    def error_of(fmt):
      r = fmt.round(x, axis, None, slices)
      within = tuple(range(1, r.elements.ndim, 2))
      return squared_error((fmt.values(r) - x).reshape(r.elements.shape), r.amax, within)

    error_6, error_4 = map(error_of, candidates)
    six, four = (fmt.round(x, axis, random_bits, slices) for fmt in candidates)
    choose = lambda field: jnp.where(  # noqa: E731
      error_4 < error_6, getattr(four, field), getattr(six, field)
    )
    return six._replace(**{field: choose(field) for field in ("elements", "scales", "scaled")})


NVFP4_4O6 = FourOverSix(name="NVFP4_4O6")
