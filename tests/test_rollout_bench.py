"""The benchmark of rollouts on a model of two layers: what is told of each way to hold weights."""

import pytest
from flax import nnx

from experiments.rl import rollout_bench
from fp4jax.models import LanguageModel, ModelConfig


@pytest.mark.slow
def test_each_way_to_hold_weights_has_its_bytes_and_a_time_for_each_round():
  config = ModelConfig(
    num_layers=2, d_model=128, num_heads=2, num_kv_heads=1, head_dim=64, num_experts=0, d_ff=256
  )
  found = rollout_bench.time_rollouts(LanguageModel(config, 64, nnx.Rngs(0)), 2, 4, 3, rounds=3)
  assert found.keys() == rollout_bench.numerics().keys()
  assert all(len(own["seconds"]) == 3 and min(own["seconds"]) > 0 for own in found.values())
  size = {name: own["weight_bytes"] for name, own in found.items()}
  # 2 layers of qkv, out, w13 and w2, in bf16, E4M3 with a float32 for 128 x 128, E2M1 with a byte
  # for 32.
  values = 2 * 128 * (256 + 128 + 512 + 256)
  assert size["bf16"] == size["w4a4"]
  assert size["bf16"] - size["w8a16 packed"] == values * 2 - (values + values // 128**2 * 4)
  assert size["bf16"] - size["w4a16 packed"] == values * 2 - values * 17 // 32
  assert size["w4a16 packed"] == size["w4a16 packed, XLA"] == size["w4a4 packed"]
