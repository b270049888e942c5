"""Quantize to a block format, dequantize, and the two in one with a straight-through gradient.

q = quantize(x, MXFP4)            # codes and scales, 4.25 bits per value
y = dequantize(q)                 # float32
y == fake_quantize(x, MXFP4)      # the same values; its gradient is that of the identity
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from fp4jax import float_bits as fb
from fp4jax.arguments import check_axis, check_key, check_type, to_arrays
from fp4jax.formats.format import WHOLE, Format, Rounded, Slices, block_axes, is_format
from fp4jax.formats.packing import codes_per_group, pack, unpack
from fp4jax.formats.roundings import Rounding, as_rounding
from fp4jax.implementation import Implementation, choose
from fp4jax.mosaic import quantize as mosaic
from fp4jax.quantized_array import QuantizedArray
from fp4jax.sharding import explicit_mesh, one_program, spec_of, spread

_INPUT_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def quantize(
  x: ArrayLike,
  fmt: Format,
  axis: int = -1,
  *,
  rounding: str | Rounding = "nearest",
  key: jax.Array | None = None,
  implementation: Implementation | None = None,
) -> QuantizedArray:
  """Quantizes x in blocks along `axis` (and, for a 2-D block, the other one of the last two axes).

  "nearest" ties to even. "stochastic" rounds up with the probability of the distance to the element
  below, so that its mean is x wherever the scale does not clip; the same key gives the same draws.
  Any other `Rounding` is a value, such as `formats.Stochastic(bits=8)`.

  Codes have no gradient: `dequantize(quantize(x))` in a loss raises. `fake_quantize` passes it on.

  Args:
    implementation: see `fp4jax.implementation`. "mosaic" serves MXFP4 of any scale rule, FP8_BLOCK
      and FP8_BLOCK_POW2 along the last axis. Its stochastic rounding makes draws of its own, so
      that None leaves that to "xla".
  Raises:
    ValueError: an axis out of range, one that the block does not divide or whose codes do not fill
      bytes, an unknown rounding, stochastic rounding without a key, or what makes `implementation`
      impossible.
    TypeError: x is not an array of float32, bfloat16 or float16, fmt is not a format, or key is not
      a single key.
  """
  x, axis = check_arguments(x, fmt, axis, rounding, key)
  group = codes_per_group(fmt.element_bits)
  if x.shape[axis] % group:
    what = "odd" if group == 2 else f"no multiple of {group}"
    how = "in pairs" if group == 2 else f"in groups of {group}"
    raise ValueError(
      f"axis {axis} of shape {x.shape} is {what}; {fmt.element_bits}-bit codes are packed {how}"
    )
  options = fmt, axis, rounding, implementation
  spec = None
  if (mesh := explicit_mesh(x)) is not None:
    from fp4jax.placement import specs  # which imports this module

    body = functools.partial(_quantize, *options)
    packed = jax.eval_shape(body, jax.ShapeDtypeStruct(x.shape, x.dtype), key)
    spec = specs(packed, mesh, spec_of(x))
  return spread(_quantize, options, (x, key), spec=spec)


def _quantize(fmt, axis, rounding, implementation, x, key):
  draws = as_rounding(rounding).needs_key
  if implementation is None and draws:
    implementation = "xla"
  trace = x.astype(jnp.float32).reshape(-1)[:0]
  if choose(implementation, mosaic.obstacle(x, fmt, axis, rounding)) == "mosaic":
    codes, scales = mosaic.quantize(x, fmt, key if draws else None)
    return QuantizedArray(codes, scales, None, fmt, axis, trace)
  return dataclasses.replace(pack_blocks(x, fmt, axis, rounding, key), trace=trace)


def pack_rows(x: Float[Array, "*s"], fmt: Format, implementation: Implementation) -> QuantizedArray:
  """`quantize` along the last axis to nearest: with "mosaic" by the kernels where they serve `fmt`.
  Arguments are not checked, and a gradient is not refused."""
  named = "xla" if implementation == "xla" else None
  return dataclasses.replace(_quantize(fmt, -1, "nearest", named, x, None), trace=None)


def pack_blocks(
  x: Float[Array, "*s"],
  fmt: Format,
  axis: int,
  rounding: str | Rounding = "nearest",
  key: jax.Array | None = None,
  slices: Slices = WHOLE,
) -> QuantizedArray:
  """`quantize` in XLA, where several slices have a scale each; arguments are not checked."""
  codes, scales, slice_scale = fmt.store(round_blocks(x, fmt, axis, rounding, key, slices))
  return QuantizedArray(pack(codes, fmt.element_bits, axis), scales, slice_scale, fmt, axis)


def dequantize(
  q: QuantizedArray,
  dtype: DTypeLike = jnp.float32,
  *,
  implementation: Implementation | None = None,
) -> Float[Array, "*s"]:
  """The values of q in `dtype`, saturated: no finite x becomes infinite.

  In float32 they are exact for E8M0 scales; for other scales see `BlockFormat`.

  `implementation`: see `fp4jax.implementation`. "mosaic" makes bfloat16 of MXFP4, along the last
  axis.
  """
  check_type("q", q, QuantizedArray)
  if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
    raise TypeError(f"dtype={jnp.dtype(dtype).name} is not a float: codes would be cut off")
  return spread(_dequantize, (jnp.dtype(dtype), implementation), (q,), spec=spec_of(q.codes))


def _dequantize(dtype, implementation, q):
  obstacle = mosaic.dequantize_obstacle(q.codes, q.fmt, q.axis, dtype)
  if choose(implementation, obstacle) == "mosaic":
    return _without_gradient(mosaic.dequantize(q.codes, q.scales), q.trace)
  codes = unpack(q.codes, q.fmt.element_bits, q.axis)
  values = fb.saturate(q.fmt.load(codes, q.scales, q.tensor_scale), dtype)
  return _without_gradient(q.unfilled(values), q.trace)


def _without_gradient(values, trace):
  return values if trace is None else _refuse_gradient(values, trace)


@jax.custom_jvp
def _refuse_gradient(values, trace):
  return values


@_refuse_gradient.defjvp
def _refuse_gradient_jvp(primals, tangents):
  raise TypeError(
    "dequantize(quantize(x)) has no gradient: codes are integers. Use fake_quantize(x), whose "
    "gradient is passed straight through, or jax.lax.stop_gradient(x)"
  )


def fake_quantize(
  x: ArrayLike,
  fmt: Format,
  axis: int = -1,
  *,
  rounding: str | Rounding = "nearest",
  key: jax.Array | None = None,
) -> Float[Array, "*s"]:
  """`dequantize(quantize(...))` in x's dtype; its gradient is passed straight through."""
  x, axis = check_arguments(x, fmt, axis, rounding, key)
  return spread(_fake_quantize, (fmt, axis, rounding), (x, key), spec=spec_of(x))


def _fake_quantize(fmt, axis, rounding, x, key):
  return straight_through(x, fmt, axis, rounding, key, WHOLE, x.dtype)


def straight_through(
  x: Float[Array, "*s"],
  fmt: Format,
  axis: int,
  rounding: str | Rounding,
  key: jax.Array | None,
  slices: Slices,
  dtype: DTypeLike,
) -> Float[Array, "*s"]:
  """The rounded values of x in `dtype`. Arguments as `check_arguments` passes them."""
  key = key if as_rounding(rounding).needs_key else None
  return _straight_through(fmt, axis, rounding, jnp.dtype(dtype), x, key, slices)


# The key is an argument like x, for it may be a tracer of an inner trace: a scan, a checkpoint.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
@one_program(4)
def _straight_through(fmt, axis, rounding, dtype, x, key, slices):
  return fb.saturate(fmt.values(round_blocks(x, fmt, axis, rounding, key, slices)), dtype)


@_straight_through.defjvp
def _straight_through_jvp(fmt, axis, rounding, dtype, primals, tangents):
  out = _straight_through(fmt, axis, rounding, dtype, *primals)
  return out, tangents[0].astype(dtype)


def check_arguments(x, fmt, axis, rounding, key) -> tuple[jax.Array, int]:
  """Refuses what no format can round; x as a jax.Array, and the axis counted from the end."""
  if not is_format(fmt):
    raise TypeError(f"fmt has type {type(fmt).__name__}, not BlockFormat such as fp4jax.MXFP4")
  (x,) = to_arrays(x=x)
  if x.dtype not in _INPUT_DTYPES:
    raise TypeError(f"x is {x.dtype}; quantize takes float32, bfloat16 or float16")
  axis = check_axis(axis, x)
  if fmt.block_shape is not None and len(fmt.block_shape) == 2 and (axis < -2 or x.ndim < 2):
    raise ValueError(
      f"{axis=} of shape {x.shape}: the 2-D blocks of {fmt.name} tile the last two axes"
    )
  for a, block in block_axes(fmt, axis).items():
    if x.shape[a] % block:
      raise ValueError(
        f"axis {a} of shape {x.shape} is not a multiple of the block of {block} of {fmt.name};"
        " a recipe's GEMMs pad with zeros, which change no block"
      )
  if as_rounding(rounding).needs_key:
    if key is None:
      name = f'"{rounding}"' if isinstance(rounding, str) else rounding
      raise ValueError(f"rounding={name} needs a key, such as key=jax.random.key(0)")
    check_key(key=key)
  return x, axis


def round_blocks(
  x: Float[Array, "*s"],
  fmt: Format,
  axis: int,
  rounding: str | Rounding,
  key: jax.Array | None,
  slices: Slices = WHOLE,
) -> Rounded:
  """The one place where values are rounded. Arguments as `check_arguments` passes them."""
  random_bits = as_rounding(rounding).draw(key, x.shape)
  return fmt.round(x.astype(jnp.float32), axis, random_bits, slices)
