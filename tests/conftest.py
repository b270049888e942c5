"""Fixtures that any test may ask for."""

import jax
import pytest


@pytest.fixture
def strict_promotion():
  """No silent mixing of dtypes, no silent broadcasting of ranks."""
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield
