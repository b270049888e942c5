"""Checks the annotations of packages while the tests run them: jaxtyping's, with beartype."""

import functools
from typing import Any

import jax
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def check(modules: list[str]) -> None:
  """Of every function with an annotated result in `modules` and below, imported from now on."""
  install_import_hook(modules, f"{__name__}.on_return")


def on_return(signature):
  """Checks arguments and result when a call has returned.

  jaxtyping asks twice: before the call for the arguments alone (their result is Any), and after it
  for both. Only the second counts, so that what a function refuses, it refuses in its own words.
  Fields of dataclasses are not checked: JAX makes registered ones anew with leaves of any type.
  Nor are calls with constants: JAX hands a custom_vjp NumPy's arrays, or literals of its own.
  """
  arguments_alone = signature.__annotations__.get("return") is Any
  if arguments_alone or signature.__name__ == "__init__":
    return signature
  checked = _checked(signature)

  @functools.wraps(signature)
  def check_call(*args, **kwargs):
    constant = any(map(_is_constant, (*args, *kwargs.values())))
    return (signature if constant else checked)(*args, **kwargs)

  return check_call


def _is_constant(x):
  return hasattr(x, "__array__") and not isinstance(x, jax.Array)
