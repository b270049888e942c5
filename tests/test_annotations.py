"""Annotations are checked, and what a function refuses, it refuses in its own words."""

import importlib
import sys

import annotations
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from fp4jax import hadamard

MODULE = """
import dataclasses
from jaxtyping import Array, Float

@dataclasses.dataclass
class Pair:
  left: Float[Array, " n"]

def dot(x: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, ""]:
  if isinstance(x, list):
    raise TypeError("x is a list")
  return (x * y).sum() if y.ndim else x

def half(n: float) -> float:
  return n / 2
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / "annotated.py").write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))  # takes the hook back
  annotations.check(["annotated"])
  yield importlib.import_module("annotated")
  del sys.modules["annotated"]


def test_shapes_of_arguments_and_results_are_checked(module):
  x = jnp.ones(3)
  assert module.dot(x, x) == 3
  with pytest.raises(TypeCheckError, match=r"annotated\.dot"):
    module.dot(x, jnp.ones(1))  # broadcasts, and is no dot product
  with pytest.raises(TypeCheckError, match=r"annotated\.dot"):
    module.dot(jnp.arange(3), x)
  with pytest.raises(TypeCheckError, match="return value"):
    module.dot(x, jnp.float32(1))


def test_a_function_refuses_in_its_own_words(module):
  with pytest.raises(TypeError, match=r"^x is a list$"):
    module.dot([1.0], jnp.ones(1))


def test_an_int_is_a_float_and_fields_hold_anything(module):
  assert module.half(3) == 1.5
  assert module.Pair(None).left is None


def test_the_hook_is_in_place():
  """This very run checks the packages that `conftest.CHECKED` names."""
  assert "jaxtyping" in hadamard.__wrapped__.__globals__
