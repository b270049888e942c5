"""The page of a report: one HTML file that opens anywhere, offline, with charts that plotly draws.

report_base.html.jinja is what all reports have in common: the look, the head, a legend, settings
and the script of the charts. A template that extends it says what stands between, with the macros
of report_macros.html.jinja; report_probes.html.jinja is a section to include.
"""

import base64
import functools
import gzip
import shlex
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from experiments.gaps import ABOVE, BELOW, CONFIDENCE, DIVERGED, MIN_SEEDS
from experiments.numbers import MISSING, fixed, short, signed, thousands
from experiments.records import BASELINE, Records
from experiments.report_charts import ALL
from experiments.report_lines import Chart, smoothing_window, styles_of

_FOLDER = Path(__file__).parent


def render(
  template: Path,
  records: Records,
  summary: dict[str, Any],
  *,
  name: str,
  headline: list[str],
  charts: dict[str, Chart],
  panels: dict[str, list[Chart]],
  **own: Any,
) -> str:
  """The page; everything that comes from files is escaped.

  `charts` by the id of their place, `panels` by the name of their group; `own` is what `template`
  asks besides.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader([template.parent, _FOLDER]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    "fixed": fixed,
    "short": short,
    "signed": signed,
    "thousands": thousands,
  }
  recipes = summary["recipes"].values()
  bands = "Line: mean over the seeds that have the step; band: lowest to highest seed."
  return environment.get_template(template.name).render(
    name=name,
    headline=headline,
    summary=summary,
    charts=charts,
    all_panels=panels,
    all_operands=ALL,
    baseline=BASELINE,
    told_apart=(ABOVE, BELOW, DIVERGED),
    missing=MISSING,
    min_seeds=MIN_SEEDS,
    over_seeds=bands if any(own["seeds"] != 1 for own in recipes) else "One seed.",
    interval_words=f"{100 * CONFIDENCE:.0f} % interval of the mean over seeds (Student's t)",
    several=len(summary["workdirs"]) > 1,
    styles=styles_of(records.arms.values()),
    window=smoothing_window(records),
    runs_finished=sum(own["seeds_finished"] for own in recipes),
    runs_planned=sum(own["seeds"] or 1 for own in recipes),
    differences=differences(records.configs),
    configs={workdir: flatten(config) for workdir, config in records.configs.items()},
    environments={workdir: flatten(own) for workdir, own in records.environments.items()},
    plotly=packed_plotly(),
    **own,
  )


@functools.cache
def packed_plotly() -> str:
  """plotly's script, a third of the page's size when the page unpacks it itself."""
  return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def differences(configs: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
  """Settings that are not the same in all workdirs, by name, in the order of the workdirs."""
  # What was asked of each arm, its table says.
  flat = [flatten(config | {"seeds_by_arm": None}) for config in configs.values()]
  names = dict.fromkeys(name for own in flat for name in own)
  values = {name: [own.get(name, "none") for own in flat] for name in names}
  return {name: own for name, own in values.items() if len(set(own)) > 1}


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
