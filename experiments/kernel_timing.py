"""Device times of functions of large arrays, and the grouped matmuls that are timed."""

import dataclasses
import functools
import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler
from jaxtyping import Array, Int

import pallas_kernels
from pallas_kernels import bf16_matmul, grouped_matmul

ROWS, CONTRACTION, COLUMNS = 32768, 7168, 2048
GEMMS = (COLUMNS, CONTRACTION), (CONTRACTION, COLUMNS)  # columns and contraction of fprop


def plain(candidate) -> dict[str, Any]:
  """An entry of a tuning table, for JSON."""
  if dataclasses.is_dataclass(candidate):
    return dataclasses.asdict(candidate)
  return dict(candidate)


def tuning() -> dict[str, dict[str, Any]]:
  """Every entry of the tables TUNING, as this process has them: "grouped_matmul.wgrad"."""
  entries = {}
  for module in pkgutil.iter_modules(pallas_kernels.__path__):
    table = getattr(importlib.import_module(f"pallas_kernels.{module.name}"), "TUNING", {})
    entries |= {f"{module.name}.{key}": plain(value) for key, value in table.items()}
  return entries


def compiled(f: Callable, *arguments):
  """f, traced anew, its kernels too: a tuning table may have changed since it was last."""
  jax.clear_caches()
  return jax.jit(lambda *a: f(*a)).lower(*arguments).compile()


def time_us(program: Callable, *sets: tuple, repeats: int = 10) -> dict[str, float]:
  """Device time of a compiled program, the sets of inputs in turns."""
  times = []
  for arguments in sets:
    jax.block_until_ready(program(*arguments))
    _, ms = profiler.measure(program, iterations=repeats)(*arguments)
    times += [1000 * t for t in ms]
  low, median, high = statistics.quantiles(times, n=4)
  return {"time_us": median, "time_us_quartiles": [low, high]}


def wall_us(program: Callable, arguments: tuple, repeats: int = 10) -> float:
  """Wall clock of a compiled program over several devices, a call of many in a row."""
  times = []
  for _ in range(5):
    jax.block_until_ready(program(*arguments))
    began = time.perf_counter()
    jax.block_until_ready([program(*arguments) for _ in range(repeats)])
    times.append((time.perf_counter() - began) / repeats * 1e6)
  return statistics.median(times)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key, shape, dtype):
  return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)


def bf16_tensor(seed: int, shape: tuple[int, ...]):
  return _random(jax.random.key(seed), shape, jnp.bfloat16)


def grouped(n: int, k: int, sizes: Int[Array, " e"]) -> Iterator[tuple[str, str, Callable, list]]:
  """(name, gemm, function, sets of its inputs); the inputs are freed one after the other."""
  e = len(sizes)
  rows = 128 * (ROWS // 128 + e)
  fp8 = lambda seed, *shape: _random(jax.random.key(seed), shape, jnp.float8_e4m3fn)  # noqa: E731
  scales = lambda *shape: jax.random.uniform(jax.random.key(9), shape, minval=0.5)  # noqa: E731
  for gemm, i, o in (("fprop", k, n), ("dgrad", n, k)):
    weights = lambda s, i=i, o=o: (fp8(s, e, o, i), scales(e, o // 128, i // 128))  # noqa: E731
    sets = [(fp8(s, ROWS, i), scales(i // 128, ROWS), *weights(s + 2), sizes) for s in (0, 1)]
    yield f"fp8 {gemm}", gemm, grouped_matmul.grouped_matmul, sets
  sides = lambda s: (fp8(s, k, rows), scales(rows // 128, k))  # noqa: E731
  other = lambda s: (fp8(s, n, rows), scales(rows // 128, n))  # noqa: E731
  sets = [(*sides(s), *other(s + 2), sizes) for s in (0, 1)]
  for dtype in (jnp.float32, jnp.bfloat16):
    wgrad = functools.partial(grouped_matmul.grouped_wgrad, out_dtype=dtype)
    yield f"fp8 wgrad, {jnp.dtype(dtype).name} result", "wgrad", wgrad, sets
  x, w, dy = bf16_tensor(0, (rows, k)), bf16_tensor(1, (e, k, n)), bf16_tensor(2, (rows, n))
  yield "bf16 fprop", "fprop", bf16_matmul.grouped_matmul, [(x[:ROWS], w, sizes)]
  dgrad = functools.partial(bf16_matmul.grouped_matmul, transpose_rhs=True)
  yield "bf16 dgrad", "dgrad", dgrad, [(dy[:ROWS], w, sizes)]
  filled = -(-sizes // 128) * 128  # as fp8's
  for dtype in (jnp.float32, jnp.bfloat16):
    wgrad = functools.partial(bf16_matmul.grouped_wgrad, out_dtype=dtype)
    yield f"bf16 wgrad, {jnp.dtype(dtype).name} result", "wgrad", wgrad, [(x, dy, filled)]
