"""A run's report as one HTML file that opens anywhere, offline.

    python -m experiments.report --workdir=runs/demo
    python -m experiments.report --workdir=runs/demo,runs/deep --out=runs/both.html

Works on a run that is still going, too. Several workdirs are laid side by side: each recipe is
compared with BF16 of its own workdir.
"""

import base64
import functools
import gzip
import os
import shlex
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from experiments import logs
from experiments.headline import headline, listed
from experiments.numbers import MISSING, fixed, signed, thousands
from experiments.report_charts import (
  ALL,
  ON_TOP,
  OVER_TIME,
  curve_charts,
  load_charts,
  probe_charts,
  smoothing_window,
)
from experiments.report_lines import styles_of
from experiments.report_stacks import PARTS
from experiments.summary import (
  ABOVE,
  BASELINE,
  BELOW,
  CONFIDENCE,
  DIVERGED,
  MIN_SEEDS,
  Records,
  read_records,
  summarize_records,
)


def write_report(*workdirs: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
  """Raises FileNotFoundError without a config.json, ValueError at a damaged file or line."""
  path = Path(out or Path(workdirs[0]) / "report.html")
  names = [Path(workdir).resolve().name for workdir in workdirs]
  page = render(read_records(*workdirs), name=", ".join(names))
  logs.write_text(path, page)
  return path


def render(records: Records, name: str) -> str:
  """The page; everything that comes from files is escaped."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {"fixed": fixed, "signed": signed, "thousands": thousands}
  summary = summarize_records(records)
  recipes = summary["recipes"]
  probes = probe_charts(records)
  return environment.get_template("report.html.jinja").render(
    name=name,
    headline=headline(summary),
    summary=summary,
    curves=curve_charts(records),
    all_panels={name: charts for name, charts in probes.items() if name not in OVER_TIME}
    | {"load": load_charts(records)},
    over_time={name: probes[name][0] for name in OVER_TIME if name in probes},
    formats={recipe: _formats(own) for recipe, own in recipes.items()},
    reading={recipe: _reading_residual(own) for recipe, own in recipes.items()},
    operands=list(probes["sqnr"][0]["figures"]) if probes else [],
    all_operands=ALL,
    parts=PARTS,
    on_top=ON_TOP,
    baseline=BASELINE,
    told_apart=(ABOVE, BELOW, DIVERGED),
    missing=MISSING,
    min_seeds=MIN_SEEDS,
    confidence=f"{100 * CONFIDENCE:.0f}",
    styles=styles_of(records.arms.values()),
    has_peak=any(own["flops_utilization"] is not None for own in recipes.values()),
    window=smoothing_window(records),
    runs_finished=sum(own["seeds_finished"] for own in recipes.values()),
    runs_planned=sum(own["seeds"] or 1 for own in recipes.values()),
    differences=differences(records.configs),
    configs={workdir: flatten(config) for workdir, config in records.configs.items()},
    environments={workdir: flatten(own) for workdir, own in records.environments.items()},
    plotly=packed_plotly(),
  )


@functools.cache
def packed_plotly() -> str:
  """plotly's script, a third of the page's size when the page unpacks it itself."""
  return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def differences(configs: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
  """Settings that are not the same in all workdirs, by name, in the order of the workdirs."""
  flat = [flatten(config) for config in configs.values()]
  names = dict.fromkeys(name for own in flat for name in own)
  values = {name: [own.get(name, "none") for own in flat] for name in names}
  return {name: own for name, own in values.items() if len(set(own)) > 1}


def _formats(own: dict[str, Any]) -> str:
  """What a recipe's operands are rounded to, each format with its scale rule."""
  operands = own["decomposition"]["operands"]
  named = [" ".join(filter(None, (o["format"], o["scale_rule"]))) for o in operands]
  return ", ".join(dict.fromkeys(filter(None, named)))


def _reading_residual(own: dict[str, Any]) -> str:
  operands = own["decomposition"]["operands"]
  return listed([f"{o['gemm']} {o['operand']}" for o in operands if o["reads_residual"]])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
  """Leaves by dotted name, as text; `argv` as a command line to paste into a shell."""
  leaves = {}
  for name, value in tree.items():
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
      value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, dict) and value:
      leaves |= flatten(value, f"{prefix}{name}.")
    elif name == "argv" and isinstance(value, list):
      leaves[prefix + name] = shlex.join(map(str, value))
    elif isinstance(value, list):
      leaves[prefix + name] = ", ".join(map(str, value))
    else:
      leaves[prefix + name] = "none" if value is None else str(value)
  return leaves


if __name__ == "__main__":
  from absl import app, flags

  from experiments import command_line

  WORKDIRS = command_line.define_workdir("Folders of runs, with commas.", several=True)
  OUT = flags.DEFINE_string("out", None, "The page; of one workdir by default its report.html.")

  def main(_) -> None:
    if len(WORKDIRS.value) > 1 and not OUT.value:
      raise ValueError("several workdirs need --out, the page to write")
    print(write_report(*WORKDIRS.value, out=OUT.value))

  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
