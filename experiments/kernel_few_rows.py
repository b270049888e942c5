"""Rows of the benchmark: few rows of x times a matrix, in bf16 and packed in MXFP4."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from experiments.kernel_checks import CheckFailed
from experiments.kernel_timing import bf16_tensor, compiled, time_us
from fp4jax import dequantize, formats, quantize
from fp4jax.quantized_array import QuantizedArray
from pallas_kernels.few_rows import VARIANTS, few_rows_matmul

SHAPES = (2048, 8192), (8192, 2048), (8192, 28672)  # k, n
ROWS = 8, 64
_MORE_THAN_L2 = 100e6  # bytes of packed weights that a program reads


def few_rows() -> Iterator[dict]:
  """Times are of one product; a program computes as many, each with its own weights, as read more
  than L2 holds."""
  default = {"default": None}
  for k, n in SHAPES:
    copies = -(-int(_MORE_THAN_L2) // (k * n // 2))
    weights = [_weights(seed, k, n) for seed in range(copies)]
    packed = [(q.codes, q.scales) for q in weights]
    size = sum(x.nbytes for x in packed[0])
    plain = [_dequantized(q) for q in weights]
    for m in ROWS:
      x = bf16_tensor(copies, (m, k))
      one = lambda f, copies=copies: f / copies  # noqa: E731
      bf16_us = one(_time(lambda x, w: x @ w, x, [(w,) for w in plain]))
      xla_us = one(_time(lambda x, q: x @ _dequantized(q), x, [(q,) for q in weights]))
      for name, config in (default | VARIANTS).items():
        kernel = functools.partial(few_rows_matmul, config=config)
        what = {"kind": "few_rows", "name": name, "m": m, "k": k, "n": n}
        try:
          what["error_to_bound"] = _check(kernel, x, packed[0], plain[0])
        except CheckFailed as error:
          yield what | {"failed": str(error)}
          continue
        us = one(_time(kernel, x, packed))
        yield what | {
          "time_us": us,
          "tb_per_s": size / us / 1e6,
          "times_xla_bf16": bf16_us / us,
          "times_xla_packed": xla_us / us,
        }


def default_us(m: int, k: int, n: int) -> float:
  """Of one product, as the kernel's own table tunes it.

  Raises:
    CheckFailed: it is not the product.
  """
  q, x = _weights(0, k, n), bf16_tensor(1, (m, k))
  _check(few_rows_matmul, x, (q.codes, q.scales), _dequantized(q))
  return _time(few_rows_matmul, x, [(q.codes, q.scales)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _weights(seed, k, n) -> QuantizedArray:
  return quantize(bf16_tensor(seed, (k, n)), formats.MXFP4, axis=-2, implementation="xla")


@jax.jit
def _dequantized(q):
  return dequantize(q, jnp.bfloat16, implementation="xla")


def _time(product, x, weights) -> float:
  program = compiled(lambda x, all_weights: [product(x, *w) for w in all_weights], x, weights)
  return time_us(program, (x, weights))["time_us"]


def _check(kernel, x, packed, plain) -> float:
  error = float(_error(compiled(kernel, x, *packed)(x, *packed), x, plain))
  if not error <= 1:
    raise CheckFailed(f"{error:.2f} of the bound of its error")
  return error


@jax.jit
def _error(y, x, w):
  """Of the bound: sums in float32 in any order, the result rounded to bf16."""
  x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  product = functools.partial(jnp.matmul, precision="highest")
  exact, magnitude = product(x, w), product(jnp.abs(x), jnp.abs(w))
  bound = magnitude * (2 * x.shape[1] * 2.0**-24 + 2.0**-12) + jnp.abs(exact) * 2.0**-8
  error = jnp.abs(y.astype(jnp.float32) - exact) / bound
  return jnp.max(jnp.where(jnp.isnan(error), jnp.inf, error))
