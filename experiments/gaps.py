"""What the seeds tell of arms: how far each is from the baseline, and whether that is told apart.

Gaps are paired: the same seed, the same step.
"""

import dataclasses
from collections.abc import Callable

import pandas as pd
from scipy.special import stdtrit

from experiments import logs
from experiments.records import Arm, Records, Row

MIN_SEEDS = 3  # for an interval
CONFIDENCE = 0.95
# What a gap can say of an arm; the rest is why it says nothing.
ABOVE, BELOW, SAME = "above BF16", "below BF16", "not told apart"
UNFINISHED, DIVERGED, TOO_FEW = "not finished", "diverged", "too few seeds"


@dataclasses.dataclass(frozen=True)
class Measure:
  """What arms are compared by: a number of the rows of "metrics" that evaluate."""

  split: str
  column: str
  gap: Callable[[pd.Series, pd.Series], pd.Series]  # of an arm's values and the baseline's

  @property
  def value(self) -> str:
    """Its name in the summary of a run: at the last evaluation, which is at step `step`."""
    return f"{self.split}_{self.column}"

  @property
  def step(self) -> str:
    return f"{self.split}_step"

  @property
  def train(self) -> str:
    """The name of the same column of a training step."""
    return f"train_{self.column}"


def percent(own: pd.Series, baseline: pd.Series) -> pd.Series:
  return 100 * (own / baseline - 1)


def difference(own: pd.Series, baseline: pd.Series) -> pd.Series:
  return own - baseline


def interval(values: list[float]) -> tuple[float, float] | None:
  """Student's confidence interval of the mean; None of fewer than MIN_SEEDS values."""
  if len(values) < MIN_SEEDS:
    return None
  series = pd.Series(values)
  half = stdtrit(len(series) - 1, (1 + CONFIDENCE) / 2) * series.sem()
  return series.mean() - half, series.mean() + half


def paired(records: Records, arm: Arm, measure: Measure) -> pd.Series:
  """Gaps by (seed, step)."""
  rows = records.metrics[records.metrics.split == measure.split]
  values = rows.set_index(["recipe", "seed", "step"])[measure.column].sort_index()
  if arm.baseline is None or not {arm.name, arm.baseline} <= set(values.index.levels[0]):
    return pd.Series(dtype=float, index=pd.MultiIndex.from_tuples([], names=["seed", "step"]))
  return measure.gap(values.loc[arm.name], values.loc[arm.baseline]).dropna()


def runs_of(records: Records, arm: Arm, measure: Measure) -> list[Row]:
  """One entry per seed; a run that diverged has no final values."""
  runs = []
  own = records.metrics[records.metrics.recipe == arm.name]
  for seed, rows in own.groupby("seed"):
    train = rows[rows.split == "train"].set_index("step")[measure.column]
    scores = rows[rows.split == measure.split].set_index("step")[measure.column]
    events = rows[rows.event == "diverged"]
    diverged = None
    if len(events):
      diverged = events.iloc[0][["step", "probe"]].to_dict()
    last = scores.index.max() if len(scores) else None
    runs.append(
      {
        "seed": seed,
        "last_step": rows.step.max(),
        # The last step is always evaluated.
        "finished": bool(arm.steps is not None and last is not None and last >= arm.steps),
        measure.train: None if diverged else mean_at_end(train, arm),
        measure.value: None if diverged or last is None else scores[last],
        measure.step: last,
        "diverged": diverged,
      }
    )
  return logs.plain(runs)


def mean_at_end(values: pd.Series, arm: Arm) -> float:
  """Of values by step: over the last tenth of the planned steps, counted back from the last."""
  window = values[values.index > values.index.max() - max(0.1 * (arm.steps or 0), 1)]
  return window.mean(skipna=False)


def mean_of_runs(runs: list[Row], name: str, step_name: str) -> Row:
  """Mean and spread over the seeds that got furthest; runs with no value are left out."""
  known = [run for run in runs if run[name] is not None]
  step = max((run[step_name] for run in known), default=None)
  values = pd.Series([run[name] for run in known if run[step_name] == step], dtype=float)
  found = {"step": step, "seeds": len(values), "mean": values.mean(), "std": values.std()}
  return logs.plain(found)


def gap_of(records: Records, arm: Arm, runs: dict[str, list[Row]], measure: Measure) -> Row:
  """The mean gap at the last step that arm and baseline both reached, of `runs` by arm."""
  diverged = {run["seed"] for run in runs[arm.name] if run["diverged"]}
  gaps = paired(records, arm, measure)
  gaps = gaps[~gaps.index.isin(diverged, level="seed")]
  step = gaps.index.get_level_values("step").max() if len(gaps) else None
  values = gaps.xs(step, level="step").tolist() if len(gaps) else []
  untrained = gaps[gaps.index.get_level_values("step") == 0]
  bounds = interval(values)
  found = {
    "mean": pd.Series(values, dtype=float).mean(),
    "interval": bounds,
    "seeds": len(values),
    "step": step,
    "step_0": untrained.mean(),  # before training: of the rounding of the forward pass alone
    "verdict": _verdict(arm, records.arms.get(arm.baseline), runs, bounds, len(values)),
  }
  return logs.plain(found)


def median_time(timing: pd.DataFrame, arm: str, column: str = "step_time_ms") -> float:
  """NaN without rows. The first row of every run compiles: left out."""
  own = timing[timing.recipe == arm]
  later = own[own.step > own.groupby("seed").step.transform("min")]
  return later[column].median()


def _verdict(
  arm: Arm,
  bf16: Arm | None,
  runs: dict[str, list[Row]],
  bounds: tuple[float, float] | None,
  seeds: int,
) -> str | None:
  if arm.name == arm.baseline:
    return "reference"
  if any(run["diverged"] for run in runs[arm.name]):
    return DIVERGED
  if bf16 is None:
    return None
  finished, of_bf16 = (
    {run["seed"] for run in runs[each.name] if run["finished"]} for each in (arm, bf16)
  )
  # Seeds that were never asked of BF16 wait for nothing; the gap leaves them out.
  lacks = [seed for seed in finished - of_bf16 if bf16.seeds is None or seed < bf16.seeds]
  if len(finished) < (arm.seeds or 0) or lacks:
    return UNFINISHED
  if bounds is None:
    return TOO_FEW if seeds else None
  return ABOVE if bounds[0] > 0 else BELOW if bounds[1] < 0 else SAME
