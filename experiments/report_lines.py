"""Lines over steps: a recipe's mean over its seeds, the band of its seeds, its name at the end."""

import html
import math
from collections.abc import Iterable
from typing import Any

from experiments.summary import BASELINE, Row

Figure = dict[str, Any]
Curve = list[tuple[int, float, float, float]]  # step; mean, lowest and highest over seeds

RECIPE_COLOURS = 4
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_POINTS = 300
LINE_HEIGHT = 15  # pixels of a name at the end of a line


def recipe_styles(recipes: Iterable[str]) -> dict[str, dict[str, str]]:
  """Colour and dash by recipe, the same in every chart."""
  styles = {BASELINE: {"color": "--baseline", "dash": "solid"}}
  for i, recipe in enumerate(recipe for recipe in recipes if recipe != BASELINE):
    dash = DASHES[i // RECIPE_COLOURS % len(DASHES)]
    styles[recipe] = {"color": f"--recipe-{i % RECIPE_COLOURS}", "dash": dash}
  return styles


def by_seed(rows: list[Row], name: str) -> dict[int, dict[int, float | None]]:
  """Value by seed and step; several rows of one step (layers, operands) are averaged."""
  values: dict[int, dict[int, list[float]]] = {}
  for row in rows:
    own = values.setdefault(row["seed"], {}).setdefault(row["step"], [])
    own += [row[name]] if row.get(name) is not None else []
  return {
    seed: {step: sum(v) / len(v) if v else None for step, v in sorted(own.items())}
    for seed, own in values.items()
  }


def over_seeds(curves: dict[int, dict[int, float | None]], window: int = 1) -> Curve:
  """Running mean of every seed, then mean and range over the seeds that have the step."""
  smooth: dict[int, list[float]] = {}
  for curve in curves.values():
    values = list(curve.values())
    for i, step in enumerate(curve):
      near = values[max(0, i - window // 2) : i + (window + 1) // 2]
      if None not in near:
        smooth.setdefault(step, []).append(sum(near) / len(near))
  steps = sorted(smooth)
  stride = max(1, math.ceil(len(steps) / MAX_POINTS))
  steps = steps[::-1][::stride][::-1]  # the last step is always kept
  return [(s, sum(smooth[s]) / len(smooth[s]), min(smooth[s]), max(smooth[s])) for s in steps]


def line_figure(
  curves: dict[str, Curve],
  styles: dict,
  unit: str,
  *,
  height: int = 320,
  log: bool = False,
  level: float | None = None,
) -> Figure:
  """Mean lines with bands over seeds and names at their ends; `level`: the unigram entropy.

  A style may name, as `recipe`, the recipe that a curve is hidden with.
  """
  scale = math.log10 if log else float
  curves = {recipe: curve for recipe, curve in curves.items() if curve}
  values = [v for curve in curves.values() for point in curve for v in point[1:]]
  if not values or (log and min(values) <= 0):
    return {"data": [], "layout": {}}
  values += [] if level is None else [level]
  low, high = scale(min(values)), scale(max(values))
  ends = sorted(curves, key=lambda recipe: curves[recipe][-1][1])
  at = [scale(curves[recipe][-1][1]) for recipe in ends]
  at = _spread_out(at, apart=LINE_HEIGHT * 1.12 * (high - low) / (height - 60))
  low, high = min(low, at[0]), max(high, at[-1])
  margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0

  bands = [_band(curve, styles[r], r) for r, curve in curves.items() if _is_spread(curve)]
  lines = [line(curve, styles[recipe], recipe) for recipe, curve in curves.items()]
  names = [
    {
      "type": "scatter",
      "mode": "text",
      "meta": "label",
      "legendgroup": styles[recipe].get("recipe", recipe),
      "x": [curves[recipe][-1][0]],
      "y": [10**y if log else y],
      "text": [f"  {html.escape(recipe)}"],
      "textposition": "middle right",
      "textfont": {"color": styles[recipe]["color"], "size": 12},
      "cliponaxis": False,
      "hoverinfo": "skip",
    }
    for recipe, y in zip(ends, at, strict=True)
  ]
  yaxis = {"title": {"text": unit}, "range": [low - margin, high + margin]}
  layout = {
    "height": height,
    "margin": {"r": 16 + 7 * max(map(len, curves))},
    "xaxis": {"title": {"text": "step"}, "showgrid": False},
    "yaxis": yaxis | ({"type": "log", "dtick": "D2"} if log else {}),
  }
  if level is not None:
    layout["shapes"] = [rule("y", level)]
    text = {"text": f"unigram entropy {level:.2f}", "font": {"color": "--muted"}}
    place = {"xref": "paper", "x": 1, "y": level, "xanchor": "right", "yanchor": "bottom"}
    layout["annotations"] = [text | place | {"showarrow": False}]
  return {"data": bands + lines + names, "layout": layout}


def _is_spread(curve: Curve) -> bool:
  return any(lowest < highest for _, _, lowest, highest in curve)


def line(curve: Curve, style: dict, recipe: str) -> dict:
  return {
    "type": "scatter",
    "mode": "lines+markers" if len(curve) < 30 else "lines",
    "name": html.escape(recipe),
    "legendgroup": style.get("recipe", recipe),
    "x": [point[0] for point in curve],
    "y": [short(point[1]) for point in curve],
    "line": {"color": style["color"], "dash": style["dash"], "width": 2},
    "marker": {"color": style["color"], "size": 5},
    "hovertemplate": "%{y:.5~g}",
  }


def last_point(curve: dict[int, float | None], style: dict, recipe: str) -> list[dict]:
  """A cross at the last finite value of a run that diverged."""
  finite = {step: value for step, value in curve.items() if value is not None}
  if not finite:
    return []
  return [
    {
      "type": "scatter",
      "mode": "markers",
      "legendgroup": recipe,
      "x": [max(finite)],
      "y": [finite[max(finite)]],
      "marker": {"color": style["color"], "symbol": "x", "size": 9},
      "hoverinfo": "skip",
    }
  ]


def _band(curve: Curve, style: dict, recipe: str) -> dict:
  steps = [point[0] for point in curve]
  return {
    "type": "scatter",
    "mode": "lines",
    "legendgroup": style.get("recipe", recipe),
    "x": steps + steps[::-1],
    "y": [short(point[3]) for point in curve] + [short(point[2]) for point in curve[::-1]],
    "line": {"width": 0},
    "fill": "toself",
    "fillcolor": f"{style['color']}/2e",
    "hoverinfo": "skip",
  }


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


def short(value: float) -> float:
  """Six significant digits: what a chart can show."""
  return float(f"{value:.6g}")
