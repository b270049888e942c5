"""The folder of one experiment: what belongs to it, and how far it has come.

config.json  recipes.json  environment.json  metrics.jsonl  probes.jsonl  timing.jsonl
runs/<recipe>-<seed>/checkpoints/  tensorboard/  finished.json
report.html  summary.json
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging

from experiments import logs
from experiments.config import Experiment, to_dict
from fp4jax import recipes

LOGS = ("metrics", "probes", "timing")
Offsets = dict[str, int]  # bytes of each log


@dataclasses.dataclass(frozen=True)
class Run:
  """One recipe with one seed."""

  recipe: str
  seed: int
  folder: Path

  @property
  def name(self) -> str:
    return f"{self.recipe}-{self.seed}"

  def finished_offsets(self) -> Offsets | None:
    """Length of the logs when this run ended; None while it has not."""
    path = self.folder / "finished.json"
    return json.loads(path.read_text())["offsets"] if path.exists() else None

  def finish(self, offsets: Offsets) -> None:
    logs.write_json(self.folder / "finished.json", {"offsets": offsets})


class WorkDir:
  """Opened only by the config, with the recipes and on the corpus that it began with.

  A workdir of before recipes.json is opened with a warning: its recipes are taken to be unchanged.
  """

  def __init__(self, path: str | Path, config: Experiment):
    self.path = Path(path)
    used = [*config.recipes, *filter(None, [config.final_recipe])]
    self._wanted = {"config": to_dict(config), "recipes": _definitions(used)}
    if (self.path / "config.json").exists():
      self._refuse_differences("config", "another config")
      if (self.path / "recipes.json").exists():
        self._refuse_differences("recipes", "recipes defined differently")
      else:
        logging.warning("%s does not tell how its recipes were defined: taken to be as now", path)
    self.runs = [
      Run(recipe, seed, self.path / "runs" / f"{recipe}-{seed}")
      for seed in range(max(map(config.seeds_of, config.recipes)))
      for recipe in config.recipes
      if seed < config.seeds_of(recipe)
    ]

  def begin(self, environment: dict[str, Any]) -> None:
    """Writes what was configured and environment.json, or adds this session to that of the first.

    Raises:
      ValueError: the corpus, or the tokenizer, is not the one that the runs began with.
    """
    self.path.mkdir(parents=True, exist_ok=True)
    environment_path = self.path / "environment.json"
    if environment_path.exists():
      first = json.loads(environment_path.read_text())
      for name in ("tokenizer_sha256", "sha256"):
        was, now = first["corpus"][name], environment["corpus"][name]
        if was != now:
          what = "tokenizer" if name == "tokenizer_sha256" else "corpus"
          raise ValueError(f"{self.path} began with the {what} {was}, not {now}")
      again = {k: v for k, v in environment.items() if k != "corpus"}
      environment = first | {"resumed": [*first.get("resumed", []), again]}
    logs.write_json(environment_path, environment)
    for name in ("recipes", "config"):  # no config.json of today is without recipes.json
      logs.write_json(self.path / f"{name}.json", self._wanted[name])

  def _refuse_differences(self, name: str, other: str) -> None:
    found = json.loads((self.path / f"{name}.json").read_text())
    differences = list(_differences(found, self._wanted[name], name))
    if differences:
      raise ValueError(
        f"{self.path} belongs to {other}; choose another --workdir, or undo\n  "
        + "\n  ".join(differences)
      )

  def unfinished(self) -> tuple[list[Run], Offsets]:
    """The runs still to do in order, and the length of the logs where the first of them begins."""
    offsets = dict.fromkeys(LOGS, 0)
    for i, run in enumerate(self.runs):
      done = run.finished_offsets()
      if done is None:
        return self.runs[i:], offsets
      offsets = done
    return [], offsets

  def open_logs(self, offsets: Offsets) -> dict[str, logs.JsonLines]:
    return {name: logs.JsonLines(self.path / f"{name}.jsonl", offsets[name]) for name in LOGS}


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


def _differences(was, now, path):
  """`config.model.num_layers: 2 there, 6 here`."""
  if isinstance(was, dict) and isinstance(now, dict):
    for name in {**was, **now}:
      if name != "type" or name in was:  # recipes.json did not always tell types
        yield from _differences(was.get(name), now.get(name), f"{path}.{name}")
  elif was != now:
    yield f"{path}: {was!r} there, {now!r} here"
