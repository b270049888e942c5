"""Stable-SPAM, arXiv 2502.17055: Adam on clipped and normalized gradients, its moments reset.

For the gradient g of each tensor, t counting steps since the last reset:

    T = c T + (1 - c) max|g|              AdaClip: what is above T / (1 - c^t) is scaled,
    g = g / max|g| * T / (1 - c^t)        the largest to that very value
    n = a n + (1 - a) |g|                 AdaGN: the norm of g becomes the mean of past norms
    r = b r + (1 - b) |g|^2               over their root mean square
    g = g / |g| * n / (1 - a^t) / (sqrt(r / (1 - b^t)) + eps)
    m = v = 0, t = 1                      MoRet, every `reset_every` steps
    Adam of g

with a, b, c = gamma1, gamma2, gamma3. As in the published code, weights are decayed first, and on a
step with a reset AdaClip and AdaGN still use the old t. T, n and r outlive a reset, but the new t
corrects them: T / (1 - c^t) is 500 times too large on the step after one, 2.5 times after 500
steps, so that AdaClip hardly clips after the first reset. That is kept: it is what was measured.

A gradient of zeros stays zero: an expert that no token chose has one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, PyTree

from experiments.config import Optimizer, StableSpam
from experiments.optimizers.norms import Norm


class State(NamedTuple):
  """Trees like the parameters; largest, norm and square have one value per tensor."""

  steps: Int32[Array, ""]
  since_reset: Int32[Array, ""]
  largest: Any  # T above
  norm: Any  # n
  square: Any  # r
  m: Any
  v: Any


def stable_spam(
  config: Optimizer, schedule: optax.Schedule, steps: int, decayed: PyTree[bool], norm: Norm
) -> optax.GradientTransformation:
  """Stable-SPAM with AdamW's weight decay; the global norm is not clipped."""
  del norm
  return optax.chain(
    scale_by_stable_spam(config.stable_spam, steps),
    optax.add_decayed_weights(config.weight_decay, decayed),
    optax.scale_by_learning_rate(schedule),
  )


def scale_by_stable_spam(config: StableSpam, steps: int) -> optax.GradientTransformation:
  """The direction of a step, before learning rate and weight decay.

  A tensor is one matrix of one layer and one expert, or one vector of one layer: weights that the
  model stacks have the statistics that they would have apart.
  """
  c = config

  def init(params):
    def per_tensor(path, p):
      return jnp.zeros_like(jnp.sum(p, _axes(path, p), keepdims=True))

    each = jax.tree_util.tree_map_with_path(per_tensor, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return State(jnp.int32(0), jnp.int32(0), each, each, each, zeros, zeros)

  def update(updates, state, params=None):
    del params
    total, t = state.steps + 1, state.since_reset + 1
    resets = total % c.reset_every == 0
    adam_t = jnp.where(resets, 1, t)
    scale = _cosine(total, steps, c.final_scale)

    def one(path, g, largest, norm, square, m, v):
      axes = _axes(path, g)
      peak = jnp.max(jnp.abs(g), axes, keepdims=True)
      largest = _mean(c.gamma3, largest, peak)
      limit = _corrected(largest, c.gamma3, t)
      g = jnp.where(jnp.abs(g) > limit, g / _nonzero(peak) * limit, g)

      length = jnp.sqrt(jnp.sum(g * g, axes, keepdims=True))
      norm = _mean(c.gamma1 * scale, norm, length)
      square = _mean(c.gamma2, square, length**2)
      root = jnp.sqrt(_corrected(square, c.gamma2, t))
      g = g / _nonzero(length) * _corrected(norm, c.gamma1, t, scale) / (root + c.eps)

      m, v = (jnp.where(resets, 0, moment) for moment in (m, v))
      m = _mean(c.b1 * scale, m, g)
      v = _mean(c.b2, v, g * g)
      root = jnp.sqrt(_corrected(v, c.b2, adam_t))
      direction = _corrected(m, c.b1, adam_t, scale) / (root + c.eps)
      return direction, largest, norm, square, m, v

    trees = (state.largest, state.norm, state.square, state.m, state.v)
    found = jax.tree_util.tree_map_with_path(one, updates, *trees)
    directions, *trees = jax.tree.transpose(
      jax.tree.structure(updates), jax.tree.structure((0,) * 6), found
    )
    return directions, State(total, adam_t, *trees)

  return optax.GradientTransformation(init, update)


def _axes(path, p) -> tuple[int, ...]:
  """The axes of one tensor: before them lie those of the layers and of the experts."""
  stacked = str(path[0].key) == "blocks"
  return tuple(range(-min(p.ndim - stacked, 2), 0))


def _mean(decay, old, new):
  return decay * old + (1 - decay) * new


def _corrected(mean, decay, t, scale=1.0):
  """mean / (1 - (decay * scale)^t), without the cancellation when the power is near 1."""
  return mean / -jnp.expm1(t * (math.log(max(decay, 1e-300)) + jnp.log(scale)))


def _nonzero(x):
  return jnp.where(x == 0, 1, x)


def _cosine(step, steps, final):
  """From 1 at step 0 to `final` at step steps + 1."""
  return final + (1 - final) * (1 + jnp.cos(jnp.pi * step / (steps + 1))) / 2
