"""Step time over some of the devices, as the command measures it."""

import os
import subprocess
import sys

import numpy as np
import pytest
from small_runs import ROOT, SMALL

from experiments import logs
from experiments.step_cost import busiest_device

MODEL = SMALL | {"data.batch_size": 4, "model.num_experts": 4, "recipes": "bf16,fp8_dispatch"}
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}


def step_time(out, *arguments):
  line = [sys.executable, "-m", "experiments.step_time", "--config=configs/demo.py"]
  line += [f"--config.{name}={value}" for name, value in MODEL.items()]
  return subprocess.run(
    [*line, "--rounds=3", f"--out={out}", *arguments],
    cwd=ROOT,
    env=os.environ | DEVICES,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_the_busiest_device_of_layers_is_counted_by_its_own_experts():
  load = np.array([[1, 1, 2, 0], [3, 1, 0, 0]])  # of two devices: 2 and 2, 4 and 0
  assert busiest_device({"expert_load": load}, 2) == pytest.approx((1 + 2) / 2)
  assert busiest_device({"expert_load": load}, 1) == 1
  assert busiest_device({}, 1) is None


@pytest.mark.slow
def test_rows_say_the_mesh_and_the_tokens_of_each_device(tmp_path, corpus_file):
  done = step_time(
    tmp_path / "rows.jsonl",
    f"--config.data.path={corpus_file}",
    "--devices=2",
    "--config.mesh.expert=2",
    "--config.mesh.capacity_factor=1.5",
  )
  assert done.returncode == 0, done.stderr
  rows = logs.read_rows(tmp_path / "rows.jsonl")
  assert [row["recipe"] for row in rows] == ["bf16", "fp8_dispatch"]
  for row in rows:
    assert row["mesh"] == {"data": 1, "fsdp": 1, "expert": 2}
    assert (row["devices"], row["capacity_factor"]) == (2, 1.5)
    assert (row["tokens_per_step"], row["sequence_length"]) == (64, 16)
    assert 1 <= row["busiest_device"] <= 2
    assert row["tokens_per_gpu_s"] == pytest.approx(64 / 2 / row["step_time_ms"] * 1e3)


def test_more_devices_than_there_are(tmp_path):
  done = step_time(tmp_path / "rows.jsonl", "--devices=8")
  assert done.returncode == 1
  assert done.stderr == "error: --devices=8, but there are 4\n"
