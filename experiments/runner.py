"""What commands that train have in common: processes meet, train what is left, report and end."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from experiments import logs, processes
from experiments.comparison import Distributed
from experiments.processes import Group
from experiments.session import Interrupted
from experiments.stop_signals import StopSignals
from experiments.workdir import Run, WorkDir


def main(settings: Distributed, run: Callable[[Group], None]) -> NoReturn:
  """Runs `run` in the processes of `settings`; a signal's status is 128 + its number."""
  status = 0
  with processes.joined(settings, os.environ) as group:
    try:
      run(group)
    except Interrupted as stopped:
      print(f"\n{stopped}", file=sys.stderr)
      status = 128 + stopped.number
  sys.exit(status)


def train_unfinished(
  folder: WorkDir,
  environment: dict[str, Any],
  train: Callable[[Run, logs.Progress], None],
  report: Callable[[], Path],
  make_progress: Callable[[int], logs.Progress],
  stop: StopSignals,
  group: Group,
) -> None:
  """Trains what is not yet in `folder`, one run after the other, then reports.

  Runs that another process trains, started by itself with the same command, are left to it: so
  several devices share a folder, each with a process of its own. `make_progress` is told the steps
  of all runs, 0 in a process that writes nothing. The report is written after a failure or a
  signal, too. Every process of `group` calls this.

  Raises:
    ValueError: other processes train all that is left.
  """
  folder.agree(group, environment)
  first = group.index == 0
  if first:
    folder.begin(environment)
  unfinished = group.gather([this.name for this in folder.unfinished()] if first else None)[0]
  runs = [this for this in folder.runs if this.name in unfinished]
  progress, left = make_progress(len(runs) * folder.steps * first), []
  try:
    with stop.after_step(), contextlib.closing(progress):
      for this in runs:
        with folder.claimed(this) if first else contextlib.nullcontext() as mine:
          todo = mine and not this.is_finished(folder.steps)  # as it may be by now
          if group.gather(todo)[0]:
            train(this, progress)
          else:
            progress.skip(folder.steps)
            left += [] if mine else [this.name]
  except BaseException:
    # After a full disk, say: what went wrong first is what counts.
    with contextlib.suppress(OSError, ValueError):
      if first:
        report()
    raise
  if first:
    others = f"another process trains {', '.join(left)} in {folder.path}"
    if left and len(left) == len(runs):
      raise ValueError(f"{others}; wait until it ends")
    print(f"report: {report()}" + (f" (so far: {others})" if left else ""))
