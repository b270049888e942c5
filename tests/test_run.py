"""The real runner, in its own process where it has to be killed."""

import dataclasses
import importlib.util
import json
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import ROOT, assert_same_logs, finish, rows_of, small, wait_for_lines
from test_logs import events

from experiments import checks, data, logs, probes
from experiments import config as configs
from experiments.checkpoints import Checkpoints
from experiments.loop import train_run
from experiments.run import run
from experiments.session import Interrupted
from experiments.train import make_trainer, policy_of, saved_activation_bytes
from experiments.workdir import Run
from fp4jax import operands, recipes

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PRE_TRAINING = [path for path in CONFIGS if not path.name.startswith("rl_")]


def test_a_run_leaves_everything_that_it_promises(straight):
  names = {p.name for p in straight.iterdir() if not p.name.startswith(".")}
  written = {"config.json", "recipes.json", "environment.json", "summary.json", "report.html"}
  assert names == written | {"runs"}
  for recipe in ("bf16", "mxfp4_rht_sr"):
    mine = logs.read_rows(straight / "runs" / f"{recipe}-0" / "metrics.jsonl")
    assert {(r["recipe"], r["seed"]) for r in mine} == {(recipe, 0)}
    assert [r["step"] for r in mine if r["split"] == "train"] == list(range(1, 9))
    loads = {r["step"]: np.array(r["load"]) for r in mine if r["split"] == "routing"}
    assert set(loads) == {4, 8} and loads[8].shape == (1, 2)
    assert loads[8].sum() == pytest.approx(1, abs=2e-6)
    assert [r["step"] for r in mine if r["split"] == "validation"] == [0, 4, 8]
    assert list((straight / "runs" / f"{recipe}-0" / "checkpoints").iterdir())
    (board,) = (straight / "runs" / f"{recipe}-0" / "tensorboard").iterdir()
    tags = {value.tag for event in events(board) for value in event.summary.value}
    assert {"train/learning_rate", "routing/busiest_expert", "validation/loss"} <= tags
    assert ("probe/dgrad.lhs/sqnr_db" in tags) == (recipe != "bf16")
    assert {"timing/step_time_ms", "timing/tokens_per_s"} <= tags
  environment = json.loads((straight / "environment.json").read_text())
  for row in rows_of(straight, "timing"):
    seconds = environment["gemm_seconds_at_peak"][row["recipe"]]
    known = seconds is not None
    assert (row["flops_utilization"] is not None) == known
    assert not known or row["flops_utilization"] * row["step_time_ms"] / 1e3 == pytest.approx(
      seconds
    )
  assert environment["corpus"]["sha256"] and environment["versions"]["jax"]
  assert environment["saved_activation_bytes_per_token"]["bf16"] > 0
  found = {(r["module"], r["gemm"], r["operand"]) for r in rows_of(straight, "probes")}
  gemms = ("attention.qkv", "attention.out", "experts.w13", "experts.w2")
  assert found == {
    (m, g, o) for m in gemms for g in ("fprop", "dgrad", "wgrad") for o in ("lhs", "rhs")
  }


def test_recipes_begin_with_the_same_weights_and_see_the_same_batches(corpus_file):
  config = small(**{"data.path": corpus_file})
  corpus = data.load_corpus(config.data)
  states, losses = [], []
  for name in ("bf16", "mxfp4"):
    policy = policy_of(recipes.by_name(name), config)
    trainer = make_trainer(config, corpus.vocab_size, policy)
    state = trainer.init(jnp.int32(0))
    states.append(state.params)
    batch = data.batches(corpus, config.data, 0, "train")[0]
    losses.append(float(trainer.evaluate(state, batch, jnp.int32(0))))
  leaves = [list(map(np.asarray, _leaves(s))) for s in states]
  assert all((a == b).all() for a, b in zip(*leaves, strict=True))
  assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.1


def _leaves(tree):
  return [leaf for v in tree.values() for leaf in _leaves(v)] if isinstance(tree, dict) else [tree]


def test_kill_9_and_resume_equal_a_run_that_never_stopped_bit_for_bit(command, straight, tmp_path):
  # Killed once before the first checkpoint, once after one, once in the second recipe.
  for recipe, lines in (("bf16", 2), ("bf16", 7), ("mxfp4_rht_sr", 3)):
    process = command(tmp_path)
    wait_for_lines(tmp_path / f"runs/{recipe}-0/metrics.jsonl", lines, process)
    process.kill()
    process.communicate()
  finish(command(tmp_path))
  assert_same_logs(tmp_path, straight)
  timing = [rows_of(w, "timing") for w in (tmp_path, straight)]
  assert len(timing[0]) == len(timing[1])


def test_sigterm_saves_first(command, straight, tmp_path):
  process = command(tmp_path, "--config.checkpoint_every=1000")
  wait_for_lines(
    tmp_path / "runs/bf16-0/metrics.jsonl", 1, process
  )  # before the first step, which compiles
  process.send_signal(signal.SIGTERM)
  out = finish(process, code=128 + signal.SIGTERM)
  assert "\nstopping after this step\n" in out and "saved its state after step" in out
  steps = [int(p.name) for p in (tmp_path / "runs/bf16-0/checkpoints").iterdir()]
  assert len(steps) == 1 and 1 <= steps[0] < 8
  finish(command(tmp_path, "--config.checkpoint_every=1000"))
  assert_same_logs(tmp_path, straight)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_training_a_signal_ends_the_process_at_once(command, tmp_path, number):
  process = command(tmp_path / "run")
  status = Path(f"/proc/{process.pid}/status")
  while not int(status.read_text().split("SigBlk:")[1].split()[0], 16) >> (number - 1) & 1:
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(number)
  assert finish(process, code=128 + number) == "\nstopped\n"
  assert not (tmp_path / "run").exists()


def test_a_signal_between_two_runs_is_no_step_late(tmp_path):
  with pytest.raises(Interrupted, match="stopped before bf16-1") as caught:
    train_run(Run("bf16", 1, tmp_path), *[None] * 5, asked_to_stop=lambda: signal.SIGINT)
  assert caught.value.number == signal.SIGINT


@pytest.mark.slow
def test_without_checkpoints_a_stopped_run_begins_again(command, straight, tmp_path):
  arguments = ("--config.checkpoint_every=0",)
  process = command(tmp_path, *arguments)
  wait_for_lines(tmp_path / "runs/mxfp4_rht_sr-0/metrics.jsonl", 1, process)
  process.send_signal(signal.SIGINT)
  assert "without a checkpoint" in finish(process, code=128 + signal.SIGINT)
  assert (tmp_path / "runs/bf16-0/finished.json").exists()
  finish(command(tmp_path, *arguments))
  assert not list(tmp_path.rglob("checkpoints"))
  assert_same_logs(tmp_path, straight)
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["recipes"]["mxfp4_rht_sr"]["gap"]["seeds"] == 1
  assert "2 of 2 runs finished" in (tmp_path / "report.html").read_text()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(command, straight, tmp_path):
  process = command(tmp_path, "--config.recipes=bf16")
  found = lambda: sorted((tmp_path / "runs/bf16-0/checkpoints").glob("*[0-9]"))  # noqa: E731
  while len(found()) < 2:
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)
  process.kill()
  process.communicate()
  newest = found()[-1]
  victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  victim.write_bytes(victim.read_bytes()[:-1])
  out = finish(command(tmp_path, "--config.recipes=bf16"))
  assert "damaged" in out and str(int(newest.name)) in out
  log = "runs/bf16-0/metrics.jsonl"
  assert (tmp_path / log).read_bytes() == (straight / log).read_bytes()


# Weights of 1e30 after one step: their squares leave float32.
DIVERGING = {"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0}


@pytest.mark.slow
def test_without_probes_a_diverged_run_says_only_when(tmp_path, corpus_file):
  changes = {"data.path": corpus_file, "probe_every": 0, "checkpoint_every": 0}
  run(small(**DIVERGING | changes, recipes=configs.Names(["mxfp4"])), tmp_path)
  event = rows_of(tmp_path, "metrics")[-1]
  assert event["event"] == "diverged" and event["step"] > 0 and event["probe"] is None
  assert not rows_of(tmp_path, "probes")


@pytest.mark.slow
def test_a_diverged_recipe_ends_alone_and_names_the_first_probe(tmp_path, corpus_file):
  changes = DIVERGING | {"data.path": corpus_file}
  config = small(**changes, recipes=configs.Names(["bf16", "mxfp4"]))
  run(config, tmp_path)
  rows = rows_of(tmp_path, "metrics")
  events = [r for r in rows if r["split"] == "event"]
  assert [e["recipe"] for e in events] == ["bf16", "mxfp4"]  # the second went on
  assert events[0]["probe"] is None and events[1]["probe"]["module"].startswith("attention")
  assert all(np.isfinite(r["loss"]) for r in rows if r["split"] == "train")
  for event in events:  # the checkpoint is of the weights that diverged, before any NaN
    policy = policy_of(recipes.by_name(event["recipe"]), config)
    abstract = jax.eval_shape(make_trainer(config, 256, policy).init, jnp.int32(0))
    folder = tmp_path / "runs" / f"{event['recipe']}-0" / "checkpoints"
    step, state, _ = Checkpoints(folder, keep=2).restore_latest(abstract)
    assert step == event["step"] > 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert "diverged" in json.dumps(summary)
  assert "diverged" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.model.num_layer=6", "did you mean --config.model.num_layers"),
    ("--config.warmup=1", "did you mean --config.optimizer.warmup_steps?"),
    ("--config.lr=1", "did you mean --config.optimizer.learning_rate?"),
    ("--config.zzzz=1", "there is no --config.zzzz; --help and experiments/config.py list"),
    ("mxfp4,", "unexpected argument 'mxfp4,'"),
    ("--config.recipes=bf16,mxfp44", "unknown recipe 'mxfp44'"),
    ("--config.data.path=no/such/file", "no/such/file"),
    ("--config.steps=x", "steps"),
    ("--config.model.num_layers=0", "model.num_layers=0 is not at least 1"),
    ("--config.implementation=cuda", "implementation='cuda' is not one of ('xla', 'mosaic')"),
    pytest.param(
      "--config.implementation=mosaic",
      "this device has none (cpu)",  # and not that probes need "xla"
      marks=pytest.mark.skipif(jax.default_backend() != "cpu", reason="for a CPU"),
    ),
  ],
)
def test_bad_settings_are_one_clear_error_and_touch_nothing(command, tmp_path, argument, message):
  out = finish(command(tmp_path / "run", argument), code=1)
  assert message in out and "Traceback" not in out
  assert len([line for line in out.splitlines() if "error" in line]) == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", PRE_TRAINING, ids=lambda p: p.stem)
def test_every_config_takes_one_step(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  checks.validate(config)
  if config.implementation == "mosaic":  # made for a GPU: its model cut to what a CPU can do
    config.implementation = "xla"
    cut = dict(num_layers=1, d_model=32, head_dim=16, num_experts=4, top_k=2, d_ff=32)
    config.model = dataclasses.replace(config.model, **cut)
    config.data.sequence_length = 32
  assert all(word in module.__doc__ for word in ("Claim:", "Command:", "Cost:", "Expected:"))
  corpus = data.load_corpus(config.data)
  recipe = recipes.by_name(config.recipes[-1])
  policy = policy_of(recipe, config)
  trainer = make_trainer(config, corpus.vocab_size, policy)
  batch = data.batches(corpus, config.data, 0, "train")[0]
  state, scalars = trainer.step(trainer.init(jnp.int32(0)), batch, jnp.int32(0))
  assert int(state.step) == 1 and np.isfinite(float(scalars["loss"]))


@pytest.mark.slow
def test_probe_reads_the_tensors_of_training_and_changes_nothing(corpus_file):
  config = small(**{"data.path": corpus_file})
  corpus = data.load_corpus(config.data)
  policy = policy_of(recipes.HOPPER_FP4, config)
  trainer = make_trainer(config, corpus.vocab_size, policy)
  batch = data.batches(corpus, config.data, 0, "train")[0]
  state = trainer.init(jnp.int32(0))
  rows = probes.probe_rows(trainer.probe(state, batch, jnp.int32(0)), policy, 1)
  roles = list(operands.quantized_roles(recipes.HOPPER_FP4))
  assert {f"{r['gemm']}.{r['operand']}" for r in rows} == set(roles)
  kept = [r for r in rows if r["gemm"] == "residual"]
  assert {(r["format"], r["scale_rule"]) for r in kept} == {("MXFP4", "floor")}
  read = {f"{r['gemm']}.{r['operand']}" for r in rows if r["source"] == "residual"}
  assert read == {"fprop.lhs", "wgrad.lhs"}
  assert all(r["sqnr_db"] > 10 for r in kept)
  order = [r["gemm"] for r in rows]
  assert order.index("dgrad") > max(i for i, g in enumerate(order) if g == "fprop")


def test_saved_bytes_of_activations_count_no_weights(corpus_file):
  config = small(**{"data.path": corpus_file, "model.dtype": "bfloat16"})

  def cost(name, batch=8, **model):
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    policy = policy_of(recipes.by_name(name), config)
    return saved_activation_bytes(make_trainer(changed, 256, policy), batch, 128)

  bf16 = cost("bf16", num_experts=0)
  assert cost("mxfp4", num_experts=0) == bf16  # it quantizes for each GEMM from the original
  # HOPPER_FP4 keeps the inputs of qkv, out, w13 and w2 in MXFP4: 32 values each, 2 bytes become
  # 4.25 bits.
  saved = 4 * 32 * (2 - 4.25 / 8)
  assert bf16 - cost("hopper_fp4", num_experts=0) == pytest.approx(saved, abs=0.01)
  # Weights, and the tables of the layout, are the same whatever the batch.
  assert cost("bf16", batch=32) == pytest.approx(cost("bf16"), rel=0.01)
