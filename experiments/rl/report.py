"""The report of reinforcement learning as one HTML file that opens anywhere, offline.

    python -m experiments.rl.report --workdir=runs/rl_demo
    python -m experiments.rl.report --workdir=runs/rl_demo,runs/replayed --out=runs/both.html

Works on a run that is still going, too. Several workdirs are laid side by side: each arm is
compared with bf16 of its own workdir.
"""

import os
import re
from pathlib import Path
from typing import Any

from experiments import logs, report_page
from experiments.records import Records
from experiments.report import of_probes, split_probes
from experiments.report_charts import probe_charts
from experiments.rl.headline import headline
from experiments.rl.report_charts import SECTIONS, constants, curve_charts
from experiments.rl.summary import (
  ERROR,
  HEALTHY,
  read_records,
  samples,
  standard_error,
  summarize_records,
)

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(*workdirs: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
  """Raises FileNotFoundError without a config.json, ValueError at a damaged file or line."""
  path = Path(out or Path(workdirs[0]) / "report.html")
  names = [Path(workdir).resolve().name for workdir in workdirs]
  logs.write_text(path, render(read_records(*workdirs), name=", ".join(names)))
  return path


def render(records: Records, name: str) -> str:
  summary = summarize_records(records)
  probes = probe_charts(records)
  over_time, panels = split_probes(probes)
  lines = {name: own for section in SECTIONS.values() for name, own in section.items()}
  return report_page.render(
    _TEMPLATE,
    records,
    summary,
    name=name,
    headline=headline(summary),
    charts=curve_charts(records) | over_time,
    panels=panels,
    sections={section: list(own) for section, own in SECTIONS.items()},
    constants={lines[name].title: value for name, value in constants(records).items()},
    # A line may break after what joins the parts of a name.
    pieces={arm: re.split(r"(?<=[.+@/])", arm) for arm in records.arms},
    samples=[visible(sample) for sample in samples(records)],
    error=ERROR,
    healthy=HEALTHY,
    uncertainty=_uncertainty(summary),
    **of_probes(summary, probes),
  )


def _uncertainty(summary: dict[str, Any]) -> list[dict[str, Any]]:
  """Of the held-out reward of each workdir, by how many problems it is the mean of."""
  found = []
  for workdir, facts in summary["workdirs"].items():
    own = [arm for arm in summary["recipes"].values() if arm["workdir"] == workdir]
    rewards = [arm["held_out_reward"]["mean"] for arm in own]
    errors = {r: standard_error(r, facts["held_out"]) for r in rewards if r is not None}
    errors = {reward: error for reward, error in errors.items() if error is not None}
    if errors:
      reward = max(errors, key=errors.get)
      found.append(facts | {"workdir": workdir, "reward": reward, "error": errors[reward]})
  return found


# A policy may say anything: control characters, which a page would drop, as their pictures.
_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {127: 0x2421}


def visible(value: Any) -> Any:
  """Text, in lists and dicts too, without characters that a page can't show."""
  match value:
    case str():
      return value.translate(_PICTURES)
    case dict():
      return {key: visible(own) for key, own in value.items()}
    case list():
      return [visible(own) for own in value]
    case _:
      return value


if __name__ == "__main__":
  from experiments import command_line

  command_line.run_report(write_report)
