"""The pictures of the README and of docs/results.md, from committed rows."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from experiments.gaps import interval

plt.rcParams |= {"svg.hashsalt": "fp4jax", "font.size": 9, "axes.spines.right": False}
plt.rcParams |= {"axes.spines.top": False, "svg.fonttype": "none"}
_GREY, _ORANGE, _SKY = "#808080", "#e69f00", "#56b4e9"
_COLOURS = dict(
  bf16=_GREY, fp8="#0072b2", mxfp4="#d55e00", mxfp4_rht_sr="#009e73", hopper_fp4="#cc79a7"
)
_PARTS = {"grid noise": "#b0b0b0", "deadzone": _SKY, "lost to the scale": _ORANGE}
_STEP, _GAP = "step (0: before training)", "validation loss above BF16, %"
Row = dict


def gaps_to_bf16(rows: list[Row]) -> dict[str, dict[int, list[float]]]:
  """In percent, by recipe and step, one for each seed; from step 0, before training."""
  loss: dict[str, dict[int, dict[int, float]]] = {}
  for row in rows:
    if row["kind"] == "validation":
      loss.setdefault(row["recipe"], {}).setdefault(row["step"], {})[row["seed"]] = row["loss"]
  return {
    name: {
      step: [100 * (own[seed] / loss["bf16"][step][seed] - 1) for seed in own]
      for step, own in by_step.items()
    }
    for name, by_step in loss.items()
  }


def demo_picture(rows: list[Row], path: Path) -> None:
  """Gaps to BF16 over the run with their intervals, and what MXFP4's error is made of."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
  for name, gaps in gaps_to_bf16(rows).items():
    means = [sum(own) / len(own) for own in gaps.values()]
    colour = _COLOURS[name]
    left.plot(list(gaps), means, color=colour, label=name, linewidth=1.8)
    bounds = [interval(own) or (min(own), max(own)) for own in gaps.values()]
    left.fill_between(list(gaps), *zip(*bounds, strict=True), color=colour, alpha=0.15)
  left.set(xlabel=_STEP, ylabel=_GAP, xlim=(min(gaps), max(gaps)))
  above = dict(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.45, 1))
  left.legend(ncols=5, columnspacing=1, **above)
  operands = next(r for r in rows if r.get("recipe") == "mxfp4" and r["kind"] == "recipe")
  operands = operands["decomposition"]["operands"]
  names = [f"{o['gemm']} {o['operand']}" for o in operands]
  stacks = [(o["grid_noise"], o["deadzone"], 1 - o["grid_noise"] - o["deadzone"]) for o in operands]
  base = [0.0] * len(operands)
  for shares, (label, colour) in zip(zip(*stacks, strict=True), _PARTS.items(), strict=True):
    right.barh(names, shares, left=base, color=colour, label=label)
    base = [b + s for b, s in zip(base, shares, strict=True)]
  for i, operand in enumerate(operands):
    right.text(1.02, i, f"{operand['sqnr_db']:.1f} dB", va="center", fontsize=8)
  right.invert_yaxis()
  right.set(xlabel="MXFP4: share of the squared error, and SQNR")
  right.set(xlim=(0, 1))
  right.legend(ncols=3, columnspacing=1, **above)
  _save(figure, path)


def seeds_picture(rows: list[Row], path: Path) -> None:
  """Each recipe's gap to BF16 over the run: thin lines are seeds, the thick one is their mean."""
  gaps = {name: own for name, own in gaps_to_bf16(rows).items() if name != "bf16"}
  figure, panels = plt.subplots(
    1, len(gaps), figsize=(9, 2.8), sharey=True, squeeze=False, layout="constrained"
  )
  for axes, (name, own) in zip(panels[0], gaps.items(), strict=True):
    colour = _COLOURS[name]
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.plot(list(own), list(own.values()), color=colour, linewidth=0.8, alpha=0.6)
    means = [sum(seeds) / len(seeds) for seeds in own.values()]
    axes.plot(list(own), means, color=colour, linewidth=2.2)
    axes.set_title(name, color=colour, fontsize=9, loc="left")
    axes.set(xlabel=_STEP, xlim=(min(own), max(own)))
  panels[0, 0].set(ylabel=_GAP)
  _save(figure, path)


def _save(figure, path: Path) -> None:
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)
