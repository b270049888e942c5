"""Randomized block Hadamard transform: spreads an outlier over its block, cancels in a GEMM."""

import operator
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fp4jax.arguments import check_arrays


def hadamard(
  x: Float[Array | np.ndarray, "*s"],
  axis: SupportsIndex,
  block: int = 32,
  signs: Float[Array | np.ndarray, " block"] | None = None,
) -> Float[Array, "*s"]:
  """H diag(signs) x on each run of `block` values along `axis`; H is Sylvester's, over sqrt(block).

  H is symmetric and orthogonal, so `signs * hadamard(hadamard(x, signs=signs))` gives x back, and
  transforming both operands of a GEMM along the contracted axis leaves the product unchanged.

  Args:
    x: floats; the products are float32, the result has x's dtype.
    axis: a multiple of `block` long.
    block: a power of two.
    signs: +1 and -1, the same for every run; None for no signs.
  Raises:
    TypeError: x or signs are not arrays of float32, bfloat16 or float16, axis is not an int.
    ValueError: an axis out of range or not a multiple of `block` long; signs of another shape or,
      where they are not traced, of other values.
  """
  check_block(block)
  _check_floats("x", x)
  axis = _axis_of(x, axis)
  if x.shape[axis] % block:
    raise ValueError(f"axis {axis} of shape {x.shape} is not a multiple of {block=}")
  if signs is not None:
    _check_signs(signs, block)
  x = jnp.asarray(x)
  matrix = jnp.asarray(sylvester(block))
  if signs is not None:
    matrix = matrix * jnp.asarray(signs, jnp.float32)[None, :]
  before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
  blocks = x.astype(jnp.float32).reshape(*before, n // block, block, *after)
  out = jnp.tensordot(matrix, blocks, axes=(1, axis + 1), precision=lax.Precision.HIGHEST)
  return jnp.moveaxis(out, 0, axis + 1).reshape(x.shape).astype(x.dtype)


def check_block(block: int) -> None:
  """Refuses a block for which there is no Sylvester matrix."""
  if not isinstance(block, int | np.integer) or block < 1 or block & (block - 1):
    raise ValueError(f"{block=} is not a power of two")


def _check_floats(name, x):
  check_arrays(**{name: x})
  if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise TypeError(f"{name} is {x.dtype}; hadamard takes float32, bfloat16 or float16")


def _axis_of(x, axis):
  try:
    index = operator.index(axis)
  except TypeError:
    raise TypeError(f"{axis=} has type {type(axis).__name__}, not int") from None
  if not -x.ndim <= index < x.ndim:
    raise ValueError(f"{axis=} is out of range for x of shape {x.shape}")
  return index % x.ndim


def _check_signs(signs, block):
  _check_floats("signs", signs)
  if signs.shape != (block,):
    raise ValueError(f"signs of shape {signs.shape} do not match {block=}")
  if isinstance(signs, jax.core.Tracer):
    return
  values = np.asarray(signs, np.float32)
  if (wrong := values[np.abs(values) != 1]).size:
    raise ValueError(f"signs hold {wrong[0]}, which is neither 1 nor -1")


def sylvester(n: int) -> np.ndarray:
  """Sylvester's Hadamard matrix over sqrt(n): entry (i, j) has the sign (-1)^popcount(i & j)."""
  i = np.arange(n)
  signs = 1 - 2 * (np.bitwise_count(i[:, None] & i) % 2).astype(np.int8)
  return (signs / np.sqrt(n)).astype(np.float32)
