"""AdamW behind a clip of the global norm."""

from typing import Any

import jax
import optax

from experiments.config import Optimizer


def adamw(config: Optimizer, schedule: optax.Schedule, steps: int) -> optax.GradientTransformation:
  """Clipped AdamW that decays matrices only."""
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


def decayed(params: Any) -> Any:
  """True for each tensor that weight decay shrinks: those whose name begins with w."""
  return jax.tree_util.tree_map_with_path(lambda path, _: str(path[-1].key).startswith("w"), params)
