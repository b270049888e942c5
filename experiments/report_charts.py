"""The charts of a report as plain plotly figures.

A chart is {"title", "figures"}: one figure for each choice of operand, or only one under ALL.
The page completes them: it draws what is common to all and resolves colours, which are names of
its CSS variables, `--recipe-1` or with an alpha byte `--recipe-1/33`.
"""

import html
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.report_lines import (
  Curve,
  Figure,
  by_seed,
  last_point,
  line,
  line_figure,
  over_seeds,
  recipe_styles,
  rule,
  short,
)
from experiments.summary import (
  BASELINE,
  Records,
  Row,
  is_lossless,
  last_probe_rows,
  mean_shares,
  reads_residual,
)

Chart = dict[str, Any]


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
GEMMS = ("fprop", "dgrad", "wgrad", "residual")
ALL = "all operands"
SHARE = "share of squared error"
ON_TOP = "*"  # of an error that adds to the residual's


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
    return {r: over_seeds(by_seed(own, name), window) for r, own in rows[split].items()}

  diverged = {(r["recipe"], r["seed"]) for r in records.metrics if r.get("event") == "diverged"}
  loss = "loss (nats/token)"
  validation = curves("validation", "loss")
  figures = {
    "validation": line_figure(validation, styles, loss, height=400, level=unigram_entropy),
    "gap": line_figure(_gap_curves(rows["validation"]), styles, "gap to BF16 (%)"),
    "train": line_figure(curves("train", "loss", window), styles, loss),
    "gradients": line_figure(
      curves("train", "grad_norm", window), styles, "gradient norm", log=True
    ),
  }
  for split in ("validation", "train"):
    for recipe, seed in sorted(diverged):
      own = by_seed(rows[split].get(recipe, []), "loss").get(seed, {})
      figures[split]["data"] += last_point(own, styles[recipe], recipe)
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

  sqnr = {name: _sqnr_figure(rows, name, styles) for name in [ALL, *names]}
  by_operand = {recipe: {ALL: _grouped(last[recipe], _operand)} for recipe in steps}
  return {
    "operands": _panels(by_operand, _bar_figure),
    "layers": panels(_column_figure, lambda row: row["layer"]),
    "modules": panels(_bar_figure, lambda row: row["module"]),
    "time": panels(_time_figure, lambda row: row["step"], whole_run=True),
    "sqnr": [{"title": "SQNR", "figures": sqnr}],
  }


def _sqnr_figure(rows: dict[str, dict[str, list[Row]]], name: str, styles: dict) -> Figure:
  """A residual stands beside what is read from it, whose error only adds to its own."""
  lines: dict[str, list[Row]] = {}
  styles = dict(styles)
  for recipe, own in rows.items():
    chosen = own.get(name, [])
    if name != ALL and any(map(reads_residual, chosen)):
      chosen = chosen + own.get(f"residual {chosen[0]['operand']}", [])
    for row in chosen:
      kind, dash = "", styles[recipe]["dash"]
      if row["gemm"] == "residual":
        kind, dash = " residual", "dot"
      elif reads_residual(row):
        kind, dash = " on top", "dash"
      lines.setdefault(recipe + kind, []).append(row)
      styles[recipe + kind] = styles[recipe] | {"dash": dash, "recipe": recipe}
  curves = {line: over_seeds(by_seed(own, "sqnr_db")) for line, own in lines.items()}
  return line_figure(curves, styles, "SQNR (dB)", height=360)


def _operand(row: Row) -> str:
  return f"{row['gemm']} {row['operand']}"


def _order(operand: str) -> tuple[int, str]:
  gemm = operand.split(" ")[0]
  return (GEMMS.index(gemm) if gemm in GEMMS else len(GEMMS), operand)


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> Parts:
  """Mean shares by key, both cross terms added up."""
  groups: dict[Any, list[Row]] = {}
  for row in rows:
    groups.setdefault(key(row), []).append(row)
  parts = {}
  for name, own in groups.items():
    shares = mean_shares(own)
    if shares["scale_bias"] is not None:
      shares["cross"] = shares["cross_scale_grid"] + shares["cross_scale_deadzone"]
      parts[name] = Stack({part: short(shares[part]) for part in PARTS}, _sqnr(own))
    elif all(is_lossless(row) for row in own):
      parts[name] = Stack(dict.fromkeys(PARTS, 0.0), _sqnr(own))
  return parts


def _sqnr(rows: list[Row]) -> str:
  """Mean of the decibels, nothing for several operands at once, which differ in what they mean."""
  values = [row["sqnr_db"] for row in rows if row.get("sqnr_db") is not None]
  if len(set(map(_operand, rows))) > 1:
    return ""
  text = f"{sum(values) / len(values):.1f} dB" if values else "no error"
  return text + ON_TOP * any(map(reads_residual, rows))


def _gap_curves(rows: dict[str, list[Row]]) -> dict[str, Curve]:
  """Gap to the baseline in percent, paired by seed and step; the baseline: 0 ± its seed spread."""
  runs = {recipe: by_seed(own, "loss") for recipe, own in rows.items()}
  reference = runs.pop(BASELINE, {})
  curves = {}
  for recipe, seeds in runs.items():
    gaps: dict[int, dict[int, float | None]] = {}
    for seed in seeds.keys() & reference:
      paired = [(step, reference[seed].get(step), loss) for step, loss in seeds[seed].items()]
      gaps[seed] = {s: (loss / base - 1) * 100 for s, base, loss in paired if base and loss}
    curves[recipe] = over_seeds(gaps)
  if any(curves.values()):
    noise = [(s, (high - low) / mean * 100) for s, mean, low, high in over_seeds(reference)]
    curves[BASELINE] = [(step, 0.0, -spread, spread) for step, spread in noise]
  return curves


def _panels(parts: dict[str, dict[str, Parts]], figure: Callable) -> list[Chart]:
  """One chart a recipe; all share the range of their values."""
  every = [own for figures in parts.values() for own in figures.values()]
  shares = [stack.shares for own in every for stack in own.values()]
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
  """Horizontal stacks, first key on top, with the SQNR at their ends."""
  keys = sorted(parts, key=_order)
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


def _column_figure(parts: Parts, bounds: list[float]) -> Figure:
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
  steps = sorted(step for step, own in parts.items() if any(own.shares.values()))
  traces = []
  for part, label in PARTS.items():
    curve = [(step, parts[step].shares[part], 0.0, 0.0) for step in steps]
    style = {"color": f"--part-{part}", "dash": "dash" if part == "cross" else "solid"}
    traces.append(line(curve, style, label))
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
