"""Adaptive quantization noise."""

import jax
import numpy as np
from flax import nnx

from experiments.rl.config import NoiseSettings
from experiments.rl.noise import noise_at, with_noise
from fp4jax.models import LanguageModel, ModelConfig


def test_the_schedule_falls_by_equal_factors_after_a_stage_without_noise():
  """As in QeRL's code: interval 0 has none, interval i of N has
  start (end / start)^((i - 1) / (N - 2))."""
  settings = NoiseSettings(start=1e-2, end=1e-4, stages=10)
  found = [noise_at(settings, step, 100) for step in range(100)]
  stages = 1e-2 * 1e-2 ** (np.arange(9) / 8)
  np.testing.assert_allclose(found, np.repeat([0.0, *stages], 10), rtol=1e-12)
  assert noise_at(NoiseSettings(stages=2), 99, 100) == NoiseSettings().start


def test_the_noise_is_of_the_norms_alone_and_leaves_the_clean_weights():
  model = LanguageModel(ModelConfig(qk_norm=True), 50, nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(model))
  before = jax.tree.map(np.array, params)
  sigma = 0.1
  noisy = with_noise(params, jax.random.key(0), sigma)
  jax.tree.map(np.testing.assert_array_equal, params, before)
  draws = []
  for (path, clean), found in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(noisy), strict=True
  ):
    name = jax.tree_util.keystr(path)
    if "norm" in name:
      draws.append(np.asarray(found - clean).ravel() / sigma)
    else:
      np.testing.assert_array_equal(found, clean, name)
  assert len(draws) == 5  # before attention and experts, of q and of k, and the last
  z = np.concatenate(draws)
  assert abs(z.mean()) < 5 / z.size**0.5
  assert abs(z.std() - 1) < 5 / (2 * z.size) ** 0.5
  assert len({float(d[0]) for d in draws}) == len(draws)
  other = with_noise(params, jax.random.key(1), sigma)
  assert not np.array_equal(other["norm"]["scale"], noisy["norm"]["scale"])
