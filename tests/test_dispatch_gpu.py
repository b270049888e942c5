"""Experts divided among GPUs, by the kernels, compute what one GPU computes in as many parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dispatch import NAMES, RECIPES, E, K, make_mesh, over_mesh, with_gradients

from fp4jax import moe_ffn, recipes


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs or more")
@pytest.mark.parametrize("name", ["bf16", "fp8_pow2", "hopper_fp4", *RECIPES[-2:]])
def test_kernels_over_devices_compute_what_one_computes(name):
  recipe, devices = recipes.RECIPES[name], jax.device_count()
  rng = np.random.default_rng(0)
  tokens, d, f = 512 * devices, 512, 256
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
  picks = np.argsort(rng.random((tokens, E)) - np.eye(E)[0], axis=1)[:, :K]  # expert 0 is busy
  weights = jnp.asarray(rng.uniform(0.1, 1, (tokens, K)), jnp.float32)
  w13, w2 = normal(E, d, 2 * f) / d**0.5, normal(E, f, d) / f**0.5
  arguments = (normal(tokens, d), w13, w2, weights, jnp.asarray(picks), normal(tokens, d))

  def layer(x, w13, w2, weights, experts):
    how = {"token_parts": devices, "implementation": "mosaic"}
    return moe_ffn(x, w13, w2, experts, weights, recipe, **how)

  want = [np.asarray(r, np.float64) for r in jax.jit(with_gradients(layer))(*arguments)]
  run = over_mesh(recipe, make_mesh(1, devices), implementation="mosaic")
  first = run(*arguments)
  for what, a, e in zip(NAMES, first, want, strict=True):
    error = np.asarray(a, np.float64) - e
    # Sums in two orders: few results fall on the other side of a rounding, by 2^-8 or 2^-3 of them.
    # A device's sum that returns in bf16 is rounded once more, by up to 2^-9.
    sums_round = what in ("y", "dx") and recipe.payload.sums == jnp.bfloat16
    tolerance = 0.002 + (2.0**-9 if sums_round else 0)
    assert np.linalg.norm(error) < tolerance * np.linalg.norm(e), what
  for _ in range(50):
    for a, b in zip(run(*arguments), first, strict=True):
      np.testing.assert_array_equal(a, b)
