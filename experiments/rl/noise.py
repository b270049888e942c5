"""Adaptive quantization noise (arXiv 2510.11696): Gaussian, on the weights of the norms, in the
rollout alone. The weights themselves stay clean, so that nothing accumulates."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from experiments.rl.config import NoiseSettings

_NORM = "scale"  # what nnx.RMSNorm calls its weights


def noise_at(settings: NoiseSettings, step: int, steps: int) -> float:
  """The standard deviation of a step: 0 in the first of equally long stages, whose others fall from
  `start` to `end` by equal factors."""
  stage = step * settings.stages // steps
  if stage == 0:
    return 0.0
  last = settings.stages - 2
  share = (stage - 1) / last if last else 0.0
  return settings.start * (settings.end / settings.start) ** share


def with_noise(params: PyTree, key: jax.Array, sigma: jax.Array | float) -> PyTree:
  """`params` with noise of that standard deviation on the weights of every norm."""
  paths, tree = jax.tree_util.tree_flatten_with_path(params)
  noisy = []
  for i, (path, x) in enumerate(paths):
    if _name(path) == _NORM:
      x = x + sigma * jax.random.normal(jax.random.fold_in(key, i), x.shape, jnp.float32)
    noisy.append(x)
  return tree.unflatten(noisy)


def _name(path) -> str:
  return jax.tree_util.keystr(path[-1:], simple=True)
