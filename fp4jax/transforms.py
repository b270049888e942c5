"""Randomized block Hadamard transform: spreads an outlier over its block, cancels in a GEMM."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fp4jax.arguments import check_arrays


def hadamard(
  x: Float[Array, "*s"], axis: int, block: int = 32, signs: Float[Array, " block"] | None = None
) -> Float[Array, "*s"]:
  """H diag(signs) x on each run of `block` values along `axis`; H is Sylvester's, over sqrt(block).

  H is symmetric and orthogonal, so `signs * hadamard(hadamard(x, signs=signs))` gives x back, and
  transforming both operands of a GEMM along the contracted axis leaves the product unchanged.

  Args:
    x: floats; the products are float32, the result has x's dtype.
    axis: a multiple of `block` long.
    block: a power of two.
    signs: +1 and -1, the same for every run; None for no signs.
  """
  check_block(block)
  check_arrays(x=x)
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f"{axis=} is out of range for x of shape {x.shape}")
  if x.shape[axis] % block:
    raise ValueError(f"axis {axis} of shape {x.shape} is no multiple of {block=}")
  if signs is not None and signs.shape != (block,):
    raise ValueError(f"signs of shape {signs.shape} do not match {block=}")
  axis %= x.ndim
  matrix = jnp.asarray(sylvester(block))
  if signs is not None:
    matrix = matrix * signs.astype(jnp.float32)[None, :]
  before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
  blocks = x.astype(jnp.float32).reshape(*before, n // block, block, *after)
  out = jnp.tensordot(matrix, blocks, axes=(1, axis + 1), precision=lax.Precision.HIGHEST)
  return jnp.moveaxis(out, 0, axis + 1).reshape(x.shape).astype(x.dtype)


def check_block(block: int) -> None:
  """Refuses a block for which there is no Sylvester matrix."""
  if not isinstance(block, int | np.integer) or block < 1 or block & (block - 1):
    raise ValueError(f"{block=} is not a power of two")


def sylvester(n: int) -> np.ndarray:
  """Sylvester's Hadamard matrix over sqrt(n): entry (i, j) has the sign (-1)^popcount(i & j)."""
  i = np.arange(n)
  signs = 1 - 2 * (np.bitwise_count(i[:, None] & i) % 2).astype(np.int8)
  return (signs / np.sqrt(n)).astype(np.float32)
