"""Fixtures that any test may ask for."""

import hashlib
import importlib.util
import os
import platform
import types
from pathlib import Path

import pytest


def cpu() -> str:
  """Names what XLA compiles for: programs for another CPU may hold instructions that it lacks."""
  info = Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
  told = sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})
  return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:12]


# Compiled programs are kept from run to run, also for the processes that tests start. In pytest's
# own folder: git ignores it, and --cache-clear empties it.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / f".pytest_cache/d/xla-{cpu()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling is most of a first run. LLVM's first level of optimization takes two thirds of the time
# of its third, and keeps what changes bits: the fused multiply-adds. A GPU's tests run as users do.
if not importlib.util.find_spec("jax_plugins"):
  os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=4"
  )

import annotations  # noqa: E402, imports jax, which reads the environment
import jax  # noqa: E402

CHECKED = ["experiments", "fp4jax"]
annotations.check(CHECKED)  # before anything imports them

from fake_kernels import fake_kernels  # noqa: E402
from slow_minutes import pytest_addoption, pytest_configure  # noqa: E402, F401
from small_runs import command, corpus_file, straight  # noqa: E402, F401

import pallas_kernels  # noqa: E402
from experiments import mesh  # noqa: E402
from fp4jax import implementation, sharding  # noqa: E402

# An emulated warpgroup that waits at a barrier keeps the XLA thread that it runs on. XLA has one
# thread per core, so that a small machine may have none left for the warpgroup that is waited for.
# These suffice for two CTAs of four warpgroups. XLA reads their number with the first device.
os.environ["PJRT_NPROC"] = str(max(16, os.cpu_count()))

jax.config.update("jax_num_cpu_devices", 4)  # for test_sharding; other tests compute on the first


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """A run within a test has one device, as the same command has; a mesh has those that it names."""
  monkeypatch.setattr(mesh, "all_devices", lambda: jax.devices()[:1])


@pytest.fixture(autouse=True, scope="module")
def programs():
  """A file's programs go with it. Each is some memory maps of the process, which may have 65530."""
  yield
  jax.clear_caches()


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

  sharding.compiled.cache_clear()  # programs of the CPU are none of Hopper's
  monkeypatch.setattr(implementation, "compute_capability", lambda: "9.0")
  for name, kernels in fake_kernels().items():
    counting = {k: counted(k, f) for k, f in vars(kernels).items()}
    monkeypatch.setattr(pallas_kernels, name, types.SimpleNamespace(**counting), raising=False)
  yield calls
  sharding.compiled.cache_clear()


def pytest_collection_modifyitems(items):
  if getattr(jax.devices()[0], "compute_capability", None) != "9.0":
    skip = pytest.mark.skip(reason="needs a Hopper GPU: make gpu-test")
    for item in items:
      if "gpu" in item.keywords:
        item.add_marker(skip)
