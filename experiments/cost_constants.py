"""The constants of `experiments.cost_terms`, from the committed rows of results/.

What one GPU measures gives all but four: the wire and the plan of the exchange (`dispatch_bench`),
the all-reduce and the network. How unevenly experts are chosen is from the routing of moe_wide's
runs. The all-reduce is what BF16 takes longer in data parallel, once results/scaling.jsonl says it;
until then as fast as the wire.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from experiments import logs
from experiments.cost_terms import (
  Constants,
  Run,
  Shape,
  bytes_per_value,
  experts_seconds,
  memory_bytes,
  packing_bytes,
  reduced_bytes,
  shape_of,
  step_seconds,
)
from fp4jax import FP8_BLOCK_POW2, MXFP4, recipes
from fp4jax.models import ModelConfig
from fp4jax.recipe import Recipe

# configs/moe_wide.py, of which the steps are.
MOE_WIDE = Shape(
  layers=2,
  expert_layers=2,
  d=4096,
  f=4096,
  experts=8,
  top_k=2,
  attention=4096 * (32 + 8 + 8 + 32) * 128,
  qkv=(32 + 8 + 8) * 128,
  values=32 * 128,
  scores=2 * 32 * 128,
  head=4096 * 256,
  unrolled=True,
)
# Of each kind of GPU.
_BENCHES = ("kernel_bench", "kernel_bench_h100")
_LAYERS = ("moe_ffn", "moe_ffn_h100")
_RECOMPUTED = ("recompute", "recompute_32", "recompute_unrolled_16", "recompute_unrolled_24")
_ATTENTION = (
  "moe_wide_512_attention_step_time",
  "moe_wide_4096_attention_step_time",
  "scaling_attention",
)
STEPS = (
  "moe_wide_512_step_time",
  "moe_wide_4096_step_time",
  "scaling",
  *_ATTENTION,
  *_RECOMPUTED,
)
PEAKS = ("moe_wide_4096_memory", *_RECOMPUTED)
SOURCES = (
  *_BENCHES,
  *_LAYERS,
  "dispatch",
  "moe_wide",
  "moe_wide_peak",
  *dict.fromkeys(STEPS + PEAKS),
)
_PAYLOADS = {"bf16": None, "fp8": FP8_BLOCK_POW2, "mxfp4": MXFP4, "bfloat16": None}
_DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One measured time of a step or a layer, or peak of memory."""

  source: str  # file in results/
  gpu: str
  shape: Shape
  recipe: Recipe
  run: Run
  measured: float  # seconds, or bytes; infinite where memory did not suffice

  @property
  def devices(self) -> int:
    return self.run.data * self.run.expert

  @property
  def is_layer(self) -> bool:
    return not self.shape.attention

  @property
  def is_fitted(self) -> bool:
    """Whether a constant is read from it: what one GPU measures, and BF16's data parallel."""
    run = self.run
    reduces = self.recipe.name == "bf16" and run.expert == 1 and not self.is_layer
    plain = run.remat == "none" and run.capacity_factor is None
    plain = plain and not self.shape.quantized_attention
    return plain and (self.devices == 1 or reduces)


def read(results: Path, name: str) -> list[Row]:
  return logs.read_rows(results / f"{name}.jsonl")


def gpu_of(device: str) -> str:
  """`H100` of "gpu NVIDIA H100 80GB HBM3 x1, 32 CPU cores".

  Raises:
    ValueError: another GPU than these two.
  """
  found = [gpu for gpu in ("H100", "H200") if gpu in device]
  if not found:
    raise ValueError(f"{device=} is neither an H100 nor an H200: nothing is measured on it")
  return found[0]


def steps(results: Path) -> Iterator[Cell]:
  """Every step whose time is committed, with attention as it now is."""
  for name in STEPS:
    for row in _found(results, name):
      if not row.get("oom"):
        yield _step(results, name, row, row["step_time_ms"] / 1e3)


def peaks(results: Path) -> Iterator[Cell]:
  """Every committed peak of memory of such a step."""
  for name in PEAKS:
    for row in _found(results, name):
      yield _step(results, name, row, math.inf if row.get("oom") else row["peak_bytes"])


def _found(results, name):
  return read(results, name) if (results / f"{name}.jsonl").exists() else []


def _step(results, name, row, measured):
  mesh = row.get("mesh", {"data": 1, "fsdp": 1, "expert": 1})
  if mesh["fsdp"] > 1:
    raise ValueError(f"results/{name}.jsonl: {mesh=}, and the model has no term for fsdp")
  busiest = row.get("busiest_device")
  if not busiest and row.get("dropped"):
    busiest = row["capacity_factor"]  # it was full
  run = Run(
    tokens=row["tokens_per_step"] // math.prod(mesh.values()),
    length=row.get("sequence_length") or int(name.split("_")[2]),
    data=mesh["data"],
    expert=mesh["expert"],
    capacity_factor=row.get("capacity_factor"),
    exchange=row.get("exchange", "xla"),
    remat=row.get("remat", "none"),
    imbalance=busiest or imbalances(results)[mesh["expert"]],
  )
  shape = shape_of(ModelConfig(**row["model"])) if "model" in row else MOE_WIDE
  return Cell(
    source=name,
    gpu=gpu_of(row["device"]),
    shape=dataclasses.replace(shape, quantized_attention=name in _ATTENTION),
    recipe=recipes.by_name(row["recipe"]),
    run=run,
    measured=measured,
  )


def layers(results: Path) -> Iterator[Cell]:
  """Forward and backward pass of `moe_ffn` alone, on one GPU and on several."""
  for name in _LAYERS:
    first, *rows = read(results, name)
    for row in rows:
      yield Cell(
        source=name,
        gpu=gpu_of(first["device"]),
        shape=one_layer(d=7168, f=2048, experts=row["experts"], top_k=row["top_k"]),
        recipe=recipes.by_name(row["recipe"]),
        run=Run(tokens=32768, length=1),
        measured=row["time_us"] / 1e6,
      )
  for row in read(results, "dispatch"):
    if row["kind"] == "layer":
      recipe = recipes.BF16.replace({"payload.sums": "bfloat16"})
      if row["payload"] != "bf16":
        recipe = recipes.by_name(f"{row['payload']}_dispatch")
      yield Cell(
        source="dispatch",
        gpu=gpu_of(row["device"]),
        shape=one_layer(**{key: row[key] for key in ("d", "f", "experts", "top_k")}),
        recipe=recipe,
        run=_exchange_run(row),
        measured=row["time_us"] / 1e6,
      )


def one_layer(d: int, f: int, experts: int, top_k: int) -> Shape:
  """Experts and nothing else."""
  nothing = dict.fromkeys(("attention", "qkv", "values", "scores", "head"), 0)
  return Shape(layers=1, expert_layers=1, d=d, f=f, experts=experts, top_k=top_k, **nothing)


def predicted_seconds(cell: Cell, constants: Constants) -> float:
  part_seconds = experts_seconds if cell.is_layer else step_seconds
  return sum(part_seconds(cell.shape, cell.recipe, cell.run, constants).values())


def fit(results: Path, gpu: str) -> Constants:
  """The constants of steps on `gpu`, "H100" or "H200"."""
  chips = _chips(results)
  fastest = [row["peak_flops_per_s"]["bfloat16"] for row in read(results, "moe_wide_peak")]
  known = Constants(
    **chips[gpu],
    dense_flops=statistics.mean(fastest),
    score_flops=math.inf,
    weight_bytes={},
    other_bytes={},
    wire=_wire(results, chips),
    plan=statistics.mean(r["time_us"] / 1e6 for r in _exchanges(results) if r["part"] == "plan"),
    reduce=math.inf,
    transient_bytes={},
  )
  one_gpu = [cell for cell in layers(results) if cell.devices == 1]
  for name, chip in chips.items():
    at = dataclasses.replace(known, **chip)
    chip["weight_bytes"] = _weight_bytes([cell for cell in one_gpu if cell.gpu == name], at)
  known = dataclasses.replace(known, **chips[gpu])
  cells = [cell for cell in steps(results) if cell.is_fitted and cell.devices == 1]
  known = dataclasses.replace(known, score_flops=_score_flops(cells))
  other = _other_bytes(cells, known, chips)
  other |= _other_bytes([cell for cell in cells if cell.gpu == gpu], known, chips)
  known = dataclasses.replace(known, other_bytes=other)
  known = dataclasses.replace(known, transient_bytes=_transient_bytes(results, known))
  return dataclasses.replace(known, reduce=_reduce(results, known, gpu))


def _chips(results) -> dict[str, dict[str, Any]]:
  """By GPU the constants that are its own: rates of the grouped kernels, and of a copy."""
  found = {}
  for name in _BENCHES:
    rows = read(results, name)
    (copy,) = (row["tb_per_s"] for row in rows if row["kind"] == "copy")
    rates = {"experts_flops": _kernel_rates(rows), "memory": copy * 1e12}
    found[gpu_of(rows[0]["device"])] = rates
  if len(found) < len(_BENCHES):
    raise ValueError(
      f"results/{' and '.join(_BENCHES)}.jsonl are of one kind of GPU, {', '.join(found)}: each"
      " kind has a file"
    )
  return found


def imbalances(results: Path) -> dict[int, float]:
  """Choices on the busiest of 1, 2, ... devices over the mean: of moe_wide's runs at step 100, the
  mean over runs and layers. Before it nothing is logged."""
  rows = [r for r in read(results, "moe_wide") if r["kind"] == "routing" and r["step"] == 100]
  loads = np.array([load for row in rows for load in row["load"]])
  return {
    n: float(np.mean(loads.reshape(len(loads), n, -1).sum(axis=2).max(axis=1)) * n)
    for n in (1, 2, 4, 8)
  }


def _kernel_rates(rows):
  """FLOP/s by dtype, of fprop, dgrad and wgrad together; as in a step, dw in float32."""
  matmuls = [r for r in rows if r["kind"] == "matmul" and "bfloat16" not in r["name"]]
  rates = {}
  for name, dtype in _DTYPES.items():
    own = [r for r in matmuls if r["name"].startswith(name)]
    flops = sum(2 * r["m"] * r["n"] * r["k"] for r in own)
    rates[dtype] = flops / sum(r["time_us"] / 1e6 for r in own)
  return rates


def _exchange_run(row):
  return Run(
    tokens=row["tokens"],
    length=1,
    expert=row["devices"],
    capacity_factor=row.get("capacity_factor"),
    exchange=row.get("exchange", "xla"),
  )


def _exchanges(results):
  return [row for row in read(results, "dispatch") if row["kind"] == "exchange"]


def _wire(results, chips):
  """By exchange, seconds and bytes a second: of the wire, and of dispatch less its packing."""
  points = {}
  for row in _exchanges(results):
    if row["part"] not in ("wire", "dispatch"):
      continue
    run, value = _exchange_run(row), bytes_per_value(_PAYLOADS[row["payload"]])
    shape = one_layer(row["d"], 0, row["experts"], row["top_k"])
    time = row["time_us"] / 1e6
    if row["part"] == "dispatch":
      time -= packing_bytes(shape, run, value) / chips[gpu_of(row["device"])]["memory"]
    point = 1.0, run.rows_sent(shape) * row["d"] * value, time
    points.setdefault(run.exchange, []).append(point)
  found = {}
  for exchange, own in points.items():
    terms = np.array(own)
    (latency, per_byte), _ = nnls(terms[:, :2] / terms[:, 2:], np.ones(len(terms)))
    found[exchange] = float(latency), float(1 / per_byte)
  return found


def _by_recipe(cells):
  found = {}
  for cell in cells:
    found.setdefault(cell.recipe.name, []).append(cell)
  return found


def _weight_bytes(cells, known):
  """What layers on one GPU take beside GEMMs and rows, a byte of their weights: least squares of
  relative errors."""
  found = {}
  for name, own in _by_recipe(cells).items():
    at = dataclasses.replace(known, weight_bytes={name: 0.0})
    terms = []
    for cell in own:
      rest = cell.measured - predicted_seconds(cell, at)
      terms.append((cell.shape.expert_weights / at.memory / cell.measured, rest / cell.measured))
    x, y = np.array(terms).T
    found[name] = max(float(x @ y / (x @ x)), 0.0)
  return found


def _score_flops(cells):
  """From steps of as many tokens in sequences of two lengths, on one kind of GPU."""
  speeds = []
  for own in _by_recipe([cell for cell in cells if cell.source != "scaling"]).values():
    short, long = sorted(own, key=lambda cell: cell.run.length)
    pairs = long.run.tokens * (long.run.length - short.run.length) / 2
    flops = 6 * pairs * long.shape.scores * long.shape.layers
    speeds.append(flops / (long.measured - short.measured))
  return statistics.mean(speeds)


def _other_bytes(cells, known, chips):
  found = {}
  for name, own in _by_recipe(cells).items():
    rest = []
    for cell in own:
      at = dataclasses.replace(known, **chips[cell.gpu], other_bytes={name: 0.0})
      seconds = cell.measured - predicted_seconds(cell, at)
      values = cell.run.tokens * cell.shape.d * cell.shape.layers
      rest.append(seconds * at.memory / values)
    found[name] = statistics.mean(rest)
  return found


def _transient_bytes(results, known):
  """What the peak of moe_wide's step has beside state, gradients and what is kept."""
  found = {}
  for cell in peaks(results):
    if cell.is_fitted:
      name = cell.recipe.name
      unit = dataclasses.replace(known, transient_bytes={name: 1.0})
      parts = memory_bytes(cell.shape, cell.recipe, cell.run, unit)
      values = parts.pop("transient")
      found[name] = (cell.measured - sum(parts.values())) / values
  return found


def _reduce(results, known, gpu):
  """From BF16 in data parallel; infinite where the reduction hides behind the backward pass."""
  cells = [c for c in steps(results) if c.is_fitted and c.devices > 1 and c.gpu == gpu]
  if not cells:
    return known.wire["xla"][1]
  excess = sum(cell.measured - predicted_seconds(cell, known) for cell in cells)
  moved = sum(reduced_bytes(cell.shape, cell.run) for cell in cells)
  return moved / excess if excess > 0 else math.inf
