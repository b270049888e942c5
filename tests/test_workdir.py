"""What belongs to a workdir: what it refuses, and how it grows."""

import copy
import dataclasses
import importlib
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from small_runs import assert_same_logs, finish, small
from stateful import Clipped, Shaped, with_state

from experiments import config as configs
from experiments import summary
from experiments.comparison import from_dict
from experiments.rl.config import RLExperiment
from experiments.run import run
from experiments.workdir import WorkDir, read_config
from fp4jax import formats, recipes


def begin(path, config):
  WorkDir(path, config).begin({})


def test_a_workdir_with_another_config_is_refused_and_kept(straight, corpus_file):
  before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}
  config = small(**{"data.path": corpus_file, "recipes": configs.Names(["bf16", "mxfp4_rht_sr"])})
  config.model.num_layers = 6
  with pytest.raises(ValueError, match=r"config\.model\.num_layers: 1 there, 6 here"):
    run(config, straight)
  for where, name, value in (("model", "head_dim", 15), ("data", "path", "no/such/file")):
    wrong = copy.deepcopy(config)
    setattr(getattr(wrong, where), name, value)
    with pytest.raises((ValueError, OSError), match=f"{name}={value!r}"):  # what to mend first
      run(wrong, straight)
  assert before == {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}


def test_a_run_killed_between_its_last_checkpoint_and_its_end(straight, corpus_file, tmp_path):
  shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
  finished = tmp_path / "runs" / "bf16-0" / "finished.json"
  before = finished.read_text()
  finished.unlink()
  recipes_of = configs.Names(["bf16", "mxfp4_rht_sr"])
  run(small(**{"data.path": corpus_file, "recipes": recipes_of}), tmp_path)
  assert finished.read_text() == before
  assert_same_logs(tmp_path, straight)


def test_a_finished_run_without_its_rows_is_refused(straight, corpus_file, tmp_path):
  shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
  (tmp_path / "runs/bf16-0/metrics.jsonl").unlink()
  recipes_of = configs.Names(["bf16", "mxfp4_rht_sr"])
  with pytest.raises(
    ValueError, match=r"bf16-0 is finished, but its metrics.jsonl is gone: remove"
  ):
    run(small(**{"data.path": corpus_file, "recipes": recipes_of}), tmp_path)


@pytest.mark.slow
def test_another_corpus_is_refused(tmp_path, command, corpus_file):
  text = tmp_path / "text.txt"
  text.write_bytes(Path(corpus_file).read_bytes())
  workdir = tmp_path / "run"
  arguments = (f"--config.data.path={text}", "--config.recipes=bf16", "--config.steps=3")
  finish(command(workdir, *arguments))
  text.write_bytes(text.read_bytes() + b"one more line\n")
  assert "began with the corpus" in finish(command(workdir, *arguments), code=1)


RCEIL = dataclasses.replace(formats.MXFP4, scale_rule="rceil")
MINE = recipes.MXFP4.replace({"name": "mine"})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"fprop.lhs.format": RCEIL}, "fprop.lhs.format.scale_rule: 'floor' there, 'rceil' here"),
    ({"dgrad.rhs.format": jnp.float32}, "dgrad.rhs.format: {.*'floor'.*} there, 'float32' here"),
    ({"dgrad.lhs.rounding": "stochastic"}, "dgrad.lhs.rounding: 'nearest' there, 'stochastic'"),
    (
      {f"wgrad.{o}.transform": recipes.MXFP4_RHT_SR.wgrad.lhs.transform for o in ("lhs", "rhs")},
      "wgrad.rhs.transform: None there, {'type': 'Hadamard', 'block': 32, 'seed': 0} here",
    ),
    (
      {"residual.lhs": formats.MXFP4, "wgrad.lhs.source": "residual"},
      "wgrad.lhs.source: 'original' there, 'residual' here",
    ),
  ],
)
def test_a_redefined_recipe_is_refused(tmp_path, monkeypatch, changes, message):
  config = small(recipes=configs.Names(["bf16", "mine"]))
  monkeypatch.setitem(recipes.RECIPES, "mine", MINE)
  begin(tmp_path, config)
  monkeypatch.setitem(recipes.RECIPES, "mine", dataclasses.replace(MINE, citation="better words"))
  WorkDir(tmp_path, config)
  monkeypatch.setitem(recipes.RECIPES, "mine", MINE.replace(changes))
  with pytest.raises(ValueError, match=rf"(?s)defined differently.*\n  recipes\.mine\.{message}"):
    WorkDir(tmp_path, config)


def test_a_quantizer_of_another_type_is_refused_though_its_fields_are_the_same(
  tmp_path, monkeypatch
):
  config = small(recipes=configs.Names(["bf16", "mine"]))
  for quantizer in (Clipped, Shaped):
    monkeypatch.setitem(recipes.RECIPES, "mine", with_state(MINE, quantizer, "fprop.rhs"))
    if quantizer is Clipped:
      begin(tmp_path, config)
  with pytest.raises(ValueError, match=r"fprop\.rhs\.type: 'Clipped' there, 'Shaped' here"):
    WorkDir(tmp_path, config)
  recorded = (tmp_path / "recipes.json").read_text()
  (tmp_path / "recipes.json").write_text(recorded.replace('"type": "Clipped",', ""))  # an older one
  WorkDir(tmp_path, config)


def test_a_workdir_of_before_recipes_were_recorded_is_opened_with_a_warning(tmp_path, caplog):
  config = small()
  begin(tmp_path, config)
  assert not caplog.text
  recorded = (tmp_path / "recipes.json").read_text()
  (tmp_path / "recipes.json").unlink()
  (tmp_path / "environment.json").unlink()
  begin(tmp_path, config)
  assert "does not tell how its recipes were defined" in caplog.text
  assert (tmp_path / "recipes.json").read_text() == recorded


def growing(corpus_file, **changes):
  settings = {"data.path": corpus_file, "optimizer.final_fraction": 1.0} | changes
  return small(**settings)


@pytest.mark.slow
def test_a_workdir_grows_into_the_one_that_was_asked_for_at_once(corpus_file, tmp_path):
  both, one = configs.Names(["bf16", "mxfp4_rht_sr"]), configs.Names(["bf16"])
  dense = {"model.num_experts": 0}
  straight, grown = tmp_path / "straight", tmp_path / "grown"
  run(growing(corpus_file, recipes=both, seeds=2, **dense), straight)
  run(growing(corpus_file, recipes=one, steps=4, **dense), grown)
  run(growing(corpus_file, recipes=both, seeds=2, **dense), grown)
  assert_same_logs(grown, straight)
  for name in ("config", "recipes"):
    assert (grown / f"{name}.json").read_bytes() == (straight / f"{name}.json").read_bytes()
  # A part of what is there trains nothing and forgets nothing.
  before = {p: p.read_bytes() for p in (*grown.rglob("*.jsonl"), grown / "config.json")}
  run(growing(corpus_file, recipes=one, **dense), grown)
  assert before == {p: p.read_bytes() for p in before}

  shutil.rmtree(grown / "runs/bf16-0/checkpoints")
  with pytest.raises(ValueError, match="bf16-0 has no checkpoint of its last step, 8"):
    run(growing(corpus_file, recipes=one, steps=10, **dense), grown)


def test_each_arm_has_the_seeds_that_were_asked_of_it(tmp_path):
  def grow(seeds, *arms):
    begin(tmp_path, small(recipes=configs.Names(arms), seeds=seeds))
    return {name: arm.seeds for name, arm in summary.read_records(tmp_path).arms.items()}

  grow(2, "bf16", "mxfp4")
  asked = json.loads((tmp_path / "config.json").read_text())
  del asked["seeds_by_arm"]  # as an earlier version left it
  (tmp_path / "config.json").write_text(json.dumps(asked))
  assert grow(3, "bf16") == {"bf16": 3, "mxfp4": 2}
  assert grow(1, "bf16", "fp8") == {"bf16": 3, "mxfp4": 2, "fp8": 1}
  assert json.loads((tmp_path / "config.json").read_text())["seeds"] == 3


@pytest.mark.parametrize("name", sorted(path.stem for path in Path("configs").glob("*.py")))
def test_a_workdir_tells_the_config_that_it_began_with(name, tmp_path):
  config = importlib.import_module(f"configs.{name}").get_config()
  begin(tmp_path, config)
  found = read_config(tmp_path, type(config))
  assert found.to_dict() == config.to_dict()
  assert type(found.arm_names()) is configs.Names


def test_a_workdir_tells_what_it_has_grown_to(tmp_path):
  begin(tmp_path, small(recipes=configs.Names(["bf16"]), seeds=2))
  begin(tmp_path, small(recipes=configs.Names(["fp8"]), seeds=1, **{"mesh.fsdp": 2}))
  found = read_config(tmp_path, configs.Experiment)
  assert found == small(recipes=configs.Names(["bf16", "fp8"]), seeds=2)
  with pytest.raises(TypeError, match="'recipes'"):
    read_config(tmp_path, RLExperiment)
  with pytest.raises(FileNotFoundError, match="holds no config"):
    read_config(tmp_path / "none", configs.Experiment)


def test_what_a_config_lacks_has_the_default_of_its_experiment():
  partial = from_dict(RLExperiment, {"optimizer": {"warmup_steps": 3}})
  assert partial.optimizer == dataclasses.replace(RLExperiment().optimizer, warmup_steps=3)


@pytest.mark.parametrize(
  ("changes", "steps", "message"),
  [
    ({}, 7, "has runs of steps=8, which steps=7 can't shorten"),
    ({"optimizer.final_fraction": 0.5}, 9, "final_fraction=0.5 ends the fall of the learning rate"),
    ({"final_recipe": "bf16", "final_share": 0.5}, 9, "final_recipe=bf16 has trained the last"),
    ({"checkpoint_every": 0}, 9, "checkpoint_every=0 keeps no state"),
    (
      {"optimizer.name": "stable_spam", "optimizer.stable_spam.final_scale": 0.5},
      9,
      "final_scale=0.5 ends a cosine",
    ),
  ],
)
def test_steps_that_would_not_follow_are_refused(tmp_path, corpus_file, changes, steps, message):
  begin(tmp_path, growing(corpus_file, **changes))
  WorkDir(tmp_path, growing(corpus_file, **changes))
  with pytest.raises(ValueError, match=re.escape(message)):
    WorkDir(tmp_path, growing(corpus_file, **changes | {"steps": steps}))


def test_a_second_process_leaves_what_the_first_trains(tmp_path, command, corpus_file):
  config = small(**{"data.path": corpus_file, "recipes": configs.Names(["bf16", "mxfp4_rht_sr"])})
  begin(tmp_path, config)
  folder = WorkDir(tmp_path, config)
  with folder.claimed(folder.runs[0]), folder.claimed(folder.runs[1]):
    out = finish(command(tmp_path), code=1)
  both = "bf16-0, mxfp4_rht_sr-0"
  assert out.endswith(f"error: another process trains {both} in {tmp_path}; wait until it ends\n")
  assert not list(tmp_path.glob("runs/*/*.jsonl"))


def test_a_claim_is_given_back_also_after_a_failure(tmp_path):
  folder = WorkDir(tmp_path, small())
  kept = []  # a lock that is collected is given back anyway
  with pytest.raises(OSError, match="full"), folder.claimed(folder.runs[0]) as mine:
    kept.append(mine)
    with folder.claimed(folder.runs[0]) as again:
      kept.append(again)
    raise OSError("full")
  assert kept == [True, False]
  with folder.claimed(folder.runs[0]) as mine:
    assert mine


def test_a_workdir_of_the_earlier_layout_is_told_from_a_new_one(tmp_path):
  begin(tmp_path, small())
  (tmp_path / "metrics.jsonl").write_text("")
  with pytest.raises(ValueError, match=r"one metrics\.jsonl for all runs"):
    WorkDir(tmp_path, small())


@pytest.mark.parametrize("name", ["config", "recipes", "environment"])
def test_a_damaged_file_is_named(tmp_path, name):
  begin(tmp_path, small())
  path = tmp_path / f"{name}.json"
  path.write_text(path.read_text()[:-3])
  with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")):
    WorkDir(tmp_path, small())


def test_a_file_is_no_workdir(tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match="is a file, not a folder"):
    WorkDir(tmp_path / "file", small())
