"""The charts of reinforcement learning over steps; see report_charts.py of experiments/."""

from typing import NamedTuple

import pandas as pd

from experiments.records import Records
from experiments.report_charts import ALL, one_arm_a_workdir
from experiments.report_lines import (
  Chart,
  curves_of,
  gap_curves,
  last_points,
  line_figure,
  smoothing_window,
  styles_of,
)
from experiments.rl.summary import ERROR, FLIPS, HEALTHY, REWARD, UNREPLAYED


class Lines(NamedTuple):
  """A chart of a column of "metrics"."""

  title: str
  column: str
  unit: str
  split: str = "train"
  smooth: bool = True
  is_error: bool = False  # on a logarithmic axis, which shows 1.05 beside a hundred


REWARDS = {
  "reward": Lines("Reward in training", "reward", "reward"),
  "accuracy": Lines(
    "Held-out answers worth 1", "accuracy", "share of answers", "held_out", smooth=False
  ),
}
STEPS = {
  "entropy": Lines("Entropy", "entropy", "entropy (nats/token)"),
  "gradients": Lines("Gradient norm", "grad_norm", "gradient norm"),
  "mixed": Lines("Groups whose rewards differ", "groups/mixed", "share of groups"),
  "length": Lines("Length of answers", "length", "tokens"),
  "truncated": Lines("Truncated answers", "truncated", "share of answers"),
  "clipped_tokens": Lines("Clipped tokens", "pg_clipfrac", "share of tokens"),
  "ratio": Lines("Largest ratio to the old policy", "is_ratio/max", "ratio", smooth=False),
  "reference": Lines("Divergence from the start", "kl", "k3 (nats/token)"),
}
BETWEEN = {
  "error": Lines("Probability error", ERROR, ERROR, smooth=False, is_error=True),
  "divergence": Lines("ppo_kl", "ppo_kl", "nats/token"),
  "k3": Lines("rollout_kl", "rollout_kl", "nats/token"),
  "distance": Lines("Mean distance of log-probabilities", "sampler_trainer/logp_diff_mean", "nats"),
  "furthest": Lines(
    "Largest distance of log-probabilities", "sampler_trainer/logp_diff_max", "nats", smooth=False
  ),
  "weights": Lines("Mean importance weight", "sampler_is/weight_mean", "weight"),
  "least": Lines("Smallest importance weight", "sampler_is/weight_min", "weight", smooth=False),
}
_PROBED = {"split": "gap", "smooth": False}
FLIPPED = {
  "tokens": Lines("Tokens with a router flip", FLIPS[0], "share of tokens", **_PROBED),
  "choices": Lines("Choices that flip", FLIPS[1], "share of choices", **_PROBED),
}
WITHOUT_REPLAY = {
  "unreplayed_error": Lines(
    "Probability error without replay", UNREPLAYED + ERROR, ERROR, is_error=True, **_PROBED
  ),
  "unreplayed_divergence": Lines(
    "ppo_kl without replay", UNREPLAYED + "ppo_kl", "nats/token", **_PROBED
  ),
}
SCHEDULES = {
  "noise": Lines("Noise in the rollout", "noise", "standard deviation", smooth=False),
  "rate": Lines("Learning rate", "learning_rate", "learning rate", smooth=False),
}
SECTIONS = {
  "rewards": REWARDS,
  "training": STEPS,
  "between": BETWEEN,
  "flips": FLIPPED,
  "unreplayed": WITHOUT_REPLAY,
  "schedules": SCHEDULES,
}


def curve_charts(records: Records) -> dict[str, Chart]:
  """As far as there are rows: held-out reward, its gap to BF16, and of each of SECTIONS what is not
  the same in all steps of all runs."""
  styles = styles_of(records.arms.values())
  held_out = curves_of(records, "held_out", "reward")
  figures = {
    "held_out": ("Held-out reward", line_figure(held_out, styles, "reward", height=400)),
    "gap": (
      "Gap to BF16 in held-out reward",
      line_figure(gap_curves(records, REWARD), styles, "reward less BF16's", zero=True),
    ),
  }
  same, window = constants(records), smoothing_window(records)
  for name, lines in _drawn(records).items():
    if name not in same:
      curves = curves_of(records, lines.split, lines.column, window if lines.smooth else 1)
      if name == "rate":
        curves = one_arm_a_workdir(records, curves)
      if name == "noise":
        curves = {arm: own for arm, own in curves.items() if own["high"].any()}
      level = ("", HEALTHY) if lines.is_error else None
      figure = line_figure(curves, styles, lines.unit, log=lines.is_error, level=level)
      figures[name] = lines.title, figure
  for name, split in (("held_out", "held_out"), ("reward", "train")):
    if name in figures:
      figures[name][1]["data"] += last_points(records, split, "reward", styles)
  return {
    name: {"title": title, "figures": {ALL: figure}}
    for name, (title, figure) in figures.items()
    if figure["data"]
  }


def constants(records: Records) -> dict[str, float]:
  """By chart, the one value of a column that has no other in any run."""
  values = {name: _values(records, lines) for name, lines in _drawn(records).items()}
  return {
    name: float(own.iloc[0])
    for name, own in values.items()
    if name not in REWARDS and len(own) > 1 and own.nunique() == 1
  }


def _values(records: Records, lines: Lines) -> pd.Series:
  return records.metrics[records.metrics.split == lines.split][lines.column].dropna()


def _drawn(records: Records) -> dict[str, Lines]:
  """Without replay both gaps are one; where no answer is worth a part, both rewards are."""
  replays = any(
    (config.get("rollout") or {}).get("replay_routing") for config in records.configs.values()
  )
  sections = {n: own for n, own in SECTIONS.items() if replays or n != "unreplayed"}
  drawn = {name: lines for own in sections.values() for name, lines in own.items()}
  rows = records.metrics[records.metrics.split == "held_out"]
  if (rows.accuracy == rows.reward).all():
    del drawn["accuracy"]
  return drawn
