"""Fixtures that any test may ask for."""

import os
import types

import annotations
import jax
import pytest

CHECKED = ["experiments", "fp4jax.models.attention", "fp4jax.nnx", "fp4jax.transforms"]
annotations.check(CHECKED)  # before anything imports them

from fake_kernels import fake_kernels  # noqa: E402

import pallas_kernels  # noqa: E402
from fp4jax import implementation  # noqa: E402

# An emulated warpgroup that waits at a barrier keeps the XLA thread that it runs on. XLA has one
# thread per core, so that a small machine may have none left for the warpgroup that is waited for.
# These suffice for two CTAs of four warpgroups. XLA reads their number with the first device.
os.environ["PJRT_NPROC"] = str(max(16, os.cpu_count()))


@pytest.fixture
def strict_promotion():
  """No silent mixing of dtypes, no silent broadcasting of ranks."""
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def hopper(monkeypatch):
  """Looks like sm_90; the kernels are stand-ins that count their calls."""
  calls = []

  def counted(name, function):
    def call(*args, **kwargs):
      calls.append(name)
      return function(*args, **kwargs)

    return call

  monkeypatch.setattr(implementation, "compute_capability", lambda: "9.0")
  for name, kernels in fake_kernels().items():
    counting = {k: counted(k, f) for k, f in vars(kernels).items()}
    monkeypatch.setattr(pallas_kernels, name, types.SimpleNamespace(**counting), raising=False)
  return calls


def pytest_collection_modifyitems(items):
  if getattr(jax.devices()[0], "compute_capability", None) != "9.0":
    skip = pytest.mark.skip(reason="needs a Hopper GPU: make gpu-test")
    for item in items:
      if "gpu" in item.keywords:
        item.add_marker(skip)
