"""The result of a comparison in sentences: what the seeds tell apart, and what they can't."""

from collections.abc import Callable
from typing import Any

from experiments.gaps import (
  ABOVE,
  BELOW,
  CONFIDENCE,
  DIVERGED,
  MIN_SEEDS,
  SAME,
  TOO_FEW,
  UNFINISHED,
)
from experiments.numbers import signed
from experiments.records import BASELINE


def headline(summary: dict[str, Any]) -> list[str]:
  """Of pre-training; what was lost to the scale stands at its end."""
  percent = lambda gap: signed(gap["percent"], unit="%")  # noqa: E731
  return compared(summary, "validation loss", "percent", percent) + lost_to_scale(summary)


def compared(
  summary: dict[str, Any], what: str, key: str, shown: Callable[[dict[str, Any]], str]
) -> list[str]:
  """Ranks what can be ranked: finished runs, paired with BF16's, of MIN_SEEDS seeds or more.

  `what` names the gaps, `key` is where a gap has its mean, `shown` writes it.
  """
  recipes = summary["recipes"]
  if not any(own["runs"] for own in recipes.values()):
    return ["No training steps yet."]
  gaps = {name: own["gap"] for name, own in recipes.items()}
  told = {name: shown(gap) for name, gap in gaps.items()}
  seeds = {name: gap["seeds"] for name, gap in gaps.items()}
  by_verdict: dict[str | None, list[str]] = {}
  for name, gap in sorted(gaps.items(), key=lambda item: -(item[1][key] or 0)):
    by_verdict.setdefault(gap["verdict"], []).append(name)
  sentences = []
  if diverged := by_verdict.get(DIVERGED):
    sentences.append(f"{listed(diverged)} diverged.")
  sentences += _ranked(by_verdict, what, told, seeds)
  if few := by_verdict.get(TOO_FEW):
    sentences += _too_few(few, what, told, seeds)
  if unfinished := by_verdict.get(UNFINISHED):
    sentences.append(f"Not finished, so not compared: {listed(unfinished)}.")
  if lone := by_verdict.get(None):
    one = "is no run" if len(summary["workdirs"]) == 1 else "are no runs"
    sentences.append(f"There {one} of {BASELINE} to compare {listed(lone)} with.")
  if not sentences:
    sentences.append(f"{listed(list(recipes))} alone: there is nothing to compare.")
  return sentences


def _ranked(
  by_verdict: dict[str | None, list[str]], what: str, told: dict[str, str], seeds: dict[str, int]
) -> list[str]:
  words = {ABOVE: "above", BELOW: "below"}
  sentences = []
  for verdict, side in words.items():
    if names := by_verdict.get(verdict):
      each = listed([f"{name} ({told[name]})" for name in names])
      sentences.append(f"{each} {_ends(names)} {side} BF16 in {what}.")
  if same := by_verdict.get(SAME):
    sentences.append(f"{listed(same)} can't be told from BF16.")
  if sentences:
    ranked = [n for v in (ABOVE, BELOW, SAME) for n in by_verdict.get(v, [])]
    counts = sorted({seeds[name] for name in ranked})
    of = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    percent = f"{100 * CONFIDENCE:.0f}\N{NO-BREAK SPACE}%"
    sentences.append(f"By {percent} intervals of the gaps, paired over {of} seeds.")
  return sentences


def _too_few(names: list[str], what: str, told: dict[str, str], seeds: dict[str, int]) -> list[str]:
  counts = sorted({seeds[name] for name in names})
  number = {1: "One seed is", 2: "Two seeds are"}
  many = number[counts[0]] if len(counts) == 1 else "One or two seeds are"
  means = listed([f"{name} {told[name]}" for name in names])
  return [
    f"{many} too few to tell {listed(names)} from BF16; with {MIN_SEEDS} there is an interval.",
    f"Mean gap in {what}: {means}.",
  ]


def _ends(names: list[str]) -> str:
  return "end" if len(names) > 1 else "ends"


def lost_to_scale(summary: dict[str, Any]) -> list[str]:
  """Of the recipe that loses the largest share."""
  recipes = {name: own for name, own in summary["recipes"].items() if own["runs"]}
  lost = {name: own["decomposition"]["lost_to_scale"] for name, own in recipes.items()}
  lost = {name: share for name, share in lost.items() if share is not None}
  if not lost:
    return []
  name = max(lost, key=lost.get)
  percent = round(100 * lost[name])
  if percent <= 0:
    return [f"An ideal scale would remove none of {name}'s squared error: it is the grid's."]
  return [
    f"An ideal scale would remove {percent}\N{NO-BREAK SPACE}% of {name}'s squared error;"
    " the rest is the grid's."
  ]


def listed(names: list[str]) -> str:
  return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
