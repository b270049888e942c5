"""The charts of a report as plain plotly figures.

A chart is {"title", "figures"}: one figure for each choice of operand, or only one under ALL.
The page completes them: it draws what is common to all and resolves colours, which are names of
its CSS variables, `--recipe-1` or with an alpha byte `--recipe-1/33`. plotly.express builds no
figure here: it knows no bands, no names at the ends of lines, and no colours of two schemes.
"""

import html
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.report_lines import (
  Curve,
  Figure,
  last_point,
  line,
  line_figure,
  over_seeds,
  rule,
  seed_bands,
  shorts,
  styles_of,
)
from experiments.summary import (
  MIN_SEEDS,
  Records,
  interval,
  is_lossless,
  last_probe_rows,
  mean_shares,
  paired_gaps,
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
# Over steps, by operand: title and unit of a column of the probes.
OVER_TIME = {
  "sqnr": ("SQNR", "sqnr_db", "SQNR (dB)"),
  "flushed": ("Flushed to zero", "flushed", "values (%)"),
  "clipped": ("Clipped", "clipped", "values (%)"),
}
# Of a training step: title, unit, whether the axis is logarithmic.
_STEP_CURVES = {
  "train": ("Train loss", "loss", "loss (nats/token)", False),
  "gradients": ("Gradient norm", "grad_norm", "gradient norm", True),
  "balance": ("Load-balancing loss", "load_balance_loss", "1: balanced", False),
  "z": ("Router z loss", "router_z_loss", "mean of logsumexp²", False),
  "rate": ("Learning rate", "learning_rate", "learning rate", False),
}


def smoothing_window(records: Records) -> int:
  """Rows averaged at every point of the train curves: 3 % of a run's rows."""
  train = records.metrics[records.metrics.split == "train"]
  longest = train.groupby(["recipe", "seed"]).size().max() if len(train) else 0
  return max(1, round(0.03 * longest))


def curve_charts(records: Records) -> dict[str, Chart]:
  """Over steps, as far as there are rows: validation loss, its gap to BF16, and of the training
  steps the loss, the gradient norm, the routing losses, the busiest expert and the learning rate.
  """
  metrics, styles = records.metrics, styles_of(records.arms.values())
  window = smoothing_window(records)

  def curves(split: str, name: str, window: int = 1) -> dict[str, Curve]:
    own = metrics[metrics.split == split]
    return {arm: over_seeds(own[own.recipe == arm], name, window) for arm in records.arms}

  validation = curves("validation", "loss")
  level = _one_entropy(records)
  charts = {
    "validation": (
      "Validation loss",
      line_figure(validation, styles, "loss (nats/token)", height=400, level=level),
    ),
    "gap": (
      "Validation gap to BF16",
      line_figure(_gap_curves(records), styles, "gap to BF16 (%)", zero=True),
    ),
  }
  for name, (title, column, unit, log) in _STEP_CURVES.items():
    own = curves("train", column, 1 if name == "rate" else window)
    if name == "rate":  # of all recipes of a workdir
      firsts = {arm.workdir: arm.name for arm in reversed(records.arms.values())}
      own = {arm: own[arm] for arm in firsts.values()}
    charts[name] = title, line_figure(own, styles, unit, log=log)
  charts["busiest"] = "Busiest expert", _busiest_figure(metrics, styles)
  for split, name in (("validation", "validation"), ("train", "train")):
    for _, event in metrics[metrics.event == "diverged"].iterrows():
      of_run = (metrics.recipe == event.recipe) & (metrics.seed == event.seed)
      own = metrics[of_run & (metrics.split == split)].set_index("step").loss
      charts[name][1]["data"] += last_point(own, styles[event.recipe])
  return {
    name: {"title": title, "figures": {ALL: figure}}
    for name, (title, figure) in charts.items()
    if figure["data"]
  }


def load_charts(records: Records) -> list[Chart]:
  """A panel per arm: the share of the choices by layer and expert at its last evaluation."""
  panels = []
  rows = records.metrics[records.metrics.split == "routing"]
  for arm, own in rows.groupby("recipe", sort=False):
    load = np.mean([np.array(load) for load in own[own.step == own.step.max()].load], axis=0)
    panels.append((arm, 100 * load))
  high = max((load.max() for _, load in panels), default=0.0)
  return [
    {
      "title": arm,
      "figures": {
        ALL: _heatmap(load, range(load.shape[1]), "expert", "choices (%)", (0.0, float(high)))
      },
    }
    for arm, load in panels
  ]


def probe_charts(records: Records) -> dict[str, list[Chart]]:
  """The error decomposition, a panel per arm (`operands`, `layers`, `modules`, `time`), the SQNR by
  layer over time (`depth`), and lines over time for each of OVER_TIME."""
  probes = records.probes
  if probes.empty:
    return {}
  probes = probes.assign(key=probes.gemm + " " + probes.operand)
  names = sorted(probes.key.unique(), key=_order)
  last = {arm: last_probe_rows(probes, arm) for arm in records.arms}
  last = {arm: own for arm, own in last.items() if len(own)}
  styles = styles_of(records.arms.values())

  def chosen(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    return rows if name == ALL else rows[rows.key == name]

  def panels(figure: Callable, column: str, whole_run: bool = False) -> list[Chart]:
    parts = {}
    for arm, own in last.items():
      rows = probes[probes.recipe == arm] if whole_run else own
      parts[arm] = {name: _grouped(chosen(rows, name), column) for name in [ALL, *names]}
    return _panels(parts, figure)

  charts = {
    "operands": _panels({a: {ALL: _grouped(own, "key")} for a, own in last.items()}, _bar_figure),
    "layers": panels(_column_figure, "layer"),
    "modules": panels(_bar_figure, "module"),
    "time": panels(_time_figure, "step", whole_run=True),
    "depth": _depth_charts({a: probes[probes.recipe == a] for a in last}, [ALL, *names], chosen),
  }
  for chart, (title, column, unit) in OVER_TIME.items():
    figures = {
      name: _probe_line_figure(probes, name, column, unit, styles) for name in [ALL, *names]
    }
    charts[chart] = [{"title": title, "figures": figures}]
  return charts


def _one_entropy(records: Records) -> float | None:
  """The unigram entropy, if all workdirs have one."""
  corpora = [(e.get("corpus") or {}) for e in records.environments.values()]
  found = {corpus.get("unigram_entropy_nats") for corpus in corpora}
  return found.pop() if len(found) == 1 else None


def _busiest_figure(metrics: pd.DataFrame, styles: dict) -> Figure:
  rows = metrics[metrics.split == "routing"].copy()
  if rows.empty:
    return {"data": [], "layout": {}}
  loads = [np.array(load) for load in rows.load]
  rows["busiest"] = [load.shape[1] * load.max(axis=1).mean() for load in loads]
  curves = {arm: over_seeds(own, "busiest") for arm, own in rows.groupby("recipe", sort=False)}
  return line_figure(curves, styles, "its load, 1: balanced")


def _probe_line_figure(
  probes: pd.DataFrame, name: str, column: str, unit: str, styles: dict
) -> Figure:
  """A residual stands beside what is read from it, whose error only adds to its own."""
  curves, styles = {}, dict(styles)
  for arm, own in probes.groupby("recipe", sort=False):
    rows = own if name == ALL else own[own.key == name]
    if name != ALL and len(rows) and reads_residual(rows):
      rows = own[own.key.isin([name, f"residual {rows.operand.iloc[0]}"])]
    kinds = pd.Series("", index=rows.index)
    kinds[rows.source == "residual"] = " on top"
    kinds[rows.gemm == "residual"] = " residual"
    for kind, of_kind in rows.groupby(kinds, sort=False):
      dash = {" residual": "dot", " on top": "dash"}.get(kind, styles[arm]["dash"])
      styles[arm + kind] = styles[arm] | {"dash": dash}
      curve = over_seeds(of_kind, column)
      curves[arm + kind] = curve if column == "sqnr_db" else 100 * curve
  return line_figure(curves, styles, unit, height=360)


def _order(operand: str) -> tuple[int, str]:
  gemm = operand.split(" ")[0]
  return (GEMMS.index(gemm) if gemm in GEMMS else len(GEMMS), operand)


def _grouped(rows: pd.DataFrame, column: str) -> Parts:
  """Mean shares by the values of a column, both cross terms added up."""
  parts = {}
  for key, own in rows.groupby(column, sort=False):
    shares = mean_shares(own)
    shares["cross"] = shares["cross_scale_grid"] + shares["cross_scale_deadzone"]
    if not math.isnan(shares["cross"]):
      own_shares = shorts(shares[part] for part in PARTS)
      parts[key] = Stack(dict(zip(PARTS, own_shares, strict=True)), _sqnr(own))
    elif is_lossless(own):
      parts[key] = Stack(dict.fromkeys(PARTS, 0.0), _sqnr(own))
  return parts


def _sqnr(rows: pd.DataFrame) -> str:
  """Mean of the decibels, nothing for several operands at once, which differ in what they mean."""
  if rows.key.nunique() > 1:
    return ""
  mean = rows.sqnr_db.mean()
  text = "no error" if math.isnan(mean) else f"{mean:.1f} dB"
  return text + ON_TOP * reads_residual(rows)


def _gap_curves(records: Records) -> dict[str, Curve]:
  """Mean gap to BF16 in percent; the band is the interval, of fewer than MIN_SEEDS seeds their
  range."""
  curves = {}
  for arm in records.arms.values():
    if arm.name != arm.baseline:
      gaps = paired_gaps(records, arm)
      curve = seed_bands(gaps)
      for step, own in gaps.groupby("step"):
        if len(own) >= MIN_SEEDS:
          curve.loc[step, ["low", "high"]] = interval(own.tolist())
      curves[arm.name] = curve
  return curves


def _panels(parts: dict[str, dict[str, Parts]], figure: Callable) -> list[Chart]:
  """One chart per arm; all share the range of their values."""
  every = [own for figures in parts.values() for own in figures.values()]
  shares = [stack.shares for own in every for stack in own.values()]
  low = min([0.0, *(sum(v for v in share.values() if v < 0) for share in shares)])
  high = max([1.0, *(sum(v for v in share.values() if v > 0) for share in shares)])
  if figure is _time_figure:  # side by side, not on top of each other
    high = max([1.0, *(v for share in shares for v in share.values())])
  margin = 0.05 * (high - low)
  bounds = [low - margin * (low < 0), high + margin]
  return [
    {"title": arm, "figures": {name: figure(own, bounds) for name, own in figures.items()}}
    for arm, figures in parts.items()
  ]


def _depth_charts(rows: dict[str, pd.DataFrame], names: list[str], chosen: Callable) -> list[Chart]:
  """SQNR by layer and step: a panel per arm, one range for all panels of an operand."""
  tables = {
    arm: {
      name: chosen(own, name).pivot_table(index="layer", columns="step", values="sqnr_db")
      for name in names
    }
    for arm, own in rows.items()
  }
  charts = {arm: {} for arm in rows}
  for name in names:
    own = [of_arm[name].to_numpy() for of_arm in tables.values() if of_arm[name].size]
    bounds = (min(map(np.nanmin, own)), max(map(np.nanmax, own))) if own else (0.0, 1.0)
    for arm, of_arm in tables.items():
      table = of_arm[name]
      charts[arm][name] = _heatmap(
        table.to_numpy(), table.columns, "step", "SQNR (dB)", bounds, table.index
      )
  return [{"title": arm, "figures": figures} for arm, figures in charts.items()]


def _heatmap(
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
    curve = pd.DataFrame({"mean": [parts[step].shares[part] for step in steps]}, index=steps)
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
