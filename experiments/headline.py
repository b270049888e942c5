"""The result of a comparison in sentences: what the seeds tell apart, and what they can't."""

from typing import Any

from experiments.numbers import signed
from experiments.summary import (
  ABOVE,
  BASELINE,
  BELOW,
  CONFIDENCE,
  DIVERGED,
  MIN_SEEDS,
  SAME,
  TOO_FEW,
  UNFINISHED,
)


def headline(summary: dict[str, Any]) -> list[str]:
  """Ranks what can be ranked: finished runs, paired with BF16's, of MIN_SEEDS seeds or more."""
  recipes = summary["recipes"]
  if not any(own["runs"] for own in recipes.values()):
    return ["No training steps yet."]
  gaps = {name: own["gap"] for name, own in recipes.items()}
  by_verdict: dict[str | None, list[str]] = {}
  for name, gap in sorted(gaps.items(), key=lambda item: -(item[1]["percent"] or 0)):
    by_verdict.setdefault(gap["verdict"], []).append(name)
  sentences = []
  if diverged := by_verdict.get(DIVERGED):
    sentences.append(f"{listed(diverged)} diverged.")
  sentences += _ranked(by_verdict, gaps)
  if few := by_verdict.get(TOO_FEW):
    sentences += _too_few(few, gaps)
  if unfinished := by_verdict.get(UNFINISHED):
    sentences.append(f"Not finished, so not compared: {listed(unfinished)}.")
  if lone := by_verdict.get(None):
    one = "is no run" if len(summary["workdirs"]) == 1 else "are no runs"
    sentences.append(f"There {one} of {BASELINE} to compare {listed(lone)} with.")
  if not sentences:
    sentences.append(f"{listed(list(recipes))} alone: there is nothing to compare.")
  return sentences + _lost_to_scale(recipes)


def _ranked(by_verdict: dict[str | None, list[str]], gaps: dict[str, Any]) -> list[str]:
  words = {ABOVE: "above", BELOW: "below"}
  sentences = []
  for verdict, side in words.items():
    if names := by_verdict.get(verdict):
      told = listed([f"{name} ({_percent(gaps[name])})" for name in names])
      sentences.append(f"{told} {_ends(names)} {side} BF16 in validation loss.")
  if same := by_verdict.get(SAME):
    sentences.append(f"{listed(same)} can't be told from BF16.")
  if sentences:
    ranked = [n for v in (ABOVE, BELOW, SAME) for n in by_verdict.get(v, [])]
    seeds = sorted({gaps[name]["seeds"] for name in ranked})
    of = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    percent = f"{100 * CONFIDENCE:.0f}\N{NO-BREAK SPACE}%"
    sentences.append(f"By {percent} intervals of the gaps, paired over {of} seeds.")
  return sentences


def _too_few(names: list[str], gaps: dict[str, Any]) -> list[str]:
  counts = sorted({gaps[name]["seeds"] for name in names})
  number = {1: "One seed is", 2: "Two seeds are"}
  many = number[counts[0]] if len(counts) == 1 else "One or two seeds are"
  told = listed([f"{name} {_percent(gaps[name])}" for name in names])
  return [
    f"{many} too few to tell {listed(names)} from BF16; with {MIN_SEEDS} there is an interval.",
    f"Mean gap in validation loss: {told}.",
  ]


def _ends(names: list[str]) -> str:
  return "end" if len(names) > 1 else "ends"


def _percent(gap: dict[str, Any]) -> str:
  return signed(gap["percent"], unit="%")


def _lost_to_scale(recipes: dict[str, Any]) -> list[str]:
  """Of the recipe that loses the largest share."""
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
