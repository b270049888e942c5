"""AdamW behind a clip of the global norm."""

import optax
from jaxtyping import PyTree

from experiments.config import Optimizer
from experiments.optimizers.norms import Norm, clip_by_norm


def adamw(
  config: Optimizer, schedule: optax.Schedule, steps: int, decayed: PyTree[bool], norm: Norm
) -> optax.GradientTransformation:
  """Clipped AdamW."""
  del steps
  return optax.chain(
    clip_by_norm(config.clip_norm, norm),
    optax.adamw(
      schedule,
      b1=config.b1,
      b2=config.b2,
      weight_decay=config.weight_decay,
      mask=decayed,
    ),
  )
