"""AdamW behind a clip of the global norm."""

import optax
from jaxtyping import PyTree

from experiments.config import Optimizer


def adamw(
  config: Optimizer, schedule: optax.Schedule, steps: int, decayed: PyTree[bool]
) -> optax.GradientTransformation:
  """Clipped AdamW."""
  del steps
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule,
      b1=config.b1,
      b2=config.b2,
      weight_decay=config.weight_decay,
      mask=decayed,
    ),
  )
