"""The charts of a report as plain plotly figures.

A chart is {"title", "figures"}: one figure for each choice of operand, or only one under ALL.
The page completes them: it draws what is common to all and resolves colours, which are names of
its CSS variables, `--recipe-1` or with an alpha byte `--recipe-1/33`. plotly.express builds no
figure here: it knows no bands, no names at the ends of lines, and no colours of two schemes.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from experiments.records import Records
from experiments.report_lines import (
  Chart,
  Curve,
  Figure,
  curves_of,
  gap_curves,
  last_points,
  line_figure,
  over_seeds,
  shorts,
  smoothing_window,
  styles_of,
)
from experiments.report_stacks import (
  PARTS,
  Parts,
  Stack,
  bar_figure,
  column_figure,
  heatmap,
  order,
  panels,
  time_figure,
)
from experiments.summary import (
  LOSS,
  is_lossless,
  last_probe_rows,
  mean_shares,
  place_columns,
  reads_residual,
)

ALL = "all operands"
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
  "dropped": ("Dropped choices", "dropped", "share of the choices", False),
  "rate": ("Learning rate", "learning_rate", "learning rate", False),
}


def curve_charts(records: Records) -> dict[str, Chart]:
  """Over steps, as far as there are rows: validation loss, its gap to BF16, and of the training
  steps the loss, the gradient norm, the routing losses, the busiest expert and the learning rate.
  """
  styles = styles_of(records.arms.values())
  window = smoothing_window(records)
  validation = curves_of(records, "validation", "loss")
  entropy = _one_entropy(records)
  level = None if entropy is None else ("unigram entropy", entropy)
  charts = {
    "validation": (
      "Validation loss",
      line_figure(validation, styles, "loss (nats/token)", height=400, level=level),
    ),
    "gap": (
      "Validation gap to BF16",
      line_figure(gap_curves(records, LOSS), styles, "gap to BF16 (%)", zero=True),
    ),
  }
  for name, (title, column, unit, log) in _STEP_CURVES.items():
    own = curves_of(records, "train", column, 1 if name == "rate" else window)
    if name == "rate":
      own = one_arm_a_workdir(records, own)
    charts[name] = title, line_figure(own, styles, unit, log=log)
  charts["busiest"] = "Busiest expert", _busiest_figure(records.metrics, styles)
  for split in ("validation", "train"):
    charts[split][1]["data"] += last_points(records, split, "loss", styles)
  return {
    name: {"title": title, "figures": {ALL: figure}}
    for name, (title, figure) in charts.items()
    if figure["data"]
  }


def one_arm_a_workdir(records: Records, curves: dict[str, Curve]) -> dict[str, Curve]:
  """Of what is the same for all arms of a workdir."""
  firsts = {arm.workdir: arm.name for arm in reversed(records.arms.values())}
  return {arm: curves[arm] for arm in firsts.values()}


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
        ALL: heatmap(load, range(load.shape[1]), "expert", "choices (%)", (0.0, float(high)))
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
  columns = [probes[name] for name in place_columns(probes)]
  probes = probes.assign(key=functools.reduce(lambda a, b: a + " " + b, columns))
  names = sorted(probes.key.unique(), key=order)
  last = {arm: last_probe_rows(probes, arm) for arm in records.arms}
  last = {arm: own for arm, own in last.items() if len(own)}
  styles = styles_of(records.arms.values())

  def chosen(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    return rows if name == ALL else rows[rows.key == name]

  def by_column(figure: Callable, column: str, whole_run: bool = False) -> list[Chart]:
    parts = {}
    for arm, own in last.items():
      rows = probes[probes.recipe == arm] if whole_run else own
      parts[arm] = {name: _grouped(chosen(rows, name), column) for name in [ALL, *names]}
    return panels(parts, figure)

  charts = {
    "operands": panels({a: {ALL: _grouped(own, "key")} for a, own in last.items()}, bar_figure),
    "layers": by_column(column_figure, "layer"),
    "modules": by_column(bar_figure, "module"),
    "time": by_column(time_figure, "step", whole_run=True),
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
      rows = own[(own.key == name) | _is_residual_of(own, rows.iloc[0])]
    kinds = pd.Series("", index=rows.index)
    kinds[rows.source == "residual"] = " on top"
    kinds[rows.gemm == "residual"] = " residual"
    for kind, of_kind in rows.groupby(kinds, sort=False):
      dash = {" residual": "dot", " on top": "dash"}.get(kind, styles[arm]["dash"])
      styles[arm + kind] = styles[arm] | {"dash": dash}
      curve = over_seeds(of_kind, column)
      curves[arm + kind] = curve if column == "sqnr_db" else 100 * curve
  return line_figure(curves, styles, unit, height=360)


def _is_residual_of(rows: pd.DataFrame, reader: pd.Series) -> pd.Series:
  """Which rows are of the residual that `reader` reads: a backward pass has it from the forward."""
  found = (rows.gemm == "residual") & (rows.operand == reader.operand)
  if "path" in rows:
    found &= rows.path == ("forward" if reader.path == "backward" else reader.path)
  return found


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
      charts[arm][name] = heatmap(
        table.to_numpy(), table.columns, "step", "SQNR (dB)", bounds, table.index
      )
  return [{"title": arm, "figures": figures} for arm, figures in charts.items()]
