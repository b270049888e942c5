"""A row for each case: what it is, how good the student is, what that took."""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from experiments.apart import alone
from experiments.qat.evaluate import accuracy, nats_per_token
from experiments.qat.methods import Case, make
from experiments.qat.settings import Settings
from experiments.qat.source import Source, load_source
from fp4jax.formats import FORMATS

Row = dict[str, Any]


def measure(source: Source, case: Case) -> Row:
  """All of a row but where it ran. `bits_per_value` is of the weights."""
  s, began = source.settings, time.perf_counter()
  student, facts = make(source, case)
  made = time.perf_counter()
  nats = nats_per_token(student, source.held_out, s.window_batch)
  pattern = s.task_pattern or None
  share, error = accuracy(student, source.problems, source.text, s.max_new_tokens, pattern)
  fmt = FORMATS.get(case.format)
  return {
    "kind": "qat",
    "method": case.method,
    "format": case.format,
    "operands": case.operands,
    "weights": case.format,
    "activations": case.format if case.activations else "bf16",
    "bits_per_value": 16.0 if fmt is None else fmt.bits_per_value,
    "perplexity": math.exp(nats),
    "nats_per_token": nats,
    "accuracy": share,
    "accuracy_error": error,
    "tokens_trained": 0,
    "seconds": made - began,
    "evaluation_seconds": time.perf_counter() - made,
    **facts,
    **source.describe(),
    "settings": dataclasses.asdict(s),
  }


def measure_apart(settings: Settings, case: Case) -> Row:
  """`measure` in a process of its own, from which no other case's compiling is seen."""
  return alone(_load_and_measure, settings, case)


def _load_and_measure(settings, case):
  return measure(load_source(settings), case)


def measure_all(
  measure_one: Callable[[Case], Row], cases: Iterable[Case], workers: int
) -> Iterator[Row]:
  """As they are done, `workers` at a time: while one compiles, another computes. Where a case
  fails, those that are done nonetheless come before its error."""
  if workers == 1:
    yield from map(measure_one, cases)
    return
  failed = None
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    running = [pool.submit(measure_one, case) for case in cases]
    try:
      for one in concurrent.futures.as_completed(running):
        if one.cancelled():
          continue
        if one.exception() is None:
          yield one.result()
          continue
        failed = failed or one.exception()
        _cancel(running)
    finally:
      _cancel(running)
  if failed is not None:
    raise failed


def _cancel(running: Iterable[concurrent.futures.Future]) -> None:
  """What has not begun. Not by the pool's own shutdown, after which as_completed waits for ever."""
  for one in running:
    one.cancel()


def missing(
  cases: Iterable[Case], rows: Iterable[Row], settings: Settings, environment: Row
) -> list[Case]:
  """The cases of which there is no row of these settings by this very code, in their order."""
  if environment["git_commit"] is None or environment["git_dirty"]:
    return list(cases)
  known = {name: environment[name] for name in ("git_commit", "git_dirty")}
  known["settings"] = dataclasses.asdict(settings)
  done = {
    (row["method"], row["format"], row["operands"])
    for row in rows
    if all(row.get(name) == value for name, value in known.items())
  }
  return [case for case in cases if tuple(case) not in done]
