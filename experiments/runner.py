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

  `make_progress` is told the steps of all runs, 0 in a process that writes nothing. The report is
  written after a failure or a signal, too. Every process calls this.
  """
  folder.agree(group, environment)
  first = group.index == 0
  with folder.begin(environment) if first else contextlib.nullcontext():
    unfinished = group.gather([this.name for this in folder.unfinished()] if first else None)[0]
    runs = [this for this in folder.runs if this.name in unfinished]
    progress = make_progress(len(runs) * folder.steps * first)
    try:
      with stop.after_step(), contextlib.closing(progress):
        for this in runs:
          train(this, progress)
    except BaseException:
      # After a full disk, say: what went wrong first is what counts.
      with contextlib.suppress(OSError, ValueError):
        if first:
          report()
      raise
    if first:
      print(f"report: {report()}")
