"""Roundings: what decides between the two elements around a value; `ROUNDINGS` by name.

A format takes the draws of a rounding, random bits for each value, or None to round to nearest,
ties to even. It rounds up where the fraction of the step and the uniform number that the bits name
reach 1.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


@runtime_checkable
class Rounding(Protocol):
  needs_key: bool

  def draw(self, key: jax.Array | None, shape: tuple[int, ...]) -> UInt32[Array, "*s"] | None:
    """The draws for an array of `shape`."""


@dataclasses.dataclass(frozen=True)
class Nearest:
  needs_key = False

  def draw(self, key, shape):
    return None


@dataclasses.dataclass(frozen=True)
class Stochastic:
  """Up with the probability of the distance to the element below.

  With fewer `bits` per draw, as hardware has them, the uniform numbers are (i + 1/2) / 2^bits: the
  mean is off by at most 2^-(bits + 1) of a step.
  """

  bits: int = 32
  needs_key = True

  def __post_init__(self):
    if not (isinstance(self.bits, int) and 1 <= self.bits <= 32):
      raise ValueError(f"bits={self.bits!r} is not an int from 1 to 32")

  def draw(self, key, shape):
    drawn = jax.random.bits(key, shape, jnp.uint32)
    if self.bits == 32:
      return drawn
    unused = 32 - self.bits
    return (drawn >> unused << unused) | (1 << (unused - 1))


ROUNDINGS: dict[str, Rounding] = {"nearest": Nearest(), "stochastic": Stochastic()}


def as_rounding(rounding: Any) -> Rounding:
  """A rounding by name, or as it is; refuses what is neither."""
  if isinstance(rounding, Rounding) and not isinstance(rounding, type):
    return rounding
  if not isinstance(rounding, str) or rounding not in ROUNDINGS:
    raise ValueError(f"{rounding=} is not one of {tuple(ROUNDINGS)}, nor a Rounding")
  return ROUNDINGS[rounding]
