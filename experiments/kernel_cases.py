"""What each element-wise kernel computes, in the words of fp4jax: its tests and its benchmark."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import fp4jax
from fp4jax import QuantizedArray, formats
from fp4jax.swiglu import swiglu, swiglu_backward
from pallas_kernels import convert, fp8, gather, mxfp4
from pallas_kernels import dequantize as dequantizer
from pallas_kernels import swiglu as swiglu_kernel

# What the kernels are compared with is not to run them.
quantize = functools.partial(fp4jax.quantize, implementation="xla")
dequantize = functools.partial(fp4jax.dequantize, implementation="xla")

SIGNS = np.random.default_rng(0).choice(np.float32([-1, 1]), 32)
_MXFP4_BYTES = 17 / 32  # a value's codes and its share of a scale
_FP8_BYTES = 1 + 4 / 128
_BENCHMARKED = ("floor", "rceil")  # of the scale rules


@dataclasses.dataclass(frozen=True)
class Case:
  """`kernel(x)` equals `definition(x)`; x is what `prepare` makes of a bf16 tensor."""

  name: str
  kernel: Callable
  definition: Callable | None  # None for what rounds stochastically
  bytes_per_value: float
  prepare: Callable = lambda x: x
  benchmarked: bool = True  # False where another rule or scale costs the same
  exact: bool = True  # bit for bit; False: but for the last bits of exp, see `kernel_checks.near`


def mxfp4_format(rule: str) -> formats.BlockFormat:
  return dataclasses.replace(formats.MXFP4, scale_rule=rule)


def _mxfp4(rule="floor"):
  def definition(x):
    q = quantize(x, mxfp4_format(rule))
    return q.codes, q.scales

  return Case(
    f"quantize_mxfp4 {rule}",
    lambda x: mxfp4.quantize_mxfp4(x, scale_rule=rule),
    definition,
    2 + _MXFP4_BYTES,
    benchmarked=rule in _BENCHMARKED,
  )


def _mxfp4_both(rule="floor"):
  def definition(x):
    rows, columns = (quantize(v, mxfp4_format(rule)) for v in (x, x.T))
    return rows.codes, rows.scales, columns.codes, columns.scales

  return Case(
    f"quantize_mxfp4_both {rule}",
    lambda x: mxfp4.quantize_mxfp4_both(x, scale_rule=rule),
    definition,
    2 + 2 * _MXFP4_BYTES,
    benchmarked=rule in _BENCHMARKED,
  )


def _mxfp4_hadamard():
  def definition(x):
    q = quantize(butterflies(x), mxfp4_format("rceil"))
    return q.codes, q.scales

  return Case(
    "quantize_mxfp4 rceil, Hadamard",
    lambda x: mxfp4.quantize_mxfp4(x, scale_rule="rceil", signs=SIGNS),
    definition,
    2 + _MXFP4_BYTES,
  )


def butterflies(x):
  """`fp4jax.hadamard(x, -1, 32, SIGNS)` with its sums in the kernel's order."""
  blocks = x.astype(jnp.float32).reshape(-1, 32) * SIGNS
  for distance in (1, 2, 4, 8, 16):
    pairs = blocks.reshape(-1, 16 // distance, 2, distance)
    low, high = pairs[:, :, 0], pairs[:, :, 1]
    blocks = jnp.stack([low + high, low - high], axis=2).reshape(-1, 32)
  return (blocks * np.float32(32**-0.5)).reshape(x.shape)


def _as_e4m3(codes):
  return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)


def _rows(x, power_of_two):
  q = quantize(x, formats.FP8_BLOCK_POW2 if power_of_two else formats.FP8_BLOCK)
  return _as_e4m3(q.codes), q.scales.T


def _weights(w, power_of_two):
  q = quantize(w, formats.FP8_BLOCK_POW2_2D if power_of_two else formats.FP8_BLOCK_2D)
  return _as_e4m3(q.codes), _as_e4m3(q.codes).swapaxes(-1, -2), q.scales


def _experts(x):
  """x as the weights of two experts, where it is large enough."""
  return x.reshape(2 if len(x) % 256 == 0 else 1, -1, x.shape[1])


def _float32_experts(x):
  """Values that bf16 does not hold."""
  return _experts(x).astype(jnp.float32) * 1.0009


def _bf16(x):
  """Rounded to bf16; a cast there and back XLA takes out of a program that it fuses."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


def _kind(power_of_two):
  return "power of two" if power_of_two else "float32"


def _fp8(power_of_two):
  kind, options = _kind(power_of_two), dict(power_of_two=power_of_two)
  return (
    Case(
      f"quantize_fp8_rows {kind}",
      lambda x: fp8.quantize_fp8_rows(x, **options),
      lambda x: _rows(x, power_of_two),
      2 + _FP8_BYTES,
      benchmarked=not power_of_two,
    ),
    Case(
      f"quantize_fp8_columns {kind}",
      lambda x: fp8.quantize_fp8_columns(x, **options),
      lambda x: _rows(x.T, power_of_two),
      2 + _FP8_BYTES,
      benchmarked=not power_of_two,
    ),
    Case(
      f"quantize_fp8_both {kind}",
      lambda x: fp8.quantize_fp8_both(x, **options),
      lambda x: (*_rows(x, power_of_two), *_rows(x.T, power_of_two)),
      2 + 2 * _FP8_BYTES,
      benchmarked=not power_of_two,
    ),
    Case(
      f"quantize_fp8_weights {kind}",
      lambda w: fp8.quantize_fp8_weights(w, **options),
      lambda w: _weights(w, power_of_two),
      4,
      _experts,
      benchmarked=not power_of_two,
    ),
    Case(
      f"quantize_fp8_weights of float32 {kind}",
      lambda w: fp8.quantize_fp8_weights(w, columns=False, **options),
      lambda w: _weights(_bf16(w), power_of_two)[::2],
      5,
      _float32_experts,
      benchmarked=False,
    ),
    Case(
      f"quantize_fp8_weights of float32, transposed {kind}",
      lambda w: fp8.quantize_fp8_weights(w, rows=False, **options),
      lambda w: _weights(_bf16(w), power_of_two)[1:],
      5,
      _float32_experts,
      benchmarked=not power_of_two,
    ),
  )


def _gathered(power_of_two):
  """Rows of half of x, some of them twice and a few nowhere in it."""

  def prepare(x):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(x) // 2, len(x)).astype(np.int32)
    rows[::61], rows[5] = len(x) // 2, -1
    factors = rng.uniform(-1, 1, len(x))
    return x[: len(x) // 2], jnp.asarray(rows), jnp.asarray(factors, jnp.float32)

  def definition(arguments):
    x, rows, factors = arguments
    exist = (rows >= 0) & (rows < len(x))
    values = x[jnp.where(exist, rows, 0)].astype(jnp.float32) * factors[:, None]
    values = _bf16(jnp.where(exist[:, None], values, 0))
    return *_rows(values, power_of_two), *_rows(values.T, power_of_two)

  return Case(
    f"gather_fp8_both {_kind(power_of_two)}",
    lambda arguments: gather.gather_fp8_both(*arguments, power_of_two=power_of_two),
    definition,
    2 + 2 * _FP8_BYTES,
    prepare,
    benchmarked=not power_of_two,
  )


def _pack_fp8(x):
  q = quantize(x, formats.FP8_BLOCK_POW2)
  return _as_e4m3(q.codes), q.scales.T


def _pack_mxfp4(x):
  q = quantize(x, formats.MXFP4)
  return q.codes, q.scales


def _narrow(rule):
  def definition(packed):
    codes, scales = packed
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    values = dequantize(QuantizedArray(codes, scales.T, None, formats.FP8_BLOCK_POW2, -1))
    q = quantize(values, mxfp4_format(rule))
    return q.codes, q.scales

  return Case(
    f"fp8_to_mxfp4 {rule}",
    lambda packed: convert.fp8_to_mxfp4(*packed, scale_rule=rule),
    definition,
    _FP8_BYTES + _MXFP4_BYTES,
    _pack_fp8,
    rule in _BENCHMARKED,
  )


def _values(packed):
  return dequantize(QuantizedArray(*packed, None, formats.MXFP4, -1))


def _widened_rows(packed):
  """Every block of 128 with a scale of 2^-6 times the largest of its four."""
  codes, scales = packed
  top = jnp.max(scales.reshape(len(codes), -1, 4), axis=-1).astype(jnp.int32)
  exponent = jnp.maximum(top - 6, 1)
  scale = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
  scaled = _values(packed).reshape(*top.shape, 128) / scale[..., None]
  return _finish(scaled, top, scale)


def _widened_columns(packed):
  codes, scales = packed
  blocks, k = len(codes) // 128, 2 * codes.shape[1]
  top = jnp.max(scales.reshape(blocks, 128, -1), axis=1).astype(jnp.int32)
  top = jnp.repeat(top, 32, axis=1).T
  scale = jax.lax.bitcast_convert_type(jnp.maximum(top - 6, 1) << 23, jnp.float32)
  scaled = _values(packed).T.reshape(k, blocks, 128) / scale[..., None]
  return _finish(scaled, top, scale)


def _finish(scaled, top, scale):
  whole = (top < 255)[..., None]
  codes = jnp.where(whole, scaled, 0.0).astype(jnp.float8_e4m3fn)
  return codes.reshape(len(codes), -1), jnp.where(top < 255, scale, jnp.nan).T


def _swiglu(power_of_two):
  return Case(
    f"swiglu_fp8_rows{_of(False, power_of_two)}",
    functools.partial(swiglu_kernel.swiglu_fp8_rows, power_of_two=power_of_two),
    lambda h: _activated(h, power_of_two),
    2 + _FP8_BYTES / 2,
    benchmarked=not power_of_two,
    exact=False,
  )


def _activated(h, power_of_two):
  # The rounding to bf16 between the two is one that XLA would leave out.
  return _rows(jax.lax.reduce_precision(swiglu(h), 8, 7), power_of_two)


def _swiglu_kept(power_of_two):
  kernel = functools.partial(swiglu_kernel.keep_swiglu_fp8_rows, power_of_two=power_of_two)

  def definition(h):
    kept = _pack_mxfp4(h)
    return *kept, *_activated(_values(kept).astype(jnp.bfloat16), power_of_two)

  return Case(
    f"keep_swiglu_fp8_rows{_of(False, power_of_two)}",
    kernel,
    definition,
    2 + _MXFP4_BYTES + _FP8_BYTES / 2,
    benchmarked=not power_of_two,
    exact=False,
  )


def _of(packed, power_of_two):
  return (", h in MXFP4" if packed else "") + (", power of two" if power_of_two else "")


def _swiglu_backward(packed, power_of_two):
  """x as h, some of it as g; `after` is 1, but for a few rows."""

  def prepare(x):
    after = jnp.where(jnp.arange(len(x)) % 16, 1, 2.0**-70)
    return _pack_mxfp4(x) if packed else x, x[::-1, : x.shape[1] // 2], after

  def kernel(arguments):
    outputs = swiglu_kernel.swiglu_backward_fp8(*arguments, power_of_two=power_of_two)
    return jax.tree.leaves(outputs)

  def definition(arguments):
    h, g, after = arguments
    a, dh, products = swiglu_backward(
      _values(h).astype(g.dtype) if packed else h, g, after[:, None]
    )
    a, dh = (jax.lax.reduce_precision(x, 8, 7) for x in (a, dh))
    codes = (part for x in (dh, dh.T, a.T) for part in _rows(x, power_of_two))
    return *codes, products

  h_bytes = _MXFP4_BYTES if packed else 2
  return Case(
    f"swiglu_backward_fp8{_of(packed, power_of_two)}",
    kernel,
    definition,
    h_bytes + 1 + 2.5 * _FP8_BYTES,
    prepare,
    benchmarked=not power_of_two,
    exact=False,
  )


CASES = (
  *(_mxfp4(rule) for rule in ("floor", "even", "rceil", "oas")),
  _mxfp4_hadamard(),
  *(_mxfp4_both(rule) for rule in ("floor", "even", "rceil", "oas")),
  *_fp8(False),
  *_fp8(True),
  _gathered(False),
  _gathered(True),
  *(_narrow(rule) for rule in ("floor", "even", "rceil", "oas")),
  Case(
    "mxfp4_to_fp8_rows",
    lambda packed: convert.mxfp4_to_fp8_rows(*packed),
    _widened_rows,
    _FP8_BYTES + _MXFP4_BYTES,
    _pack_mxfp4,
  ),
  Case(
    "mxfp4_to_fp8_columns",
    lambda packed: convert.mxfp4_to_fp8_columns(*packed),
    _widened_columns,
    _FP8_BYTES + _MXFP4_BYTES,
    _pack_mxfp4,
  ),
  Case(
    "dequantize_mxfp4",
    lambda packed: (dequantizer.dequantize_mxfp4(*packed),),
    lambda packed: (_values(packed).astype(jnp.bfloat16),),
    2 + _MXFP4_BYTES,
    _pack_mxfp4,
  ),
)
# Equal but for the last bits of exp.
SWIGLU = tuple(
  case
  for power_of_two in (False, True)
  for case in (
    _swiglu(power_of_two),
    _swiglu_kept(power_of_two),
    *(_swiglu_backward(packed, power_of_two) for packed in (False, True)),
  )
)
# Their draws are the kernel's own: no definition gives the same.
STOCHASTIC = tuple(
  Case(
    f"quantize_mxfp4 rceil, stochastic{suffix}",
    functools.partial(mxfp4.quantize_mxfp4, scale_rule="rceil", seed=(1, 2), signs=signs),
    None,
    2 + 17 / 32,
  )
  for suffix, signs in (("", None), (", Hadamard", SIGNS))
)
BY_NAME = {case.name: case for case in (*CASES, *SWIGLU, *STOCHASTIC)}
