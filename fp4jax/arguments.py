"""Refuses arguments of the wrong type by name and type: what they hold may fill pages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_type(name: str, value: Any, expected: type, hint: str = "") -> None:
  """Raises a TypeError that ends in `hint`, such as " such as fp4jax.MXFP4"."""
  if not isinstance(value, expected):
    raise TypeError(f"{name} has type {type(value).__name__}, not {expected.__name__}{hint}")


def check_arrays(**arrays: Any) -> None:
  """Refuses lists and Python's numbers, which have no dtype: none is guessed."""
  for name, value in arrays.items():
    if not hasattr(value, "dtype"):
      raise TypeError(f"{name} has type {type(value).__name__}, not jax.Array or numpy.ndarray")


def to_arrays(**arrays: Any) -> list[jax.Array]:
  """NumPy's arrays as JAX's, others as they are; refuses what `check_arrays` refuses."""
  check_arrays(**arrays)
  return [x if isinstance(x, jax.Array) else _to_jax(x) for x in arrays.values()]


def _to_jax(x):
  # jnp.asarray would make float32 of float64 in silence; the caller refuses float64 by its name.
  return x if x.dtype in (np.float64, np.complex128) else jnp.asarray(x)


def check_axis(axis: Any, x: jax.Array) -> int:
  """The axis of x, counted from the end."""
  if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
    raise TypeError(f"{axis=} has type {type(axis).__name__}, not int")
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f"{axis=} is out of range for x of shape {x.shape}")
  return int(axis) % x.ndim - x.ndim


def check_key(**keys: Any) -> None:
  """Refuses what is not a single key of `jax.random`: a number, a string, a batch of keys."""
  for name, key in keys.items():
    dtype = getattr(key, "dtype", None)
    if dtype is None:
      raise TypeError(f"{name} has type {type(key).__name__}, not a key such as jax.random.key(0)")
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and not (dtype == np.uint32 and key.ndim):
      raise TypeError(f"{name} is {dtype} {key.shape}, not a key such as jax.random.key(0)")
    if key.ndim != (0 if typed else 1):
      raise ValueError(f"{name} of shape {key.shape} is a batch of keys, not one key")
