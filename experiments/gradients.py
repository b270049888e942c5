"""How far gradients are from those of BF16: the comparison behind `gradient_error`."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from experiments import data
from experiments.config import Experiment
from experiments.mesh import make_mesh
from experiments.train import make_trainer, policy_of
from fp4jax import recipes


def measure(config: Experiment, under: str, after: int, batches: int) -> Iterator[dict]:
  """A row for each recipe, tensor, and number of batches, one or all, `after` steps `under` one."""
  corpus = data.load_corpus(config.data)
  train, seed = data.batches(corpus, config.data, 0, "train"), jnp.int32(0)

  def trainer_of(name):
    policy = policy_of(recipes.by_name(name), config)
    return make_trainer(config, corpus.vocab_size, policy, make_mesh(config))

  trainer = trainer_of(under)
  state = trainer.init(seed)
  for step in range(after):
    state, _ = trainer.step(state, train[step], seed)
  tokens = [train[after + i] for i in range(batches)]
  expected = _first_and_mean(trainer_of("bf16"), state, tokens)
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


def _first_and_mean(trainer, state, tokens):
  """The gradient of the first batch, and the mean over all."""
  state = trainer.adopt(state)
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
