"""Times every candidate of the kernels' tuning tables on a Hopper GPU and writes the fastest there.

python -m experiments.kernel_sweep --out=results/kernel_sweep.jsonl

Each kernel's file has its table, TUNING. A candidate is timed through the public wrapper, with its
entry of the table in place, at 32768 x 7168; the matmuls at both shapes of the benchmark. One that
computes something else has an error and no time.
"""

import ast
import dataclasses
import functools
import importlib
import itertools
import pprint
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import command_line, kernel_exchange, kernel_few_rows, logs
from experiments import kernel_cases as cases
from experiments import kernel_checks as checks
from experiments import kernel_timing as timing
from experiments.environment import COMMIT, describe_environment
from fp4jax import formats
from fp4jax.implementation import choose, device_obstacle
from pallas_kernels import few_rows
from pallas_kernels.grouped_matmul import TuningConfig

_OUT = flags.DEFINE_string("out", "results/kernel_sweep.jsonl", "JSONL file to write.")
_WRITE = flags.DEFINE_boolean("write", True, "Write the fastest into the tables.")
_ONLY = flags.DEFINE_list(
  "only", [], "Files of pallas_kernels, or entries such as fp8.rows, to sweep; none: all."
)
_ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One entry of a table: its candidates, and the calls that it decides."""

  module: str
  key: str
  candidates: Sequence[Any]
  time: Callable[[], float]  # of all calls, in us, with the candidate in place

  @property
  def name(self) -> str:
    return f"{self.module}.{self.key}"


def grid(**choices) -> list[dict]:
  return [
    dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
  ]


def _case(name: str) -> Callable[[], float]:
  case = cases.BY_NAME[name]

  def check(out):
    if case.definition:
      checks.check_case(case, out, jax.jit(case.definition)(_prepared(case)))

  return lambda: _time_us(case.kernel, (_prepared(case),), check)


def _time_us(f, arguments, check):
  program = timing.compiled(f, *arguments)
  check(program(*arguments))
  return timing.time_us(program, arguments)["time_us"]


@functools.cache
def _prepared(case):
  return jax.jit(case.prepare)(timing.bf16_tensor(0, (timing.ROWS, timing.CONTRACTION)))


def _gemms(*names: str) -> Callable[[], float]:
  def time_us(gemm, f, arguments):
    return _time_us(f, arguments, lambda out: checks.check_gemm(gemm, out, arguments))

  return lambda: sum(time_us(gemm, f, sets[0]) for gemm, f, sets in _calls(names))


@functools.cache
def _calls(names):
  sizes = jnp.full(8, timing.ROWS // 8, jnp.int32)
  found = []
  for n, k in timing.GEMMS:
    found += [call[1:] for call in timing.grouped(n, k, sizes) if call[0] in names]
  return found


def _exchange(name: str) -> Callable[[], float]:
  def time_us():
    program, arguments = kernel_exchange.calls(
      timing.ROWS // 2, timing.CONTRACTION, timing.ROWS // 2
    )[name]
    program = timing.compiled(program, *arguments)
    kernel_exchange.check(name, program(*arguments), arguments)
    return timing.wall_us(program, arguments)

  return time_us


def _few_rows(m: int, fmt: formats.Format = formats.MXFP4) -> Callable[[], float]:
  return lambda: kernel_few_rows.default_us(m, *kernel_few_rows.SHAPES[0], fmt)


_FEW_ROWS = [
  few_rows.TuningConfig(**c)
  for c in (*grid(workers=(2, 4)), *grid(workers=(3,), stages=(3,), depth=(2,)))
]
_FP8_ROWS = [few_rows.TuningConfig(workers=3), *few_rows.FP8_VARIANTS.values()]
_BF16 = [
  dict(block_m=m, block_n=n, block_k=64, max_concurrent_steps=steps, grid_block_n=8)
  for m, n, steps in ((128, 128, 4), (64, 256, 4), (128, 192, 4))
]
_SCHEDULES = [
  TuningConfig(stages=4, **c)
  for c in (
    *grid(cluster=(1, 2), skip_idle=(False, True)),
    *grid(cluster=(2,), skip_idle=(True,), grid_tile_width=(4, 16)),
  )
]
ENTRIES = (
  Entry("mxfp4", "nearest", grid(runs=(4, 8, 16)), _case("quantize_mxfp4 floor")),
  Entry("mxfp4", "stochastic", grid(runs=(2, 4, 8)), _case("quantize_mxfp4 rceil, stochastic")),
  Entry("mxfp4", "hadamard", grid(runs=(2, 4, 8)), _case("quantize_mxfp4 rceil, Hadamard")),
  Entry("mxfp4", "both", grid(columns=(64, 128)), _case("quantize_mxfp4_both floor")),
  Entry("fp8", "rows", grid(runs=(2, 4, 8)), _case("quantize_fp8_rows float32")),
  Entry("dequantize", "rows", grid(runs=(2, 4, 8)), _case("dequantize_mxfp4")),
  Entry("convert", "narrow", grid(rows=(16, 32, 64), tiles=(1, 2, 4)), _case("fp8_to_mxfp4 floor")),
  Entry("widen", "rows", grid(rows=(16, 32, 64), tiles=(1, 2)), _case("mxfp4_to_fp8_rows")),
  Entry("widen", "columns", grid(tiles=(1, 2, 4)), _case("mxfp4_to_fp8_columns")),
  Entry("swiglu", "forward", grid(runs=(1, 2, 4)), _case("swiglu_fp8_rows")),
  Entry("swiglu", "kept", grid(runs=(1, 2, 4)), _case("keep_swiglu_fp8_rows")),
  Entry("swiglu", "backward", grid(warpgroups=(1, 2)), _case("swiglu_backward_fp8")),
  # dgrad is fprop at the other shape.
  Entry(
    "grouped_matmul",
    "matmul",
    [*_SCHEDULES, TuningConfig(compute_warpgroups=2, stages=5, skip_idle=True)],
    _gemms("fp8 fprop"),
  ),
  Entry(
    "grouped_matmul",
    "wgrad",
    _SCHEDULES,
    _gemms("fp8 wgrad, float32 result"),
  ),
  Entry("bf16_matmul", "matmul", _BF16, _gemms("bf16 fprop", "bf16 dgrad")),
  Entry("few_rows", "up to 64 rows", _FEW_ROWS, _few_rows(8)),
  Entry("few_rows", "more", _FEW_ROWS, _few_rows(128)),
  Entry("few_rows", "FP8", _FP8_ROWS, _few_rows(64, formats.FP8_BLOCK_POW2_2D)),
  # On two GPUs or more.
  Entry("exchange", "send", grid(ctas=(4, 8), rows=(2, 4)), _exchange("send")),
  Entry("exchange", "mxfp4", grid(ctas=(4, 8), rows=(2, 4)), _exchange("mxfp4")),
  Entry("exchange", "collect", grid(ctas=(2, 4, 8)), _exchange("collect")),
  Entry("bf16_matmul", "wgrad", _BF16, _gemms("bf16 wgrad, float32 result")),
)


def chosen(only: Sequence[str]) -> list[Entry]:
  """The entries of these files or names; all, where there is none."""
  return [entry for entry in ENTRIES if not only or {entry.module, entry.name} & set(only)]


def sweep(entry: Entry):
  """Rows of all candidates; those that do not fit the chip have no time."""
  table = importlib.import_module(f"pallas_kernels.{entry.module}").TUNING
  for candidate in entry.candidates:
    with mock.patch.dict(table, {entry.key: candidate}):
      try:
        time_us, error = entry.time(), None
      except (ValueError, RuntimeError) as e:  # a check, too much SMEM, a shape that it lacks
        time_us, error = None, str(e).splitlines()[0][:200]
    yield {
      "kind": "sweep",
      "table": entry.name,
      "candidate": timing.plain(candidate),
      "time_us": time_us,
      "error": error,
    }


def source_of(candidate) -> str:
  """A dataclass with the fields that differ from its defaults, a dict as it is."""
  if not dataclasses.is_dataclass(candidate):
    return pprint.pformat(dict(candidate), sort_dicts=False, width=10**6).replace("'", '"')
  changed = [
    f"{f.name}={getattr(candidate, f.name)!r}"
    for f in dataclasses.fields(candidate)
    if getattr(candidate, f.name) != f.default
  ]
  return f"{type(candidate).__name__}({', '.join(changed)})"


def with_table(source: str, table: dict[str, Any]) -> str:
  """The module's source with its TUNING replaced; what stands beside it stays."""
  (assignment,) = [
    node
    for node in ast.parse(source).body
    if isinstance(node, ast.Assign | ast.AnnAssign)
    and ast.unparse(node).startswith(("TUNING =", "TUNING:"))
  ]
  entries = "".join(f'  "{key}": {source_of(value)},\n' for key, value in table.items())
  lines = source.splitlines(keepends=True)
  old = assignment.value
  before = lines[old.lineno - 1][: old.col_offset]
  after = lines[old.end_lineno - 1][old.end_col_offset :]
  lines[old.lineno - 1 : old.end_lineno] = [f"{before}{{\n{entries}}}{after}"]
  return "".join(lines)


command_line.allow("only", [*(e.module for e in ENTRIES), *(e.name for e in ENTRIES)])


def main(argv) -> None:
  del argv
  choose("mosaic", device_obstacle())
  environment = {"kind": "environment"} | describe_environment(COMMIT.value)
  log = logs.Rewritten(_OUT.value, environment)
  best = {}
  for entry in chosen(_ONLY.value):
    rows = list(sweep(entry))
    for row, candidate in zip(rows, entry.candidates, strict=True):
      log.write(row)
      took = row["error"] or f"{row['time_us']:9.1f} us"
      print(f"{row['table']:22s} {source_of(candidate):70s} {took}", flush=True)
    timed = [(r["time_us"], i) for i, r in enumerate(rows) if r["time_us"] is not None]
    if timed:
      best[entry.module, entry.key] = entry.candidates[min(timed)[1]]
  log.close()
  if not _WRITE.value:
    return
  for module in dict.fromkeys(module for module, _ in best):
    table = importlib.import_module(f"pallas_kernels.{module}").TUNING
    table |= {key: value for (m, key), value in best.items() if m == module}
    path = _ROOT / "pallas_kernels" / f"{module}.py"
    path.write_text(with_table(path.read_text(), table))


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
