"""How formats that try several scales for a block compare them."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from fp4jax import float_bits as fb


def squared_error(
  error: Float32[Array, "*v"], amax: Int32[Array, "*u"], axes: tuple[int, ...]
) -> Float32[Array, "*u"]:
  """The sum of error^2 over `axes`, in units that each block's amax (its bits) sets.

  A power of two as large as amax is divided out first, so that no square leaves float32. The sum
  has a fixed order and no product that it could be fused with: compiled, op by op and on every
  backend it is the same, and so is the choice that hangs on it.
  """
  relative = error * fb.exp2(127 - (amax >> 23))
  total = jnp.minimum(relative * relative, 2.0**100)
  for axis in axes:
    while (n := total.shape[axis]) > 1:
      first, second, rest = jnp.split(total, (n // 2, n // 2 * 2), axis)
      total = jnp.concatenate([first + second, rest], axis)
  return total
