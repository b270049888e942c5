"""Params whose last bit differs, and how far that sets a trainer from itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rl_cases import small_rl

from experiments.rl.rounding import gaps, nudged
from experiments.rl.run import Setting


def test_a_nudge_is_the_next_bf16_value_of_each_entry_of_the_embedding():
  table = jax.random.normal(jax.random.key(0), (64, 32)).astype(jnp.bfloat16).astype(jnp.float32)
  table = table.at[3, 5].set(0.0)
  params = {"embedding": {"embedding": table}, "head": jnp.ones(3)}
  found = nudged(params, jax.random.key(1))
  assert found["head"] is params["head"] and params["embedding"]["embedding"] is table
  other = np.asarray(found["embedding"]["embedding"])
  assert other[3, 5] == 0
  bits = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.int16).astype(np.int32)  # noqa: E731
  apart = np.delete((bits(other) - bits(table)).ravel(), 3 * 32 + 5)
  assert set(apart) == {-1, 1} and 0.4 < np.mean(apart == 1) < 0.6
  np.testing.assert_array_equal(other, np.asarray(jnp.bfloat16(other), np.float32))


@pytest.mark.slow
def test_the_gap_of_equal_numerics_is_that_of_how_they_are_compiled_or_of_a_last_bit():
  config = small_rl()
  setting = Setting.of(config)
  found = {}
  for arm in ("mxfp4", "mxfp4@rollout"):
    for row in gaps(config, setting, setting.source.params(), arm):
      found[arm, row["excess_precision"], row["nudged"]] = row
  assert len(found) == 6
  exact = found["mxfp4", False, False]
  assert abs(exact["ppo_kl"]) < 1e-7 and exact["router_flips/tokens"] == 0
  apart = found["mxfp4@rollout", False, False]
  assert apart["rollout_kl"] > 1e-3 and apart["router_flips/tokens"] > 0
  # The trainer of "@rollout" is bf16: a last bit is not amplified by a grid of 4 bits.
  of_bf16, of_mxfp4 = (found[arm, False, True]["rollout_kl"] for arm in ("mxfp4@rollout", "mxfp4"))
  assert 0 < of_bf16 < of_mxfp4 / 10
