"""The tables that the sweep writes, and what it finds to time."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from experiments import kernel_cases, kernel_sweep, kernel_timing
from pallas_kernels import dequantize

MODULES = sorted({entry.module for entry in kernel_sweep.ENTRIES})


def module(name):
  return importlib.import_module(f"pallas_kernels.{name}")


def tuning_of(source, module):
  names = {"TuningConfig": getattr(module, "TuningConfig", None), "dict": dict, "str": str}
  assignment = source[source.index("\nTUNING") :].split("\n}\n")[0] + "\n}\n"
  exec("from typing import Literal\n" + assignment, names)
  return names["TUNING"]


@pytest.mark.parametrize("name", MODULES)
def test_a_table_is_replaced_and_nothing_else(name):
  with open(module(name).__file__) as file:
    source = file.read()
  table = module(name).TUNING
  same = kernel_sweep.with_table(source, table)
  assert tuning_of(same, module(name)) == table
  changed = {
    entry.key: entry.candidates[-1] for entry in kernel_sweep.ENTRIES if entry.module == name
  }
  written = kernel_sweep.with_table(source, table | changed)
  assert tuning_of(written, module(name)) == table | changed
  assert kernel_sweep.with_table(written, table) == same
  before, after = source.split("\nTUNING")[0], source.split("\nTUNING")[1].split("\n\n", 1)[1]
  assert written.startswith(before) and written.endswith(after)


def test_every_entry_of_every_table_is_swept():
  swept = {entry.name for entry in kernel_sweep.ENTRIES}
  assert swept == kernel_timing.tuning().keys()


@pytest.mark.parametrize("entry", kernel_sweep.ENTRIES, ids=lambda e: f"{e.module}.{e.key}")
def test_candidates_are_of_the_kind_in_the_table(entry):
  now = module(entry.module).TUNING[entry.key]
  for candidate in entry.candidates:
    assert type(candidate) is type(now)
    if isinstance(now, dict):
      assert candidate.keys() == now.keys()


def test_files_and_entries_are_chosen_by_name():
  names = [entry.name for entry in kernel_sweep.chosen(["fp8", "widen.columns"])]
  assert names == ["fp8.rows", "widen.columns"]
  assert kernel_sweep.chosen([]) == list(kernel_sweep.ENTRIES)


def test_a_candidate_that_is_wrong_has_no_time(monkeypatch):
  case = kernel_cases.BY_NAME["quantize_mxfp4 floor"]
  monkeypatch.setattr(kernel_timing, "bf16_tensor", lambda seed, shape: jnp.ones((64, 64)))
  monkeypatch.setattr(kernel_timing, "time_us", lambda program, *sets: {"time_us": 1e3})
  for kernel, message in (
    (case.definition, None),
    (lambda x: tuple(part + 1 for part in case.definition(x)), "differs from its definition"),
  ):
    kernel_sweep._prepared.cache_clear()
    planted = dataclasses.replace(case, kernel=kernel)
    monkeypatch.setitem(kernel_cases.BY_NAME, case.name, planted)
    time = kernel_sweep._case(case.name)
    (row,) = kernel_sweep.sweep(kernel_sweep.Entry("mxfp4", "nearest", [{"runs": 8}], time))
    assert row["error"] == message and row["time_us"] == (None if message else 1e3)
  kernel_sweep._prepared.cache_clear()


def test_a_kernel_is_compiled_with_the_table_as_it_is(monkeypatch):
  arguments = jnp.zeros((256, 128), jnp.uint8), jnp.zeros((256, 8), jnp.uint8)
  traced = lambda: str(jax.make_jaxpr(lambda *a: dequantize.dequantize_mxfp4(*a))(*arguments))  # noqa: E731
  before = traced()
  monkeypatch.setitem(dequantize.TUNING, "rows", {"runs": 2})
  assert traced() == before
  with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
    kernel_timing.compiled(dequantize.dequantize_mxfp4, *arguments)
  assert traced() != before
  jax.clear_caches()
