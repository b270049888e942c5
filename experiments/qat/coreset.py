"""Adaptive coreset selection (ACS, arXiv 2306.07215): the student trains on what it errs on most.

Every `reselect` epochs each window of the pool gets two scores, means over its tokens,

    EVS = |p_S - onehot(y)|     the error vector: how far the student is from the next token
    DS  = |p_S - p_T|           the disagreement with the teacher

(Euclidean norms, from 0 to sqrt(2)), which the epoch t of E weighs as c EVS + (1 - c) DS with
c = cos(pi t / 2 E), as the paper says; its code has (1 + cos(pi t / E)) / 2. The windows with the
largest are the coreset until the next selection. The paper selects images, as many of each class;
text has no classes.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from experiments.qat.blocks import Params
from experiments.qat.policies import TEACHER
from fp4jax.models import LanguageModel, Policy


def token_scores(
  teacher: Float[Array, "*t vocab"], student: Float[Array, "*t vocab"], targets: Int[Array, "*t"]
) -> tuple[Float32[Array, "*t"], Float32[Array, "*t"]]:
  """EVS and DS of each token, from logits."""
  of_teacher, of_student = (
    jax.nn.softmax(logits.astype(jnp.float32), axis=-1) for logits in (teacher, student)
  )
  is_next = targets[..., None] == jnp.arange(student.shape[-1])
  norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=-1))  # noqa: E731
  return norm(of_student - is_next), norm(of_student - of_teacher)


def error_vector_share(epoch: int, epochs: int) -> float:
  """c above: 1 in the first epoch, falling towards 0."""
  return math.cos(math.pi / 2 * epoch / epochs)


def select(scores: np.ndarray, count: int) -> np.ndarray:
  """The places of the `count` largest scores, in rising order; of equals those in front."""
  return np.sort(np.argsort(-scores, kind="stable")[:count])


def window_scores(
  model: LanguageModel,
  policy: Policy,
  params: Params,
  pool: np.ndarray,
  batch: int,
  share: float,
) -> np.ndarray:
  """c EVS + (1 - c) DS of each window (n, t + 1), with c = `share`."""
  graph, teacher = nnx.split(model)
  found = [
    _scores(graph, policy, params, teacher, pool[start : start + batch])
    for start in range(0, len(pool), batch)
  ]
  of_errors, of_teacher = (
    np.concatenate(part) for part in zip(*jax.device_get(found), strict=True)
  )
  return share * of_errors + (1 - share) * of_teacher


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(graph, policy, params, teacher, tokens: Int32[Array, "b t1"]):
  read, targets = tokens[:, :-1], tokens[:, 1:]
  of_teacher, _ = nnx.merge(graph, teacher)(read, TEACHER)
  of_student, _ = nnx.merge(graph, params)(read, policy)
  return tuple(jnp.mean(s, axis=1) for s in token_scores(of_teacher, of_student, targets))


def epochs_of(
  pool: np.ndarray,
  score: Callable[[float], np.ndarray],
  fraction: float,
  epochs: int,
  reselect: int,
  batch: int,
  rng: np.random.Generator,
) -> Iterator[np.ndarray]:
  """Batches of windows, epoch after epoch: all of the coreset, in an order of each epoch's own.

  `score(share)` gives the scores of the pool as the student then is.

  Raises:
    ValueError: a coreset smaller than a batch.
  """
  count = round(fraction * len(pool))
  if not batch <= count <= len(pool):
    raise ValueError(
      f"a coreset of {fraction=} of {len(pool)} windows has {count}, which is no batch of {batch}"
    )
  for epoch in range(epochs):
    if epoch % reselect == 0:
      chosen = select(score(error_vector_share(epoch, epochs)), count)
    order = rng.permutation(chosen)
    for start in range(0, count - batch + 1, batch):
      yield pool[order[start : start + batch]]
