"""From the largest magnitude of a block to its stored scale, and back.

A rule says what the scale is, a codec how it is stored. Each is a value, and one line of a table:
`RULES` by the names that `BlockFormat.scale_rule` takes, `CODECS` by the dtypes of `scale_dtype`.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32, UInt8, UInt32

from fp4jax import float_bits as fb
from fp4jax.formats.grids import E4M3, FloatGrid, Grid

E8M0 = jnp.dtype(ml_dtypes.float8_e8m0fnu)
FP32 = jnp.dtype(np.float32)

StoredScale = UInt8[Array, "..."] | UInt32[Array, "..."] | Float32[Array, "..."]
_E8M0_BIAS = 127
_E8M0_NAN = 255


# Rules. A rule with power-of-two scales gives exponents, another one a float32 scale.


@runtime_checkable
class PowerOfTwoRule(Protocol):
  def exponent(self, amax: Int32[Array, "*s"], grid: Grid) -> Int32[Array, "*s"]:
    """Unclamped exponent of the scale of a block, from the bits of its amax.

    Subnormal and zero amax have exponent field 0, that is -127 or less, where every scale clamps.
    """


@runtime_checkable
class FloatRule(Protocol):
  def target(self, grid: Grid) -> float:
    """The magnitude in units of the scale that amax falls on, before the scale is rounded."""


Rule = PowerOfTwoRule | FloatRule


@dataclasses.dataclass(frozen=True)
class Floor:
  """2^(floor(log2 amax) - emax), OCP MX v1.0."""

  def exponent(self, amax, grid):
    return _exponent(amax, grid)


@dataclasses.dataclass(frozen=True)
class Even:
  """Floor of amax rounded to the precision of an element."""

  def exponent(self, amax, grid):
    # Half a unit of the element's last mantissa bit: the top half carries into the exponent.
    return _exponent(amax + (1 << (22 - grid.mantissa_bits)), grid)


@dataclasses.dataclass(frozen=True)
class Limit:
  """2^ceil(log2(amax / limit)): the largest value of a block falls into (limit / 2, limit].

  `limit` lies in the binade of the grid's largest element, and is that element where it is None.
  """

  limit: float | None = None

  def exponent(self, amax, grid):
    limit = grid.max if self.limit is None else self.limit
    # Carries into the exponent where amax's mantissa exceeds that of the limit.
    mantissa = int(np.float32(limit).view(np.int32)) & fb.MANTISSA_MASK
    return _exponent(amax + (fb.MANTISSA_MASK - mantissa), grid)


@dataclasses.dataclass(frozen=True)
class Nearest:
  """amax / target, rounded to what the codec stores; `target` is q_max where it is None."""

  amax_at: float | None = None

  def target(self, grid):
    return grid.max if self.amax_at is None else self.amax_at


def _exponent(bits, grid):
  return (bits >> 23) - 127 - math.floor(math.log2(grid.max))


RULES: dict[str, Rule] = {
  "floor": Floor(),
  "even": Even(),
  "rceil": Limit(),
  "oas": Limit(7.0),
  "nearest": Nearest(),
}


# Codecs.


@runtime_checkable
class ScaleCodec(Protocol):
  """How a scale is stored. `finite` is False for blocks whose scale is NaN."""

  name: str
  bits: int
  max: float  # largest scale

  def store(
    self, rule: Rule, grid: Grid, amax: Int32[Array, "*s"], unit: Float32[Array, "*s"] | None
  ) -> StoredScale:
    """The stored scale of each block from the bits of its amax.

    `unit` is the scale of the whole slice in formats that have one; block scales multiply it.
    """

  def read(self, stored: StoredScale) -> Float32[Array, "*s"]:
    """The value of every stored scale."""

  def reciprocal(self, stored: StoredScale) -> Float32[Array, "*s"]:
    """What elements are multiplied by before rounding: 1 / scale, 0 where that is not finite."""

  def apply(self, elements: Float32[Array, "*v"], stored: StoredScale) -> Float32[Array, "*v"]:
    """element * scale."""

  def takes(self, rule: Rule) -> bool:
    """Whether scales of that rule can be stored."""


@dataclasses.dataclass(frozen=True)
class PowerOfTwo:
  """E8M0: an exponent in a byte, 255 is NaN. Products are exact, into the subnormals."""

  name: str = "float8_e8m0fnu"
  bits: int = 8
  max: float = 2.0**127

  def takes(self, rule):
    return isinstance(rule, PowerOfTwoRule)

  def store(self, rule, grid, amax, unit=None):
    code = jnp.clip(rule.exponent(amax, grid) + _E8M0_BIAS, 0, 254)
    return jnp.where(amax < fb.EXPONENT_MASK, code, _E8M0_NAN).astype(jnp.uint8)

  def exponent(self, stored):
    """The exponent of every scale; that of code 255, NaN, is 128."""
    return stored.astype(jnp.int32) - _E8M0_BIAS

  def read(self, stored):
    return self.apply(jnp.float32(1), stored)

  def reciprocal(self, stored):
    return jnp.where(stored == _E8M0_NAN, 0.0, fb.exp2(-self.exponent(stored)))

  def apply(self, elements, stored):
    exact = fb.ldexp(elements, self.exponent(stored))
    return fb.nan_where(stored == _E8M0_NAN, exact)


@dataclasses.dataclass(frozen=True)
class SmallFloat:
  """Magnitudes of a small float without its sign: E4M3 in a byte, code 127 is NaN."""

  grid: Grid
  nan: int

  @property
  def name(self) -> str:
    return self.grid.name

  @property
  def bits(self) -> int:
    return 8

  @property
  def max(self) -> float:
    return self.grid.max

  def takes(self, rule):
    return isinstance(rule, FloatRule)

  def store(self, rule, grid, amax, unit=None):
    scale = self.grid.round(_ratio(rule, grid, amax, unit), None)
    finite = amax < fb.EXPONENT_MASK
    return jnp.where(finite, self.grid.encode(jnp.where(finite, scale, 0)), self.nan).astype(
      jnp.uint8
    )

  def read(self, stored):
    return fb.nan_where(
      stored == self.nan, self.grid.decode(jnp.where(stored == self.nan, 0, stored))
    )

  def reciprocal(self, stored):
    value = self.grid.decode(jnp.where(stored == self.nan, 0, stored))
    return jnp.where(value > 0, 1.0 / jnp.where(value > 0, value, 1), 0.0)

  def apply(self, elements, stored):
    return elements * self.read(stored)


@dataclasses.dataclass(frozen=True)
class Full:
  """The scale in float32, at least 2^-126, so that its reciprocal is finite."""

  name: str = "float32"
  bits: int = 32
  max: float = float(np.finfo(np.float32).max)

  def takes(self, rule):
    return True

  def store(self, rule, grid, amax, unit=None):
    if isinstance(rule, PowerOfTwoRule):
      scale = fb.exp2(rule.exponent(amax, grid))
    else:
      scale = jnp.maximum(_ratio(rule, grid, amax, unit), 2.0**-126)
    return fb.nan_where(amax >= fb.EXPONENT_MASK, scale)

  def read(self, stored):
    return stored

  def reciprocal(self, stored):
    usable = stored > 0  # False for NaN
    return jnp.where(usable, 1.0 / jnp.where(usable, stored, 1), 0.0)

  def apply(self, elements, stored):
    return elements * stored


def _ratio(rule, grid, amax, unit) -> Float32[Array, "*s"]:
  """amax / target in units of the slice's scale."""
  target = rule.target(grid)
  factor = 1.0 / target if unit is None else (1.0 / unit) * (1.0 / target)
  return fb.multiply(amax, jnp.broadcast_to(jnp.asarray(factor, jnp.float32), amax.shape))


CODECS: dict[DTypeLike, ScaleCodec] = {
  E8M0: PowerOfTwo(),
  E4M3: SmallFloat(FloatGrid(E4M3), nan=127),
  FP32: Full(),
}


def slice_scale(amax: Int32[Array, "*s"], largest: float) -> Float32[Array, "*s"]:
  """Scale of a whole slice: its finite amax falls on `largest`. 1 for a slice of zeros.

  At least 2^-126, which keeps it and its reciprocal normal.
  """
  encode = jnp.minimum(largest / fb.from_bits(jnp.maximum(amax, fb.SMALLEST_NORMAL)), 2.0**126)
  return jnp.where(amax == 0, 1.0, 1.0 / encode)
