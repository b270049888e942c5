"""The numbers of a comparison, from the files that the runner leaves in its workdirs.

Works on a run that is still going or was killed: what can't be known yet is None.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pandas as pd
import scipy.stats

from experiments import logs

BASELINE = "bf16"
MIN_SEEDS = 3  # for an interval
CONFIDENCE = 0.95
# What a gap can say of a recipe; the rest is why it says nothing.
ABOVE, BELOW, SAME = "above BF16", "below BF16", "not told apart"
UNFINISHED, DIVERGED, TOO_FEW = "not finished", "diverged", "too few seeds"
# Shares of one quantization's squared error: these five sum to 1.
SHARES = ["scale_bias", "deadzone", "grid_noise", "cross_scale_grid", "cross_scale_deadzone"]
RATES = ["cosine", "sqnr_db", "gain", "flushed", "clipped"]
_RUN = ("recipe", "seed", "step")
_NEEDED = {
  "metrics": (*_RUN, "split"),
  "probes": (*_RUN, "layer", "module", "gemm", "operand"),
  "timing": _RUN,
}
_NUMBERS = {
  "metrics": [
    "loss",
    "grad_norm",
    "learning_rate",
    "load_balance_loss",
    "router_z_loss",
    "dropped",
  ],
  "probes": SHARES + RATES,
  "timing": ["step_time_ms"],
}
_WORDS = {"metrics": ["event", "probe", "load"], "probes": ["format", "scale_rule", "source"]}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
  """One recipe of one workdir: a line of every chart, a row of every table."""

  name: str  # the recipe's; among several workdirs `workdir/recipe`
  recipe: str
  workdir: str
  baseline: str | None  # the arm of BF16 in the same workdir
  seeds: int | None  # planned
  steps: int | None  # planned


@dataclasses.dataclass(frozen=True)
class Records:
  """Everything that runs wrote into their workdirs so far. In the frames `recipe` is an arm."""

  configs: dict[str, dict[str, Any]]  # by workdir
  environments: dict[str, dict[str, Any]]
  arms: dict[str, Arm]
  metrics: pd.DataFrame
  probes: pd.DataFrame
  timing: pd.DataFrame


def read_records(*workdirs: str | os.PathLike) -> Records:
  """Raises FileNotFoundError without a config.json, ValueError at a damaged file or line."""
  configs, environments, arms = {}, {}, {}
  rows: dict[str, list[Row]] = {log: [] for log in _NEEDED}
  for label, workdir in _labels(workdirs).items():
    config = logs.read_json(workdir / "config.json")
    if config is None:
      raise FileNotFoundError(f"{workdir} holds no config.json: not the workdir of a run")
    configs[label] = config
    environments[label] = logs.read_json(workdir / "environment.json") or {}
    own = {log: _read_rows(workdir, log) for log in _NEEDED}
    prefix = f"{label}/" if len(workdirs) > 1 else ""
    every = [row["recipe"] for found in own.values() for row in found]
    recipes = list(dict.fromkeys([*config.get("recipes", ()), *every]))
    baseline = prefix + BASELINE if BASELINE in recipes else None
    for recipe in recipes:
      name = prefix + recipe
      arms[name] = Arm(name, recipe, label, baseline, config.get("seeds"), config.get("steps"))
    for log, found in own.items():
      rows[log] += [row | {"recipe": prefix + row["recipe"]} for row in found]
  return Records(configs, environments, arms, **{log: _frame(rows[log], log) for log in rows})


def _labels(workdirs: tuple) -> dict[str, Path]:
  """By name of the folder, by its whole path where two have one name."""
  paths = [Path(workdir) for workdir in workdirs]
  names = [path.resolve().name for path in paths]
  labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
  if len(set(labels)) < len(labels):
    raise ValueError(f"{', '.join(map(str, paths))} names one workdir twice")
  return dict(zip(labels, paths, strict=True))


def _read_rows(workdir: Path, log: str) -> list[Row]:
  """Of every run; an earlier version kept one file for all of them."""
  found = []
  for path in (workdir / f"{log}.jsonl", *sorted(workdir.glob(f"runs/*/{log}.jsonl"))):
    rows = logs.read_rows(path)
    for number, row in enumerate(rows, 1):
      missing = [name for name in _NEEDED[log] if row.get(name) is None]
      if missing:
        raise ValueError(f"{path}, line {number} has no {', '.join(missing)}: {repr(row)[:80]}")
    found += rows
  return found


def _frame(rows: list[Row], log: str) -> pd.DataFrame:
  frame = pd.DataFrame(rows)
  known = dict.fromkeys([*_NEEDED[log], *_NUMBERS[log], *_WORDS.get(log, ()), *frame.columns])
  return frame.reindex(columns=list(known)).astype(dict.fromkeys(_NUMBERS[log], float))


def summarize(*workdirs: str | os.PathLike) -> dict[str, Any]:
  """What summary.json holds: plain values, losses in nats per token, by arm and by workdir."""
  return summarize_records(read_records(*workdirs))


def summarize_records(records: Records) -> dict[str, Any]:
  arms = records.arms
  runs = {name: _runs(records, arm) for name, arm in arms.items()}
  facts = {name: _facts(own, records.environments[name]) for name, own in records.configs.items()}
  saved = {
    name: _of_recipe(records, arm, "saved_activation_bytes_per_token") for name, arm in arms.items()
  }
  at_peak = {name: _of_recipe(records, arm, "gemm_seconds_at_peak") for name, arm in arms.items()}
  step_times = {name: _median_step_time(records.timing, name) for name in arms}
  recipes = {}
  for name, arm in arms.items():
    loss = _over_seeds(runs[name], "validation_loss", "validation_step")
    entropy = facts[arm.workdir]["unigram_entropy_nats"]
    below = None if None in (entropy, loss["mean"]) else entropy - loss["mean"]
    recipes[name] = {
      "workdir": arm.workdir,
      "steps": arm.steps,
      "seeds": arm.seeds,
      "seeds_finished": sum(run["finished"] for run in runs[name]),
      "last_step": max((run["last_step"] for run in runs[name]), default=None),
      "runs": runs[name],
      "train_loss": _over_seeds(runs[name], "train_loss", "last_step"),
      "validation_loss": loss,
      "gap": _gap(records, arm, runs),
      "nats_below_unigram": below,
      "saved_activation_bytes_per_token": saved[name],
      "saved_activation_ratio": _ratio(saved[name], saved.get(arm.baseline)),
      "step_time_ms": step_times[name],
      "step_time_ratio": _ratio(step_times[name], step_times.get(arm.baseline)),
      "flops_utilization": _ratio(at_peak[name], step_times[name] / 1000),
      "decomposition": _decomposition(records.probes, name),
    }
  return logs.plain({"workdirs": facts, "notes": _notes(records, runs), "recipes": recipes})


def write_summary(workdir: str | os.PathLike) -> Path:
  path = Path(workdir) / "summary.json"
  logs.write_json(path, summarize(workdir))
  return path


def interval(values: list[float]) -> tuple[float, float] | None:
  """Student's confidence interval of the mean; None of fewer than MIN_SEEDS values."""
  if len(values) < MIN_SEEDS:
    return None
  series = pd.Series(values)
  half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(series) - 1) * series.sem()
  return series.mean() - half, series.mean() + half


def paired_gaps(records: Records, arm: Arm) -> pd.Series:
  """100 * (loss / loss of BF16 - 1) of the validation loss by (seed, step), same seed and step."""
  validation = records.metrics[records.metrics.split == "validation"]
  losses = validation.set_index(["recipe", "seed", "step"]).loss.sort_index()
  if arm.baseline is None or not {arm.name, arm.baseline} <= set(losses.index.levels[0]):
    return pd.Series(dtype=float, index=pd.MultiIndex.from_tuples([], names=["seed", "step"]))
  gaps = 100 * (losses.loc[arm.name] / losses.loc[arm.baseline] - 1)
  return gaps.dropna()


def last_probe_rows(probes: pd.DataFrame, recipe: str) -> pd.DataFrame:
  """A recipe's rows, of all seeds, at its last step where some quantization has shares."""
  own = probes[probes.recipe == recipe]
  return own[own.step == own[has_shares(own)].step.max()]


def has_shares(rows: pd.DataFrame) -> pd.Series:
  """False if something was not finite, or if nothing was lost: then there is nothing to share."""
  return rows[SHARES].notna().all(axis=1) & (rows[SHARES] != 0).any(axis=1)


def is_lossless(rows: pd.DataFrame) -> bool:
  return bool((rows[SHARES] == 0).all(axis=None))


def mean_shares(rows: pd.DataFrame) -> dict[str, float]:
  """Unweighted means over the quantizations that have shares, so that the means sum to 1."""
  return rows[has_shares(rows)][SHARES].mean().to_dict()


def reads_residual(rows: pd.DataFrame) -> bool:
  """Whether this operand is read from the residual: its error adds to that one's."""
  return bool((rows.source == "residual").any())


def lost_to_scale(rows: pd.DataFrame) -> float | None:
  """Share of the squared error that an ideal scale would remove, over all quantizations.

  Deadzone and grid noise, which never overlap, are the error on the grid of the ideal scale: the
  rest is lost to the scale. Errors relative to their tensors are added up, not shares, so that a
  finer format counts for as little as its error.
  """
  rows = rows[has_shares(rows) & rows.sqnr_db.notna()]
  errors = 10 ** (-rows.sqnr_db / 10)
  lost = 1 - rows.deadzone - rows.grid_noise
  return (errors * lost).sum() / errors.sum() if errors.sum() else None


def _of_recipe(records: Records, arm: Arm, name: str) -> float | None:
  """What environment.json tells of each recipe."""
  return (records.environments[arm.workdir].get(name) or {}).get(arm.recipe)


def _facts(config: dict[str, Any], environment: dict[str, Any]) -> Row:
  facts = {"steps": config.get("steps")}
  facts |= {name: environment.get(name) for name in ("parameters", "active_parameters", "device")}
  corpus = environment.get("corpus") or {}
  facts["unigram_entropy_nats"] = corpus.get("unigram_entropy_nats")
  return facts


def _runs(records: Records, arm: Arm) -> list[Row]:
  """One entry per seed; a run that diverged has no final losses."""
  runs = []
  own = records.metrics[records.metrics.recipe == arm.name]
  for seed, rows in own.groupby("seed"):
    train = rows[rows.split == "train"].set_index("step").loss
    scores = rows[rows.split == "validation"].set_index("step").loss
    events = rows[rows.event == "diverged"]
    diverged = None
    if len(events):
      diverged = events.iloc[0][["step", "probe"]].to_dict()
    # The last tenth of the planned steps, counted back from the last step taken.
    window = train[train.index > train.index.max() - max(0.1 * (arm.steps or 0), 1)]
    last = scores.index.max() if len(scores) else None
    runs.append(
      {
        "seed": seed,
        "last_step": rows.step.max(),
        # The last step is always evaluated.
        "finished": bool(arm.steps is not None and last is not None and last >= arm.steps),
        "train_loss": None if diverged else window.mean(skipna=False),
        "validation_loss": None if diverged or last is None else scores[last],
        "validation_step": last,
        "diverged": diverged,
      }
    )
  return logs.plain(runs)


def _over_seeds(runs: list[Row], name: str, step_name: str) -> Row:
  """Mean and spread over the seeds that got furthest; runs with no value are left out."""
  known = [run for run in runs if run[name] is not None]
  step = max((run[step_name] for run in known), default=None)
  values = pd.Series([run[name] for run in known if run[step_name] == step], dtype=float)
  return {"step": step, "seeds": len(values), "mean": values.mean(), "std": values.std()}


def _gap(records: Records, arm: Arm, runs: dict[str, list[Row]]) -> Row:
  """Relative gap to BF16 in percent, paired by seed, at the last step that both reached."""
  diverged = {run["seed"] for run in runs[arm.name] if run["diverged"]}
  gaps = paired_gaps(records, arm)
  gaps = gaps[~gaps.index.isin(diverged, level="seed")]
  step = gaps.index.get_level_values("step").max() if len(gaps) else None
  percents = gaps.xs(step, level="step").tolist() if len(gaps) else []
  untrained = gaps[gaps.index.get_level_values("step") == 0]
  bounds = interval(percents)
  return {
    "percent": pd.Series(percents, dtype=float).mean(),
    "interval_percent": bounds,
    "seeds": len(percents),
    "step": step,
    # Before training: of the rounding of the forward pass alone.
    "step_0_percent": untrained.mean(),
    "verdict": _verdict(arm, runs, bounds, len(percents)),
  }


def _verdict(
  arm: Arm, runs: dict[str, list[Row]], bounds: tuple[float, float] | None, seeds: int
) -> str | None:
  if arm.name == arm.baseline:
    return "reference"
  if any(run["diverged"] for run in runs[arm.name]):
    return DIVERGED
  finished = {run["seed"] for run in runs[arm.name] if run["finished"]}
  of_bf16 = {run["seed"] for run in runs.get(arm.baseline, ()) if run["finished"]}
  if arm.baseline is None:
    return None
  if len(finished) < (arm.seeds or 0) or not finished <= of_bf16:
    return UNFINISHED
  if bounds is None:
    return TOO_FEW if seeds else None
  return ABOVE if bounds[0] > 0 else BELOW if bounds[1] < 0 else SAME


def _median_step_time(timing: pd.DataFrame, recipe: str) -> float | None:
  """The first row of every run compiles: left out."""
  own = timing[timing.recipe == recipe]
  later = own[own.step > own.groupby("seed").step.transform("min")]
  return later.step_time_ms.median()


def _decomposition(probes: pd.DataFrame, recipe: str) -> Row:
  """Means over seeds, layers and modules, by GEMM and operand."""
  last = last_probe_rows(probes, recipe)
  operands = [
    {
      "gemm": gemm,
      "operand": operand,
      "format": _listed(rows.format),
      "scale_rule": _listed(rows.scale_rule),
      "reads_residual": reads_residual(rows),
      "lossless": is_lossless(rows),
      **mean_shares(rows),
      **rows[RATES].mean(),
    }
    for (gemm, operand), rows in last.groupby(["gemm", "operand"], sort=False)
  ]
  step = last.step.max() if len(last) else None
  return {"step": step, "lost_to_scale": lost_to_scale(last), "operands": operands}


def _listed(names: pd.Series) -> str:
  return ", ".join(sorted(map(str, names.dropna().unique())))


def _notes(records: Records, runs: dict[str, list[Row]]) -> list[str]:
  """Why something is missing, in sentences."""
  notes = []
  for workdir in records.configs:
    where = f" in {workdir}" if len(records.configs) > 1 else ""
    own = [arm for arm in records.arms.values() if arm.workdir == workdir]
    scored = [a.name for a in own if any(r["validation_loss"] is not None for r in runs[a.name])]
    if not any(runs[arm.name] for arm in own):
      notes.append(f"No metrics yet{where}: its runs have no metrics.jsonl, or empty ones.")
    elif not any(arm.name == arm.baseline for arm in own if arm.name in scored):
      notes.append(f"No validation loss of {BASELINE}{where}, so there are no gaps to it.")
    if not records.environments[workdir]:
      notes.append(f"No environment.json{where}: corpus, memory and versions are unknown.")
  if records.probes.empty:
    notes.append("No probe rows, so there is no error decomposition.")
  return notes


def _ratio(value: float | None, reference: float | None) -> float | None:
  return value / reference if value and reference else None
