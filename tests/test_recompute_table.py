"""Speed and memory by what is computed again, each step in a process of its own."""

import os
import re
import subprocess
import sys
import time

import jax
import pytest
from small_runs import ROOT, SMALL, small

from experiments import apart, logs, step_cost

DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
MODEL = SMALL | {"data.batch_size": 4, "model.num_experts": 4, "recipes": "bf16"}
MODEL |= {"mesh.expert": 2, "mesh.capacity_factor": 1.5}
MODEL |= {"model.num_layers": 4, "data.sequence_length": 64}  # of which a step keeps something


@pytest.mark.slow
def test_a_row_for_each_policy(tmp_path, corpus_file):
  line = [sys.executable, "-m", "experiments.recompute_table", "--config=configs/demo.py"]
  line += [f"--config.{name}={value}" for name, value in MODEL.items()]
  line += [f"--config.data.path={corpus_file}", f"--out={tmp_path / 'rows.jsonl'}"]
  done = subprocess.run(
    [*line, "--policies=everything,none", "--rounds=2", "--compilers=2", "--commit=of_a_copy"],
    cwd=ROOT,
    env=os.environ | DEVICES,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  rows = logs.read_rows(tmp_path / "rows.jsonl")
  assert [row["remat"] for row in rows] == ["everything", "none"]
  for row in rows:
    assert row["recipe"] == "bf16" and row["model"]["remat"] == row["remat"]
    assert (row["oom"], row["peak_bytes"], row["limit_bytes"]) == (False, None, None)
    assert row["mesh"] == {"data": 2, "fsdp": 1, "expert": 2} and row["devices"] == 4
    assert row["tokens_per_gpu_s"] == pytest.approx(4 * 64 / 4 / row["step_time_ms"] * 1e3)
    assert 0 <= row["dropped"] < 1 and row["git_commit"] == "of_a_copy"
  again, kept = rows
  assert again["argument_bytes"] == kept["argument_bytes"] > 12 * kept["parameters"] / 2
  assert again["temp_bytes"] < kept["temp_bytes"]


def test_a_step_without_room_is_a_row(monkeypatch, corpus_file):
  def fail(*_):
    raise jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 58.13GiB."
    )

  config = small(**{"data.path": corpus_file})
  monkeypatch.setattr(step_cost, "_run", fail)
  row = step_cost.measure_step(config, "bf16", 2)
  assert (row["used_bytes"], row["largest_free_bytes"]) == (None, None)  # a CPU does not count
  of = {"bytes_limit": [9, 8], "bytes_in_use": [5, 6], "largest_free_block_bytes": [2, 3]}
  monkeypatch.setattr(step_cost, "_of_memory", lambda _, name: of[name])
  row = step_cost.measure_step(config, "bf16", 2)
  assert [row[f"{name}_bytes"] for name in ("limit", "used", "largest_free")] == [8, 6, 2]
  assert row["oom"] and row["oom_bytes"] == round(58.13 * 2**30)
  assert row["temp_bytes"] > 0 and "peak_bytes" not in row


@pytest.mark.parametrize(
  ("message", "size"),
  [
    ("Out of memory while trying to allocate 62419849216 bytes. [tf-", 62419849216),
    ("Out of memory while trying to allocate 1.5MiB.", 3 * 2**19),
    ("out of memory", None),
  ],
)
def test_what_was_asked_for(message, size):
  assert step_cost.asked_bytes(message) == size


@pytest.mark.parametrize(
  ("function", "argument", "timeout_s", "message"),
  [(os._exit, 3, 60, "ended with status 3"), (time.sleep, 60, 1, "no result after 1 s")],
)
def test_a_process_without_a_result_is_an_error(function, argument, timeout_s, message):
  with pytest.raises(ChildProcessError, match=re.escape(message)):
    apart.alone(function, argument, timeout_s=timeout_s)
