"""From the taps of one probe to rows of probes.jsonl: one for each quantization of each GEMM."""

import math
from typing import Any

import jax
import numpy as np
import pandas as pd

from fp4jax import operands
from fp4jax.models import Policy

_FORWARD = ("fprop", "residual")
_SCALARS = ["sqnr_db", "scale_bias", "deadzone", "grid_noise", "flushed", "clipped"]


def probe_rows(
  taps: dict[str, np.ndarray | jax.Array], policy: Policy, num_layers: int
) -> list[dict[str, Any]]:
  """Rows in the order in which the pass computes them: forward, then backward from the last layer.

  The head counts as layer `num_layers`.
  """
  rows = []
  for name, tap in taps.items():
    layers = enumerate(np.asarray(tap)) if tap.ndim == 3 else [(num_layers, np.asarray(tap))]
    for layer, table in layers:
      recipe = policy.recipe(name, layer, num_layers)
      errors = operands.read_tap(table, recipe)
      for role, fmt in operands.quantized_roles(recipe).items():
        gemm, operand = role.split(".")
        source = "original" if gemm == "residual" else recipe.operand(role).source
        rows.append(
          {"layer": layer, "module": name, "gemm": gemm, "operand": operand, "ran": recipe.name}
          | {"format": fmt.name, "scale_rule": str(fmt.scale_rule), "source": source}
          | {name: float(value) for name, value in vars(errors[role]).items()}
        )
  forward = [row for row in rows if row["gemm"] in _FORWARD]
  backward = [row for row in rows if row["gemm"] not in _FORWARD]
  return sorted(forward, key=lambda r: r["layer"]) + sorted(backward, key=lambda r: -r["layer"])


def scalars(rows: list[dict[str, Any]]) -> dict[str, float]:
  """Means over layers and modules by operand, `probe/fprop.lhs/sqnr_db`."""
  if not rows:
    return {}
  means = pd.DataFrame(rows).groupby(["gemm", "operand"])[_SCALARS].mean()
  return {
    f"probe/{gemm}.{operand}/{name}": value
    for (gemm, operand), own in means.iterrows()
    for name, value in own.items()
  }


def first_non_finite(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
  """Where the first operand with a NaN or an infinity was; `gain` is finite for every other."""
  for row in rows:
    if not math.isfinite(row["gain"]):
      return {name: row[name] for name in ("layer", "module", "gemm", "operand")}
  return None
