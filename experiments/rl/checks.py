"""Which settings no run of reinforcement learning can have."""

from typing import get_args

from experiments.checks import Ranges, validate_comparison, validate_model, validate_optimizer
from experiments.rl import grpo
from experiments.rl.config import RLExperiment
from fp4jax.models import ModelConfig

_RANGES: Ranges = (
  (
    "at least 1",
    lambda x: x >= 1,
    "rollout.prompts rollout.max_prompt_tokens rollout.max_new_tokens start.teaching.batch_size"
    " task.held_out grpo.iterations grpo.minibatches grpo.max_rollouts",
  ),
  ("at least 2", lambda x: x >= 2, "rollout.group noise.stages"),  # the first stage has no noise
  (
    "at least 0",
    lambda x: x >= 0,
    "samples_kept start.seed start.teaching.steps start.teaching.warmup_steps"
    " rollout.eval_temperature grpo.beta grpo.overlong_buffer",
  ),
  (
    "above 0",
    lambda x: x > 0,
    "start.teaching.learning_rate fallback_alpha grpo.clip_high noise.start noise.end",
  ),
  ("None or above 0", lambda x: x > 0, "grpo.importance_cap"),
  ("above 0 and below 1", lambda x: 0 < x < 1, "grpo.clip_low"),
)


def validate(config: RLExperiment, model: ModelConfig) -> None:
  """Raises ValueError for settings that no run can have; `model` is that of the policy."""
  validate_comparison(config, _RANGES)
  for name in config.arms:
    config.arm(name)
  if config.grpo.mean not in get_args(grpo.Means):
    raise ValueError(
      f"grpo.mean={config.grpo.mean!r} is not one of {', '.join(get_args(grpo.Means))}"
    )
  validate_model(model, config.quantize, config.implementation)
  updates = config.steps * config.grpo.iterations * config.grpo.minibatches
  validate_optimizer(config.optimizer, updates, "steps * grpo.iterations * grpo.minibatches")
  answers, parts = config.rollout.prompts * config.rollout.group, config.grpo.minibatches
  if answers % parts:
    raise ValueError(
      f"rollout.prompts * rollout.group={answers} answers do not divide into"
      f" grpo.minibatches={parts}"
    )
  if config.grpo.overlong_buffer > config.rollout.max_new_tokens:
    raise ValueError(
      f"grpo.overlong_buffer={config.grpo.overlong_buffer} is more than"
      f" rollout.max_new_tokens={config.rollout.max_new_tokens}"
    )
  teaching = config.start.teaching
  if teaching.steps and teaching.warmup_steps >= teaching.steps:
    raise ValueError(
      f"start.teaching.warmup_steps={teaching.warmup_steps} is not below"
      f" start.teaching.steps={teaching.steps}"
    )
  if config.rollout.replay_routing and not model.num_experts:
    raise ValueError("rollout.replay_routing=true of a policy without experts")
