"""Runs of a model that trains in seconds, and the command that a user types."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import config as configs
from experiments import logs

ROOT = Path(__file__).parent.parent
SMALL = {
  "seeds": 1,
  "optimizer.learning_rate": 3e-3,
  "steps": 8,
  "eval_every": 4,
  "eval_batches": 1,
  "probe_every": 3,
  "checkpoint_every": 2,
  "data.sequence_length": 16,
  "data.batch_size": 2,
  "model.num_layers": 1,
  "model.d_model": 32,
  "model.num_heads": 2,
  "model.num_kv_heads": 1,
  "model.head_dim": 16,
  "model.num_experts": 2,
  "model.top_k": 1,
  "model.d_ff": 32,
  "optimizer.warmup_steps": 2,
}


def rows_of(workdir, log):
  """Rows of all runs, in the order of their names."""
  paths = sorted(workdir.glob(f"runs/*/{log}.jsonl"))
  return [row for path in paths for row in logs.read_rows(path)]


def assert_same_logs(workdir, other):
  for log in ("metrics", "probes"):
    paths = sorted(other.glob(f"runs/*/{log}.jsonl"))
    assert paths and len(paths) == len(list(workdir.glob(f"runs/*/{log}.jsonl")))
    for path in paths:
      assert (workdir / path.relative_to(other)).read_bytes() == path.read_bytes(), path


def small(**changes) -> configs.Experiment:
  config = configs.Experiment()
  for path, value in (SMALL | changes).items():
    *parents, name = path.split(".")
    node = config
    for parent in parents:
      node = getattr(node, parent)
    setattr(node, name, value)
  return config


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("corpus") / "text.txt"
  path.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(3000)))
  return str(path)


@pytest.fixture(scope="session")
def command(corpus_file):
  """Starts the runner as a user does; its programs are compiled for few steps."""
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

  def start(workdir, *arguments, small_config=True):
    values = SMALL | {"data.path": corpus_file, "recipes": "bf16,mxfp4_rht_sr"}
    overrides = [f"--config.{k}={v}" for k, v in values.items()] if small_config else []
    line = [sys.executable, "-m", "experiments.run", "--config=configs/demo.py"]
    return subprocess.Popen(
      [*line, f"--workdir={workdir}", *overrides, *arguments],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return start


def finish(process, code=0):
  out, _ = process.communicate(timeout=300)
  assert process.returncode == code, out
  return out


def wait_for_lines(path, count, process):
  while not path.exists() or path.read_bytes().count(b"\n") < count:
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)


@pytest.fixture(scope="session")
def straight(command, tmp_path_factory):
  """A run that was never stopped."""
  workdir = tmp_path_factory.mktemp("straight")
  finish(command(workdir))
  return workdir
