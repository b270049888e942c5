"""Runs that end in another recipe: when it begins, and that a resume changes nothing."""

import dataclasses
import io
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stateful import Clipped, with_state

from experiments import checks, data, logs
from experiments import config as configs
from experiments.checkpoints import Checkpoints
from experiments.loop import train_run
from experiments.session import Interrupted
from experiments.train import make_trainer, policy_of, schedule_of
from experiments.workdir import WorkDir
from fp4jax import recipes
from fp4jax.models import ModelConfig

STEPS, SWITCH = 8, 5
# Evaluation draws, too: what it draws shows in the losses. Two operands have state; the last steps
# have one of them.
MXFP4_SR = with_state(recipes.MXFP4, Clipped, "fprop.rhs", "dgrad.rhs").replace(
  {"fprop.lhs.rounding": "stochastic", "name": "mxfp4_sr"}
)


@pytest.fixture(scope="module", autouse=True)
def listed():
  recipes.RECIPES["mxfp4_sr"] = MXFP4_SR
  yield
  del recipes.RECIPES["mxfp4_sr"]


def experiment(**changes) -> configs.Experiment:
  config = configs.Experiment(
    recipes=configs.Names(("mxfp4_sr",)),
    steps=STEPS,
    final_recipe="bf16",
    final_share=3 / 8,
    final_gemms=configs.Names(("fprop",)),
    eval_every=1,
    eval_batches=2,
    probe_every=1,
    checkpoint_every=1,
    **changes,
  )
  config.data.sequence_length, config.data.batch_size = 16, 2
  config.model = ModelConfig(
    num_layers=1, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=0, d_ff=32
  )
  config.quantize.attention = False  # fewer programs
  config.optimizer.warmup_steps = 2
  checks.validate(config)
  return config


def test_the_recipes_of_a_run():
  config = experiment()
  (start, first), (switch, last) = config.recipes_of("mxfp4_sr")
  assert (start, switch) == (0, SWITCH) and first is MXFP4_SR
  assert last.name == "mxfp4_sr[fprop=bf16]"
  assert last.fprop == recipes.BF16.fprop
  assert (last.dgrad, last.wgrad) == (first.dgrad, first.wgrad)
  assert config.recipes_of("bf16") == ((0, recipes.BF16),)  # what gaps are relative to
  config.final_gemms = configs.ALL_GEMMS
  assert config.recipes_of("mxfp4")[1] == (SWITCH, recipes.BF16)
  config.final_recipe = "mxfp4"
  assert config.recipes_of("mxfp4") == ((0, recipes.MXFP4),)
  config.steps, config.final_share = 1000, 0.18
  assert [step for step, _ in config.recipes_of("fp8")] == [0, 820]
  config.final_recipe = None
  assert config.recipes_of("fp8") == ((0, recipes.FP8),)


def test_what_is_kept_follows_the_gemm_that_reads_it():
  config = experiment()
  config.final_gemms = configs.Names(("fprop", "wgrad"))
  last = config.recipes_of("hopper_fp4")[1][1]
  assert last.residual == recipes.BF16.residual and last.wgrad == recipes.BF16.wgrad
  assert last.dgrad == recipes.HOPPER_FP4.dgrad
  config.final_recipe = "hopper_fp4"
  last = config.recipes_of("mxfp4")[1][1]
  assert last.residual == recipes.HOPPER_FP4.residual and last.dgrad == recipes.MXFP4.dgrad


def test_a_redefined_final_recipe_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(recipes.RECIPES, "mine", recipes.FP8.replace({"name": "mine"}))
  config = experiment()
  config.final_recipe = "mine"
  WorkDir(tmp_path, config).begin({})
  WorkDir(tmp_path, config)
  monkeypatch.setitem(recipes.RECIPES, "mine", recipes.MXFP4.replace({"name": "mine"}))
  with pytest.raises(ValueError, match=r"defined differently(?s:.)*recipes\.mine\.fprop"):
    WorkDir(tmp_path, config)


class Runner:
  """Trains the run of `config` in a folder, and stops after the steps it is told."""

  def __init__(self, config):
    self.config, self.corpus = config, data.load_corpus(config.data)
    self.phases = [
      (step, make_trainer(config, self.corpus.vocab_size, policy))
      for step, policy in schedule_of(config, config.recipes[0])
    ]

  def run(self, path, stops=()):
    this, stops = WorkDir(path, self.config).runs[0], list(stops)
    for _ in range(len(stops) + 1):
      polls = [0]  # of `asked_to_stop`: before the run, then after each step

      def asked(polls=polls):
        polls[0] += 1
        return signal.SIGINT if stops and polls[0] == stops[0] + 1 else None

      try:
        progress = logs.Progress(STEPS, 1, io.StringIO())
        train_run(this, self.config, self.corpus, self.phases, [0.5, None], progress, asked)
      except Interrupted:
        stops.pop(0)
    assert not stops
    rows = {name: (this.folder / f"{name}.jsonl").read_bytes() for name in ("metrics", "probes")}
    saved = Checkpoints(this.folder / "checkpoints", 2)
    return rows, saved.restore_latest(jax.eval_shape(self.phases[1][1].init, jnp.int32(0)))[1]


@pytest.fixture(scope="module")
def runner():
  return Runner(experiment())


@pytest.fixture(scope="module")
def straight(runner, tmp_path_factory):
  return runner.run(tmp_path_factory.mktemp("straight"))


@pytest.mark.slow
def test_the_flops_of_a_step_are_those_of_its_phase(runner, tmp_path):
  """0.5 s of GEMMs in the first phase, not known of the second."""
  runner.run(tmp_path)
  rows = logs.read_rows(next(tmp_path.glob("runs/*/timing.jsonl")))
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  for row in rows:
    seconds = row["step_time_ms"] / 1e3
    expected = pytest.approx(0.5 / seconds) if row["step"] <= SWITCH else None
    assert row["flops_utilization"] == expected


@pytest.mark.slow
def test_the_state_is_that_of_steps_under_one_policy_and_then_the_other(runner, straight):
  """Oracle: the steps by hand, under policies made here."""
  config, seed = runner.config, jnp.int32(0)
  last = MXFP4_SR.replace({"fprop": recipes.BF16.fprop, "name": "by hand"})
  first, last = (
    make_trainer(config, runner.corpus.vocab_size, policy_of(recipe, config))
    for recipe in (MXFP4_SR, last)
  )
  batches = data.batches(runner.corpus, config.data, 0, "train")
  validation = data.batches(runner.corpus, config.data, 0, "validation")

  def loss(trainer, state):
    batches = [trainer.evaluate(state, validation[i], seed, i) for i in range(2)]
    return float(np.mean(batches))

  state = first.init(seed)
  losses = [loss(first, state)]
  for step in range(STEPS):
    state, _ = (first if step < SWITCH else last).step(state, batches[step], seed)
    if step + 1 == SWITCH:
      of_blocks = state.quantizers["0:1"]
      assert {tuple(roles) for roles in of_blocks.values()} == {("dgrad.rhs", "fprop.rhs")}
      kept = {gemm: {"dgrad.rhs": roles["dgrad.rhs"]} for gemm, roles in of_blocks.items()}
      state = dataclasses.replace(state, quantizers={"0:1": kept})
    losses.append(loss(first if step + 1 < SWITCH else last, state))
  rows, saved = straight
  jax.tree.map(np.testing.assert_array_equal, saved, state)
  metrics = map(json.loads, rows["metrics"].splitlines())
  found = [row["loss"] for row in metrics if row["split"] == "validation"]
  assert found == losses


@pytest.mark.slow
def test_probes_say_which_recipe_ran(straight):
  rows = list(map(json.loads, straight[0]["probes"].splitlines()))
  ran = {step: {r["ran"] for r in rows if r["step"] == step} for step in range(STEPS + 1)}
  final = "mxfp4_sr[fprop=bf16]"
  assert ran == {s: {"mxfp4_sr" if s < SWITCH else final} for s in range(STEPS + 1)}
  assert {r["recipe"] for r in rows} == {"mxfp4_sr"}  # the run's
  forward = {r["step"] for r in rows if r["gemm"] == "fprop"}
  assert forward == set(range(SWITCH))


@pytest.mark.slow
def test_a_run_stopped_in_both_phases_and_between_equals_one_that_never_was(
  runner, straight, tmp_path
):
  rows, state = runner.run(tmp_path, stops=(2, SWITCH - 2, 1))
  assert rows == straight[0]
  jax.tree.map(np.testing.assert_array_equal, state, straight[1])


@pytest.mark.slow
def test_each_phase_is_compiled_once(runner, straight):
  for _, trainer in runner.phases:
    assert trainer.step._cache_size() == trainer.probe._cache_size() == 1
