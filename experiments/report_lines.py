"""Lines over steps: an arm's mean over its seeds, the band of its seeds, its name at the end."""

import html
import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from experiments.gaps import MIN_SEEDS, Measure, interval, paired
from experiments.records import Arm, Records

Figure = dict[str, Any]
Chart = dict[str, Any]  # see report_charts.py
Curve = pd.DataFrame  # by step: mean, and low and high of the band

RECIPE_COLOURS = 4
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_POINTS = 300
LINE_HEIGHT = 15  # pixels of a name at the end of a line


def styles_of(arms: Iterable[Arm]) -> dict[str, dict[str, str]]:
  """Colour and dash by arm, the same in every chart: a recipe has a colour, a workdir a dash."""
  arms = list(arms)
  recipes = list(dict.fromkeys(arm.recipe for arm in arms if arm.name != arm.baseline))
  workdirs = list(dict.fromkeys(arm.workdir for arm in arms))
  styles = {}
  for arm in arms:
    color, turn = "--baseline", 0
    if arm.name != arm.baseline:
      turn, i = divmod(recipes.index(arm.recipe), RECIPE_COLOURS)
      color = f"--recipe-{i}"
    dash = DASHES[(turn + workdirs.index(arm.workdir)) % len(DASHES)]
    styles[arm.name] = {"color": color, "dash": dash, "recipe": arm.name}
  return styles


def over_seeds(rows: pd.DataFrame, name: str, window: int = 1) -> Curve:
  """Running mean of every seed, then mean and range over the seeds that have the step.

  Several rows of one step (layers, operands) are averaged. A window that meets a value that is not
  finite has no mean.
  """
  of_run = rows.groupby(["seed", "step"])[name].mean()
  if window > 1:
    near, all_near = (
      values.groupby("seed").rolling(window, center=True, min_periods=1)
      for values in (of_run, of_run.fillna(0))
    )
    of_run = near.mean().where(near.count() == all_near.count()).droplevel(0)
  return seed_bands(of_run.dropna())


def seed_bands(values: pd.Series) -> Curve:
  """Mean and range by step of values by (seed, step)."""
  bands = values.groupby("step").agg(["mean", "min", "max"])
  return bands.set_axis(["mean", "low", "high"], axis=1)


def smoothing_window(records: Records) -> int:
  """Rows averaged at every point of the curves of training steps: 3 % of a run's rows."""
  train = records.metrics[records.metrics.split == "train"]
  longest = train.groupby(["recipe", "seed"]).size().max() if len(train) else 0
  return max(1, round(0.03 * longest))


def curves_of(records: Records, split: str, column: str, window: int = 1) -> dict[str, Curve]:
  """A column of the rows of "metrics" with that split, by arm."""
  own = records.metrics[records.metrics.split == split]
  return {arm: over_seeds(own[own.recipe == arm], column, window) for arm in records.arms}


def gap_curves(records: Records, measure: Measure) -> dict[str, Curve]:
  """Mean gaps to BF16; the band is the interval, of fewer than MIN_SEEDS seeds their range."""
  curves = {}
  for arm in records.arms.values():
    if arm.name != arm.baseline:
      gaps = paired(records, arm, measure)
      curve = seed_bands(gaps)
      for step, own in gaps.groupby("step"):
        if len(own) >= MIN_SEEDS:
          curve.loc[step, ["low", "high"]] = interval(own.tolist())
      curves[arm.name] = curve
  return curves


def line_figure(
  curves: dict[str, Curve],
  styles: dict,
  unit: str,
  *,
  height: int = 320,
  log: bool = False,
  level: tuple[str, float] | None = None,
  zero: bool = False,
) -> Figure:
  """Mean lines with bands over seeds and names at their ends.

  `level` is a value with its name, "" where a caption tells it, for a rule across the plot; `zero`
  asks for one at 0. A style names, as `recipe`, the arm that a curve is hidden with.
  """
  scale = math.log10 if log else float
  curves = {arm: _thinned(curve) for arm, curve in curves.items() if len(curve)}
  values = [v for curve in curves.values() for v in curve.to_numpy().ravel()]
  if not values or (log and min(values) <= 0):
    return {"data": [], "layout": {}}
  if level is not None:
    values.append(level[1])
  values += [0.0] * zero
  low, high = scale(min(values)), scale(max(values))
  if low == high:
    low, high = low - 0.5, high + 0.5
  last = {arm: curve["mean"].iloc[-1] for arm, curve in curves.items()}
  ends = sorted(curves, key=last.get)
  at = [scale(last[arm]) for arm in ends]
  for _ in range(5):  # the room that names take makes a pixel more of the axis
    at = _spread_out(at, apart=LINE_HEIGHT * 1.12 * (high - low) / (height - 60))
    low, high = min(low, at[0]), max(high, at[-1])
  margin = 0.06 * (high - low)

  bands = [_band(c, styles[arm]) for arm, c in curves.items() if (c.low < c.high).any()]
  lines = [line(curve, styles[arm], arm) for arm, curve in curves.items()]
  names = [
    {
      "type": "scatter",
      "mode": "text",
      "meta": "label",
      "legendgroup": styles[arm]["recipe"],
      "x": [int(curves[arm].index[-1])],
      "y": [10**y if log else y],
      "text": [f"  {html.escape(arm)}"],
      "textposition": "middle right",
      "textfont": {"color": styles[arm]["color"], "size": 12},
      "cliponaxis": False,
      "hoverinfo": "skip",
    }
    for arm, y in zip(ends, at, strict=True)
  ]
  yaxis = {"title": {"text": unit}, "range": [low - margin, high + margin]}
  if max(map(abs, values)) < 1e-2:
    yaxis["exponentformat"] = "e"  # plotly would write 200µ
  layout = {
    "height": height,
    "margin": {"r": 16 + 7 * max(map(len, curves))},
    "xaxis": {"title": {"text": "step"}, "showgrid": False},
    "yaxis": yaxis | ({"type": "log"} if log else {}),
    "shapes": [rule("y", 0.0)] * zero,
  }
  if level is not None:
    name, at = level
    layout["shapes"].append(rule("y", at))
    if name:
      text = {"text": f"{html.escape(name)} {at:.2f}", "font": {"color": "--muted"}}
      place = {"xref": "paper", "x": 1, "y": scale(at), "xanchor": "right", "yanchor": "bottom"}
      layout["annotations"] = [text | place | {"showarrow": False}]
  return {"data": bands + lines + names, "layout": layout}


def line(curve: Curve, style: dict, name: str) -> dict:
  return {
    "type": "scatter",
    "mode": "lines+markers" if len(curve) < 30 else "lines",
    "name": html.escape(name),
    "legendgroup": style.get("recipe", name),
    "x": curve.index.tolist(),
    "y": shorts(curve["mean"]),
    "line": {"color": style["color"], "dash": style["dash"], "width": 2},
    "marker": {"color": style["color"], "size": 5},
    "hovertemplate": "%{y:.5~g}",
  }


def last_points(records: Records, split: str, column: str, styles: dict) -> list[dict]:
  """A cross at the last finite value of each run that diverged."""
  metrics, crosses = records.metrics, []
  for _, event in metrics[metrics.event == "diverged"].iterrows():
    of_run = (metrics.recipe == event.recipe) & (metrics.seed == event.seed)
    own = metrics[of_run & (metrics.split == split)].set_index("step")[column]
    crosses += _last_point(own, styles[event.recipe])
  return crosses


def _last_point(curve: pd.Series, style: dict) -> list[dict]:
  finite = curve.dropna()
  if finite.empty:
    return []
  return [
    {
      "type": "scatter",
      "mode": "markers",
      "meta": "mark",  # the line has this point
      "legendgroup": style["recipe"],
      "x": [int(finite.index[-1])],
      "y": [float(finite.iloc[-1])],
      "marker": {"color": style["color"], "symbol": "x", "size": 9},
      "hoverinfo": "skip",
    }
  ]


def _band(curve: Curve, style: dict) -> dict:
  steps = curve.index.tolist()
  return {
    "type": "scatter",
    "mode": "lines",
    "legendgroup": style["recipe"],
    "x": steps + steps[::-1],
    "y": shorts(curve.high) + shorts(curve.low[::-1]),
    "line": {"width": 0},
    "fill": "toself",
    "fillcolor": f"{style['color']}/2e",
    "hoverinfo": "skip",
  }


def _thinned(curve: Curve) -> Curve:
  """The last step is always kept."""
  stride = max(1, math.ceil(len(curve) / MAX_POINTS))
  return curve[::-1][::stride][::-1]


def _spread_out(values: list[float], apart: float) -> list[float]:
  """Ascending positions at least `apart`, each group of neighbours centred on its values."""
  groups: list[tuple[list[float], float]] = []  # values and the position of the first
  for value in values:
    groups.append(([value], value))
    while len(groups) > 1:
      (below, start), (own, first) = groups[-2:]
      if first - (start + apart * (len(below) - 1)) >= apart:
        break
      joined = below + own
      first = sum(joined) / len(joined) - apart * (len(joined) - 1) / 2
      groups[-2:] = [(joined, first)]
  return [start + apart * i for own, start in groups for i in range(len(own))]


def rule(axis: str, at: float) -> dict:
  """Dashed line across the plot at y or x = `at`."""
  other = {"x": "y", "y": "x"}[axis]
  place = {f"{axis}0": at, f"{axis}1": at, f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1}
  return {"type": "line", "line": {"color": "--muted", "width": 1, "dash": "dash"}} | place


def shorts(values: Iterable[float]) -> list[float]:
  """Six significant digits: what a chart can show."""
  return [float(f"{value:.6g}") for value in values]
