"""The folder of one experiment: what belongs to it, and how far it has come.

config.json  recipes.json  environment.json  summary.json  report.html
runs/<recipe>-<seed>/  metrics.jsonl  probes.jsonl  timing.jsonl  checkpoints/  tensorboard/
                       finished.json

Reinforcement learning adds policy/, and samples.jsonl of each run.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
from absl import logging

from experiments import logs
from experiments.comparison import Comparison, from_dict
from experiments.config import Experiment
from experiments.processes import Group

Offsets = Mapping[str, int]  # bytes of each log


@dataclasses.dataclass(frozen=True)
class Run:
  """One arm with one seed."""

  recipe: str  # the arm's name, as rows tell it
  seed: int
  folder: Path

  @property
  def name(self) -> str:
    return f"{self.recipe}-{self.seed}"

  def finished_at(self) -> int | None:
    """The step at which this run ended or diverged; None while it has not."""
    found = logs.read_json(self.folder / "finished.json")
    return found and found["step"]

  def is_finished(self, steps: int) -> bool:
    found = logs.read_json(self.folder / "finished.json")
    if found is not None and not (self.folder / "metrics.jsonl").exists():
      raise ValueError(
        f"{self.folder} is finished, but its metrics.jsonl is gone: remove the folder, and the run"
        " is trained again"
      )
    return found is not None and (found["diverged"] or found["step"] >= steps)

  def finish(self, step: int, diverged: bool) -> None:
    logs.write_json(self.folder / "finished.json", {"step": step, "diverged": diverged})

  def open_logs(self, offsets: Offsets) -> dict[str, logs.JsonLines]:
    return {name: logs.JsonLines(self.folder / f"{name}.jsonl", at) for name, at in offsets.items()}


class WorkDir:
  """Opened by the config, with the arms and on the data that it began with, or by one that asks for
  more: other arms, more seeds, more steps where the first steps stay the same.

  A workdir from before recipes.json is opened with a warning: its arms are taken to be unchanged.
  """

  def __init__(self, path: str | Path, config: Comparison):
    """Raises ValueError if the folder belongs to another experiment; writes nothing."""
    self.path = Path(path)
    self._config = config
    if self.path.exists() and not self.path.is_dir():
      raise ValueError(f"the workdir {path} is a file, not a folder")
    self.steps = config.steps
    self._definitions = config.definitions()
    found = self._check()
    known = (found and found[1]) or {}
    self.new_arms = [arm for arm in config.arm_names() if arm not in known]  # that none began yet
    self.runs = [
      Run(arm, seed, self.path / "runs" / f"{quote(arm, safe=_SAFE)}-{seed}")
      for seed in range(config.seeds)
      for arm in config.arm_names()
    ]

  def begin(self, environment: dict[str, Any]) -> None:
    """Writes what was configured and environment.json, or adds this session to that of the first.

    Raises:
      ValueError: something of `KEPT`, such as the corpus, is not what the runs began with.
    """
    self.path.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(self.path / ".lock"):
      found = self._check()  # the process before this one may have written since
      if found is None:
        found = self._config.to_dict(), {}, {}
      config, definitions, first = found
      logs.write_json(self.path / "environment.json", self._joined(first, environment))
      logs.write_json(self.path / "recipes.json", definitions | self._definitions)
      logs.write_json(self.path / "config.json", self._grown(config))

  @contextlib.contextmanager
  def claimed(self, run: Run) -> Iterator[bool]:
    """Whether this process may train `run`: no other one does, nor can until the context ends."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run.folder / ".lock", blocking=False)
    try:
      lock.acquire()
    except filelock.Timeout:
      yield False
      return
    try:
      yield True
    finally:
      lock.release()

  def agree(self, group: Group, environment: dict[str, Any]) -> None:
    """Raises ValueError, alike in all processes, where one of them would train something else."""
    kept = [name.partition(".")[0] for name in self._config.KEPT]
    facts = {name: environment[name] for name in (*kept, "versions", "git_commit")}
    settings = dataclasses.asdict(self._config)
    del settings["distributed"]
    mine = {"config": settings, self._config.ARMS: self._definitions} | facts
    mine["workdir"] = str(self.path.resolve())
    first, *others = group.gather(mine)
    for process, theirs in enumerate(others, 1):
      words = "in process 0", f"in process {process}"
      if found := [
        d for name in first for d in _differences(first[name], theirs[name], name, words)
      ]:
        raise ValueError(f"the processes differ: {'; '.join(found)}")

  def unfinished(self) -> list[Run]:
    return [run for run in self.runs if not run.is_finished(self._config.steps)]

  def _check(self) -> tuple[dict, dict, dict] | None:
    """What config.json, recipes.json and environment.json hold; None in a new workdir."""
    found = [logs.read_json(self.path / f"{name}.json") for name in _FILES]
    config, definitions, environment = found
    if config is None:
      if any(self.path.glob("runs/*/*.jsonl")):
        raise ValueError(
          f"{self.path} holds runs and no config.json, which says what they were: choose another"
          " --workdir"
        )
      return None
    if (self.path / "metrics.jsonl").exists():
      raise ValueError(
        f"{self.path} is of an earlier version, with one metrics.jsonl for all runs: its report "
        "can be written again, but its training can't go on; choose another --workdir"
      )
    arms = self._config.ARMS
    wanted = self._config.to_dict()
    grows = arms, "seeds", "seeds_by_arm", "steps"
    both = wanted | {name: config[name] for name in grows if name in config}
    self._refuse(_differences(config, both, "config"), "another config")
    if definitions is None:
      logging.warning(
        "%s does not tell how its %s were defined: taken to be as now", self.path, arms
      )
    shared = {name: own for name, own in self._definitions.items() if name in (definitions or {})}
    was = {name: definitions[name] for name in shared}
    self._refuse(_differences(was, shared, arms), f"{arms} defined differently")
    self._check_steps(config["steps"])
    return config, definitions or {}, environment or {}

  def _check_steps(self, was: int) -> None:
    now = self._config.steps
    if now < was:
      raise ValueError(f"{self.path} has runs of steps={was}, which steps={now} can't shorten")
    reason = self._config.why_not_longer() if now > was else None
    if reason:
      raise ValueError(
        f"{self.path} has runs of steps={was}, which can't go on to steps={now}: {reason}; "
        "choose another --workdir"
      )

  def _refuse(self, differences: Iterable[str], other: str) -> None:
    if differences := list(differences):
      raise ValueError(
        f"{self.path} belongs to {other}; choose another --workdir, or undo\n  "
        + "\n  ".join(differences)
      )

  def _grown(self, was: dict[str, Any]) -> dict[str, Any]:
    """The config with the arms of both, and of each as many seeds as were asked for."""
    now, arms = self._config.to_dict(), self._config.ARMS
    both = list(dict.fromkeys([*was[arms], *now[arms]]))
    asked = was.get("seeds_by_arm") or dict.fromkeys(was[arms], was["seeds"])
    asked |= {arm: max(now["seeds"], asked.get(arm, 0)) for arm in now[arms]}
    seeds = max(asked.values())
    return now | {arms: both, "seeds": seeds, "seeds_by_arm": asked}

  def _joined(self, first: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """environment.json of a workdir that began with `first`."""
    if not first:
      return now
    kept, by_arm = self._config.KEPT, self._config.BY_ARM
    groups = {path.partition(".")[0] for path in kept}
    # An earlier version did not keep all of them: taken to be as now.
    first = {group: now[group] for group in groups} | first
    for path, what in kept.items():
      was, is_now = (_at(path, each) for each in (first, now))
      if was != is_now:
        raise ValueError(f"{self.path} began with the {what} {was}, not {is_now}")
    again = {name: value for name, value in now.items() if name not in (*groups, *by_arm)}
    resumed = {"resumed": [*first.get("resumed", []), again]}
    return first | resumed | {name: first.get(name, {}) | now.get(name, {}) for name in by_arm}


def read_settings(path: Path) -> dict[str, Any]:
  """What config.json of the workdir at `path` holds: the config, and `seeds_by_arm` beside it."""
  found = logs.read_json(path / "config.json")
  if found is None:
    raise FileNotFoundError(f"{path} holds no config.json: not the workdir of a run")
  return found


def read_config[C: Comparison](path: Path, cls: type[C]) -> C:
  """The config of the workdir at `path`, with all that it has grown to; its devices are not told.

  Raises FileNotFoundError without a config.json, TypeError at another kind of experiment's."""
  settings = read_settings(path)
  return from_dict(cls, {name: v for name, v in settings.items() if name != "seeds_by_arm"})


def check_same(path: Path, config: Comparison, *groups: str) -> None:
  """Raises ValueError where the workdir at `path` has other settings than `config` in `groups`."""
  was, now = read_settings(path), config.to_dict()
  wanted, found = ({group: each.get(group) for group in groups} for each in (now, was))
  if differences := list(_differences(found, wanted, "config")):
    raise ValueError(f"{path} was trained by another config\n  " + "\n  ".join(differences))


def with_token_parts(config: Experiment, path: Path, devices: int) -> Experiment:
  """`config` with the `mesh.token_parts` that the workdir began with, else one for each device."""
  if config.mesh.token_parts is not None:
    return config
  found = (path.is_dir() and logs.read_json(path / "config.json")) or {}
  parts = found.get("mesh", {}).get("token_parts", devices)
  return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, token_parts=parts))


_FILES = ("config", "recipes", "environment")
# Of an arm's name, in the name of a folder, besides letters, digits and "_.-~". In a folder with
# brackets, Orbax does not find what it saved.
_SAFE = "+@=,"


def _at(path: str, tree: Mapping[str, Any]) -> Any:
  """The value at the dotted `path`."""
  for name in path.split("."):
    tree = tree[name]
  return tree


def _differences(was, now, path, words=("there", "here")):
  """`config.model.num_layers: 2 there, 6 here`."""
  if isinstance(was, dict) and isinstance(now, dict):
    for name in {**was, **now}:
      if name != "type" or name in was:  # recipes.json did not always tell types
        yield from _differences(was.get(name), now.get(name), f"{path}.{name}", words)
  elif was != now:
    yield f"{path}: {was!r} {words[0]}, {now!r} {words[1]}"
