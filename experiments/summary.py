"""The numbers of a comparison in pre-training, from the files that runs leave in their workdirs.

Works on a run that is still going or was killed: what can't be known yet is None.
"""

import os
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import gaps, logs
from experiments.records import BASELINE, RUN, Arm, Columns, Records, Row, read

# Shares of one quantization's squared error: these five sum to 1.
SHARES = ["scale_bias", "deadzone", "grid_noise", "cross_scale_grid", "cross_scale_deadzone"]
RATES = ["cosine", "sqnr_db", "gain", "flushed", "clipped"]
PROBES = Columns(
  needed=(*RUN, "layer", "module", "gemm", "operand"),
  numbers=(*SHARES, *RATES),
  words=("format", "scale_rule", "source"),
)
LOGS = {
  "metrics": Columns(
    needed=(*RUN, "split"),
    numbers=(
      "loss",
      "grad_norm",
      "learning_rate",
      "load_balance_loss",
      "router_z_loss",
      "dropped",
    ),
    words=("event", "probe", "load"),
  ),
  "probes": PROBES,
  "timing": Columns(numbers=("step_time_ms",)),
}
LOSS = gaps.Measure("validation", "loss", gaps.percent)


def read_records(*workdirs: str | os.PathLike) -> Records:
  """Raises FileNotFoundError without a config.json, ValueError at a damaged file or line."""
  return read(LOGS, "recipes", *workdirs)


def summarize(*workdirs: str | os.PathLike) -> dict[str, Any]:
  """What summary.json holds: plain values, losses in nats per token, by arm and by workdir."""
  return summarize_records(read_records(*workdirs))


def summarize_records(records: Records) -> dict[str, Any]:
  arms = records.arms
  runs = {name: gaps.runs_of(records, arm, LOSS) for name, arm in arms.items()}
  facts = {name: _facts(own, records.environments[name]) for name, own in records.configs.items()}
  saved = {
    name: records.of_arm(arm, "saved_activation_bytes_per_token") for name, arm in arms.items()
  }
  at_peak = {name: records.of_arm(arm, "gemm_seconds_at_peak") for name, arm in arms.items()}
  step_times = {name: gaps.median_time(records.timing, name) for name in arms}
  recipes = {}
  for name, arm in arms.items():
    loss = gaps.mean_of_runs(runs[name], LOSS.value, LOSS.step)
    entropy = facts[arm.workdir]["unigram_entropy_nats"]
    below = None if None in (entropy, loss["mean"]) else entropy - loss["mean"]
    recipes[name] = {
      "workdir": arm.workdir,
      "steps": arm.steps,
      "seeds": arm.seeds,
      "seeds_finished": sum(run["finished"] for run in runs[name]),
      "last_step": max((run["last_step"] for run in runs[name]), default=None),
      "runs": runs[name],
      "train_loss": gaps.mean_of_runs(runs[name], LOSS.train, "last_step"),
      "validation_loss": loss,
      "gap": _gap(records, arm, runs),
      "nats_below_unigram": below,
      "saved_activation_bytes_per_token": saved[name],
      "saved_activation_ratio": ratio(saved[name], saved.get(arm.baseline)),
      "step_time_ms": step_times[name],
      "step_time_ratio": ratio(step_times[name], step_times.get(arm.baseline)),
      "flops_utilization": ratio(at_peak[name], step_times[name] / 1000),
      "decomposition": decomposition(records.probes, name),
    }
  told = notes(records, runs, LOSS, "validation loss")
  return logs.plain({"workdirs": facts, "notes": told, "recipes": recipes})


def write_summary(workdir: str | os.PathLike) -> Path:
  path = Path(workdir) / "summary.json"
  logs.write_json(path, summarize(workdir))
  return path


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


def facts_of(config: dict[str, Any], environment: dict[str, Any]) -> Row:
  """What the head of a page tells of a workdir."""
  names = ("parameters", "active_parameters", "device")
  return {"steps": config.get("steps")} | {name: environment.get(name) for name in names}


def _facts(config: dict[str, Any], environment: dict[str, Any]) -> Row:
  corpus = environment.get("corpus") or {}
  entropy = {"unigram_entropy_nats": corpus.get("unigram_entropy_nats")}
  return facts_of(config, environment) | entropy


def _gap(records: Records, arm: Arm, runs: dict[str, list[Row]]) -> Row:
  """In percent of BF16's loss."""
  gap = gaps.gap_of(records, arm, runs, LOSS)
  return {
    "percent": gap["mean"],
    "interval_percent": gap["interval"],
    "seeds": gap["seeds"],
    "step": gap["step"],
    "step_0_percent": gap["step_0"],
    "verdict": gap["verdict"],
  }


def place_columns(probes: pd.DataFrame) -> list[str]:
  """What tells where a quantization is: the path, if runs have several, the GEMM, the operand."""
  return [name for name in ("path", "gemm", "operand") if name in probes]


def decomposition(probes: pd.DataFrame, recipe: str) -> Row:
  """Means over seeds, layers and modules, by `place_columns`."""
  last = last_probe_rows(probes, recipe)
  columns = place_columns(last)
  operands = [
    {
      **dict(zip(columns, place, strict=True)),
      "format": _listed(rows.format),
      "scale_rule": _listed(rows.scale_rule),
      "reads_residual": reads_residual(rows),
      "lossless": is_lossless(rows),
      **mean_shares(rows),
      **rows[RATES].mean(),
    }
    for place, rows in last.groupby(columns, sort=False)
  ]
  step = last.step.max() if len(last) else None
  return {"step": step, "lost_to_scale": lost_to_scale(last), "operands": operands}


def _listed(names: pd.Series) -> str:
  return ", ".join(sorted(map(str, names.dropna().unique())))


def notes(
  records: Records, runs: dict[str, list[Row]], measure: gaps.Measure, what: str
) -> list[str]:
  """Why something is missing, in sentences; `what` is `measure` in words."""
  told = []
  for workdir in records.configs:
    where = f" in {workdir}" if len(records.configs) > 1 else ""
    own = [arm for arm in records.arms.values() if arm.workdir == workdir]
    scored = [a.name for a in own if any(r[measure.value] is not None for r in runs[a.name])]
    if not any(runs[arm.name] for arm in own):
      told.append(f"No metrics yet{where}: its runs have no metrics.jsonl, or empty ones.")
    elif not any(arm.name == arm.baseline for arm in own if arm.name in scored):
      told.append(f"No {what} of {BASELINE}{where}, so there are no gaps to it.")
    if not records.environments[workdir]:
      told.append(f"No environment.json{where}, so it is unknown what its runs ran on.")
  if records.probes.empty:
    told.append("No probe rows, so there is no error decomposition.")
  return told


def ratio(value: float | None, reference: float | None) -> float | None:
  return value / reference if value and reference else None
