"""Reinforcement learning as a command: what it leaves, how it goes on, what it refuses."""

import dataclasses
import importlib.util
import signal
import subprocess
import sys

import pytest
from rl_cases import small_rl
from small_runs import ROOT, finish, rows_of, wait_for_lines

from experiments import logs
from experiments.comparison import Names
from experiments.rl.checks import validate
from experiments.rl.run import Setting, run
from experiments.rl.start import start_params
from experiments.tasks import TaskSettings
from fp4jax.models import ModelConfig

TINY = {
  "seeds": 1,
  "steps": 4,
  "eval_every": 2,
  "probe_every": 2,
  "checkpoint_every": 1,
  "start.teaching.steps": 3,
  "start.teaching.warmup_steps": 1,
  "start.teaching.batch_size": 4,
  "task.held_out": 4,
  "rollout.prompts": 2,
  "rollout.group": 2,
  "rollout.max_new_tokens": 3,
  "model.num_layers": 1,
  "model.d_model": 32,
  "model.num_heads": 2,
  "model.num_kv_heads": 1,
  "model.head_dim": 16,
  "model.num_experts": 2,
  "model.top_k": 1,
  "model.d_ff": 32,
  "arms": "bf16,mxfp4@rollout",
}


def command(workdir, *arguments):
  overrides = [f"--config.{name}={value}" for name, value in TINY.items()]
  line = [sys.executable, "-m", "experiments.rl", "--config=configs/rl_demo.py"]
  return subprocess.Popen(
    [*line, f"--workdir={workdir}", *overrides, *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def same_logs(one, other):
  for log in ("metrics", "probes", "samples"):
    paths = sorted(other.glob(f"runs/*/{log}.jsonl"))
    assert len(paths) == 2
    for path in paths:
      assert (one / path.relative_to(other)).read_bytes() == path.read_bytes(), path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that was never stopped."""
  workdir = tmp_path_factory.mktemp("rl")
  finish(command(workdir))
  return workdir


@pytest.mark.slow
def test_a_run_leaves_everything_that_it_promises(whole):
  metrics = rows_of(whole, "metrics")
  for arm in ("bf16", "mxfp4@rollout"):
    own = [row for row in metrics if row["recipe"] == arm]
    steps = {split: [r["step"] for r in own if r["split"] == split] for split in ("train", "gap")}
    assert steps == {"train": [1, 2, 3, 4], "gap": [0, 2]}
    assert [r["step"] for r in own if r["split"] == "held_out"] == [0, 2, 4]
  last = [row for row in metrics if row["split"] == "train"][-1]
  assert {"reward", "entropy", "length", "grad_norm", "ppo_kl", "pg_clipfrac"} <= last.keys()
  assert {"learning_rate", "noise", "groups/mixed", "sampler_is/weight_min"} <= last.keys()
  probes = rows_of(whole, "probes")
  assert {(r["recipe"], r["path"]) for r in probes} == {("mxfp4@rollout", "rollout")}
  assert len(rows_of(whole, "samples")) == 2 * 3 * 4
  assert {"rollout_ms", "update_ms", "step_time_ms"} <= rows_of(whole, "timing")[0].keys()
  assert (whole / "policy").is_dir()
  definitions = logs.read_json(whole / "recipes.json")
  assert definitions["mxfp4@rollout"]["trainer"] == definitions["bf16"]["trainer"]
  assert logs.read_json(whole / "environment.json")["parameters"] > 0
  own = logs.read_json(whole / "summary.json")["recipes"]["mxfp4@rollout"]
  assert own["seeds_finished"] == 1 and own["gap"]["verdict"] == "too few seeds"
  assert "mxfp4@rollout" in (whole / "report.html").read_text()


@pytest.mark.slow
def test_killed_and_stopped_it_goes_on_bit_for_bit(whole, tmp_path):
  process = command(tmp_path)
  wait_for_lines(tmp_path / "runs/bf16-0/metrics.jsonl", 6, process)
  process.kill()
  process.communicate()
  process = command(tmp_path)
  wait_for_lines(tmp_path / "runs/mxfp4@rollout-0/metrics.jsonl", 2, process)
  process.send_signal(signal.SIGTERM)
  out = finish(process, code=128 + signal.SIGTERM)
  assert "saved its state after step" in out
  assert "teaching" not in out  # the policy was taught once
  finish(command(tmp_path))
  same_logs(tmp_path, whole)


@pytest.mark.slow
def test_another_experiment_is_refused_in_one_line(whole):
  out = finish(command(whole, "--config.rollout.group=4"), code=1)
  assert "config.rollout.group: 2 there, 4 here" in out and "Traceback" not in out


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"arms": Names(("mxfp5",))}, "no base 'mxfp5'"),
    ({"rollout.group": 1}, "rollout.group=1 is not at least 2"),
    ({"grpo.minibatches": 5}, "12 answers do not divide into grpo.minibatches=5"),
    ({"grpo.overlong_buffer": 6}, "overlong_buffer=6 is more than rollout.max_new_tokens=5"),
    ({"start.teaching.steps": 5}, "warmup_steps=20 is not below start.teaching.steps=5"),
    ({"noise.stages": 1}, "noise.stages=1 is not at least 2"),
    ({"noise.start": 0.0}, "noise.start=0.0 is not above 0"),
    ({"noise.end": -1e-3}, "noise.end=-0.001 is not above 0"),
    ({"noise.start": float("nan")}, "noise.start=nan"),
    ({"grpo.mean": "tokens"}, "grpo.mean='tokens' is not one of sequence, token"),
    ({"grpo.clip_low": 1.2}, "grpo.clip_low=1.2 is not above 0 and below 1"),
    ({"grpo.beta": -1.0}, "grpo.beta=-1.0 is not at least 0"),
    ({"grpo.beta": float("nan")}, "grpo.beta=nan"),
    ({"grpo.importance_cap": 0.0}, "grpo.importance_cap=0.0 is not None or above 0"),
    ({"grpo.importance_cap": float("inf")}, "grpo.importance_cap=inf"),
    ({"grpo.minibatches": 0}, "grpo.minibatches=0 is not at least 1"),
    ({"grpo.overlong_buffer": -1}, "grpo.overlong_buffer=-1 is not at least 0"),
    ({"start.seed": -1}, "start.seed=-1 is not at least 0"),
    ({"optimizer.name": "adam"}, "optimizer.name='adam' is not one of adamw"),
    ({"optimizer.warmup_steps": 8, "grpo.iterations": 2}, "grpo.minibatches=8; add"),
    ({"steps": 0}, "steps=0"),
    ({"task.held_out": 0}, "task.held_out=0"),
    ({"fallback_alpha": float("nan")}, "fallback_alpha=nan is not above 0"),
    ({"fallback_alpha": float("inf")}, "fallback_alpha=inf is not above 0"),
  ],
)
def test_settings_that_no_run_can_have(change, words):
  config = small_rl(**change)
  with pytest.raises(ValueError, match=words):
    validate(config, config.model)


def test_replay_needs_experts():
  config = small_rl(**{"rollout.replay_routing": True})
  with pytest.raises(ValueError, match="replay_routing=true of a policy without experts"):
    validate(config, ModelConfig(num_experts=0))


def test_what_can_not_be_read_is_refused_before_anything_is_written(tmp_path):
  config = small_rl(**{"start.pretrained": "gpt-5"})
  with pytest.raises(ValueError, match="'gpt-5' is not 'smollm2', nor a folder"):
    run(config, tmp_path / "run")
  config = small_rl(task=TaskSettings("rl_cases:letter"))
  with pytest.raises(ValueError, match="has no attribute 'letter'"):
    run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"rollout.packed": True, "arms": Names(("bf16", "mxfp4.deadzone"))}, "pack"),
    ({"quantize.scores": True, "arms": Names(("nvfp4",))}, "scores"),
    ({"task.pattern": "("}, r"task.pattern='\('"),
    (
      {"rollout.max_prompt_tokens": 3},
      "rollout.max_prompt_tokens=3: the prompt of '.* has [4-9]$",
    ),
  ],
)
def test_what_only_a_step_would_refuse_is_refused_before_anything_is_written(
  change, words, tmp_path
):
  with pytest.raises((ValueError, TypeError), match=words):
    run(small_rl(**change), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_teaching_that_diverges_is_an_error_and_keeps_no_policy(tmp_path):
  teaching = {"steps": 3, "warmup_steps": 0, "learning_rate": 1e30, "batch_size": 4}
  config = small_rl(**{f"start.teaching.{name}": value for name, value in teaching.items()})
  setting = Setting.of(config)
  with pytest.raises(ValueError, match="teaching diverged at step"):
    start_params(tmp_path, config, setting.source, setting.problems, lambda *_: None)
  assert not list(tmp_path.glob("*00*"))


CONFIGS = sorted((ROOT / "configs").glob("rl_*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_one_that_runs(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  if config.start.pretrained is None:
    validate(config, config.model)
  else:
    validate(config, dataclasses.replace(config.model, num_experts=0))
  assert all(word in module.__doc__ for word in ("Claim:", "Command:", "Cost:", "Expected:"))
