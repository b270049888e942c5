"""A run's report as one HTML file that opens anywhere, offline.

    python -m experiments.report --workdir=runs/demo
    python -m experiments.report --workdir=runs/demo,runs/deep --out=runs/both.html

Works on a run that is still going, too. Several workdirs are laid side by side: each recipe is
compared with BF16 of its own workdir.
"""

import os
from pathlib import Path
from typing import Any

from experiments import logs, report_page
from experiments.headline import headline, listed
from experiments.records import Records
from experiments.report_charts import ON_TOP, OVER_TIME, curve_charts, load_charts, probe_charts
from experiments.report_lines import Chart
from experiments.report_stacks import PARTS
from experiments.summary import read_records, summarize_records

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(*workdirs: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
  """Raises FileNotFoundError without a config.json, ValueError at a damaged file or line."""
  path = Path(out or Path(workdirs[0]) / "report.html")
  names = [Path(workdir).resolve().name for workdir in workdirs]
  page = render(read_records(*workdirs), name=", ".join(names))
  logs.write_text(path, page)
  return path


def render(records: Records, name: str) -> str:
  summary = summarize_records(records)
  probes = probe_charts(records)
  over_time, panels = split_probes(probes)
  return report_page.render(
    _TEMPLATE,
    records,
    summary,
    name=name,
    headline=headline(summary),
    charts=curve_charts(records) | over_time,
    panels=panels | {"load": load_charts(records)},
    has_peak=any(own["flops_utilization"] is not None for own in summary["recipes"].values()),
    **of_probes(summary, probes),
  )


def split_probes(probes: dict[str, list[Chart]]) -> tuple[dict[str, Chart], dict[str, list[Chart]]]:
  """Of `probe_charts`: what is one chart, and the panels."""
  charts = {name: probes[name][0] for name in OVER_TIME if name in probes}
  return charts, {name: own for name, own in probes.items() if name not in OVER_TIME}


def of_probes(summary: dict[str, Any], probes: dict[str, list[Chart]]) -> dict[str, Any]:
  """What report_probes.html.jinja asks for."""
  recipes = summary["recipes"]
  return {
    "formats": {recipe: _formats(own) for recipe, own in recipes.items()},
    "reading": {recipe: _reading_residual(own) for recipe, own in recipes.items()},
    "operands": list(probes["sqnr"][0]["figures"]) if probes else [],
    "place": place,
    "parts": PARTS,
    "on_top": ON_TOP,
  }


def place(operand: dict[str, Any]) -> str:
  """Of an operand of a summary, in words."""
  return " ".join(operand[name] for name in ("path", "gemm", "operand") if name in operand)


def _formats(own: dict[str, Any]) -> str:
  """What a recipe's operands are rounded to, each format with its scale rule."""
  operands = own["decomposition"]["operands"]
  named = [" ".join(filter(None, (o["format"], o["scale_rule"]))) for o in operands]
  return ", ".join(dict.fromkeys(filter(None, named)))


def _reading_residual(own: dict[str, Any]) -> str:
  operands = own["decomposition"]["operands"]
  return listed([place(o) for o in operands if o["reads_residual"]])


if __name__ == "__main__":
  from experiments import command_line

  command_line.run_report(write_report)
