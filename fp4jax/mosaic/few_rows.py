"""A few rows times weights packed in MXFP4 or FP8 on Hopper: the products of a decoding step."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from fp4jax import formats
from fp4jax import quantization as qz
from fp4jax.implementation import device_obstacle, dtype_obstacle
from fp4jax.mosaic.quantize import MXFP4
from fp4jax.quantized_array import QuantizedArray
from fp4jax.quantizers import Operand
from fp4jax.recipe import Recipe
from fp4jax.sharding import mesh_obstacle
from fp4jax.swiglu import swiglu

_FP8 = [formats.FP8_BLOCK_2D, formats.FP8_BLOCK_POW2_2D]
_BF16 = jnp.dtype(jnp.bfloat16)


def obstacle(
  recipe: Recipe,
  watched: tuple,
  lhs: Array | jax.ShapeDtypeStruct,
  rhs: QuantizedArray,
  dimension_numbers: lax.DotDimensionNumbers,
  dtype: jnp.dtype,
) -> str | None:
  """Why the kernel can't compute lhs times packed rhs, contracted along axis -2; None if it can.

  `watched` are taps and states, which only XLA reads.
  """
  if why := device_obstacle() or mesh_obstacle(lhs, rhs) or dtype_obstacle(lhs=lhs):
    return why
  (contracted, _), (batch, _) = dimension_numbers
  if batch or len(rhs.shape) != 2:
    return "the kernels take no batch axes"
  if dtype != jnp.bfloat16:
    return f"the kernels return bfloat16, not {jnp.dtype(dtype).name}"
  rows = math.prod(size for axis, size in enumerate(lhs.shape) if axis not in contracted)
  return _obstacle(recipe, watched, rows, rhs)


def experts_obstacle(
  recipe: Recipe,
  watched: tuple,
  x: Array | jax.ShapeDtypeStruct,
  packed: tuple[QuantizedArray, QuantizedArray],
) -> str | None:
  """Why the kernel can't compute `moe_ffn` of few tokens and packed weights; None if it can."""
  if why := device_obstacle() or mesh_obstacle(x, *packed) or dtype_obstacle(x=x):
    return why
  whys = (_obstacle(recipe, watched, len(x), w) for w in packed)
  return next(filter(None, whys), None)


def _obstacle(recipe, watched, rows, rhs):
  if why := _recipe_obstacle(recipe):
    return why
  most, step = (64, 128) if rhs.fmt in _FP8 else (128, 64)
  if not 1 <= rows <= most:
    return f"the kernel of weights packed in {rhs.fmt.name} multiplies 1 to {most} rows, not {rows}"
  for name, multiple, size in zip("kn", (step, 128), rhs.shape[-2:], strict=True):
    if size % multiple or not size:
      return f"{name}={size} is not a multiple of {multiple}"
  if any(w is not None for w in watched):
    return 'taps are read by implementation="xla", and so is state'
  if rhs.trace is not None:  # a gradient by it must raise, as it does in XLA
    return "the kernel takes weights of fp4jax.pack_weights, not of fp4jax.quantize"
  return None


def _recipe_obstacle(recipe):
  pair, kept = recipe.fprop, recipe.residual.rhs
  name = f"not recipe {recipe.name!r}"
  if recipe.is_stochastic:
    return f"the kernel of packed weights draws nothing at random, {name}"
  if not isinstance(pair.rhs, Operand):
    return f"the kernel of packed weights reads them in one term, {name}"
  # Weights that are kept in a format come as its values; what else is done to them, XLA does.
  original = pair.rhs.source == "original"
  packed = pair.rhs.format if original else kept
  if packed not in (*MXFP4, *_FP8):
    return f"the kernel of packed weights reads them in MXFP4 or FP8 of 128 x 128, {name}"
  if not original and pair.rhs.format != _BF16:
    return f"the kernel of packed weights multiplies their values in bf16, {name}"
  lhs = pair.lhs
  plain = isinstance(lhs, Operand) and lhs.transform is None and lhs.source == "original"
  # Of what bf16 holds, in blocks that divide the kernel's steps of k.
  of_rows, names = [_BF16, *MXFP4], "bf16 or MXFP4"
  if packed in _FP8:
    of_rows, names = [*of_rows, formats.FP8_BLOCK_POW2], "bf16, MXFP4 or FP8_BLOCK_POW2"
  if not plain or lhs.format not in of_rows:
    return f"the kernel of packed weights reads fprop.lhs in {names}, {name}: it is {lhs}"
  return None


def multiply(
  xla: Callable[[Array, QuantizedArray], Array],
  recipe: Recipe,
  axis: int,
  lhs: BFloat16[Array, "*s"],
  rhs: QuantizedArray,
) -> BFloat16[Array, "*m n"]:
  """lhs, its `axis` contracted, times rhs, for a call that `obstacle` let pass.

  The gradient of lhs is that of `xla`, which computes the same.
  """
  return _multiply(xla, recipe, axis, lhs, rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply(xla, recipe, axis, lhs, rhs):
  from pallas_kernels import few_rows

  free = tuple(size for i, size in enumerate(lhs.shape) if i != axis)
  x = _read(recipe.fprop.lhs, jnp.moveaxis(lhs, axis, -1).reshape(-1, lhs.shape[axis]))
  return few_rows.few_rows_matmul(x, rhs.codes, rhs.scales).reshape(*free, -1)


def _multiply_fwd(xla, recipe, axis, lhs, rhs):
  return _multiply(xla, recipe, axis, lhs, rhs), (lhs, rhs)


def _multiply_bwd(xla, recipe, axis, saved, g):
  lhs, rhs = saved
  _, pull = jax.vjp(lambda lhs: xla(lhs, rhs), lhs)
  return *pull(g), None  # codes have no gradient


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply_experts(
  recipe: Recipe,
  x: BFloat16[Array, "token d"],
  w13: QuantizedArray,
  w2: QuantizedArray,
  experts: Int32[Array, "token k"],
  weights: Float32[Array, "token k"],
) -> BFloat16[Array, "token d"]:
  """`moe_ffn` where `experts_obstacle` is None: every expert multiplies all tokens, and each token
  takes its own. NaN everywhere where one of `experts`, int32 from 0 up, does not exist."""
  from pallas_kernels import few_rows

  number, (tokens, d) = len(w13.codes), x.shape
  read = lambda x: _read(recipe.fprop.lhs, x.reshape(-1, x.shape[-1])).reshape(x.shape)  # noqa: E731
  of_all = jnp.broadcast_to(read(x), (number, tokens, d))
  a = swiglu(few_rows.few_rows_matmul(of_all, w13.codes, w13.scales))
  y = few_rows.few_rows_matmul(read(a), w2.codes, w2.scales)
  chosen = y[experts, jnp.arange(tokens)[:, None]].astype(jnp.float32)
  out = jnp.sum(chosen * weights[..., None], axis=1).astype(x.dtype)
  return jnp.where(jnp.all(experts < number), out, jnp.nan)


def _multiply_experts_fwd(recipe, *operands):
  return multiply_experts(recipe, *operands), None


def _multiply_experts_bwd(recipe, saved, g):
  raise ValueError("few_rows=True has no backward pass")


multiply_experts.defvjp(_multiply_experts_fwd, _multiply_experts_bwd)


def _read(operand: Operand, x: Float[Array, "m k"]) -> Float[Array, "m k"]:
  if not operand.is_quantized:
    return x
  return qz.fake_quantize(x, operand.format, rounding=operand.rounding)
