"""Times the kernels on a Hopper GPU, each after a check against its definition.

python -m experiments.kernel_bench --out=results/kernel_bench.jsonl

Device time from the profiler, two sets of random inputs in turns, each larger than L2; median and
quartiles. Ratios to what a user would pick instead are of the same run: a device copy, XLA on the
same definition, torch's matmuls where torch is installed.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from experiments import kernel_cases as cases
from experiments import kernel_peers as peers
from experiments import logs
from experiments.environment import describe_environment
from experiments.kernel_timing import (
  COLUMNS,
  CONTRACTION,
  GEMMS,
  ROWS,
  bf16_tensor,
  grouped,
  time_us,
)
from fp4jax import recipes
from fp4jax.moe_ffn import moe_ffn

_OUT = flags.DEFINE_string("out", "results/kernel_bench.jsonl", "JSONL file to write.")
_ONLY = flags.DEFINE_list("only", ["elementwise", "matmul", "moe_ffn"], "Which parts to run.")
_COMMIT = flags.DEFINE_string("commit", None, "Commit of the code, where git can't say.")
_LARGE = flags.DEFINE_boolean("large", True, "moe_ffn also at 64 experts, top-8.")
_SKEW = np.array([9001, 1, 127, 6144, 0, 3333, 12034, 2128])
Row = dict


def elementwise() -> Iterator[Row]:
  copy = peers.copy_bytes_per_second()
  yield {"kind": "copy", "tb_per_s": copy / 1e12}
  for name, time in peers.measure(peers.quantizers(ROWS, CONTRACTION)):
    yield {"kind": "peer", "name": name, "library": "torchao", "time_us": time}
  tensors = [bf16_tensor(seed, (ROWS, CONTRACTION)) for seed in (0, 1)]
  for case in (*cases.CASES, *cases.SWIGLU, *cases.STOCHASTIC):
    small = jax.jit(case.prepare)(tensors[0][:512])
    exact = case.definition and _same(jax.jit(case.kernel)(small), jax.jit(case.definition)(small))
    sets = [(jax.jit(case.prepare)(x),) for x in tensors]
    row = time_us(case.kernel, *sets)
    rate = case.bytes_per_value * ROWS * CONTRACTION / row["time_us"] * 1e6
    row |= {"tb_per_s": rate / 1e12, "of_copy": rate / copy}
    if case.definition:
      xla = time_us(case.definition, sets[0], repeats=3)["time_us"]
      row |= {"xla_time_us": xla, "times_xla": xla / row["time_us"]}
    what = {"kind": "elementwise", "name": case.name, "shape": [ROWS, CONTRACTION]}
    yield what | {"equal": exact} | row


def _same(actual, expected):
  def bits(x):
    return np.asarray(x).view(np.uint8 if x.dtype.itemsize == 1 else np.uint16)

  return all(bool((bits(a) == bits(e)).all()) for a, e in zip(actual, expected, strict=True))


def matmuls() -> Iterator[Row]:
  """Peers are timed on the very shape and groups; ratios are of speeds."""
  for n, k in GEMMS:
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
        row = time_us(f, *arguments)
        row |= {"tflops": flops / row["time_us"] * 1e-6}
        row |= {f"times_{peer}": t / row["time_us"] for peer, t in peer_times[gemm].items()}
        yield {"kind": "matmul", "name": name, "gemm": gemm} | where | row


def moe_ffns() -> Iterator[Row]:
  sizes = ((8, 2), (64, 8)) if _LARGE.value else ((8, 2),)
  for experts, top_k in sizes:
    arguments = _moe_inputs(experts, top_k)
    reference = None
    for recipe in (recipes.BF16, recipes.FP8, recipes.HOPPER_FP4):
      step = jax.jit(functools.partial(_step, recipe))
      row = {
        "kind": "moe_ffn",
        "recipe": recipe.name,
        "experts": experts,
        "top_k": top_k,
        "forward_us": time_us(functools.partial(_forward, recipe), arguments, repeats=5)["time_us"],
        **time_us(step, arguments, repeats=5),
        "temp_bytes": step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes,
        **_saved_bytes(recipe, arguments),
      }
      reference = reference or row
      row["speed_to_bf16"] = reference["time_us"] / row["time_us"]
      for name in ("saved_bytes", "saved_on_device_bytes"):
        row[f"{name}_to_bf16"] = row[name] / reference[name]
      yield row


def _moe_inputs(e, top_k, tokens=ROWS, d=CONTRACTION, f=COLUMNS):
  x, w13, w2 = (bf16_tensor(i, s) for i, s in enumerate(((tokens, d), (e, d, 2 * f), (e, f, d))))
  w13, w2 = jax.jit(lambda a, b: (a * d**-0.5, b * f**-0.5))(w13, w2)
  logits = jax.random.normal(jax.random.key(3), (tokens, e))
  weights, experts = lax.top_k(jax.nn.softmax(logits), top_k)
  return x, w13, w2, experts, weights, bf16_tensor(4, (tokens, d))


def _forward(recipe, x, w13, w2, experts, weights, dout):
  return moe_ffn(x, w13, w2, experts, weights, recipe, implementation="mosaic")


def _pull(recipe, x, w13, w2, experts, weights):
  def f(x, w13, w2, weights):
    return moe_ffn(x, w13, w2, experts, weights, recipe, implementation="mosaic")

  return jax.vjp(f, x, w13, w2, weights)


def _step(recipe, x, w13, w2, experts, weights, dout):
  y, pull = _pull(recipe, x, w13, w2, experts, weights)
  return y, *pull(dout)


def _saved_bytes(recipe, arguments):
  """What the forward pass keeps for the backward pass beside the weights of the experts.

  As outputs of the compiled forward pass (the weights are its inputs and no new outputs), and as
  what the device holds after it more than before.
  """
  forward = jax.jit(functools.partial(_pull, recipe))
  analysis = forward.lower(*arguments[:5]).compile().memory_analysis()
  in_use = lambda: jax.devices()[0].memory_stats()["bytes_in_use"]  # noqa: E731
  before = in_use()
  y, pull = jax.block_until_ready(forward(*arguments[:5]))
  held = in_use() - before - y.nbytes
  del pull
  return {
    "saved_bytes": analysis.output_size_in_bytes - y.nbytes,
    "saved_on_device_bytes": held,
  }


_PARTS = {"elementwise": elementwise, "matmul": matmuls, "moe_ffn": moe_ffns}


def main(argv):
  del argv
  log = logs.JsonLines(Path(_OUT.value), 0)
  environment = describe_environment()
  environment["git_commit"] = environment["git_commit"] or _COMMIT.value
  log.write({"kind": "environment"} | environment)
  for part in _ONLY.value:
    for row in _PARTS[part]():
      log.write(row)
      print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
  log.close()


if __name__ == "__main__":
  app.run(main)
