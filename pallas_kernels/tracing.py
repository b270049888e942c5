"""How often a kernel is traced."""

import functools

import jax
import numpy as np


def traced_once(*static: str):
  """Decorates a kernel's wrapper: traced once for arguments alike, its arguments `static` the same.

  A wrapper makes its kernel anew at each call, so JAX would lower the same kernel again for every
  layer, 0.3 s each, and compile it for every call outside jit. Inlined, the program of a caller is
  what it is without. What else the wrapper reads, such as TUNING, is read while it is traced.
  """

  def decorate(wrapper):
    traced = jax.jit(wrapper, static_argnames=static, inline=True)

    @functools.wraps(wrapper)
    def call(*args, **kwargs):
      for x in jax.tree.leaves((args, kwargs)):
        # Which jit would narrow before the wrapper can refuse it.
        if isinstance(x, np.ndarray) and x.dtype != jax.dtypes.canonicalize_dtype(x.dtype):
          name = wrapper.__name__.lstrip("_")
          raise TypeError(f"{name} got an array of {x.dtype}; kernels take no 64 bits")
      return traced(*args, **kwargs)

    return call

  return decorate
