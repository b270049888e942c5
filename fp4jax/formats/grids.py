"""Element grids as values: the magnitudes that a code can name, and how to round to them.

A grid is a float of ml_dtypes, `FloatGrid(E2M1)`, or magnitudes typed in, `TableGrid(...)`. Codes
are sign-magnitude: the index of the magnitude, with the sign above it.
"""

import dataclasses
import functools
import itertools
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, UInt8, UInt32

from fp4jax import float_bits as fb

E2M1 = jnp.dtype(ml_dtypes.float4_e2m1fn)
E2M3 = jnp.dtype(ml_dtypes.float6_e2m3fn)
E3M2 = jnp.dtype(ml_dtypes.float6_e3m2fn)
E4M3 = jnp.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = jnp.dtype(ml_dtypes.float8_e5m2)
ELEMENT_DTYPES = (E2M1, E2M3, E3M2, E4M3, E5M2)
_BITCAST_BY_XLA = {E2M1: jnp.uint4, E4M3: jnp.uint8, E5M2: jnp.uint8}


@runtime_checkable
class Grid(Protocol):
  """What a block format asks of its elements; values are float32, signs are kept."""

  name: str
  bits: int  # of a code, the sign included
  max: float
  smallest: float  # positive magnitude
  first_midpoint: float  # what is smaller rounds to zero
  mantissa_bits: int  # of the largest binade; what "even" rounds amax to
  magnitudes: tuple[float, ...]  # rising from 0

  def round(
    self, x: Float32[Array, "*s"], random_bits: UInt32[Array, "*s"] | None
  ) -> Float32[Array, "*s"]:
    """x >= 0 to a magnitude, saturating; to nearest, or up with the probability of the distance."""

  def encode(self, elements: Float32[Array, "*s"]) -> UInt8[Array, "*s"]:
    """Codes of signed elements on the grid."""

  def decode(self, codes: UInt8[Array, "*s"]) -> Float32[Array, "*s"]: ...


@dataclasses.dataclass(frozen=True)
class FloatGrid:
  """The finite values of a small float of ml_dtypes; ties to even."""

  dtype: DTypeLike

  @property
  def _info(self):
    return ml_dtypes.finfo(self.dtype)

  @property
  def magnitudes(self) -> tuple[float, ...]:
    return tuple(m for m in _magnitudes(self.dtype) if m <= self.max)

  @property
  def name(self) -> str:
    return str(self.dtype)

  @property
  def bits(self) -> int:
    return self._info.bits

  @property
  def max(self) -> float:
    return float(self._info.max)

  @property
  def smallest(self) -> float:
    return float(self._info.smallest_subnormal)

  @property
  def first_midpoint(self) -> float:
    return self.smallest / 2

  @property
  def mantissa_bits(self) -> int:
    return self._info.nmant

  def round(self, x, random_bits=None):
    return fb.round_to_grid(x, self.dtype, random_bits)

  def encode(self, elements):
    if self.dtype in _BITCAST_BY_XLA:
      codes = lax.bitcast_convert_type(elements.astype(self.dtype), _BITCAST_BY_XLA[self.dtype])
      return codes.astype(jnp.uint8)
    return _encode(elements, _magnitudes(self.dtype), self.bits)

  def decode(self, codes):
    if self.dtype in _BITCAST_BY_XLA:
      codes = codes.astype(_BITCAST_BY_XLA[self.dtype])
      return lax.bitcast_convert_type(codes, self.dtype).astype(jnp.float32)
    return _decode(codes, _magnitudes(self.dtype), self.bits)


@dataclasses.dataclass(frozen=True)
class TableGrid:
  """Magnitudes typed in, 0 first; `midpoints` are where rounding to nearest changes.

  Without midpoints they are the arithmetic ones. A tie goes to the even code, or down with
  `ties="down"`.
  """

  name: str
  magnitudes: tuple[float, ...]
  midpoints: tuple[float, ...] | None = None
  ties: str = "even"
  mantissa_bits: int = 0

  def __post_init__(self):
    for field in ("magnitudes", "midpoints"):
      if isinstance(value := getattr(self, field), list):
        raise TypeError(f"{self.name}: {field}={value} is a list; formats are hashed, give a tuple")
    m, mid = self.magnitudes, self._midpoints
    if m[0] != 0 or list(m) != sorted(set(m)):
      raise ValueError(f"{self.name}: magnitudes {m} do not rise from 0")
    if len(mid) != len(m) - 1 or any(
      not a <= t <= b for a, t, b in zip(m, mid, m[1:], strict=False)
    ):
      raise ValueError(f"{self.name}: midpoints {mid} do not lie between {m}")
    if self.ties not in ("even", "down"):
      raise ValueError(f"{self.name}: ties={self.ties!r} is not 'even' or 'down'")

  @property
  def _midpoints(self):
    m = self.magnitudes
    return self.midpoints or tuple((a + b) / 2 for a, b in itertools.pairwise(m))

  @property
  def bits(self) -> int:
    return 1 + math.ceil(math.log2(len(self.magnitudes)))

  @property
  def max(self) -> float:
    return self.magnitudes[-1]

  @property
  def smallest(self) -> float:
    return self.magnitudes[1]

  @property
  def first_midpoint(self) -> float:
    return self._midpoints[0]

  def round(self, x, random_bits=None):
    if random_bits is None:
      value = jnp.zeros_like(x)
      for i, midpoint in enumerate(self._midpoints):
        up_at_tie = self.ties == "even" and i % 2 == 1
        above = (x >= midpoint) if up_at_tie else (x > midpoint)
        value = jnp.where(above, self.magnitudes[i + 1], value)
      return value
    low, high = jnp.zeros_like(x), jnp.full_like(x, self.smallest)
    for magnitude, next_one in zip(
      self.magnitudes[1:], (*self.magnitudes[2:], self.max), strict=True
    ):
      low = jnp.where(x >= magnitude, magnitude, low)
      high = jnp.where(x >= magnitude, next_one, high)
    step = jnp.where(high > low, high - low, 1.0)
    goes_up = (jnp.minimum(x, self.max) - low) / step + fb.uniform(random_bits) >= 1
    return jnp.where(goes_up, high, low)

  def encode(self, elements):
    return _encode(elements, self.magnitudes, self.bits)

  def decode(self, codes):
    return _decode(codes, self.magnitudes, self.bits)


@functools.cache
def _magnitudes(dtype) -> tuple[float, ...]:
  codes = np.arange(2 ** (ml_dtypes.finfo(dtype).bits - 1), dtype=np.uint8)
  return tuple(codes.view(dtype).astype(np.float32).tolist())


# Comparisons rather than look-ups: a gather is slow, and asks for a sharding on an Explicit mesh.


def _encode(elements, magnitudes, bits):
  sign = jnp.signbit(elements).astype(jnp.uint8) << (bits - 1)
  absolute = jnp.abs(elements)
  return sum((absolute >= m).astype(jnp.uint8) for m in magnitudes[1:]) | sign


def _decode(codes, magnitudes, bits):
  magnitude_code = codes & ((1 << (bits - 1)) - 1)
  value = jnp.zeros_like(codes, jnp.float32)
  for code, magnitude in enumerate(magnitudes[1:], 1):
    value = jnp.where(magnitude_code == code, magnitude, value)
  return jnp.where(codes >> (bits - 1) == 1, -value, value)


def as_grid(element_dtype: DTypeLike | Grid) -> Grid:
  """The grid of a float dtype; a grid as it is."""
  return element_dtype if isinstance(element_dtype, Grid) else FloatGrid(element_dtype)
