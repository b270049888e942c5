"""Transforms of an operand along the contracted axis, which cancel in the GEMM."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from fp4jax.transforms import check_block, hadamard


@runtime_checkable
class Transform(Protocol):
  """An orthogonal map of runs of `block` values; both operands of a GEMM have the same."""

  block: int
  needs_key: bool  # of the GEMM: another map in each call, the same for both operands

  def apply(
    self, x: Float[Array, "*s"], axis: int, key: jax.Array | None
  ) -> Float32[Array, "*s"]: ...

  def invert(self, x: Float[Array, "*s"], axis: int, key: jax.Array | None) -> Float32[Array, "*s"]:
    """The inverse, which is also the transpose."""


@dataclasses.dataclass(frozen=True)
class Hadamard:
  """Randomized block Hadamard transform along the contracted axis; see `fp4jax.transforms`."""

  block: int = 32
  seed: int | None = 0  # of one sign vector, shared by all layers and steps; None: no signs
  needs_key = False

  def __post_init__(self):
    check_block(self.block)

  def signs(self) -> np.ndarray | None:
    if self.seed is None:
      return None
    return np.random.default_rng(self.seed).choice(np.float32([-1, 1]), self.block)

  def apply(self, x, axis, key=None):
    return hadamard(x.astype(jnp.float32), axis, self.block, _as_array(self.signs()))

  def invert(self, x, axis, key=None):
    return _inverse(x, axis, self.block, _as_array(self.signs()))


@dataclasses.dataclass(frozen=True)
class FreshHadamard:
  """The same with signs drawn from the key of each call, another vector in each GEMM."""

  block: int = 32
  needs_key = True

  def __post_init__(self):
    check_block(self.block)

  def apply(self, x, axis, key):
    return hadamard(x.astype(jnp.float32), axis, self.block, self._signs(key))

  def invert(self, x, axis, key):
    return _inverse(x, axis, self.block, self._signs(key))

  def _signs(self, key):
    return jax.random.rademacher(key, (self.block,), jnp.float32)


def _as_array(signs):
  return None if signs is None else jnp.asarray(signs)


def _inverse(x, axis, block, signs):
  """diag(signs) H x: H is symmetric and orthogonal."""
  y = hadamard(x.astype(jnp.float32), axis, block)
  if signs is None:
    return y
  shape = [1] * x.ndim
  shape[axis] = -1
  return y * jnp.tile(signs, x.shape[axis] // block).reshape(shape)
