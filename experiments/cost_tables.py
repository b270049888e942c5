"""The tables of docs/scaling.md: what the cost model predicts beside what is measured."""

import dataclasses
import functools
import math
from pathlib import Path

from experiments import cost_constants
from experiments.cost_constants import Cell
from experiments.cost_terms import Constants, Run, Shape, memory_bytes, step_seconds
from fp4jax import recipes
from fp4jax.recipe import Recipe

# arXiv 2412.19437: multi-head latent attention, three dense layers, a shared expert in the others.
DEEPSEEK_V3 = Shape(
  layers=61,
  expert_layers=58,
  d=7168,
  f=2048,
  experts=256,
  top_k=8,
  attention=(
    7168 * 1536  # down to the queries' latent, and up to 128 heads of 128 + 64
    + 1536 * 128 * (128 + 64)
    + 7168 * (512 + 64)  # down to the keys' and values' latent, and up
    + 512 * 128 * (128 + 128)
    + 128 * 128 * 7168
  ),
  qkv=128 * (192 + 192 + 128),
  values=128 * 128,
  scores=128 * (192 + 128),
  dense=58 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18432,
  head=7168 * 129280,
  quantized_attention=True,
)
# Two layers of a stage run one after the other; their gradients are summed over the microbatches.
ONE_BY_ONE = dataclasses.replace(DEEPSEEK_V3, unrolled=True)
GPUS, SEQUENCES, LENGTH, MEMORY = 256, 4800, 4096, 80e9
LARGE = {
  "bf16": recipes.BF16.replace({"payload.sums": "bfloat16"}),
  "fp8_dispatch": recipes.FP8_DISPATCH,
  "hopper_fp4_dispatch": recipes.HOPPER_FP4_DISPATCH,
}
# arXiv 2603.02731: tokens a GPU and second, and peak memory in % of 80 GB; None: out of memory.
PAPER = {
  "everything": {
    "bf16": (1122, 68.29),
    "fp8_dispatch": (1157, 74.20),
    "hopper_fp4_dispatch": (1156, 59.40),
  },
  "attention+norm": {"bf16": None, "fp8_dispatch": None, "hopper_fp4_dispatch": (1248, 60.62)},
  "none": {"bf16": None, "fp8_dispatch": None, "hopper_fp4_dispatch": (1302, 70.11)},
}
# Its predecessor, all layers computed again: BF16, and FP8 sent as such, by devices that divide the
# experts.
PREDECESSOR = {8: (1109, 1176), 16: (939, 1012), 32: (671, 779)}


def large_run(remat: str, expert: int = 8) -> Run:
  """Of one microbatch, a sequence on each device; experts are asked alike."""
  return Run(tokens=LENGTH, length=LENGTH, expert=expert, capacity_factor=1.1, remat=remat)


def tokens_per_second(recipe: Recipe, run: Run, constants: Constants) -> float:
  """Of one of 256 GPUs: stages of a pipeline, each with its part of the layers and `expert` GPUs.

  A step is as many microbatches as a GPU has sequences and, to fill and drain the pipeline, one
  less than there are stages; then once the optimizer.
  """
  stages, microbatches = GPUS // run.expert, SEQUENCES // run.expert
  parts = step_seconds(ONE_BY_ONE, recipe, run, constants)
  once = parts.pop("optimizer") + parts.pop("gradients' all-reduce")
  passes = (microbatches + stages - 1) * sum(parts.values())
  return microbatches * run.tokens / (passes + once)


def memory_share(recipe: Recipe, run: Run, constants: Constants) -> float:
  """Of 80 GB, on the first stage. It keeps a microbatch for every stage, of its part of the layers:
  as much as all layers keep of one."""
  parts = memory_bytes(DEEPSEEK_V3, recipe, run, constants)
  state = (parts.pop("state") + parts.pop("gradients")) * run.expert / GPUS
  return (state + sum(parts.values())) / MEMORY


def large_table(results: Path) -> str:
  constants = cost_constants.fit(results, "H100")
  lines = [
    "| computed again | recipe | tokens/GPU/s | paper | memory, % of 80 GB | paper |",
    "|---|---|---|---|---|---|",
  ]
  for remat, row in PAPER.items():
    for name, paper in row.items():
      run = large_run(remat)
      speed = tokens_per_second(LARGE[name], run, constants)
      share = 100 * memory_share(LARGE[name], run, constants)
      theirs = ("none fits", "") if paper is None else (f"{paper[0]:,}", f"{paper[1]:.1f}")
      lines.append(
        f"| `{remat}` | `{name}` | {speed:,.0f} | {theirs[0]} | {share:.0f} | {theirs[1]} |"
      )
  return "\n".join(lines)


def groups_table(results: Path) -> str:
  constants = cost_constants.fit(results, "H100")
  lines = [
    "| GPUs that divide the experts | BF16 | predecessor | FP8 sent | predecessor |",
    "|---|---|---|---|---|",
  ]
  for expert, (bf16, fp8) in PREDECESSOR.items():
    run = large_run("everything", expert)
    own = [tokens_per_second(LARGE[name], run, constants) for name in ("bf16", "fp8_dispatch")]
    lines.append(f"| {expert} | {own[0]:,.0f} | {bf16:,} | {own[1]:,.0f} | {fp8:,} |")
  return "\n".join(lines)


def parts_table(results: Path) -> str:
  """Microseconds a token of all 671B's layers, by part."""
  constants = cost_constants.fit(results, "H100")
  run = large_run("everything")
  own = [step_seconds(ONE_BY_ONE, recipe, run, constants) for recipe in LARGE.values()]
  lines = [
    "| us a token | " + " | ".join(f"`{name}`" for name in LARGE) + " |",
    "|---" * (1 + len(LARGE)) + "|",
  ]
  for part in own[0]:
    if part not in ("optimizer", "gradients' all-reduce", "loop over the layers"):
      cells = " | ".join(f"{parts[part] / run.tokens * 1e6:.0f}" for parts in own)
      lines.append(f"| {part} | {cells} |")
  return "\n".join(lines)


def times(results: Path) -> list[tuple[Cell, float]]:
  """Every measured time with what the model predicts, in seconds."""
  found = [*cost_constants.steps(results), *cost_constants.layers(results)]
  return _predicted(results, found, cost_constants.predicted_seconds)


def peaks(results: Path) -> list[tuple[Cell, float]]:
  """Every measured peak of memory with what the model predicts, in bytes."""

  def of(cell, constants):
    return sum(memory_bytes(cell.shape, cell.recipe, cell.run, constants).values())

  return _predicted(results, list(cost_constants.peaks(results)), of)


def _predicted(results, cells, predict):
  constants = functools.cache(lambda gpu: cost_constants.fit(results, gpu))
  return [(cell, predict(cell, constants(cell.gpu))) for cell in cells]


def cells_table(cells: list[tuple[Cell, float]], unit: str, size: float) -> str:
  lines = [
    f"| what | GPUs | recipe | predicted, {unit} | measured, {unit} | error | fitted on it |",
    "|---|---|---|---|---|---|---|",
  ]
  for cell, predicted in cells:
    axes = {"data": cell.run.data, "expert": cell.run.expert}
    gpus = ", ".join(
      [f"{cell.devices} {cell.gpu}", *(f"{a} {n}" for a, n in axes.items() if n > 1)]
    )
    measured, error = "out of memory", ""
    if cell.measured < math.inf:
      measured, error = f"{cell.measured / size:.1f}", f"{predicted / cell.measured - 1:+.1%}"
    name = cell.recipe.name.partition("[")[0]
    lines.append(
      f"| {_what(cell)} | {gpus} | `{name}` | {predicted / size:.1f} |"
      f" {measured} | {error} | {'yes' if cell.is_fitted else ''} |"
    )
  return "\n".join(lines)


def _what(cell):
  run, shape = cell.run, cell.shape
  if cell.is_layer:
    said = [f"layer, {shape.experts} experts, top-{shape.top_k}"]
  else:
    said = [f"step, {shape.layers} layers, {run.tokens // run.length} sequences of {run.length}"]
  said += ["unrolled"] if shape.unrolled else []
  said += ["attention quantized"] if shape.quantized_attention else []
  said += [] if run.remat == "none" else [f"`{run.remat}` again"]
  said += [] if run.exchange == "xla" else [run.exchange]
  said += [] if run.capacity_factor is None else [f"capacity {run.capacity_factor:g}"]
  return ", ".join(said)


def constants_table(results: Path) -> str:
  by_gpu = {gpu: cost_constants.fit(results, gpu) for gpu in ("H100", "H200")}
  h100, h200 = by_gpu["H100"], by_gpu["H200"]
  tera = lambda *values: " / ".join(f"{value / 1e12:,.0f}" for value in values)  # noqa: E731
  each = lambda constant, form: ", ".join(  # noqa: E731
    f"`{name}` {value:{form}}" for name, value in sorted(constant.items())
  )
  wire = ", ".join(
    f"{name}: {latency * 1e6:.0f} us and {speed / 1e9:.0f} GB/s"
    for name, (latency, speed) in h100.wire.items()
  )
  busy = cost_constants.imbalances(results)
  reduce = ["hidden" if math.isinf(c.reduce) else f"{c.reduce / 1e9:.0f}" for c in (h100, h200)]
  rows = {
    "experts' GEMMs, bf16 / FP8, H100": (
      f"{tera(*h100.experts_flops.values())} TFLOP/s",
      "`kernel_bench`: fprop, dgrad, wgrad of 8 groups",
    ),
    "experts' GEMMs, bf16 / FP8, H200": (
      f"{tera(*h200.experts_flops.values())} TFLOP/s",
      "the same",
    ),
    "other GEMMs, bf16": (f"{tera(h100.dense_flops)} TFLOP/s", "`speed_of_light`: the peak"),
    "scores of attention": (
      f"{tera(h100.score_flops)} TFLOP/s",
      "`step_time`: 4096 against 512 tokens a sequence",
    ),
    "memory, H100 / H200": (
      f"{h100.memory / 1e12:.2f} / {h200.memory / 1e12:.2f} TB/s",
      "`kernel_bench`: a copy",
    ),
    "a weight of the experts, H100": (
      f"bytes: {each(h100.weight_bytes, '.1f')}",
      "`kernel_bench`: the layer less its parts",
    ),
    "a weight of the experts, H200": (
      f"bytes: {each(h200.weight_bytes, '.1f')}",
      "the same",
    ),
    "what is left of a step, H100": (
      f"bytes of a value and layer: {each(h100.other_bytes, '.0f')}",
      "`step_time`: the step on one GPU less its parts",
    ),
    "what is left of a step, H200": (
      f"bytes of a value and layer: {each(h200.other_bytes, '.0f')}",
      "the same",
    ),
    "exchange": (wire, "`dispatch_bench`: wire and dispatch"),
    "plan of the exchange": (f"{h100.plan * 1e6:.0f} us a layer", "`dispatch_bench`"),
    "busiest device of 2 / 4": (
      f"{busy[2]:.2f} / {busy[4]:.2f} of the mean",
      "routing of moe_wide's runs at step 100",
    ),
    "all-reduce, H100 / H200": (
      f"{' / '.join(reduce)} GB/s",
      "`step_time`: BF16 in data parallel; without rows as fast as the exchange",
    ),
    "transient memory": (
      f"bytes of a row's value: {each(h100.transient_bytes, '.1f')}",
      "`step_memory`: the peak less its parts",
    ),
    "network": (f"{h100.network / 1e9:.0f} GB/s a GPU", "assumed: InfiniBand of 400 Gb/s"),
  }
  lines = ["| constant | value | from the rows of |", "|---|---|---|"]
  return "\n".join(
    lines + [f"| {name} | {value} | {source} |" for name, (value, source) in rows.items()]
  )


def sources_table(results: Path) -> str:
  """Where and when what the constants are read from was measured."""
  lines = ["| rows | device | commit |", "|---|---|---|"]
  for name in cost_constants.SOURCES:
    if (results / f"{name}.jsonl").exists():
      rows = cost_constants.read(results, name)
      said = [(row["device"], row["git_commit"][:9]) for row in rows if "git_commit" in row]
      for device, commit in dict.fromkeys(said):
        lines.append(f"| `results/{name}.jsonl` | {device} | {commit} |")
  return "\n".join(lines)


def scaling_tables(results: Path) -> dict[str, str]:
  """By the name of their place in docs/scaling.md."""
  return {
    "times": cells_table(times(results), "ms", 1e-3),
    "peaks": cells_table(peaks(results), "GB", 1e9),
    "constants": constants_table(results),
    "sources": sources_table(results),
    "large": large_table(results),
    "large_parts": parts_table(results),
    "groups": groups_table(results),
  }
