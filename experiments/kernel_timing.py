"""Device times of functions of large arrays, and the grouped matmuls that are timed."""

import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import bf16_matmul, grouped_matmul

ROWS, CONTRACTION, COLUMNS = 32768, 7168, 2048
GEMMS = (COLUMNS, CONTRACTION), (CONTRACTION, COLUMNS)  # columns and contraction of fprop


def time_us(f: Callable, *sets: tuple, repeats: int = 10) -> dict[str, float]:
  """Device time of f, the sets of inputs in turns."""
  compiled = jax.jit(lambda *arguments: f(*arguments))  # anew: a table may have changed
  times = []
  for arguments in sets:
    jax.block_until_ready(compiled(*arguments))
    _, ms = profiler.measure(compiled, iterations=repeats)(*arguments)
    times += [1000 * t for t in ms]
  low, median, high = statistics.quantiles(times, n=4)
  return {"time_us": median, "time_us_quartiles": [low, high]}


def bf16_tensor(seed: int, shape: tuple[int, ...]):
  return jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))(jax.random.key(seed))


def grouped(n, k, sizes):
  """(name, gemm, function, sets of inputs); freed one after the other."""
  e = len(sizes)
  rows = 128 * (ROWS // 128 + e)
  fp8 = lambda seed, *shape: bf16_tensor(seed, shape).astype(jnp.float8_e4m3fn)  # noqa: E731
  scales = lambda *shape: jax.random.uniform(jax.random.key(9), shape, minval=0.5)  # noqa: E731
  for gemm, i, o in (("fprop", k, n), ("dgrad", n, k)):
    sets = [
      (fp8(s, ROWS, i), scales(i // 128, ROWS), fp8(s + 2, e, o, i), scales(e, o // 128, i // 128))
      for s in (0, 1)
    ]
    yield f"fp8 {gemm}", gemm, lambda *a: grouped_matmul.grouped_matmul(*a, sizes), sets
  sets = [
    (fp8(s, k, rows), scales(rows // 128, k), fp8(s + 2, n, rows), scales(rows // 128, n))
    for s in (0, 1)
  ]
  for dtype in (jnp.float32, jnp.bfloat16):
    wgrad = functools.partial(grouped_matmul.grouped_wgrad, out_dtype=dtype)
    name = f"fp8 wgrad, {jnp.dtype(dtype).name} result"
    yield name, "wgrad", lambda *a, wgrad=wgrad: wgrad(*a, sizes), sets
  x, w, dy = bf16_tensor(0, (ROWS, k)), bf16_tensor(1, (e, k, n)), bf16_tensor(2, (ROWS, n))
  yield "bf16 fprop", "fprop", lambda x, w: bf16_matmul.grouped_matmul(x, w, sizes), [(x, w)]
  dgrad = functools.partial(bf16_matmul.grouped_matmul, transpose_rhs=True)
  yield "bf16 dgrad", "dgrad", lambda dy, w: dgrad(dy, w, sizes), [(dy, w)]
  yield "bf16 wgrad", "wgrad", lambda x, dy: bf16_matmul.grouped_wgrad(x, dy, sizes), [(x, dy)]
