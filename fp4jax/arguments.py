"""Refuses arguments of the wrong type by name and type: what they hold may fill pages."""

from typing import Any


def check_type(name: str, value: Any, expected: type, hint: str = "") -> None:
  """Raises a TypeError that ends in `hint`, such as " such as fp4jax.MXFP4"."""
  if not isinstance(value, expected):
    raise TypeError(f"{name} has type {type(value).__name__}, not {expected.__name__}{hint}")


def check_arrays(**arrays: Any) -> None:
  """Refuses lists and Python's numbers, which have no dtype: none is guessed."""
  for name, value in arrays.items():
    if not hasattr(value, "dtype"):
      raise TypeError(f"{name} has type {type(value).__name__}, not jax.Array or numpy.ndarray")
