"""Shares of the squared error as stacks, and values by layer as a map, as plain plotly figures.

A stack has a part on top of the other: bars by operand, columns by layer, lines over time. See
report_charts.py for colours and for what a chart is.
"""

import html
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.report_lines import Chart, Figure, line, rule


class Stack(NamedTuple):
  """The error of some quantizations."""

  shares: dict[str, float]  # of the squared error, by part; all 0 where nothing was lost
  sqnr: str  # in words


Parts = dict[Any, Stack]  # by operand, layer, step, ...

PARTS = {  # in the order of a stack: where the first two end, an ideal scale would end
  "grid_noise": "grid noise",
  "deadzone": "deadzone",
  "scale_bias": "scale bias",
  "cross": "cross terms",
}
_ORDER = ("rollout", "forward", "backward", "fprop", "dgrad", "wgrad", "residual")
SHARE = "share of squared error"


def order(place: str) -> tuple[list[int], str]:
  """As a step meets them: "fprop lhs", or "rollout fprop lhs" where there are paths."""
  words = place.split(" ")[:-1] or [place]
  return [_ORDER.index(word) if word in _ORDER else len(_ORDER) for word in words], place


def panels(parts: dict[str, dict[str, Parts]], figure: Callable) -> list[Chart]:
  """One chart per arm; all share the range of their values."""
  every = [own for figures in parts.values() for own in figures.values()]
  shares = [stack.shares for own in every for stack in own.values()]
  low = min([0.0, *(sum(v for v in share.values() if v < 0) for share in shares)])
  high = max([1.0, *(sum(v for v in share.values() if v > 0) for share in shares)])
  if figure is time_figure:  # side by side, not on top of each other
    high = max([1.0, *(v for share in shares for v in share.values())])
  margin = 0.05 * (high - low)
  bounds = [low - margin * (low < 0), high + margin]
  return [
    {"title": arm, "figures": {name: figure(own, bounds) for name, own in figures.items()}}
    for arm, figures in parts.items()
  ]


def bar_figure(parts: Parts, bounds: list[float]) -> Figure:
  """Horizontal stacks, first key on top, with the SQNR at their ends."""
  keys = sorted(parts, key=order)
  names = [html.escape(key) for key in keys]
  traces = [
    _bars(part)
    | {"orientation": "h", "y": names, "x": [parts[key].shares[part] for key in keys]}
    | {"hovertemplate": "%{x:.3f}"}
    for part in PARTS
  ]
  layout = {
    "height": 76 + 26 * max(3, len(keys)),
    "margin": {"r": 60 if any(parts[key].sqnr for key in keys) else 12},
    "xaxis": {"title": {"text": SHARE}, "range": bounds},
    "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False},
    "shapes": [rule("x", 1.0)],
    "annotations": [
      {"text": parts[key].sqnr, "xref": "paper", "x": 1, "y": name, "xanchor": "left"}
      | {"showarrow": False, "font": {"color": "--muted"}}
      for key, name in zip(keys, names, strict=True)
    ],
  }
  return _stacked(traces, layout) if keys else _blank(layout["height"], parts)


def column_figure(parts: Parts, bounds: list[float]) -> Figure:
  """Vertical stacks over layers."""
  keys = sorted(parts)
  traces = [
    _bars(part)
    | {"x": keys, "y": [parts[key].shares[part] for key in keys], "hovertemplate": "%{y:.3f}"}
    for part in PARTS
  ]
  layout = {
    "height": 250,
    "xaxis": {
      "title": {"text": "layer"},
      "dtick": math.ceil(len(keys) / 6) or 1,
      "showgrid": False,
    },
    "yaxis": {"title": {"text": SHARE}, "range": bounds},
    "shapes": [rule("y", 1.0)],
  }
  return (
    _stacked(traces, layout)
    if any(any(own.shares.values()) for own in parts.values())
    else _blank(250, parts)
  )


def time_figure(parts: Parts, bounds: list[float]) -> Figure:
  steps = sorted(step for step, own in parts.items() if any(own.shares.values()))
  traces = []
  for part, label in PARTS.items():
    curve = pd.DataFrame({"mean": [parts[step].shares[part] for step in steps]}, index=steps)
    style = {"color": f"--part-{part}", "dash": "dash" if part == "cross" else "solid"}
    traces.append(line(curve, style, label))
  layout = {
    "height": 250,
    "xaxis": {"title": {"text": "step"}, "showgrid": False},
    "yaxis": {"title": {"text": SHARE}, "range": bounds},
  }
  return {"data": traces, "layout": layout} if steps else _blank(250, parts)


def heatmap(
  values: np.ndarray, x, x_title: str, unit: str, bounds: tuple[float, float], layers=None
) -> Figure:
  """Layers from top to bottom."""
  if not values.size:
    return _blank(220, {})
  layers = range(len(values)) if layers is None else layers
  trace = {
    "type": "heatmap",
    "x": [str(v) for v in x],
    "y": [str(layer) for layer in layers],
    "z": [[None if math.isnan(v) else float(f"{v:.4g}") for v in row] for row in values],
    "zmin": float(bounds[0]),
    "zmax": float(bounds[1]),
    "colorscale": [[0, "--heat-low"], [1, "--heat-high"]],
    "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": unit, "side": "right"}},
    "hovertemplate": f"layer %{{y}}, {x_title} %{{x}}: %{{z}} {unit}<extra></extra>",
  }
  layout = {
    "height": 130 + 18 * min(len(values), 24),
    "hovermode": "closest",
    "xaxis": {"title": {"text": x_title}, "type": "category", "showgrid": False, "nticks": 6},
    "yaxis": {"title": {"text": "layer"}, "type": "category", "autorange": "reversed"},
  }
  return {"data": [trace], "layout": layout}


def _bars(part: str) -> dict:
  fill: dict[str, Any] = {"color": f"--part-{part}"}
  if part == "cross":
    fill = {"color": "--part-cross/26", "pattern": {"shape": "/", "size": 5, "solidity": 0.25}}
    fill["pattern"] |= {"fgcolor": "--part-cross", "fillmode": "overlay"}
  return {"type": "bar", "name": PARTS[part], "marker": fill}


def _stacked(traces: list[dict], layout: dict) -> Figure:
  unified = "y unified" if "orientation" in traces[0] else "x unified"
  return {
    "data": traces,
    "layout": {"barmode": "relative", "bargap": 0.3, "hovermode": unified} | layout,
  }


def _blank(height: int, parts: Parts) -> Figure:
  note = {"text": "no error" if parts else "no values", "xref": "paper", "yref": "paper"}
  note |= {"x": 0.5, "y": 0.5, "showarrow": False, "font": {"color": "--muted"}}
  hidden = {"visible": False}
  layout = {"height": height, "annotations": [note], "xaxis": hidden, "yaxis": hidden}
  return {"data": [], "layout": layout}
