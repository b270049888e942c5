"""What a run needs while it trains, whatever it trains: its logs, its checkpoints, its way to stop.

with RunSession(run, config, LOGS, asked_to_stop, group) as session:
  start, state = session.restore(abstract_state, init)
  for step in range(start, config.steps):
    state, loss = ...
    stop = session.stop()
    session.write("metrics", step + 1, {"split": "train", "loss": loss})
    session.end_step(step + 1, state, stop)
  session.finish(config.steps, diverged=False)
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from experiments import logs
from experiments.checkpoints import Checkpoints
from experiments.comparison import Comparison
from experiments.processes import Group
from experiments.workdir import Run


class Interrupted(Exception):
  """Signal `number` asked the run to stop, and it has saved if it saves at all."""

  def __init__(self, message: str, number: int):
    super().__init__(message)
    self.number = number


class RunSession:
  """One run from its newest checkpoint on, in all processes of `group`, of which the first writes.

  `log_names` are its files of rows. Rows behind the checkpoint from which it resumes are from a
  process that died, and are cut off. `asked_to_stop` tells the number of the signal that did; all
  processes stop after the step in which one of them was asked. Every method but `write` and
  `scalars` is called by all processes.
  """

  def __init__(
    self,
    run: Run,
    config: Comparison,
    log_names: Sequence[str],
    asked_to_stop: Callable[[], int | None],
    group: Group,
  ):
    self._run, self._config, self._names = run, config, log_names
    self._asked_to_stop, self._group = asked_to_stop, group
    self._stack = contextlib.ExitStack()
    self._saved: int | None = None  # the step of the newest checkpoint

  def __enter__(self) -> "RunSession":
    if stop := self.stop():
      raise Interrupted(
        f"stopped before {self._run.name}; the same command goes on from there", stop
      )
    folder, kept = self._run.folder / "checkpoints", self._config.checkpoints_kept
    self._checkpoints = self._closing(Checkpoints(folder, kept, self._group))
    return self

  def __exit__(self, *raised: Any) -> bool | None:
    return self._stack.__exit__(*raised)

  def restore(
    self, abstract_state: Callable[[int], Any], init: Callable[[], Any]
  ) -> tuple[int, Any]:
    """(steps done, state) of the newest checkpoint, without one (0, init()), and opens the logs.

    `abstract_state` tells what the state looks like after that many steps. Raises ValueError for a
    run that has finished but has no checkpoint to go on from.
    """
    restored = self._checkpoints.restore_latest(abstract_state)
    if restored is None:
      if (step := self._run.finished_at()) is not None:
        raise ValueError(
          f"{self._run.folder} has no checkpoint of its last step, {step}, to go on from; "
          "remove the folder to train that run from its first"
        )
      start, state, offsets = 0, init(), dict.fromkeys(self._names, 0)
    else:
      start, state, metadata = restored
      self._saved, offsets = start, metadata["offsets"]
      logging.info("%s resumes from its checkpoint of step %d", self._run.name, start)
    if self._group.index == 0:
      offsets = {name: offsets[name] for name in self._names}
      self._logs = {n: self._closing(log) for n, log in self._run.open_logs(offsets).items()}
      purge = None if restored is None else start + 1
      self._board = self._closing(logs.TensorBoard(self._run.folder / "tensorboard", purge))
    else:
      self._logs, self._board = dict.fromkeys(self._names, logs.Nowhere()), logs.Nowhere()
    return start, state

  def write(self, log: str, step: int, row: Mapping[str, Any]) -> None:
    """Adds a row, which tells whose it is, to a log."""
    label = {"recipe": self._run.recipe, "seed": self._run.seed, "step": step}
    self._logs[log].write(label | dict(row))

  def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
    """For TensorBoard; without what is not known."""
    self._board.write(step, {name: v for name, v in values.items() if v is not None})

  def stop(self) -> int | None:
    """The number of the signal that a process was sent, the same in all."""
    return next(filter(None, self._group.gather(self._asked_to_stop())), None)

  def end_step(self, step: int, state: Any, stop: int | None) -> None:
    """Saves where it is due; raises Interrupted if `stop`, unless that was the last step."""
    every, last = self._config.checkpoint_every, step == self._config.steps
    if last or stop or (every and step % every == 0):
      self.save(step, state)
    if stop and not last:
      raise Interrupted(
        f"{self._run.name} saved its state after step {step} and stopped; "
        "the same command goes on from there"
        if every
        else f"{self._run.name} stopped after step {step} without a checkpoint; "
        "the same command begins it again",
        stop,
      )

  def save(self, step: int, state: Any) -> None:
    """Puts the rows on the disk and, unless checkpoints are never made, the state."""
    lengths = {name: log.sync() for name, log in self._logs.items()}
    if self._config.checkpoint_every and self._saved != step:
      self._checkpoints.save(step, state, {"offsets": lengths})
      self._saved = step

  def finish(self, step: int, diverged: bool) -> None:
    """Ends the run at that step: waits for what is still being saved, then says so on the disk."""
    self._stack.close()
    if self._group.index == 0:
      self._run.finish(step, diverged)
    self._group.gather(None)  # none begins the next run, or a report, before

  def _closing(self, resource: Any) -> Any:
    return self._stack.enter_context(contextlib.closing(resource))
