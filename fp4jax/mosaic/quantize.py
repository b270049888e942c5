"""`quantize` and `dequantize` on Hopper: which kernel serves which format."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Shaped, UInt8

from fp4jax import formats
from fp4jax.formats import Format, Rounding
from fp4jax.formats.scales import StoredScale
from fp4jax.implementation import device_obstacle, dtype_obstacle
from fp4jax.sharding import mesh_obstacle

MIN_VALUES = 1024  # of an MXFP4 tensor
MIN_ROWS = 8  # of an FP8 tensor
_RULES = ("floor", "even", "rceil", "oas")
MXFP4 = [dataclasses.replace(formats.MXFP4, scale_rule=rule) for rule in _RULES]
_FP8 = [formats.FP8_BLOCK, formats.FP8_BLOCK_POW2]


def obstacle(x: Array, fmt: Format, axis: int, rounding: str | Rounding) -> str | None:
  """Why the kernels can't quantize x; None if they can. Arguments as `quantize` checked them."""
  if why := device_obstacle() or mesh_obstacle(x):
    return why
  if axis != -1:
    return f"the kernels quantize along the last axis, not along axis {axis}"
  if fmt in MXFP4:
    if rounding not in ("nearest", "stochastic"):
      return f"the kernels round {fmt.name} to nearest or stochastically, not by {rounding}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
      return f"the kernels take bfloat16 or float32; x is {x.dtype}"
    return _too_small(x.size)
  if fmt not in _FP8:
    return f"the kernels quantize to MXFP4, FP8_BLOCK and FP8_BLOCK_POW2, not to {fmt.name}"
  if rounding != "nearest":
    return f"the kernels round {fmt.name} to nearest, not {rounding!r}"
  if not x.size or x.size < MIN_ROWS * x.shape[-1]:
    return f"x of shape {x.shape} has fewer than {MIN_ROWS} rows"
  return dtype_obstacle(x=x)


def quantize(
  x: Float[Array, "*s"], fmt: Format, key: jax.Array | None
) -> tuple[UInt8[Array, "*packed"], StoredScale]:
  """Codes and scales as `QuantizedArray` has them, for a call that `obstacle` let pass."""
  rows = lax.stop_gradient(x).reshape(-1, x.shape[-1])  # codes have no gradient, kernels no rule
  if fmt in MXFP4:
    from pallas_kernels import mxfp4

    seed = None if key is None else jax.random.bits(key, (2,), jnp.uint32)
    codes, scales = mxfp4.quantize_mxfp4(rows, scale_rule=fmt.scale_rule, seed=seed)
  else:
    from pallas_kernels import fp8

    codes, scales = fp8.quantize_fp8_rows(rows, power_of_two=fmt.has_power_of_two_scales)
    codes, scales = lax.bitcast_convert_type(codes, jnp.uint8), scales.T
  return tuple(part.reshape(*x.shape[:-1], -1) for part in (codes, scales))


def dequantize_obstacle(codes: Array, fmt: Format, axis: int, dtype: DTypeLike) -> str | None:
  """Why the kernels can't dequantize these codes to `dtype`; None if they can."""
  if why := device_obstacle() or mesh_obstacle(codes):
    return why
  if fmt not in MXFP4 or axis != -1:
    return f"the kernels dequantize MXFP4 along the last axis, not {fmt.name} along axis {axis}"
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f"the kernels dequantize to bfloat16, not {jnp.dtype(dtype).name}"
  return _too_small(2 * codes.size)


def dequantize(codes: UInt8[Array, "*packed"], scales: UInt8[Array, "*u"]) -> BFloat16[Array, "*s"]:
  """The values of an MXFP4 tensor along its last axis."""
  from pallas_kernels import dequantize as kernels

  values = kernels.dequantize_mxfp4(*(_rows(part) for part in (codes, scales)))
  return values.reshape(*codes.shape[:-1], -1)


def _rows(x: Shaped[Array, "*s n"]) -> Shaped[Array, "m n"]:
  return x.reshape(-1, x.shape[-1])


def _too_small(values):
  return f"{values} values are fewer than {MIN_VALUES}" if values < MIN_VALUES else None
