"""The result of reinforcement learning under several numerics in sentences."""

from typing import Any

from experiments.headline import compared, listed
from experiments.numbers import fixed, short, signed
from experiments.rl.summary import ERROR, HEALTHY


def headline(summary: dict[str, Any]) -> list[str]:
  """How far BF16 came, which arms end elsewhere, and where rollout and trainer differ most."""
  gaps = compared(summary, "held-out reward", "mean", lambda gap: signed(gap["mean"], 3))
  return _progress(summary) + gaps + _furthest_apart(summary)


def _progress(summary: dict[str, Any]) -> list[str]:
  """Of the baselines; of all arms where there is none."""
  recipes = summary["recipes"]
  baselines = {name: own for name, own in recipes.items() if own["gap"]["verdict"] == "reference"}
  told = {name: _change(own) for name, own in (baselines or recipes).items()}
  each = [f"of {name} {change}" for name, change in told.items() if change]
  return [f"Held-out reward {listed(each)}."] if each else []


def _change(own: dict[str, Any]) -> str | None:
  held_out = own["held_out_reward"]
  start, end, step = own["start_reward"]["mean"], held_out["mean"], held_out["step"]
  if None in (start, end):
    return None
  if step == 0:
    return f"is {fixed(start)} before training"
  first, last = fixed(start), fixed(end)
  verb = "rises" if end > start else "falls"
  change = f"stays at {last}" if first == last else f"{verb} from {first} to {last}"
  return change + (f" by step {step}" if own["steps"] and step < own["steps"] else "")


def _furthest_apart(summary: dict[str, Any]) -> list[str]:
  """By the error at the end, over all seeds."""
  errors = {
    name: (own[ERROR]["mean"], own[f"largest_{ERROR}"])
    for name, own in summary["recipes"].items()
    if own[ERROR]["mean"] is not None
  }
  if not errors:
    return []
  if all(fixed(largest) == fixed(1.0) for _, largest in errors.values()):
    return [f"Rollout and trainer agree in every arm: {ERROR} is {fixed(1.0)} in all steps."]
  name = max(errors, key=errors.get)
  end, largest = errors[name]
  return [
    f"Rollout and trainer lie furthest apart in {name}: {ERROR} is {short(end)} over the last steps"
    f" and {short(largest)} in the worst one; up to {HEALTHY} counts as healthy."
  ]
