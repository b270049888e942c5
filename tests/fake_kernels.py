"""Stand-ins for the Hopper kernels, by their definitions: what calls them is tested anywhere.

What a kernel leaves unwritten is NaN here, and what it never reads may be.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp

import fp4jax
from experiments.kernel_cases import BY_NAME
from fp4jax.operands import scaled_rows
from fp4jax.swiglu import swiglu, swiglu_backward

quantize = functools.partial(fp4jax.quantize, implementation="xla")
dequantize = functools.partial(fp4jax.dequantize, implementation="xla")


def fake_kernels() -> dict[str, types.SimpleNamespace]:
  """By module."""
  e4m3 = fp4jax.FP8_BLOCK.element_dtype

  def block(power_of_two):
    return fp4jax.FP8_BLOCK_POW2 if power_of_two else fp4jax.FP8_BLOCK

  def as_e4m3(codes):
    return jax.lax.bitcast_convert_type(codes, e4m3)

  def rows(x, *, power_of_two):
    q = quantize(x, block(power_of_two), -1)
    return as_e4m3(q.codes), q.scales.T

  def columns(x, *, power_of_two):
    q = quantize(x, block(power_of_two), -2)
    return as_e4m3(q.codes).T, q.scales

  def both(x, *, power_of_two):
    return *rows(x, power_of_two=power_of_two), *columns(x, power_of_two=power_of_two)

  def gathered(x, rows, factors, *, power_of_two):
    assert rows.dtype == jnp.int32 and factors.shape == rows.shape
    return both(scaled_rows(x, rows, factors[:, None]), power_of_two=power_of_two)

  def weights(w, *, power_of_two, rows=True, columns=True):
    fmt = fp4jax.FP8_BLOCK_POW2_2D if power_of_two else fp4jax.FP8_BLOCK_2D
    q = quantize(w.astype(jnp.bfloat16), fmt, -2)
    codes = as_e4m3(q.codes)
    return *[codes] * rows, *[codes.swapaxes(1, 2)] * columns, q.scales

  def mxfp4(x, *, scale_rule, seed=None):
    assert x.ndim == 2 and seed is None
    q = quantize(x, dataclasses.replace(fp4jax.MXFP4, scale_rule=scale_rule))
    return q.codes, q.scales

  def values(codes, scales):
    q = fp4jax.QuantizedArray(codes, scales, None, fp4jax.MXFP4, -1)
    return dequantize(q, jnp.bfloat16)

  def swiglu_fp8_rows(h, *, power_of_two):
    return rows(swiglu(h), power_of_two=power_of_two)

  def keep_swiglu_fp8_rows(h, *, scale_rule, power_of_two):
    kept = mxfp4(h, scale_rule=scale_rule)
    return *kept, *swiglu_fp8_rows(values(*kept), power_of_two=power_of_two)

  def swiglu_backward_fp8(h, g, after, *, power_of_two):
    h = values(*h) if isinstance(h, tuple) else h
    a, dh, products = swiglu_backward(h, g, after[:, None])
    *of_rows, codes, scales = both(dh, power_of_two=power_of_two)
    return of_rows, (codes, scales), columns(a, power_of_two=power_of_two), products

  def spread(codes, scales):
    """Codes (r, c) times scales (r, c/128)."""
    return codes.astype(jnp.float32) * jnp.repeat(scales, 128, -1)

  def matmul(lhs, lhs_scales, rhs, rhs_scales, group_sizes):
    x = spread(lhs, lhs_scales.T)
    w = spread(rhs, jnp.repeat(rhs_scales, 128, 1))
    owner = owners(group_sizes, len(x))
    product = jnp.einsum("mk,enk->men", x, w, precision="highest")[jnp.arange(len(x)), owner]
    return jnp.where((owner < len(w))[:, None], product, jnp.nan).astype(jnp.bfloat16)

  def owners(sizes, length):
    """The group of each place; as many as there are groups for those past the last one."""
    ends = jnp.cumsum(sizes)
    return jnp.searchsorted(ends, jnp.arange(length), side="right")

  def wgrad(lhs, lhs_scales, rhs, rhs_scales, group_sizes, out_dtype=jnp.float32):
    x, dy = spread(lhs, lhs_scales.T), spread(rhs, rhs_scales.T)
    owner = jnp.repeat(owners(-(-group_sizes // 128), len(lhs_scales)), 128)
    x, dy = (jnp.where(owner < len(group_sizes), v, 0) for v in (x, dy))
    belongs = owner[None] == jnp.arange(len(group_sizes))[:, None]
    product = jnp.einsum("kt,nt,et->ekn", x, dy, belongs.astype(jnp.float32), precision="highest")
    return product.astype(out_dtype)

  def bf16_matmul(lhs, rhs, group_sizes, transpose_rhs=False):
    rhs = rhs if transpose_rhs else rhs.swapaxes(1, 2)
    ones = (
      jnp.ones((lhs.shape[1] // 128, len(lhs))),
      jnp.ones((len(rhs), *(n // 128 for n in rhs.shape[1:]))),
    )
    return matmul(lhs, ones[0], rhs, ones[1], group_sizes)

  def bf16_wgrad(lhs, rhs, group_sizes, *, out_dtype=jnp.bfloat16):
    assert isinstance(group_sizes, jax.core.Tracer) or not (group_sizes % 128).any()
    ones = [jnp.ones((len(x) // 128, x.shape[1])) for x in (lhs, rhs)]
    return wgrad(lhs.T, ones[0], rhs.T, ones[1], group_sizes, out_dtype)

  def few_rows(x, codes, scales):
    fp8 = scales.dtype == jnp.float32
    most, step = (64, 128) if fp8 else (128, 64)
    assert x.shape[-2] <= most and x.shape[-1] % step == codes.shape[-1] % 128 == 0
    fmt = fp4jax.FP8_BLOCK_2D if fp8 else fp4jax.MXFP4
    w = dequantize(fp4jax.QuantizedArray(codes, scales, None, fmt, -2), jnp.float32)
    product = jnp.matmul(x.astype(jnp.float32), w, precision="highest")
    return product.astype(jnp.bfloat16)

  return {
    "few_rows": types.SimpleNamespace(few_rows_matmul=few_rows),
    "fp8": types.SimpleNamespace(
      quantize_fp8_rows=rows,
      quantize_fp8_columns=columns,
      quantize_fp8_both=both,
      quantize_fp8_weights=weights,
    ),
    "gather": types.SimpleNamespace(gather_fp8_both=gathered),
    "mxfp4": types.SimpleNamespace(quantize_mxfp4=mxfp4),
    "dequantize": types.SimpleNamespace(dequantize_mxfp4=values),
    "convert": types.SimpleNamespace(
      mxfp4_to_fp8_rows=lambda c, s: rows(values(c, s), power_of_two=True),
      mxfp4_to_fp8_columns=lambda c, s: BY_NAME["mxfp4_to_fp8_columns"].definition((c, s)),
    ),
    "swiglu": types.SimpleNamespace(
      swiglu_fp8_rows=swiglu_fp8_rows,
      keep_swiglu_fp8_rows=keep_swiglu_fp8_rows,
      swiglu_backward_fp8=swiglu_backward_fp8,
    ),
    "grouped_matmul": types.SimpleNamespace(grouped_matmul=matmul, grouped_wgrad=wgrad),
    "bf16_matmul": types.SimpleNamespace(grouped_matmul=bf16_matmul, grouped_wgrad=bf16_wgrad),
  }
