"""The norm of all gradients, and the clip by it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PyTree

Norm = Callable[[PyTree], Float32[Array, ""]]


def norm_of(unrolled: bool) -> Norm:
  """`optax.tree.norm`, as fast where a model is `unrolled`.

  Its gradients of the layers are a sum of as many arrays as there are layers, zero but for one. A
  kernel that reduces the sum adds them all for every value, and was 36 times as slow as its reads
  with 12 layers. Of the sum of one layer XLA knows the array that is not zero.
  """
  return _norm_by_layer if unrolled else optax.tree.norm


def _norm_by_layer(grads: dict[str, PyTree]) -> Float32[Array, ""]:
  layers = lambda g: [g[i] for i in range(len(g))]  # noqa: E731
  return optax.tree.norm(grads | {"blocks": jax.tree.map(layers, grads["blocks"])})


def clip_by_norm(largest: float, norm: Norm) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` that takes the norm as it is told to."""

  def update(updates, state, params=None):
    del params
    length = norm(updates)
    clip = lambda g: jnp.where(length < largest, g, g / length * largest)  # noqa: E731
    return jax.tree.map(clip, updates), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
