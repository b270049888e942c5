"""Problems whose answers can be checked: what a policy is rewarded for.

A task is a function of a number, so that the same number gives the same problem. One of your own:

    import random
    from experiments.tasks import Problem

    def doubling(i: int) -> Problem:
      n = random.Random(i).randrange(1000)
      return Problem(f"What is {n} and {n}?", str(2 * n))

in a file that Python can import, named with it: `--config.task.name=my_tasks:doubling`. A name
without a colon is a generator of reasoning-gym, such as `chain_sum`, whose settings are
`--config.task.options=min_terms=2,max_terms=2,max_digits=2`.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib
import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_TRIES = 1000  # of a training problem that must not be a held-out one
_TAUGHT = 1  # of the numbers that draw problems: what is taught is not what seed 0 meets later


class Problem(NamedTuple):
  """A question with its answer; `score` says what another answer is worth, from 0 to 1."""

  question: str
  answer: str
  score: Callable[[str], float] | None = None  # None: 1 for the answer itself, 0 for others
  example: str | None = None  # of an answer's form, for who is taught no more; None: the answer

  def reward(self, answer: str) -> float:
    return float(answer == self.answer) if self.score is None else float(self.score(answer))


Task = Callable[[int], Problem]


@dataclasses.dataclass
class TaskSettings:
  """Which problems a policy meets, and where in what it says the answer stands."""

  name: str = "spell_backward"  # of reasoning-gym, or module:function
  options: str = ""  # of reasoning-gym's generator, `max_terms=2,max_digits=1`
  pattern: str | None = None  # the last match of this regular expression; None: all, stripped
  held_out: int = 64  # problems that are never trained on


def load_task(settings: TaskSettings) -> Task:
  """Raises ValueError for a name, or an option, that there is not, or a pattern that is none."""
  try:
    re.compile(settings.pattern or "")
  except re.error as error:
    raise ValueError(f"task.pattern={settings.pattern!r}: {error}") from error
  if ":" in settings.name:
    if settings.options:
      raise ValueError(f"task.options={settings.options!r} are for tasks of reasoning-gym alone")
    return _own_task(settings.name)
  return _reasoning_gym(settings.name, _options(settings.options))


def answer_in(text: str, pattern: str | None) -> str:
  """The last match of `pattern`, of its first group if it has one; "" where nothing matches."""
  if pattern is None:
    return text.strip()
  *_, last = [None, *re.finditer(pattern, text)]
  found = None if last is None else last[min(1, last.re.groups)]
  return "" if found is None else found.strip()  # a group may take no part in a match


class Problems:
  """The problems of a task, of which some are held out: no other has the question of one of them.

  Raises:
    ValueError: the task does not have so many questions.
  """

  def __init__(self, task: Task, held_out: int):
    self._task = task
    found = {}
    for i in range(held_out + _TRIES):
      if len(found) == held_out:
        break
      problem = task(i)
      found.setdefault(problem.question, problem)
    if len(found) < held_out:
      raise ValueError(
        f"task.held_out={held_out} problems are more than the {len(found)} questions that its first"
        f" {held_out + _TRIES} numbers give"
      )
    self.held_out: tuple[Problem, ...] = tuple(found.values())
    self._questions = frozenset(found)

  @property
  def sha256(self) -> str:
    """Of all that the held-out ones say, for a task of one's own may change."""
    told = [[p.question, p.answer, p.example] for p in self.held_out]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()

  def train(self, seed: int, step: int, count: int, draw: int = 0) -> list[Problem]:
    """Of a training step, or of its draw of that number: they depend on nothing else."""
    return self._drawn([seed, step, draw], count)

  def taught(self, seed: int, step: int, count: int) -> list[Problem]:
    """Of a step of the supervised phase before."""
    return self._drawn([seed, step, 0, _TAUGHT], count)

  def _drawn(self, stream: Sequence[int], count: int) -> list[Problem]:
    rng = np.random.default_rng(stream)
    return [self._one(rng) for _ in range(count)]

  def _one(self, rng: np.random.Generator) -> Problem:
    for _ in range(_TRIES):
      problem = self._task(int(rng.integers(2**31)))
      if problem.question not in self._questions:
        return problem
    raise ValueError(
      f"task.held_out={len(self.held_out)} leaves no question to train on: {_TRIES} draws in a row"
      " met one of them"
    )


def _own_task(name: str) -> Task:
  module, _, function = name.partition(":")
  try:
    task = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(f"task.name={name!r}: {error}") from error
  if not (callable(task) and isinstance(task(0), Problem)):
    raise ValueError(f"task.name={name!r} is no function of a number that returns a Problem")
  return task


def _options(text: str) -> dict[str, object]:
  """`max_terms=2,operators=('+',)` as keywords are written in Python."""
  try:
    call = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
      raise ValueError("these are no keywords")
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
  except (SyntaxError, ValueError) as error:
    raise ValueError(
      f"task.options={text!r} is not a list such as max_terms=2,max_digits=1"
    ) from error


def _reasoning_gym(name: str, options: dict[str, object]) -> Task:
  try:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
  except ImportError as error:
    raise ValueError(
      f"task.name={name!r} is of reasoning-gym, which is not installed: pip install reasoning-gym"
    ) from error
  if name not in DATASETS:
    module, _, function = name.rpartition(".")
    own = f", and a function of your own is {module}:{function}" if module else ""
    raise ValueError(
      f"task.name={name!r} is no generator of reasoning-gym; it has {_near(name)}{own}"
    )
  try:
    dataset = reasoning_gym.create_dataset(name, seed=0, size=2**31 - 1, **options)
  except (AssertionError, TypeError, ValueError) as error:
    raise ValueError(f"task.options of {name}: {error}") from error

  def task(i: int) -> Problem:
    entry = dataset[i]
    score = functools.partial(dataset.score_answer, entry=entry)
    return Problem(entry["question"], entry["answer"], score)

  return task


def _near(name: str) -> str:
  from reasoning_gym.factory import DATASETS

  near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
  return ", ".join(near or sorted(DATASETS))
