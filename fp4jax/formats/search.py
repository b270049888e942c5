"""How formats that try several scales for a block compare them."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from fp4jax import float_bits as fb


def squared_error(
  error: Float32[Array, "*v"], amax: Int32[Array, "*u"], axes: tuple[int, ...]
) -> Float32[Array, "*u"]:
  """The sum of error^2 over `axes`, in units that each block's amax (its bits) sets.

  A power of two as large as amax is divided out first, so that no square leaves float32, and there
  is no product that the sum could be fused with: compiled, op by op and on every backend it is the
  same, and so is the choice that hangs on it.
  """
  relative = error * fb.exp2(127 - (amax >> 23))
  return ordered_sum(jnp.minimum(relative * relative, 2.0**100), axes)


def ordered_sum(x: Float32[Array, "*v"], axes: tuple[int, ...]) -> Float32[Array, "*u"]:
  """The sum over `axes`, which become 1 long, in an order that no compiler chooses."""
  for axis in axes:
    while (n := x.shape[axis]) > 1:
      first, second, rest = jnp.split(x, (n // 2, n // 2 * 2), axis)
      x = jnp.concatenate([first + second, rest], axis)
  return x
