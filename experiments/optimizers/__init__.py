"""Optimizers by name, `--config.optimizer.name=stable_spam`.

Each is a function of the settings, the learning rate of each step, the number of steps, which
parameters weight decay shrinks, and how the norm of all gradients is taken. It may use elementwise
operations and reductions over single tensors alone: these work under any sharding.
"""

import optax
from jaxtyping import PyTree

from experiments.config import Optimizer
from experiments.optimizers.adamw import adamw
from experiments.optimizers.norms import Norm
from experiments.optimizers.stable_spam import stable_spam

OPTIMIZERS = {"adamw": adamw, "stable_spam": stable_spam}


def check_name(config: Optimizer) -> None:
  """Raises ValueError for a name that there is not."""
  if config.name not in OPTIMIZERS:
    raise ValueError(f"optimizer.name={config.name!r} is not one of {', '.join(OPTIMIZERS)}")


def make_optimizer(
  config: Optimizer, steps: int, decayed: PyTree[bool], norm: Norm = optax.tree.norm
) -> optax.GradientTransformation:
  check_name(config)
  return OPTIMIZERS[config.name](config, learning_rate(config, steps), steps, decayed, norm)


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
  """Of the step that follows `count` steps: the last of the warmup has the peak, the last of all
  the final fraction, and no step has 0."""
  if config.warmup_steps:
    rate = optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=config.learning_rate,
      warmup_steps=config.warmup_steps,
      decay_steps=steps,
      end_value=config.final_fraction * config.learning_rate,
    )
  else:  # a warmup of 0 steps is told of at every call
    rate = optax.cosine_decay_schedule(config.learning_rate, steps, config.final_fraction)
  return lambda count: rate(count + 1)
