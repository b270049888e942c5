"""The folder of one experiment: what belongs to it, and how far it has come.

config.json  recipes.json  environment.json  summary.json  report.html
runs/<recipe>-<seed>/  metrics.jsonl  probes.jsonl  timing.jsonl  checkpoints/  tensorboard/
                       finished.json
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax.numpy as jnp
from absl import logging

from experiments import logs
from experiments.checks import why_not_longer
from experiments.config import Experiment, to_dict
from experiments.processes import Group
from fp4jax import recipes

LOGS = ("metrics", "probes", "timing")
Offsets = dict[str, int]  # bytes of each log
_GROW = ("recipes", "seeds", "steps")


@dataclasses.dataclass(frozen=True)
class Run:
  """One recipe with one seed."""

  recipe: str
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
    return found is not None and (found["diverged"] or found["step"] >= steps)

  def finish(self, step: int, diverged: bool) -> None:
    logs.write_json(self.folder / "finished.json", {"step": step, "diverged": diverged})

  def open_logs(self, offsets: Offsets) -> dict[str, logs.JsonLines]:
    return {name: logs.JsonLines(self.folder / f"{name}.jsonl", offsets[name]) for name in LOGS}


class WorkDir:
  """Opened by the config, with the recipes and on the corpus that it began with, or by one that
  asks for more: other recipes, more seeds, more steps where the first steps stay the same.

  A workdir from before recipes.json is opened with a warning: its recipes are taken to be
  unchanged.
  """

  def __init__(self, path: str | Path, config: Experiment):
    """Raises ValueError if the folder belongs to another experiment; writes nothing."""
    self.path = Path(path)
    self._config = config
    if self.path.exists() and not self.path.is_dir():
      raise ValueError(f"the workdir {path} is a file, not a folder")
    used = [*config.recipes, *filter(None, [config.final_recipe])]
    self._recipes = _definitions(used)
    self._check()
    self.runs = [
      Run(recipe, seed, self.path / "runs" / f"{recipe}-{seed}")
      for seed in range(config.seeds)
      for recipe in config.recipes
    ]

  @contextlib.contextmanager
  def begin(self, environment: dict[str, Any]) -> Iterator[None]:
    """Writes what was configured and environment.json, or adds this session to that of the first.
    No other process can begin until the context ends.

    Raises:
      ValueError: another process trains here; the corpus, or the tokenizer, is not the one that
        the runs began with.
    """
    self.path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(filelock.FileLock(self.path / ".lock", blocking=False))
      except filelock.Timeout:
        raise ValueError(f"another process trains in {self.path}; wait until it ends") from None
      found = self._check()  # the process before this one may have written since
      if found is None:
        found = to_dict(self._config), {}, {}
      config, definitions, first = found
      logs.write_json(self.path / "environment.json", _joined(first, environment, self.path))
      logs.write_json(self.path / "recipes.json", definitions | self._recipes)
      logs.write_json(self.path / "config.json", _grown(config, self._config))
      yield

  def agree(self, group: Group, environment: dict[str, Any]) -> None:
    """Raises ValueError, alike in all processes, where one of them would train something else."""
    facts = {name: environment[name] for name in ("corpus", "versions", "git_commit")}
    mine = {"config": to_dict(self._config), "recipes": self._recipes} | facts
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
      return None
    if (self.path / "metrics.jsonl").exists():
      raise ValueError(
        f"{self.path} is of an earlier version, with one metrics.jsonl for all runs: its report "
        "can be written again, but its training can't go on; choose another --workdir"
      )
    wanted = to_dict(self._config)
    both = wanted | {name: config.get(name) for name in _GROW}
    self._refuse(_differences(config, both, "config"), "another config")
    if definitions is None:
      logging.warning(
        "%s does not tell how its recipes were defined: taken to be as now", self.path
      )
    shared = {name: own for name, own in self._recipes.items() if name in (definitions or {})}
    was = {name: definitions[name] for name in shared}
    self._refuse(_differences(was, shared, "recipes"), "recipes defined differently")
    self._check_steps(config["steps"])
    return config, definitions or {}, environment or {}

  def _check_steps(self, was: int) -> None:
    now = self._config.steps
    if now < was:
      raise ValueError(f"{self.path} has runs of steps={was}, which steps={now} can't shorten")
    reason = why_not_longer(self._config) if now > was else None
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


def with_token_parts(config: Experiment, path: Path, devices: int) -> Experiment:
  """`config` with the `mesh.token_parts` that the workdir began with, else one for each device."""
  if config.mesh.token_parts is not None:
    return config
  found = (path.is_dir() and logs.read_json(path / "config.json")) or {}
  parts = found.get("mesh", {}).get("token_parts", devices)
  return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, token_parts=parts))


_BY_RECIPE = ("saved_activation_bytes_per_token", "gemm_seconds_at_peak")  # of environment.json
_FILES = ("config", "recipes", "environment")


def _grown(was: dict[str, Any], config: Experiment) -> dict[str, Any]:
  """`config` with the recipes and seeds of both."""
  recipes = list(dict.fromkeys([*was["recipes"], *config.recipes]))
  return to_dict(config) | {"recipes": recipes, "seeds": max(was["seeds"], config.seeds)}


def _joined(first: dict[str, Any], now: dict[str, Any], path: Path) -> dict[str, Any]:
  """environment.json of a workdir that began with `first`."""
  if not first:
    return now
  for name in ("tokenizer_sha256", "sha256"):
    was, is_now = first["corpus"][name], now["corpus"][name]
    if was != is_now:
      what = "tokenizer" if name == "tokenizer_sha256" else "corpus"
      raise ValueError(f"{path} began with the {what} {was}, not {is_now}")
  again = {name: value for name, value in now.items() if name not in ("corpus", *_BY_RECIPE)}
  resumed = {"resumed": [*first.get("resumed", []), again]}
  return first | resumed | {name: first.get(name, {}) | now.get(name, {}) for name in _BY_RECIPE}


def _definitions(names: Iterable[str]) -> dict[str, Any]:
  """Every field of the recipes but their names and citations, as in recipes.json."""
  fields = {name: _plain(recipes.by_name(name)) for name in names}
  for recipe in fields.values():
    del recipe["name"], recipe["citation"]
  return fields


def _plain(value: Any) -> Any:
  """For JSON: a dataclass by its type and fields, a dtype by its name."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"type": type(value).__name__} | fields
  if isinstance(value, tuple | list):
    return [_plain(v) for v in value]
  plain = value is None or isinstance(value, str | int | float)
  return value if plain else jnp.dtype(value).name


def _differences(was, now, path, words=("there", "here")):
  """`config.model.num_layers: 2 there, 6 here`."""
  if isinstance(was, dict) and isinstance(now, dict):
    for name in {**was, **now}:
      if name != "type" or name in was:  # recipes.json did not always tell types
        yield from _differences(was.get(name), now.get(name), f"{path}.{name}", words)
  elif was != now:
    yield f"{path}: {was!r} {words[0]}, {now!r} {words[1]}"
