"""Everything that runs wrote into their workdirs, as tables, whatever they trained.

Works on a run that is still going or was killed.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import logs
from experiments.workdir import read_settings

BASELINE = "bf16"
RUN = ("recipe", "seed", "step")  # whose a row is
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Columns:
  """Of a log: every row has `needed`; the table has `numbers` and `words` though no row does."""

  needed: tuple[str, ...] = RUN
  numbers: tuple[str, ...] = ()
  words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm of one workdir: a line of every chart, a row of every table."""

  name: str  # among several workdirs `workdir/recipe`
  recipe: str  # its name in its workdir
  workdir: str
  baseline: str | None  # the arm of BF16 in the same workdir
  seeds: int | None  # planned
  steps: int | None  # planned


@dataclasses.dataclass(frozen=True)
class Records:
  """In the tables `recipe` is an arm."""

  configs: dict[str, dict[str, Any]]  # by workdir
  environments: dict[str, dict[str, Any]]
  arms: dict[str, Arm]
  tables: dict[str, pd.DataFrame]  # by log

  @property
  def metrics(self) -> pd.DataFrame:
    return self.tables["metrics"]

  @property
  def probes(self) -> pd.DataFrame:
    return self.tables["probes"]

  @property
  def timing(self) -> pd.DataFrame:
    return self.tables["timing"]

  def of_arm(self, arm: Arm, name: str) -> float | None:
    """What environment.json tells of each arm."""
    return (self.environments[arm.workdir].get(name) or {}).get(arm.recipe)


def read(columns: Mapping[str, Columns], arms: str, *workdirs: str | os.PathLike) -> Records:
  """`columns` of each log; `arms` is the setting that names the arms.

  Raises FileNotFoundError without a config.json, ValueError at a damaged file or line and for the
  workdir of an experiment that names its arms elsewhere.
  """
  configs, environments, found = {}, {}, {}
  rows: dict[str, list[Row]] = {log: [] for log in columns}
  for label, workdir in _labels(workdirs).items():
    config = read_settings(workdir)
    if arms not in config:
      other = "experiments.rl.report" if arms == "recipes" else "experiments.report"
      raise ValueError(
        f"{workdir} is of another kind of experiment: its config.json has no {arms};"
        f" try python -m {other}"
      )
    configs[label] = config
    environments[label] = logs.read_json(workdir / "environment.json") or {}
    own = {log: _read_rows(workdir, log, columns[log].needed) for log in columns}
    prefix = f"{label}/" if len(workdirs) > 1 else ""
    every = [row["recipe"] for of_log in own.values() for row in of_log]
    recipes = list(dict.fromkeys([*config[arms], *every]))
    baseline = prefix + BASELINE if BASELINE in recipes else None
    for recipe in recipes:
      name = prefix + recipe
      seeds = config.get("seeds_by_arm", {}).get(recipe, config.get("seeds"))
      found[name] = Arm(name, recipe, label, baseline, seeds, config.get("steps"))
    for log, of_log in own.items():
      rows[log] += [row | {"recipe": prefix + row["recipe"]} for row in of_log]
  tables = {log: _table(rows[log], columns[log]) for log in columns}
  return Records(configs, environments, found, tables)


def _labels(workdirs: tuple) -> dict[str, Path]:
  """By name of the folder, by its whole path where two have one name."""
  paths = [Path(workdir) for workdir in workdirs]
  names = [path.resolve().name for path in paths]
  labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
  if len(set(labels)) < len(labels):
    raise ValueError(f"{', '.join(map(str, paths))} names one workdir twice")
  return dict(zip(labels, paths, strict=True))


def _read_rows(workdir: Path, log: str, needed: tuple[str, ...]) -> list[Row]:
  """Of every run; an earlier version kept one file for all of them."""
  found = []
  for path in (workdir / f"{log}.jsonl", *sorted(workdir.glob(f"runs/*/{log}.jsonl"))):
    rows = logs.read_rows(path)
    for number, row in enumerate(rows, 1):
      missing = [name for name in needed if row.get(name) is None]
      if missing:
        raise ValueError(f"{path}, line {number} has no {', '.join(missing)}: {repr(row)[:80]}")
    found += rows
  return found


def _table(rows: list[Row], columns: Columns) -> pd.DataFrame:
  frame = pd.DataFrame(rows)
  known = dict.fromkeys([*columns.needed, *columns.numbers, *columns.words, *frame.columns])
  return frame.reindex(columns=list(known)).astype(dict.fromkeys(columns.numbers, float))
