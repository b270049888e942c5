"""All runs of an experiment of reinforcement learning that its workdir still lacks."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
from flax import nnx

from experiments import logs, runner
from experiments.environment import describe_environment
from experiments.processes import Group
from experiments.rl.arms import Arm
from experiments.rl.checks import validate
from experiments.rl.config import RLExperiment
from experiments.rl.learner import Learner, Programs
from experiments.rl.loop import train_run
from experiments.rl.report import write_report
from experiments.rl.rollouts import check_prompts
from experiments.rl.start import Source, source_of, start_params
from experiments.rl.summary import write_summary
from experiments.session import Interrupted
from experiments.stop_signals import StopSignals
from experiments.tasks import Problems, load_task
from experiments.workdir import Run, WorkDir
from fp4jax.implementation import choose, device_obstacle
from fp4jax.models import LanguageModel

POLICY = "policy"  # of a workdir, what its runs begin with


@dataclasses.dataclass(frozen=True)
class Setting:
  """What all arms of an experiment share."""

  source: Source
  problems: Problems
  model: LanguageModel  # shapes alone
  programs: dict[str, Programs] = dataclasses.field(default_factory=dict)  # by config, as JSON

  @classmethod
  def of(cls, config: RLExperiment) -> "Setting":
    """Raises ValueError or OSError for what can't be read or no run can have."""
    source = source_of(config)
    validate(config, source.model)
    problems = Problems(load_task(config.task), config.task.held_out)
    check_prompts(problems, source.text, config)
    make = lambda: LanguageModel(source.model, source.text.vocab_size, nnx.Rngs(0))  # noqa: E731
    return cls(source, problems, nnx.eval_shape(make))

  def learner(self, config: RLExperiment, arm: str | Arm) -> Learner:
    key = json.dumps(config.to_dict(), sort_keys=True)
    if key not in self.programs:
      self.programs[key] = Programs(config, self.model, self.source.text)
    text, programs = self.source.text, self.programs[key]
    arm = arm if isinstance(arm, Arm) else config.arm(arm)
    return Learner(config, arm, self.model, text, self.problems, programs)


def run(
  config: RLExperiment,
  workdir: str | Path,
  stop: StopSignals | None = None,
  commit: str | None = None,
  group: Group | None = None,
) -> None:
  """Trains whatever of `config` is not yet in `workdir`, then writes its report.

  The policy that all runs begin with is taught first, if it is to be, and kept in the workdir.
  """
  stop, group = stop or StopSignals(), group or Group()
  if group.count > 1:
    raise ValueError(f"reinforcement learning runs in one process, not in {group.count}")
  choose(config.implementation, device_obstacle())
  setting = Setting.of(config)
  folder = WorkDir(workdir, config)
  environment = describe_environment(commit) | {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(setting.model))),
    "start": {"sha256": setting.source.sha256, "tokens": setting.source.text.vocab_size},
    "problems": {"sha256": setting.problems.sha256},
  }
  answers = config.rollout.prompts * config.rollout.group
  learners = functools.cache(lambda arm: setting.learner(config, arm))

  @functools.cache
  def start() -> Any:
    with _alone(folder.path / f".{POLICY}.lock", stop):
      return _start(folder.path / POLICY, config, setting, stop)

  shapes = jax.eval_shape(setting.source.params)
  for arm in folder.new_arms:  # before anything is written, or taught
    learners(arm).check(shapes)

  def train(this: Run, progress: logs.Progress) -> None:
    train_run(this, config, learners(this.recipe), start(), progress, lambda: stop.number)

  runner.train_unfinished(
    folder,
    environment,
    train,
    report=lambda: _report(folder),
    make_progress=lambda steps: logs.Progress(steps, answers, unit="answers", shown="reward"),
    stop=stop,
    group=group,
  )


@contextlib.contextmanager
def _alone(path: Path, stop: StopSignals) -> Iterator[None]:
  """Waits until no other process teaches the policy."""
  lock = filelock.FileLock(path)
  while not lock.is_locked:
    try:
      lock.acquire(timeout=1)
    except filelock.Timeout:
      if stop.number:
        raise Interrupted("stopped while another process taught the policy", stop.number) from None
  with contextlib.ExitStack() as stack:
    stack.callback(lock.release)
    yield


def _start(folder: Path, config: RLExperiment, setting: Setting, stop: StopSignals) -> Any:
  teaching = config.start.teaching
  with contextlib.closing(
    logs.Progress(teaching.steps, teaching.batch_size, unit="problems")
  ) as bar:
    bar.start("teaching", teaching.steps)

    def tell(step: int, loss: float) -> None:
      bar.update(step, loss)
      if stop.number:
        raise Interrupted("stopped while the policy was taught; that begins again", stop.number)

    return start_params(folder, config, setting.source, setting.problems, tell)


def _report(folder: WorkDir) -> Path:
  write_summary(folder.path)
  return write_report(folder.path)
