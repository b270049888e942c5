"""Roundings: what decides between the two elements around a value; `ROUNDINGS` by name.

A format takes the draws of a rounding, random bits for each value, or None to round to nearest,
ties to even. It rounds up where the fraction of the step and the uniform number that the bits name
reach 1.
"""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, UInt32


@runtime_checkable
class Rounding(Protocol):
  needs_key: bool

  def draw(self, key: jax.Array | None, shape: tuple[int, ...]) -> UInt32[Array, "*s"] | None:
    """The draws for an array of `shape`. Several keys: one for each entry of its leading axes."""


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
    key = typed(key)
    own = functools.partial(jax.random.bits, shape=shape[key.ndim :], dtype=jnp.uint32)
    for _ in range(key.ndim):
      own = jax.vmap(own)
    drawn = own(key)
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


def typed(key: jax.Array) -> jax.Array:
  """A key or a batch of keys; of the old kind, uint32 without a type, one key."""
  return jax.random.wrap_key_data(key) if key.dtype == jnp.uint32 else key


def fold_in(key: jax.Array, *numbers: ArrayLike) -> jax.Array:
  """`jax.random.fold_in` of one number after the other; keys and numbers are broadcast."""
  for number in numbers:
    key = jnp.vectorize(jax.random.fold_in, signature="(),()->()")(key, number)
  return key
