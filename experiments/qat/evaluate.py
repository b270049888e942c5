"""How good a language model is: perplexity of text, and problems that it solves."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.rl.rollouts import padded_prompts
from experiments.tasks import Problem, answer_in
from experiments.text import Text
from fp4jax.models import LanguageModel, Policy, generate
from fp4jax.models.language_model import States


class Student(NamedTuple):
  """A model with the numerics that it runs under."""

  model: LanguageModel
  policy: Policy
  states: States | None = None  # of quantizers that have one


def nats_per_token(student: Student, windows: np.ndarray, batch: int) -> float:
  """Mean cross-entropy of the tokens of each window (n, t + 1) but its first.

  `batch` windows at a time; under formats with a scale of the whole tensor their activations share
  it.
  """
  graph, params = nnx.split(student.model)
  total = 0.0
  for start in range(0, len(windows), batch):
    found = _entropies(
      graph, student.policy, params, student.states, windows[start : start + batch]
    )
    total += float(np.sum(np.asarray(found, np.float64)))
  return total / (len(windows) * (windows.shape[1] - 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _entropies(graph, policy, params, states, tokens):
  model = nnx.merge(graph, params)
  found, _ = model.cross_entropy(tokens[:, :-1], tokens[:, 1:], policy, states=states)
  return jnp.sum(found, axis=1)


def answers(
  student: Student, questions: Sequence[str], text: Text, max_new_tokens: int
) -> list[str]:
  """The likeliest tokens after each question, all questions in one batch."""
  width = max(len(text.prompt(question)) for question in questions)
  prompts, lengths = padded_prompts(questions, text, width)
  found = generate(
    student.model,
    prompts,
    lengths,
    student.policy,
    key=jax.random.key(0),
    max_new_tokens=max_new_tokens,
    temperature=0,
    stop_tokens=(text.stop_token,),
    pad_token=text.pad_token,
    states=student.states,
  )
  tokens, ends = jax.device_get((found.tokens, found.lengths))
  return [text.decode(row[:n].tolist()) for row, n in zip(tokens, ends, strict=True)]


def accuracy(
  student: Student,
  problems: Sequence[Problem],
  text: Text,
  max_new_tokens: int,
  pattern: str | None,
) -> tuple[float, float]:
  """The share of problems with full reward, and its standard error, sqrt(p (1 - p) / n)."""
  given = answers(student, [p.question for p in problems], text, max_new_tokens)
  solved = [p.reward(answer_in(a, pattern)) == 1 for p, a in zip(problems, given, strict=True)]
  share = sum(solved) / len(solved)
  return share, math.sqrt(share * (1 - share) / len(solved))
