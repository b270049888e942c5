"""What the commands of experiments/ say to mistakes, and settings that they refuse."""

import importlib.util
import math
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import checks, kernel_peers
from experiments import config as configs
from experiments.comparison import field_paths

ROOT = Path(__file__).parents[1]


def changed(**changes) -> configs.Experiment:
  config = configs.Experiment()
  for path, value in changes.items():
    group, _, name = path.rpartition(".")
    setattr(operator.attrgetter(group)(config) if group else config, name, value)
  return config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seeds": 0}, "seeds=0 is not from 1 to 1000"),
    ({"seeds": 99999999999}, "seeds=99999999999 is not from 1 to 1000"),
    ({"steps": 2**31}, "steps=2147483648 is not from 1 to 2147483647"),
    ({"recipes": "bf16"}, "recipes='bf16' is not a list of names, such as Names(('bf16',))"),
    ({"final_gemms": ("fprop", 1)}, "final_gemms=('fprop', 1) is not a list of names"),
    ({"seeds": 2.0}, "seeds=2.0 is not of type int"),
    ({"steps": True}, "steps=True is not a number"),
    ({"data.tokenizer": 2}, "data.tokenizer=2 is not of type str or None"),
    ({"data.path": ["a.txt"]}, "data.path=['a.txt'] is not of type str or None"),
    ({"quantize.experts": 1}, "quantize.experts=1 is not of type bool"),
    ({"checkpoint_every": -1}, "checkpoint_every=-1 is not at least 0"),
    ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate=-1.0 is not above 0"),
    ({"optimizer.learning_rate": math.nan}, "optimizer.learning_rate=nan is not above 0"),
    ({"optimizer.clip_norm": math.inf}, "optimizer.clip_norm=inf is not above 0"),
    ({"optimizer.final_fraction": 1.5}, "optimizer.final_fraction=1.5 is not from 0 to 1"),
    ({"optimizer.b2": 1.0}, "optimizer.b2=1.0 is not at least 0 and below 1"),
    (
      {"quantize.first_bf16": 2, "quantize.last_bf16": 1},
      "first_bf16=2 and quantize.last_bf16=1 are more than model.num_layers=2",
    ),
    (
      {"final_recipe": "mxfp5"},
      "unknown recipe 'mxfp5'",
    ),
    (
      {"final_recipe": "bf16", "final_gemms": configs.Names(("fprop", "grad"))},
      "final_gemms=fprop,grad is not of fprop,dgrad,wgrad",
    ),
    (
      {"final_recipe": "bf16", "final_share": 0.004},
      "final_share=0.004 of steps=100 leaves one of the two recipes without a step",
    ),
    (
      {"final_recipe": "bf16", "final_gemms": configs.Names(("wgrad",))},
      'hopper_fp4[wgrad=bf16]: source="residual" needs a format in residual.lhs',
    ),
    ({"implementation": "mosaic"}, "probe_every=20: probes read the tensors of"),
    (
      {"steps": 10, "optimizer.warmup_steps": 20},
      "warmup_steps=20 is not below steps=10; add --config.optimizer.warmup_steps=2",
    ),
  ],
)
def test_senseless_settings_are_refused(changes, message):
  checks.validate(changed())
  with pytest.raises(ValueError, match=re.escape(message)):
    checks.validate(changed(**changes))


def test_no_number_is_left_unchecked():
  config = configs.Experiment()
  values = {path: operator.attrgetter(path)(config) for path in field_paths(configs.Experiment)}
  numbers = [p for p, v in values.items() if type(v) in (int, float) and not p.startswith("data.")]
  for path in numbers:
    with pytest.raises(ValueError, match=rf"^{path}=-7 is not"):
      checks.validate(changed(**{path: -7}))
  assert len(numbers) > 25


@pytest.mark.parametrize(
  ("module", "arguments", "message"),
  [
    ("run", ["--workdir={}", "--config.steps=3"], "--config is needed, such as --config=configs/"),
    ("run", ["--workdir=", "--config=configs/demo.py"], "--workdir is empty"),
    ("run", ["--config=configs/demo.py"], "error: --workdir is needed\n"),
    ("report", ["--workdir={}/rows.jsonl,"], "--workdir is empty"),
    (
      "run",
      ["--workdir={}/rows.jsonl", "--config=configs/demo.py"],
      "rows.jsonl is a file, not a folder",
    ),
    (
      "run",
      ["--workdir={}/rows.jsonl/run", "--config=configs/demo.py"],
      "rows.jsonl/run/config.json: Not a directory",
    ),
    ("run", ["--workdir={}", "--config=configs/deno.py"], "configs/deno.py: there is no such file"),
    ("run", ["--workdir={}", "--config", "configs"], "--config=configs: there is no such file"),
    (
      "run",
      ["--workdir={}", "--config=configs/demo.py", "--recipes=bf16"],
      "there is no --recipes; did you mean --config.recipes?",
    ),
    ("step_memory", ["--out={}/rows.jsonl"], "--config is needed, such as --config=configs/"),
    (
      "run",
      ["--config=configs/demo.py", "--config.recipes=bf16,", "mxfp4", "--workdir={}"],
      "unexpected argument 'mxfp4'; lists take no spaces: --config.recipes=bf16,mxfp4\n",
    ),
    ("tables", ["runs/demo"], "unexpected argument 'runs/demo'"),
    (
      "kernel_bench",
      ["--out={}/rows.jsonl", "--only=matmul,", "moe_ffn"],
      ": --only=matmul,moe_ffn",
    ),
    ("kernel_sweep", ["--out={}/rows.jsonl", "--only=swiglu,", "fp8"], ": --only=swiglu,fp8"),
    ("kernel_sweep", ["--out={}/rows.jsonl", "--only=fp8,moe"], "'moe' is not one of mxfp4, fp8,"),
    (
      "kernel_bench",
      ["--out={}/rows.jsonl", "--only=matmuls"],
      "'matmuls' is not one of elementwise",
    ),
    (
      "kernel_bench",
      ["--out={}/rows.jsonl"],
      "this device has none (cpu)",
    ),
    (
      "kernel_sweep",
      ["--out={}/rows.jsonl"],
      "this device has none (cpu)",
    ),
    (
      "step_time",  # before it times what it can't write
      ["--config=configs/demo.py", "--config.data.path=no/such/file", "--out={}"],
      "Is a directory",
    ),
    (
      "step_time",
      ["--config=configs/demo.py", "--config.recipes=mxfp4,fp8", "--out={}/rows.jsonl"],
      "recipes=mxfp4,fp8 lack 'bf16'",
    ),
    (
      "gradient_error",  # before it trains for what it can't write
      ["--config=configs/demo.py", "--config.data.path=no/such/file", "--out={}"],
      "Is a directory",
    ),
    (
      "gradient_error",
      ["--config=configs/demo.py", "--under=bf61", "--out={}/rows.jsonl"],
      "bf61",
    ),
    (
      "step_memory",
      ["--config=configs/demo.py", "--config.data.path=no/such/file", "--out={}/rows.jsonl"],
      "no/such/file",
    ),
    (
      "recompute_table",
      ["--config=configs/demo.py", "--config.data.path=no/such/file", "--out={}/rows.jsonl"],
      "no/such/file",
    ),
    (
      "recompute_table",
      ["--config=configs/demo.py", "--policies=all", "--out={}/rows.jsonl"],
      "'all' is not one of none, attention+norm, attention+norm+experts, everything",
    ),
  ],
)
def test_commands_refuse_what_they_cannot_do_and_keep_what_was_there(
  tmp_path, module, arguments, message
):
  (tmp_path / "rows.jsonl").write_text('{"of": "before"}\n')
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{module}", *(a.format(tmp_path) for a in arguments)],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith("error: ") and message in done.stderr, done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
  assert (tmp_path / "rows.jsonl").read_text() == '{"of": "before"}\n'


def test_a_benchmark_without_torch_says_which_parts_want_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"elementwise and matmul: .* torch, which is not installed"):
    kernel_peers.require_torch(["elementwise", "matmul"])
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  kernel_peers.require_torch(["matmul"])


def test_help_lists_every_setting():
  line = [sys.executable, "-m", "experiments.run", "--help"]
  out = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
  assert all(f"--config.{path}=" in out for path in field_paths(configs.Experiment))
  assert "experiments/config.py" in out and "fp4jax.models.ModelConfig" in out
  assert "--config.recipes=bf16,fp8,mxfp4" in out and "--config.model.num_layers=2\n" in out
