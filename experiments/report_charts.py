"""The charts of a report as plain plotly figures.

A chart is {"title", "figures"}: one figure for each choice of operand, or only one under ALL.
The page completes them: it draws what is common to all and resolves colours, which are names of
its CSS variables, `--recipe-1` or with an alpha byte `--recipe-1/33`.
"""

import html
import math
from collections.abc import Callable, Iterable
from typing import Any

from experiments.summary import (
  BASELINE,
  Records,
  Row,
  is_lossless,
  last_probe_rows,
  mean_shares,
)

Chart = dict[str, Any]
Figure = dict[str, Any]
Curve = list[tuple[int, float, float, float]]  # step; mean, lowest and highest over seeds
Parts = dict[Any, dict[str, float]]  # shares of the squared error, by operand, layer, step, ...

PARTS = {
  "scale_bias": "scale bias",
  "deadzone": "deadzone",
  "grid_noise": "grid noise",
  "cross": "cross terms",
}
GEMMS = ("fprop", "dgrad", "wgrad", "residual")
ALL = "all operands"
RECIPE_COLOURS = 4
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_POINTS = 300
LINE_HEIGHT = 15  # pixels of a name at the end of a line
SHARE = "share of squared error"


def recipe_styles(recipes: Iterable[str]) -> dict[str, dict[str, str]]:
  """Colour and dash by recipe, the same in every chart."""
  styles = {BASELINE: {"color": "--baseline", "dash": "solid"}}
  for i, recipe in enumerate(recipe for recipe in recipes if recipe != BASELINE):
    dash = DASHES[i // RECIPE_COLOURS % len(DASHES)]
    styles[recipe] = {"color": f"--recipe-{i % RECIPE_COLOURS}", "dash": dash}
  return styles


def smoothing_window(records: Records) -> int:
  """Rows averaged at every point of the train curves: 3 % of a run's rows."""
  counts: dict[tuple, int] = {}
  for row in records.metrics:
    if row["split"] == "train":
      counts[row["recipe"], row["seed"]] = counts.get((row["recipe"], row["seed"]), 0) + 1
  return max(1, round(0.03 * max(counts.values(), default=0)))


def curve_charts(records: Records, unigram_entropy: float | None) -> dict[str, Chart]:
  """Over steps: validation loss, its gap to the baseline, train loss, gradient norm; if any."""
  styles = recipe_styles(records.recipes)
  window = smoothing_window(records)
  rows: dict[str, dict[str, list[Row]]] = {"train": {}, "validation": {}}
  for row in records.metrics:
    rows.get(row["split"], {}).setdefault(row["recipe"], []).append(row)

  def curves(split: str, name: str, window: int = 1) -> dict[str, Curve]:
    return {r: _over_seeds(_by_seed(own, name), window) for r, own in rows[split].items()}

  diverged = {(r["recipe"], r["seed"]) for r in records.metrics if r.get("event") == "diverged"}
  loss = "loss (nats/token)"
  validation = curves("validation", "loss")
  figures = {
    "validation": _line_figure(validation, styles, loss, height=400, level=unigram_entropy),
    "gap": _line_figure(_gap_curves(rows["validation"]), styles, "gap to BF16 (%)"),
    "train": _line_figure(curves("train", "loss", window), styles, loss),
    "gradients": _line_figure(
      curves("train", "grad_norm", window), styles, "gradient norm", log=True
    ),
  }
  for split in ("validation", "train"):
    for recipe, seed in sorted(diverged):
      own = _by_seed(rows[split].get(recipe, []), "loss").get(seed, {})
      figures[split]["data"] += _last_point(own, styles[recipe], recipe)
  titles = {
    "validation": "Validation loss",
    "gap": "Validation gap to BF16",
    "train": "Train loss",
    "gradients": "Gradient norm",
  }
  return {
    name: {"title": titles[name], "figures": {ALL: figure}}
    for name, figure in figures.items()
    if figure["data"]
  }


def probe_charts(records: Records) -> dict[str, list[Chart]]:
  """The error decomposition, one panel a recipe (`operands`, `layers`, `modules`, `time`); SQNR."""
  rows: dict[str, dict[str, list[Row]]] = {}  # by recipe and operand
  for row in records.probes:
    own = rows.setdefault(row["recipe"], {ALL: []})
    own[ALL].append(row)
    own.setdefault(_operand(row), []).append(row)
  if not rows:
    return {}
  names = sorted({name for own in rows.values() for name in own if name != ALL}, key=_order)
  last = {recipe: last_probe_rows(own[ALL], recipe) for recipe, own in rows.items()}
  steps = {recipe: own[0]["step"] for recipe, own in last.items() if own}
  styles = recipe_styles(records.recipes)

  def panels(figure: Callable, key: Callable[[Row], Any], whole_run: bool = False) -> list[Chart]:
    parts = {}
    for recipe, step in steps.items():
      parts[recipe] = {}
      for name in [ALL, *names]:
        own = rows[recipe].get(name, [])
        own = own if whole_run else [row for row in own if row["step"] == step]
        parts[recipe][name] = _grouped(own, key)
    return _panels(parts, figure)

  sqnr = {}
  for name in [ALL, *names]:
    curves = {r: _over_seeds(_by_seed(own.get(name, []), "sqnr_db")) for r, own in rows.items()}
    sqnr[name] = _line_figure(curves, styles, "SQNR (dB)", height=360)
  by_operand = {recipe: {ALL: _grouped(last[recipe], _operand)} for recipe in steps}
  return {
    "operands": _panels(by_operand, _bar_figure),
    "layers": panels(_column_figure, lambda row: row["layer"]),
    "modules": panels(_bar_figure, lambda row: row["module"]),
    "time": panels(_time_figure, lambda row: row["step"], whole_run=True),
    "sqnr": [{"title": "SQNR", "figures": sqnr}],
  }


def _operand(row: Row) -> str:
  return f"{row['gemm']} {row['operand']}"


def _order(operand: str) -> tuple[int, str]:
  gemm = operand.split(" ")[0]
  return (GEMMS.index(gemm) if gemm in GEMMS else len(GEMMS), operand)


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> Parts:
  """Mean shares by key, both cross terms added up; all 0 where no row lost anything."""
  groups: dict[Any, list[Row]] = {}
  for row in rows:
    groups.setdefault(key(row), []).append(row)
  parts = {}
  for name, own in groups.items():
    shares = mean_shares(own)
    if shares["scale_bias"] is not None:
      shares["cross"] = shares["cross_scale_grid"] + shares["cross_scale_deadzone"]
      parts[name] = {part: _short(shares[part]) for part in PARTS}
    elif all(is_lossless(row) for row in own):
      parts[name] = dict.fromkeys(PARTS, 0.0)
  return parts


def _by_seed(rows: list[Row], name: str) -> dict[int, dict[int, float | None]]:
  """Value by seed and step; several rows of one step (layers, operands) are averaged."""
  values: dict[int, dict[int, list[float]]] = {}
  for row in rows:
    own = values.setdefault(row["seed"], {}).setdefault(row["step"], [])
    own += [row[name]] if row.get(name) is not None else []
  return {
    seed: {step: sum(v) / len(v) if v else None for step, v in sorted(own.items())}
    for seed, own in values.items()
  }


def _over_seeds(curves: dict[int, dict[int, float | None]], window: int = 1) -> Curve:
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


def _gap_curves(rows: dict[str, list[Row]]) -> dict[str, Curve]:
  """Gap to the baseline in percent, paired by seed and step; the baseline: 0 ± its seed spread."""
  runs = {recipe: _by_seed(own, "loss") for recipe, own in rows.items()}
  reference = runs.pop(BASELINE, {})
  curves = {}
  for recipe, seeds in runs.items():
    gaps: dict[int, dict[int, float | None]] = {}
    for seed in seeds.keys() & reference:
      paired = [(step, reference[seed].get(step), loss) for step, loss in seeds[seed].items()]
      gaps[seed] = {s: (loss / base - 1) * 100 for s, base, loss in paired if base and loss}
    curves[recipe] = _over_seeds(gaps)
  if any(curves.values()):
    noise = [(s, (high - low) / mean * 100) for s, mean, low, high in _over_seeds(reference)]
    curves[BASELINE] = [(step, 0.0, -spread, spread) for step, spread in noise]
  return curves


def _line_figure(
  curves: dict[str, Curve],
  styles: dict,
  unit: str,
  *,
  height: int = 320,
  log: bool = False,
  level: float | None = None,
) -> Figure:
  """Mean lines with bands over seeds and names at their ends; `level`: the unigram entropy."""
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

  bands = [_band(curve, styles[r]["color"], r) for r, curve in curves.items() if _is_spread(curve)]
  lines = [_line(curve, styles[recipe], recipe) for recipe, curve in curves.items()]
  names = [
    {
      "type": "scatter",
      "mode": "text",
      "meta": "label",
      "legendgroup": recipe,
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
    "margin": {"r": 24 + 7 * max(map(len, curves))},
    "xaxis": {"title": {"text": "step"}, "showgrid": False},
    "yaxis": yaxis | ({"type": "log", "dtick": "D2"} if log else {}),
  }
  if level is not None:
    layout["shapes"] = [_rule("y", level)]
    text = {"text": f"unigram entropy {level:.2f}", "font": {"color": "--muted"}}
    place = {"xref": "paper", "x": 1, "y": level, "xanchor": "right", "yanchor": "bottom"}
    layout["annotations"] = [text | place | {"showarrow": False}]
  return {"data": bands + lines + names, "layout": layout}


def _is_spread(curve: Curve) -> bool:
  return any(lowest < highest for _, _, lowest, highest in curve)


def _line(curve: Curve, style: dict, recipe: str) -> dict:
  return {
    "type": "scatter",
    "mode": "lines+markers" if len(curve) < 30 else "lines",
    "name": html.escape(recipe),
    "legendgroup": recipe,
    "x": [point[0] for point in curve],
    "y": [_short(point[1]) for point in curve],
    "line": {**style, "width": 2},
    "marker": {"color": style["color"], "size": 5},
    "hovertemplate": "%{y:.5~g}",
  }


def _last_point(curve: dict[int, float | None], style: dict, recipe: str) -> list[dict]:
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


def _band(curve: Curve, color: str, recipe: str) -> dict:
  steps = [point[0] for point in curve]
  return {
    "type": "scatter",
    "mode": "lines",
    "legendgroup": recipe,
    "x": steps + steps[::-1],
    "y": [_short(point[3]) for point in curve] + [_short(point[2]) for point in curve[::-1]],
    "line": {"width": 0},
    "fill": "toself",
    "fillcolor": f"{color}/2e",
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


def _panels(parts: dict[str, dict[str, Parts]], figure: Callable) -> list[Chart]:
  """One chart a recipe; all share the range of their values."""
  shares = [p for figures in parts.values() for own in figures.values() for p in own.values()]
  low = min([0.0, *(sum(v for v in share.values() if v < 0) for share in shares)])
  high = max([1.0, *(sum(v for v in share.values() if v > 0) for share in shares)])
  if figure is _time_figure:  # side by side, not on top of each other
    high = max([1.0, *(v for share in shares for v in share.values())])
  margin = 0.05 * (high - low)
  bounds = [low - margin * (low < 0), high + margin]
  return [
    {"title": recipe, "figures": {name: figure(own, bounds) for name, own in figures.items()}}
    for recipe, figures in parts.items()
  ]


def _bar_figure(parts: Parts, bounds: list[float]) -> Figure:
  """Horizontal stacks, first key on top."""
  keys = sorted(parts, key=_order)
  names = [html.escape(key) for key in keys]
  lossless = [name for key, name in zip(keys, names, strict=True) if not any(parts[key].values())]
  traces = [
    _bars(part)
    | {"orientation": "h", "y": names, "x": [parts[key][part] for key in keys]}
    | {"hovertemplate": "%{x:.3f}"}
    for part in PARTS
  ]
  layout = {
    "height": 76 + 26 * max(3, len(keys)),
    "xaxis": {"title": {"text": SHARE}, "range": bounds},
    "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False},
    "shapes": [_rule("x", 1.0)],
    "annotations": [
      {"text": " no error", "x": 0, "y": name, "xanchor": "left", "bgcolor": "--page"}
      | {"showarrow": False, "font": {"color": "--muted"}}
      for name in lossless
    ],
  }
  return _stacked(traces, layout) if keys else _blank(layout["height"], parts)


def _column_figure(parts: Parts, bounds: list[float]) -> Figure:
  """Vertical stacks over layers."""
  keys = sorted(parts)
  traces = [
    _bars(part) | {"x": keys, "y": [parts[key][part] for key in keys], "hovertemplate": "%{y:.3f}"}
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
    "shapes": [_rule("y", 1.0)],
  }
  return (
    _stacked(traces, layout)
    if any(any(own.values()) for own in parts.values())
    else _blank(250, parts)
  )


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


def _time_figure(parts: Parts, bounds: list[float]) -> Figure:
  steps = sorted(step for step, shares in parts.items() if any(shares.values()))
  traces = []
  for part, label in PARTS.items():
    curve = [(step, parts[step][part], 0.0, 0.0) for step in steps]
    style = {"color": f"--part-{part}", "dash": "dash" if part == "cross" else "solid"}
    traces.append(_line(curve, style, label))
  layout = {
    "height": 250,
    "xaxis": {"title": {"text": "step"}, "showgrid": False},
    "yaxis": {"title": {"text": SHARE}, "range": bounds},
  }
  return {"data": traces, "layout": layout} if steps else _blank(250, parts)


def _blank(height: int, parts: Parts) -> Figure:
  note = {"text": "no error" if parts else "no values", "xref": "paper", "yref": "paper"}
  note |= {"x": 0.5, "y": 0.5, "showarrow": False, "font": {"color": "--muted"}}
  hidden = {"visible": False}
  layout = {"height": height, "annotations": [note], "xaxis": hidden, "yaxis": hidden}
  return {"data": [], "layout": layout}


def _rule(axis: str, at: float) -> dict:
  """Dashed line across the plot at y or x = `at`."""
  other = {"x": "y", "y": "x"}[axis]
  place = {f"{axis}0": at, f"{axis}1": at, f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1}
  return {"type": "line", "line": {"color": "--muted", "width": 1, "dash": "dash"}} | place


def _short(value: float) -> float:
  """Six significant digits: what a chart can show."""
  return float(f"{value:.6g}")
