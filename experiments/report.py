"""A run's report as one HTML file that opens anywhere, offline.

    python -m experiments.report --workdir=runs/demo

Works on a run that is still going, too.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from experiments.report_charts import (
  ALL,
  ON_TOP,
  PARTS,
  curve_charts,
  probe_charts,
  smoothing_window,
)
from experiments.report_lines import recipe_styles
from experiments.summary import BASELINE, Records, read_records, summarize_records

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def write_report(workdir: str | os.PathLike) -> Path:
  """Raises FileNotFoundError without a config.json, ValueError at a damaged file or line."""
  path = Path(workdir) / "report.html"
  page = render(read_records(workdir), name=Path(workdir).resolve().name)
  partial = path.with_name(f".{path.name}.tmp")
  try:
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)  # a reader sees the old page or the new one
  finally:
    partial.unlink(missing_ok=True)
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
  environment.filters |= {
    "fixed": fixed,
    "signed": signed,
    "thousands": lambda value: MISSING if value is None else f"{value:,.0f}",
  }
  summary = summarize_records(records)
  probes = probe_charts(records)
  return environment.get_template("report.html.jinja").render(
    name=name,
    headline=headline(summary),
    summary=summary,
    curves=curve_charts(records, summary["unigram_entropy_nats"]),
    probes=probes,
    formats={recipe: _formats(own) for recipe, own in summary["recipes"].items()},
    reading={recipe: _reading_residual(own) for recipe, own in summary["recipes"].items()},
    operands=list(probes["sqnr"][0]["figures"]) if probes else [],
    all_operands=ALL,
    parts=PARTS,
    on_top=ON_TOP,
    baseline=BASELINE,
    styles=recipe_styles(records.recipes),
    window=smoothing_window(records),
    runs_finished=sum(recipe["seeds_finished"] for recipe in summary["recipes"].values()),
    runs_planned=sum(recipe["seeds"] or 1 for recipe in summary["recipes"].values()),
    config=flatten(records.config),
    environment=flatten(records.environment),
    device=records.environment.get("device"),
    # Ends a script element early, should a future plotly hold it in a string.
    plotlyjs=get_plotlyjs().replace("</script", "<\\/script"),
  )


def headline(summary: dict[str, Any]) -> list[str]:
  """The result in sentences: who is how far from the baseline, and why."""
  recipes = summary["recipes"]
  if not any(own["runs"] for own in recipes.values()):
    return ["No training steps yet."]
  diverged = [r for r, own in recipes.items() if any(run["diverged"] for run in own["runs"])]
  gaps = {r: own["gap"] for r, own in recipes.items() if r not in (BASELINE, *diverged)}
  reached = max((gap["step"] for gap in gaps.values() if gap["step"] is not None), default=None)
  behind = [recipe for recipe, gap in gaps.items() if gap["step"] != reached]
  gaps = {r: gap for r, gap in gaps.items() if gap["step"] == reached is not None}
  farthest = max(gaps, key=lambda recipe: abs(gaps[recipe]["percent"]), default=None)
  sentences = _gap_sentences(gaps, summary["steps"]) if gaps else [_best_sentence(recipes)]
  if diverged:
    sentences[0] = f"{_listed(diverged)} diverged. {sentences[0]}"
  if behind:
    sentences.append(f"Not there yet: {_listed(behind)}.")
  for recipe in [farthest] if farthest else recipes:
    lost = recipes[recipe]["decomposition"]["lost_to_scale"]
    if lost is not None:
      sentences.append(_scale_sentence(recipe, lost))
      break
  return sentences


def _gap_sentences(gaps: dict[str, Any], steps: int | None) -> list[str]:
  percents = {recipe: gap["percent"] for recipe, gap in gaps.items()}
  any_gap = next(iter(gaps.values()))
  reached, noise = any_gap["step"], any_gap["noise_percent"]
  when = f"At step {reached} of {steps}, " if steps and reached < steps else ""
  if noise is None:
    return [when + _extremes(percents), "With one BF16 seed the noise between seeds is unknown."]
  inside = [recipe for recipe, gap in gaps.items() if gap["verdict"] == "within noise"]
  outside = {recipe: percent for recipe, percent in percents.items() if recipe not in inside}
  first = f"{_listed(inside)} can't be told from BF16 in validation loss"
  if outside:
    other = ["BF16 in validation loss"]  # only the first time
    groups = _groups(outside, noise)
    first = "; ".join(_where(group, noise, other.pop() if other else "it") for group in groups)
  who = f"{_listed(inside) or 'no recipe'} {'are' if inside[1:] else 'is'} within that noise"
  apart = f"BF16's own seeds lie {fixed(noise, 2, '%')} apart"
  return [f"{when}{first}.", f"{apart}: {who}."]


def _groups(percents: dict[str, float], noise: float) -> list[dict[str, float]]:
  """Recipes not told apart, highest first: each lies within the noise of its group's first."""
  groups: list[dict[str, float]] = []
  for recipe, percent in sorted(percents.items(), key=lambda item: -item[1]):
    if groups and next(iter(groups[-1].values())) - percent <= noise:
      groups[-1][recipe] = percent
    else:
      groups.append({recipe: percent})
  return groups


def _where(group: dict[str, float], noise: float, other: str) -> str:
  side = "above" if sum(group.values()) > 0 else "below"
  sizes = sorted(map(abs, group.values()))
  highest = fixed(sizes[-1], 2, "%")
  if len(group) == 1:
    return f"{_listed(list(group))} lies {highest} {side} {other}"
  return (
    f"{_listed(list(group))} lie {fixed(sizes[0], 2)} to {highest} {side} {other},"
    f" closer together than the noise of {fixed(noise, 2, '%')}"
  )


def _extremes(percents: dict[str, float]) -> str:
  order = sorted(percents, key=lambda recipe: abs(percents[recipe]))
  closest, farthest = (signed(percents[order[i]], unit="%") for i in (0, -1))
  if len(order) == 1:
    return f"{order[0]} differs from BF16 by {closest} in validation loss."
  return (
    f"{order[0]} is closest to BF16 in validation loss ({closest})"
    f" and {order[-1]} farthest ({farthest})."
  )


def _scale_sentence(recipe: str, lost_to_scale: float) -> str:
  percent = round(100 * lost_to_scale)
  if percent <= 0:
    return f"An ideal scale would remove none of {recipe}'s squared error: it is the grid's."
  return (
    f"An ideal scale would remove {percent}\N{NO-BREAK SPACE}% of {recipe}'s squared error;"
    " the rest is the grid's."
  )


def _best_sentence(recipes: dict[str, Any]) -> str:
  losses = {r: own["validation_loss"]["mean"] for r, own in recipes.items()}
  losses = {r: loss for r, loss in losses.items() if loss is not None}
  if not losses:
    return "No validation loss yet."
  best = min(losses, key=losses.get)
  return f"{best} has the lowest validation loss, {losses[best]:.3f} nats/token."


def _listed(names: list[str]) -> str:
  return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _formats(own: dict[str, Any]) -> str:
  """What a recipe's operands are rounded to, each format with its scale rule."""
  operands = own["decomposition"]["operands"]
  named = [" ".join(filter(None, (o["format"], o["scale_rule"]))) for o in operands]
  return ", ".join(dict.fromkeys(filter(None, named)))


def _reading_residual(own: dict[str, Any]) -> str:
  operands = own["decomposition"]["operands"]
  return _listed([f"{o['gemm']} {o['operand']}" for o in operands if o["reads_residual"]])


def fixed(value: float | None, digits: int = 3, unit: str = "") -> str:
  unit = unit and f"\N{NO-BREAK SPACE}{unit}"
  if value is None:
    return MISSING
  return f"{round(value, digits) + 0.0:.{digits}f}{unit}".replace("-", MINUS)  # no −0.00


def signed(value: float | None, digits: int = 2, unit: str = "") -> str:
  return "+" * (value is not None and round(value, digits) > 0) + fixed(value, digits, unit)


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

  WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)

  def main(argv: list[str]) -> None:
    del argv
    try:
      print(write_report(WORKDIR.value))
    except (OSError, ValueError) as error:
      sys.exit(f"error: {error}")

  app.run(main)
