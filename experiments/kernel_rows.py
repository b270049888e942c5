"""The rows of the benchmark: each kernel is checked, then timed. What fails has no time.

Each run of `moe_ffn` is a process of its own, whose memory is its own to count.
"""

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import kernel_cases as cases
from experiments import kernel_peers as peers
from experiments import kernel_tables as tables
from experiments.kernel_checks import CheckFailed, check_case, check_gemm, check_rows
from experiments.kernel_few_rows import few_rows
from experiments.kernel_timing import (
  COLUMNS,
  CONTRACTION,
  GEMMS,
  ROWS,
  bf16_tensor,
  compiled,
  grouped,
  time_us,
)
from fp4jax import recipes
from fp4jax.moe_ffn import moe_ffn

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
    definition = compiled(case.definition, *sets[0]) if case.definition else None
    try:
      if definition:
        what["equal"] = check_case(case, kernel(*sets[0]), definition(*sets[0]))
    except CheckFailed as error:
      yield what | {"failed": str(error)}
      continue
    row = time_us(kernel, *sets)
    rate = case.bytes_per_value * ROWS * CONTRACTION / row["time_us"] * 1e6
    row |= {"tb_per_s": rate / 1e12, "of_copy": rate / copy}
    if definition:
      row["xla_time_us"] = time_us(definition, sets[0], repeats=3)["time_us"]
      row["times_xla"] = row["xla_time_us"] / row["time_us"]
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
        row = {"kind": "matmul", "name": name, "gemm": gemm} | where
        try:
          row["error_to_bound"] = check_gemm(gemm, programs[name](*arguments[0]), arguments[0])
        except CheckFailed as error:
          yield row | {"failed": str(error)}
          continue
        row |= time_us(programs[name], *arguments)
        row |= {"tflops": flops / row["time_us"] * 1e-6}
        yield row | {f"times_{peer}": t / row["time_us"] for peer, t in peer_times[gemm].items()}


def moe_ffns() -> Iterator[Row]:
  for experts, top_k in ((8, 2), (64, 8)):
    reference = None
    for name in ("bf16", "fp8", "hopper_fp4"):
      spawn = multiprocessing.get_context("spawn")
      with concurrent.futures.ProcessPoolExecutor(1, spawn) as alone:
        row = alone.submit(_moe_ffn, name, experts, top_k).result()
      if name == "bf16" and "failed" not in row:
        reference = row
      if reference and "failed" not in row:
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
  step = compiled(functools.partial(_step, recipe), *arguments)
  try:
    row["errors"] = _check_tokens(recipe, step, arguments)
  except CheckFailed as error:
    return row | {"failed": str(error)}
  row["forward_us"] = time_us(forward, arguments[:5], repeats=5)["time_us"]
  row |= time_us(step, arguments, repeats=5)
  return row | {"temp_bytes": step.memory_analysis().temp_size_in_bytes}


def _check_tokens(recipe, step, arguments, count=64):
  """Some tokens alone, through XLA: what is theirs depends on no other token."""
  x, w13, w2, *of_tokens = arguments
  tokens = jnp.arange(0, len(x), -(-len(x) // count))

  # Autotuning would take longer than all that is timed. With the excess precision that XLA allows
  # itself, h would reach its rounding to E2M1 in float32: 0.8 % of the codes would be others.
  options = {"xla_gpu_autotune_level": 0, "xla_allow_excess_precision": False}

  @functools.partial(jax.jit, compiler_options=options)
  def alone(*arguments):
    y, dx, _, _, dweights = _step(recipe, *arguments, implementation="xla")
    return {"y": y, "dx": dx, "dweights": dweights}

  expected = alone(x[tokens], w13, w2, *(v[tokens] for v in of_tokens))
  y, dx, _, _, dweights = step(*arguments)
  actual = {"y": y[tokens], "dx": dx[tokens], "dweights": dweights[tokens]}
  return check_rows(actual, expected)


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


def _pull(recipe, x, w13, w2, experts, weights, implementation="mosaic"):
  def f(x, w13, w2, weights):
    return moe_ffn(x, w13, w2, experts, weights, recipe, implementation=implementation)

  return jax.vjp(f, x, w13, w2, weights)


def _step(recipe, x, w13, w2, experts, weights, dout, implementation="mosaic"):
  y, pull = _pull(recipe, x, w13, w2, experts, weights, implementation)
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


PARTS = {
  "elementwise": (elementwise, tables.elementwise_table),
  "matmul": (matmuls, tables.matmul_table),
  "moe_ffn": (moe_ffns, tables.moe_ffn_table),
  "few_rows": (few_rows, tables.few_rows_table),
}


def measure(parts: Iterable[str], write: Callable[[Row], None]) -> None:
  """Writes every row, and prints each part's table.

  Raises:
    CheckFailed: at the end, with all that failed.
  """
  failed = []
  for part in parts:
    rows_of, table = PARTS[part]
    rows = []
    for row in rows_of():
      write(row)
      rows.append(row)
      line = " ".join(str(row[k]) for k in ("kind", "name", "recipe", "failed") if k in row)
      print(line, flush=True)
      failed += [line] if "failed" in row else []
    print(table(rows), flush=True)
  if failed:
    raise CheckFailed("; ".join(failed))
