"""Checks the annotations of packages while the tests run them: jaxtyping's, with beartype."""

from typing import Any

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
  """
  arguments_alone = signature.__annotations__.get("return") is Any
  return signature if arguments_alone or signature.__name__ == "__init__" else _checked(signature)
