"""Fixtures that any test may ask for."""

import jax
import pytest


@pytest.fixture
def strict_promotion():
  """No silent mixing of dtypes, no silent broadcasting of ranks."""
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


def pytest_collection_modifyitems(items):
  if getattr(jax.devices()[0], "compute_capability", None) != "9.0":
    skip = pytest.mark.skip(reason="needs a Hopper GPU: make gpu-test")
    for item in items:
      if "gpu" in item.keywords:
        item.add_marker(skip)
