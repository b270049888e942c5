"""How far the gradients of every recipe are from BF16's, at one state of a BF16 run.

    python -m experiments.gradient_error --config=configs/moe_1b.py --after=300 \
        --out=results/moe_1b_gradients.jsonl

Trains in BF16, then takes the gradients of the same batches under each recipe from those weights.
Errors that differ from batch to batch average out of the mean gradient, as they do over the steps
of a run; what they have in common does not. `projection` is of a gradient on BF16's, 1 for errors
that neither shrink nor stretch it.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jaxtyping import Array, Float32

from experiments import command_line, data, logs
from experiments.config import Experiment, validate
from experiments.environment import COMMIT, describe_environment
from experiments.train import Trainer, TrainState, make_trainer, policy_of
from fp4jax import recipes

_CONFIG = command_line.define_config()
_AFTER = flags.DEFINE_integer("after", 300, "Steps in BF16 before.", lower_bound=0)
_BATCHES = flags.DEFINE_integer("batches", 6, "Batches of the mean gradient.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)


def measure(config: Experiment, after: int, batches: int) -> Iterator[dict]:
  """A row for each recipe, tensor, and number of batches: one, and all."""
  corpus = data.load_corpus(config.data)
  train, seed = data.batches(corpus, config.data, 0, "train"), jnp.int32(0)

  def trainer_of(name):
    policy = policy_of(recipes.by_name(name), config.quantize, config.implementation)
    return make_trainer(config, corpus.vocab_size, policy)

  bf16 = trainer_of("bf16")
  state = bf16.init(seed)
  for step in range(after):
    state, _ = bf16.step(state, train[step], seed)
  tokens = [train[after + i] for i in range(batches)]
  expected = _first_and_mean(bf16, state, tokens)
  for name in config.recipes:
    if name == "bf16":
      continue
    found = _first_and_mean(trainer_of(name), state, tokens)
    for count, own, reference in zip((1, batches), found, expected, strict=True):
      for path, (error, projection) in compare(own, reference).items():
        yield {
          "kind": "gradient",
          "recipe": name,
          "tensor": path,
          "batches": count,
          "relative_error": error,
          "projection": projection,
        }


def _first_and_mean(trainer: Trainer, state: TrainState, tokens: list) -> tuple[Any, Any]:
  seed, add = jnp.int32(0), jax.jit(functools.partial(jax.tree.map, jnp.add))
  first = total = trainer.gradients(state, tokens[0], seed)
  for batch in tokens[1:]:
    total = add(total, trainer.gradients(state, batch, seed))
  return first, jax.tree.map(lambda x: x / len(tokens), total)


@jax.jit
def _distance(own: Float32[Array, "*s"], reference: Float32[Array, "*s"]):
  """Relative error, and the projection on the reference."""
  difference, square = own - reference, jnp.vdot(reference, reference)
  return jnp.sqrt(jnp.vdot(difference, difference) / square), jnp.vdot(own, reference) / square


def compare(own: Any, reference: Any) -> dict[str, tuple[float, float]]:
  """Relative error and projection of each tensor, by path; a model's layers are one tensor."""
  leaves = jax.tree_util.tree_leaves_with_path(own)
  return {
    "/".join(str(part.key) for part in path): tuple(map(float, _distance(leaf, other)))
    for (path, leaf), other in zip(leaves, jax.tree.leaves(reference), strict=True)
  }


def main(_) -> None:
  config = _CONFIG.value
  validate(config)
  log = logs.JsonLines(_OUT.value)  # refuses a place that can't be written; rows there stay
  environment = {"kind": "environment"} | describe_environment(COMMIT.value)
  for i, row in enumerate(measure(config, _AFTER.value, _BATCHES.value)):
    if i == 0:
      log.close()
      log = logs.JsonLines(_OUT.value, 0)
      log.write(environment | {"after": _AFTER.value})
    log.write(row)
    print(
      f"{row['recipe']:12s} {row['batches']} {row['tensor']:32s} "
      f"error {row['relative_error']:.4f}, projection {row['projection']:.4f}"
    )
  log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
