"""A small policy and its settings, for the tests of reinforcement learning."""

import dataclasses
import random

from flax import nnx

from experiments.config import Names
from experiments.rl.arms import arm_of
from experiments.rl.config import RLExperiment
from experiments.rl.grpo import GRPOSettings
from experiments.rl.learner import Learner
from experiments.rl.start import source_of
from experiments.tasks import Problem, Problems, TaskSettings, load_task
from fp4jax.models import LanguageModel, ModelConfig

SMALL = ModelConfig(
  num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, head_dim=32, num_experts=4, d_ff=32
)


def letters(i: int) -> Problem:
  """Worth what share of the answer's first three bytes are letters below n."""
  word = "".join(random.Random(i).choices("abcdef", k=random.Random(i + 1).randrange(2, 6)))
  return Problem(f"{i % 100} {word}", word[0], lambda text: sum(c < "n" for c in text[:3]) / 3)


def small_rl(**changes) -> RLExperiment:
  """Settings of seconds; a name with a dot changes a group's."""
  config = RLExperiment(arms=Names(("bf16", "mxfp4")), steps=4, model=SMALL)
  config.task = TaskSettings("rl_cases:letters", held_out=8)
  config.rollout = dataclasses.replace(
    config.rollout, prompts=3, group=4, max_prompt_tokens=10, max_new_tokens=5
  )
  config.optimizer.learning_rate = 1e-3
  for path, value in changes.items():
    *parents, name = path.split(".")
    node = config
    for parent in parents:
      node = getattr(node, parent)
    setattr(node, name, value)
  return config


def learner_of(config: RLExperiment, arm: str = "bf16"):
  """A learner and the params that it begins with."""
  source = source_of(config)
  model = nnx.eval_shape(lambda: LanguageModel(source.model, 256, nnx.Rngs(0)))
  problems = Problems(load_task(config.task), config.task.held_out)
  arm = arm_of(arm, config.fallback_alpha)
  return Learner(config, arm, model, source.text, problems), source.params()


__all__ = ["SMALL", "GRPOSettings", "learner_of", "letters", "small_rl"]
