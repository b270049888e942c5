"""How often a kernel is traced."""

import functools

import jax


def traced_once(*static: str):
  """Decorates a kernel's wrapper: traced once for arguments alike, its arguments `static` the same.

  A wrapper makes its kernel anew at each call, so JAX would lower the same kernel again for every
  layer, 0.3 s each, and compile it for every call outside jit. Inlined, the program of a caller is
  what it is without. What else the wrapper reads, such as TUNING, is read while it is traced.
  """
  return functools.partial(jax.jit, static_argnames=static, inline=True)
