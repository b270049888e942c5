"""GRPO on a small mixture of experts, in BF16, in MXFP4, and in MXFP4 with two corrections.

Claim: not measured yet.
Command: make rl-demo
"""

from experiments.comparison import Names
from experiments.rl.config import RLExperiment
from experiments.tasks import TaskSettings
from fp4jax.models import ModelConfig


def get_config() -> RLExperiment:
  config = RLExperiment(
    arms=Names(("bf16", "mxfp4", "mxfp4+of")),
    steps=60,
    eval_every=15,
    probe_every=15,
    checkpoint_every=30,
    task=TaskSettings("spell_backward", "min_word_len=3,max_word_len=4", held_out=64),
    model=ModelConfig(
      num_layers=4,
      d_model=128,
      num_heads=4,
      num_kv_heads=2,
      head_dim=32,
      num_experts=8,
      top_k=2,
      d_ff=64,
    ),
  )
  config.start.teaching.steps = 110
  config.rollout.prompts = 16
  config.rollout.max_prompt_tokens = 56
  config.rollout.max_new_tokens = 6
  config.optimizer.learning_rate = 2e-4
  return config
