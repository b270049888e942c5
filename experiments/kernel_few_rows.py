"""Rows of the benchmark: few rows of x times a matrix, in bf16 and packed in MXFP4 and FP8."""

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.kernel_checks import CheckFailed, error_bound
from experiments.kernel_timing import bf16_tensor, compiled, time_us
from fp4jax import dequantize, formats, quantize
from fp4jax.formats import Format
from fp4jax.quantized_array import QuantizedArray
from pallas_kernels.few_rows import FP8_VARIANTS, VARIANTS, few_rows_matmul

SHAPES = (2048, 8192), (8192, 2048), (8192, 28672)  # k, n
ROWS = 8, 64
# FP8 with scales that are powers of two: XLA multiplies its values in bf16 then.
PACKED = {formats.MXFP4: VARIANTS, formats.FP8_BLOCK_POW2_2D: FP8_VARIANTS}
MORE_THAN_L2 = 100e6  # bytes of packed weights that a program reads


def few_rows() -> Iterator[dict]:
  for (k, n), fmt in itertools.product(SHAPES, PACKED):
    weights = _weights(k, n, fmt)
    size = weights[0].codes.nbytes + weights[0].scales.nbytes
    for m in ROWS:
      x = bf16_tensor(len(weights), (m, k))
      bf16_us = _time(jnp.matmul, x, [_dequantized(q) for q in weights])
      xla_us = _time(lambda x, q: x @ _dequantized(q), x, weights)
      for name, config in ({"default": None} | PACKED[fmt]).items():
        what = {"kind": "few_rows", "name": name, "weights": fmt.name, "m": m, "k": k, "n": n}
        product = functools.partial(_product, config=config)
        try:
          what["error_to_bound"] = check(product, x, weights[0])
        except CheckFailed as error:
          yield what | {"failed": str(error)}
          continue
        us = _time(product, x, weights)
        yield what | {
          "time_us": us,
          "tb_per_s": size / us / 1e6,
          "times_xla_bf16": bf16_us / us,
          "times_xla_packed": xla_us / us,
        }


def default_us(m: int, k: int, n: int, fmt: Format = formats.MXFP4) -> float:
  """Of one product, as the kernel's own table tunes it.

  Raises:
    CheckFailed: it is not the product.
  """
  weights = _weights(k, n, fmt)
  x = bf16_tensor(len(weights), (m, k))
  check(_product, x, weights[0])
  return _time(_product, x, weights)


def check(product: Callable[..., Array], x: Array, q: QuantizedArray) -> float:
  """The largest error of product(x, q), of its bound.

  Raises:
    CheckFailed: it is above 1, or there is a NaN.
  """
  error = float(_error(compiled(product, x, q)(x, q), x, _dequantized(q)))
  if not error <= 1:
    raise CheckFailed(f"an error of {error:.2g} times its bound")
  return error


def _weights(k, n, fmt) -> list[QuantizedArray]:
  """So many matrices that together they are more than L2 holds."""
  count = -(-int(MORE_THAN_L2) // (k * n * fmt.element_bits // 8))
  return [_packed(seed, k, n, fmt) for seed in range(count)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _packed(seed, k, n, fmt):
  return quantize(bf16_tensor(seed, (k, n)), fmt, axis=-2, implementation="xla")


@jax.jit
def _dequantized(q):
  return dequantize(q, jnp.bfloat16, implementation="xla")


def _product(x, q, config=None):
  return few_rows_matmul(x, q.codes, q.scales, config=config)


def _time(product, x, weights) -> float:
  """Of one product, in a program of one for each of the weights."""
  program = compiled(lambda x, weights: [product(x, w) for w in weights], x, weights)
  return time_us(program, (x, weights))["time_us"] / len(weights)


@jax.jit
def _error(y, x, w):
  product = functools.partial(jnp.matmul, precision="highest")
  x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  exact, magnitudes = product(x, w), product(jnp.abs(x), jnp.abs(w))
  error = jnp.abs(y.astype(jnp.float32) - exact)
  error /= error_bound(exact, magnitudes, x.shape[1], y.dtype)
  return jnp.max(jnp.where(jnp.isnan(error), jnp.inf, error))
