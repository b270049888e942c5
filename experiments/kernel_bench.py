"""Times the kernels on a Hopper GPU, each after a check against its definition.

python -m experiments.kernel_bench --out=results/kernel_bench.jsonl

Device time from the profiler, two sets of random inputs in turns, each larger than L2; median and
quartiles. Ratios to what a user would pick instead are of the same run: a device copy, XLA on the
same definition, torch's matmuls, torchao's quantizers where it is installed. Each run of `moe_ffn`
is a process of its own, whose memory is its own to count: it comes first, before this one takes
any.
"""

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from experiments import command_line, logs
from experiments import kernel_cases as cases
from experiments import kernel_peers as peers
from experiments import kernel_tables as tables
from experiments.environment import COMMIT, describe_environment
from experiments.kernel_checks import equal, sampled_error
from experiments.kernel_timing import (
  COLUMNS,
  CONTRACTION,
  GEMMS,
  ROWS,
  bf16_tensor,
  compiled,
  grouped,
  time_us,
  tuning,
)
from fp4jax import recipes
from fp4jax.implementation import choose, device_obstacle
from fp4jax.moe_ffn import moe_ffn

_OUT = flags.DEFINE_string("out", "results/kernel_bench.jsonl", "JSONL file to write.")
_ONLY = flags.DEFINE_list("only", ["moe_ffn", "elementwise", "matmul"], "Which parts to run.")
_SKEW = np.array([9001, 1, 127, 6144, 0, 3333, 12034, 2128])
Row = dict


def elementwise() -> Iterator[Row]:
  copy = peers.copy_bytes_per_second()
  yield {"kind": "copy", "tb_per_s": copy / 1e12}
  for name, time in peers.measure(peers.quantizers(ROWS, CONTRACTION)):
    yield {"kind": "peer", "name": name, "library": "torchao", "time_us": time}
  tensors = [bf16_tensor(seed, (ROWS, CONTRACTION)) for seed in (0, 1)]
  for case in cases.BY_NAME.values():
    if not case.benchmarked:
      continue
    sets = [(jax.jit(case.prepare)(x),) for x in tensors]
    kernel = compiled(case.kernel, *sets[0])
    what = {"kind": "elementwise", "name": case.name, "shape": [ROWS, CONTRACTION]}
    xla = {}
    if case.definition:
      definition = compiled(case.definition, *sets[0])
      what["equal"] = equal(kernel(*sets[0]), definition(*sets[0]))
      xla = {"xla_time_us": time_us(definition, sets[0], repeats=3)["time_us"]}
    row = time_us(kernel, *sets)
    rate = case.bytes_per_value * ROWS * CONTRACTION / row["time_us"] * 1e6
    row |= xla | {"tb_per_s": rate / 1e12, "of_copy": rate / copy}
    if xla:
      row["times_xla"] = xla["xla_time_us"] / row["time_us"]
    yield what | row


def matmuls() -> Iterator[Row]:
  """Peers are timed on the very shape and groups; ratios are of speeds."""
  for n, k in GEMMS:
    programs = {}  # group sizes are arguments: both loads run the same ones
    flops = 2 * ROWS * n * k
    for load, sizes in (("even", np.full(8, ROWS // 8)), ("skewed", _SKEW)):
      where = {"groups": load, "m": ROWS, "n": n, "k": k}
      peer_times = {
        gemm: dict(peers.measure(peers.matmuls(gemm, ROWS, n, k, sizes)))
        for gemm in ("fprop", "dgrad", "wgrad")
      }
      for gemm, times in peer_times.items():
        for name, time in times.items():
          tflops = flops / time * 1e-6
          yield {"kind": "matmul_peer", "gemm": gemm, "name": name, "tflops": tflops} | where
      for name, gemm, f, arguments in grouped(n, k, jnp.asarray(sizes, jnp.int32)):
        if name not in programs:
          programs[name] = compiled(f, *arguments[0])
        row = {}
        if name.startswith("fp8"):
          row["error_to_bound"] = sampled_error(gemm, programs[name](*arguments[0]), arguments[0])
        row |= time_us(programs[name], *arguments)
        row |= {"tflops": flops / row["time_us"] * 1e-6}
        row |= {f"times_{peer}": t / row["time_us"] for peer, t in peer_times[gemm].items()}
        yield {"kind": "matmul", "name": name, "gemm": gemm} | where | row


def moe_ffns() -> Iterator[Row]:
  for experts, top_k in ((8, 2), (64, 8)):
    reference = None
    for name in ("bf16", "fp8", "hopper_fp4"):
      spawn = multiprocessing.get_context("spawn")
      with concurrent.futures.ProcessPoolExecutor(1, spawn) as alone:
        row = alone.submit(_moe_ffn, name, experts, top_k).result()
      reference = reference or row
      row["speed_to_bf16"] = reference["time_us"] / row["time_us"]
      for kept in ("saved_bytes", "saved_on_device_bytes"):
        row[f"{kept}_to_bf16"] = row[kept] / reference[kept]
      yield row


def _moe_ffn(name: str, experts: int, top_k: int) -> Row:
  # The device counts what was asked for: JAX's own allocator counts the piece that was given, which
  # is up to 128 MB more.
  os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
  recipe, arguments = recipes.by_name(name), _moe_inputs(experts, top_k)
  forward = compiled(functools.partial(_forward, recipe), *arguments[:5])
  row = {"kind": "moe_ffn", "recipe": name, "experts": experts, "top_k": top_k}
  row |= _saved_bytes(forward, arguments[:5])
  row["forward_us"] = time_us(forward, arguments[:5], repeats=5)["time_us"]
  step = compiled(functools.partial(_step, recipe), *arguments)
  row |= time_us(step, arguments, repeats=5)
  return row | {"temp_bytes": step.memory_analysis().temp_size_in_bytes}


def _moe_inputs(e, top_k, tokens=ROWS, d=CONTRACTION, f=COLUMNS):
  x, w13, w2 = (bf16_tensor(i, s) for i, s in enumerate(((tokens, d), (e, d, 2 * f), (e, f, d))))
  w13, w2 = jax.jit(lambda a, b: (a * d**-0.5, b * f**-0.5))(w13, w2)
  logits = jax.random.normal(jax.random.key(3), (tokens, e))
  weights, experts = lax.top_k(jax.nn.softmax(logits), top_k)
  return x, w13, w2, experts, weights, bf16_tensor(4, (tokens, d))


def _forward(recipe, x, w13, w2, experts, weights):
  """The output, and what is kept but for the weights of the experts."""
  y, pull = _pull(recipe, x, w13, w2, experts, weights)
  return y, [kept for kept in jax.tree.leaves(pull) if kept.shape not in (w13.shape, w2.shape)]


def _pull(recipe, x, w13, w2, experts, weights):
  def f(x, w13, w2, weights):
    return moe_ffn(x, w13, w2, experts, weights, recipe, implementation="mosaic")

  return jax.vjp(f, x, w13, w2, weights)


def _step(recipe, x, w13, w2, experts, weights, dout):
  y, pull = _pull(recipe, x, w13, w2, experts, weights)
  return y, *pull(dout)


def _saved_bytes(forward, arguments):
  """By the compiled program's own analysis, and as what the device holds more after it ran."""
  in_use = lambda: jax.devices()[0].memory_stats()["bytes_in_use"]  # noqa: E731
  before = in_use()
  y, kept = jax.block_until_ready(forward(*arguments))
  held = in_use() - before - y.nbytes
  del kept
  outputs = forward.memory_analysis().output_size_in_bytes
  return {"saved_bytes": outputs - y.nbytes, "saved_on_device_bytes": held}


_PARTS = {
  "elementwise": (elementwise, tables.elementwise_table),
  "matmul": (matmuls, tables.matmul_table),
  "moe_ffn": (moe_ffns, tables.moe_ffn_table),
}


command_line.allow("only", _PARTS)


def main(argv):
  del argv
  # For the processes of `moe_ffn`, and for torch.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  choose("mosaic", device_obstacle())
  parts = [part for part in _ONLY.value if part]
  if beside_torch := sorted({"elementwise", "matmul"}.intersection(parts)):
    peers.require_torch(beside_torch)
  environment = {"kind": "environment"} | describe_environment(COMMIT.value)
  log = logs.Rewritten(_OUT.value, environment | {"tuning": tuning()})
  for part in parts:
    measure, table = _PARTS[part]
    rows = []
    for row in measure():
      log.write(row)
      rows.append(row)
      print(" ".join(str(row[k]) for k in ("kind", "name", "recipe") if k in row), flush=True)
    print(table(rows), flush=True)
  log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
