"""The numbers of a comparison, from the files that the runner leaves in its workdir.

Works on a run that is still going or was killed: what can't be known yet is None.
"""

import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments import logs

BASELINE = "bf16"
# Shares of one quantization's squared error: these five sum to 1.
SHARES = ("scale_bias", "deadzone", "grid_noise", "cross_scale_grid", "cross_scale_deadzone")
RATES = ("cosine", "sqnr_db", "gain", "flushed", "clipped")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
  """Everything that a run wrote into its workdir so far."""

  config: dict[str, Any]
  environment: dict[str, Any]
  metrics: list[Row]
  probes: list[Row]
  timing: list[Row]

  @functools.cached_property
  def recipes(self) -> list[str]:
    """Names in the configuration's order, then any others that have rows."""
    rows = (*self.metrics, *self.probes, *self.timing)
    return list(dict.fromkeys([*self.config.get("recipes", ()), *(r["recipe"] for r in rows)]))


def read_records(workdir: str | os.PathLike) -> Records:
  """Raises FileNotFoundError without a config.json, ValueError at a damaged file or line."""
  workdir = Path(workdir)
  if not (workdir / "config.json").is_file():
    raise FileNotFoundError(f"{workdir} holds no config.json: not the workdir of a run")
  run = ("recipe", "seed", "step")
  return Records(
    config=logs.read_json(workdir / "config.json"),
    environment=logs.read_json(workdir / "environment.json") or {},
    metrics=_read_rows(workdir, "metrics", (*run, "split")),
    probes=_read_rows(workdir, "probes", (*run, "layer", "module", "gemm", "operand")),
    timing=_read_rows(workdir, "timing", run),
  )


def summarize(workdir: str | os.PathLike) -> dict[str, Any]:
  """What summary.json holds: plain values, losses in nats per token."""
  return summarize_records(read_records(workdir))


def summarize_records(records: Records) -> dict[str, Any]:
  steps = records.config.get("steps")
  entropy = (records.environment.get("corpus") or {}).get("unigram_entropy_nats")
  saved = records.environment.get("saved_activation_bytes_per_token") or {}
  runs = {recipe: _runs(records, recipe) for recipe in records.recipes}
  validation = {
    recipe: _curves(records.metrics, recipe, "validation") for recipe in records.recipes
  }
  step_times = {recipe: _median_step_time(records.timing, recipe) for recipe in records.recipes}

  recipes = {}
  for recipe in records.recipes:
    loss = _over_seeds(runs[recipe], "validation_loss", "validation_step")
    recipes[recipe] = {
      "seeds": _planned_seeds(records.config, recipe),
      "seeds_finished": sum(run["finished"] for run in runs[recipe]),
      "last_step": max((run["last_step"] for run in runs[recipe]), default=None),
      "runs": runs[recipe],
      "train_loss": _over_seeds(runs[recipe], "train_loss", "last_step"),
      "validation_loss": loss,
      "gap": _gap(recipe, validation, runs),
      "nats_below_unigram": _apply(lambda a, b: a - b, entropy, loss["mean"]),
      "saved_activation_bytes_per_token": saved.get(recipe),
      "saved_activation_ratio": _ratio(saved.get(recipe), saved.get(BASELINE)),
      "step_time_ms": step_times[recipe],
      "step_time_ratio": _ratio(step_times[recipe], step_times.get(BASELINE)),
      "decomposition": _decomposition(records.probes, recipe),
    }
  return {
    "steps": steps,
    "seeds": records.config.get("seeds"),
    "parameters": records.environment.get("parameters"),
    "active_parameters": records.environment.get("active_parameters"),
    "unigram_entropy_nats": entropy,
    "notes": _notes(records, runs),
    "recipes": recipes,
  }


def write_summary(workdir: str | os.PathLike) -> Path:
  path = Path(workdir) / "summary.json"
  logs.write_json(path, summarize(workdir))
  return path


def last_probe_rows(probes: Iterable[Row], recipe: str) -> list[Row]:
  """A recipe's rows, of all seeds, at its last step where some quantization has shares."""
  steps: dict[int, list[Row]] = {}
  for row in probes:
    if row["recipe"] == recipe:
      steps.setdefault(row["step"], []).append(row)
  return next((steps[s] for s in sorted(steps, reverse=True) if any(map(has_shares, steps[s]))), [])


def has_shares(row: Row) -> bool:
  """False if something was not finite, or if nothing was lost: then there is nothing to share."""
  shares = [row.get(name) for name in SHARES]
  return None not in shares and any(shares)


def is_lossless(row: Row) -> bool:
  return all(row.get(name) == 0 for name in SHARES)


def mean_shares(rows: Iterable[Row]) -> dict[str, float | None]:
  """Unweighted means over the quantizations that have shares, so that the means sum to 1."""
  rows = [row for row in rows if has_shares(row)]
  return {name: _mean(row[name] for row in rows) for name in SHARES}


def reads_residual(row: Row) -> bool:
  """Whether this operand is read from the residual: its error adds to that one's."""
  return row.get("source") == "residual"


def lost_to_scale(rows: Iterable[Row]) -> float | None:
  """Share of the squared error that an ideal scale would remove, over all quantizations.

  Deadzone and grid noise, which never overlap, are the error on the grid of the ideal scale: the
  rest is lost to the scale. Errors relative to their tensors are added up, not shares, so that a
  finer format counts for as little as its error.
  """
  rows = [row for row in rows if has_shares(row) and row.get("sqnr_db") is not None]
  errors = [10 ** (-row["sqnr_db"] / 10) for row in rows]
  lost = [1 - row["deadzone"] - row["grid_noise"] for row in rows]
  if not sum(errors):
    return None
  return sum(e * share for e, share in zip(errors, lost, strict=True)) / sum(errors)


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


def _curves(metrics: list[Row], recipe: str, split: str) -> dict[int, dict[int, float | None]]:
  """Loss by seed, then by step."""
  curves: dict[int, dict[int, float | None]] = {}
  for row in metrics:
    if row["recipe"] == recipe and row.get("split") == split:
      curves.setdefault(row["seed"], {})[row["step"]] = row.get("loss")
  return curves


def _runs(records: Records, recipe: str) -> list[Row]:
  """One entry a seed; a run that diverged has no final losses."""
  steps = records.config.get("steps")
  train = _curves(records.metrics, recipe, "train")
  validation = _curves(records.metrics, recipe, "validation")
  diverged: dict[int, Row] = {}
  for row in records.metrics:
    if row["recipe"] == recipe and row.get("event") == "diverged":
      event = {"step": row["step"], "probe": row.get("probe")}
      diverged[row["seed"]] = min(diverged.get(row["seed"], event), event, key=lambda e: e["step"])

  runs = []
  for seed in sorted({*train, *validation, *diverged}):
    losses, scores = train.get(seed, {}), validation.get(seed, {})
    last_step = max([*losses, *scores, *([diverged[seed]["step"]] if seed in diverged else [])])
    # The last tenth of the planned steps, counted back from the last step taken.
    window = [loss for step, loss in losses.items() if step > max(losses) - 0.1 * (steps or 0)]
    if losses and not window:
      window = [losses[max(losses)]]
    validation_step = max(scores, default=None)
    ended = seed not in diverged
    runs.append(
      {
        "seed": seed,
        "last_step": last_step,
        # The last step is always evaluated.
        "finished": steps is not None and max(scores, default=-1) >= steps,
        "train_loss": _mean(window) if ended and None not in window else None,
        "validation_loss": scores.get(validation_step) if ended else None,
        "validation_step": validation_step,
        "diverged": diverged.get(seed),
      }
    )
  return runs


def _planned_seeds(config: dict[str, Any], recipe: str) -> int | None:
  own = config.get("bf16_seeds") if recipe == BASELINE else None
  return config.get("seeds") if own is None else own


def _over_seeds(runs: list[Row], name: str, step_name: str) -> Row:
  """Mean and spread over the seeds that got furthest; runs with no value are left out."""
  known = [run for run in runs if run[name] is not None]
  step = max((run[step_name] for run in known), default=None)
  values = [run[name] for run in known if run[step_name] == step]
  return {
    "step": step,
    "seeds": len(values),
    "mean": _mean(values),
    "spread": max(values) - min(values) if len(values) > 1 else None,
    "std": statistics.stdev(values) if len(values) > 1 else None,
  }


def _gap(recipe: str, validation: dict[str, dict], runs: dict[str, list[Row]]) -> Row:
  """Relative gap to the baseline, same seed and same step, at the last step that both have."""
  alive = {
    name: {run["seed"]: validation[name][run["seed"]] for run in runs[name] if _has_loss(run)}
    for name in {recipe, BASELINE} & set(runs)
  }
  theirs, ours = alive[recipe], alive.get(BASELINE, {})
  common = {
    seed: max(set(theirs[seed]) & set(ours[seed]), default=-1) for seed in theirs.keys() & ours
  }
  step = max(common.values(), default=-1)

  def paired(at: int) -> list[float]:
    losses = [(theirs[seed].get(at), ours[seed].get(at)) for seed in sorted(common)]
    return [(loss / base - 1) * 100 for loss, base in losses if loss and base]

  percents = paired(step)
  references = [curve[step] for curve in ours.values() if curve.get(step)]
  percent, noise = _mean(percents), None
  if len(references) > 1:
    noise = (max(references) - min(references)) / statistics.fmean(references) * 100
  if recipe == BASELINE:
    verdict = "reference"
  elif any(run["diverged"] for run in runs[recipe]):
    verdict = "diverged"
  elif percent is None:
    verdict = None
  elif noise is None:
    verdict = "one seed: noise unknown"
  else:
    verdict = "within noise" if abs(percent) <= noise else "above noise"
  return {
    "percent": percent,
    "standard_error_percent": _standard_error(percents),
    "step_0_percent": _mean(paired(0)),  # before training: of the forward pass's rounding alone
    "noise_percent": noise,
    "verdict": verdict,
    "step": step if percents else None,
    "seeds": len(percents),
  }


def _has_loss(run: Row) -> bool:
  return run["validation_loss"] is not None


def _median_step_time(timing: list[Row], recipe: str) -> float | None:
  """The first row of every run compiles: left out."""
  times: dict[int, dict[int, float]] = {}
  for row in timing:
    if row["recipe"] == recipe and row.get("step_time_ms") is not None:
      times.setdefault(row["seed"], {})[row["step"]] = row["step_time_ms"]
  warm = [time for run in times.values() for step, time in run.items() if step > min(run)]
  return statistics.median(warm) if warm else None


def _decomposition(probes: list[Row], recipe: str) -> Row:
  """Means over seeds, layers and modules, by GEMM and operand."""
  groups: dict[tuple[str, str], list[Row]] = {}
  last = last_probe_rows(probes, recipe)
  for row in last:
    groups.setdefault((row["gemm"], row["operand"]), []).append(row)
  operands = [
    {
      "gemm": gemm,
      "operand": operand,
      "format": _names(rows, "format"),
      "scale_rule": _names(rows, "scale_rule"),
      "reads_residual": any(map(reads_residual, rows)),
      "lossless": all(is_lossless(row) for row in rows),
      **mean_shares(rows),
      **{name: _mean(row.get(name) for row in rows) for name in RATES},
    }
    for (gemm, operand), rows in groups.items()
  ]
  step = last[0]["step"] if last else None
  return {"step": step, "lost_to_scale": lost_to_scale(last), "operands": operands}


def _names(rows: list[Row], field: str) -> str:
  return ", ".join(sorted({str(row[field]) for row in rows if row.get(field)}))


def _notes(records: Records, runs: dict[str, list[Row]]) -> list[str]:
  """Why something is missing, in sentences."""
  notes = []
  if not any(runs.values()):
    notes.append("No metrics yet: metrics.jsonl is missing or empty.")
  elif not any(_has_loss(run) for run in runs.get(BASELINE, ())):
    notes.append(f"No {BASELINE} validation loss in this workdir, so there are no gaps to it.")
  if not records.probes:
    notes.append("No probe rows, so there is no error decomposition.")
  if not records.environment:
    notes.append("No environment.json: corpus, memory and versions are unknown.")
  return notes


def _mean(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.fmean(known) if known else None


def _standard_error(values: list[float]) -> float | None:
  return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _ratio(value: float | None, reference: float | None) -> float | None:
  return _apply(lambda a, b: a / b, value, reference or None)


def _apply(function: Callable, *values: float | None) -> float | None:
  return None if None in values else function(*values)
