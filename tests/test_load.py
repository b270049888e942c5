"""A model is loaded as its run left it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rl_cases import small_rl
from small_runs import small

from experiments.checkpoints import Checkpoints
from experiments.comparison import Names
from experiments.load import load_run, policy_of_run
from experiments.rl.run import Setting
from experiments.train import make_trainer, policy_of
from experiments.workdir import WorkDir
from fp4jax import recipes
from fp4jax.models import Policy


def save(path, run, step, state):
  kept = Checkpoints(path / "runs" / run / "checkpoints", keep=1)
  kept.save(step, state, {})
  kept.close()


def test_a_model_of_pre_training_has_the_weights_of_its_run(tmp_path):
  config = small(recipes=Names(("mxfp4",)))
  WorkDir(tmp_path, config).begin({"corpus": {"vocab_size": 256}})
  with pytest.raises(ValueError, match="has no checkpoint of a run 'mxfp4-0'"):
    load_run(tmp_path, "mxfp4-0")
  trainer = make_trainer(config, 256, policy_of(recipes.MXFP4, config))
  state = trainer.init(jnp.int32(3))
  save(tmp_path, "mxfp4-0", 2, state)
  found, model = load_run(tmp_path, "mxfp4-0")
  assert found.to_dict() == config.to_dict()
  np.testing.assert_array_equal(
    model.embedding.embedding[...], state.params["embedding"]["embedding"]
  )
  tokens = np.arange(40).reshape(2, 20)
  logits, _ = model(tokens, Policy())
  assert logits.shape == (2, 20, 256) and np.isfinite(logits).all()


def test_a_policy_has_the_weights_of_its_run(tmp_path):
  config = small_rl()
  WorkDir(tmp_path, config).begin({})
  setting = Setting.of(config)
  params = setting.source.params()
  save(tmp_path, "mxfp4-1", 2, setting.learner(config, "mxfp4").trainer.init(params))
  found, model = load_run(tmp_path, "mxfp4-1")
  assert found == config
  np.testing.assert_array_equal(model.embedding.embedding[...], params["embedding"]["embedding"])
  with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
    load_run(tmp_path / "runs", "mxfp4-1")


def test_a_workdir_without_a_policy_is_refused_before_any_is_taught(tmp_path):
  config = small_rl(**{"start.teaching.steps": 3, "start.teaching.warmup_steps": 1})
  with pytest.raises(ValueError, match="typo has no policy yet: its runs have not begun"):
    policy_of_run(tmp_path / "typo", config, Setting.of(config), None)
  assert not (tmp_path / "typo").exists()


def test_a_policy_is_that_of_the_workdirs_own_config(tmp_path):
  config = small_rl()
  WorkDir(tmp_path, config).begin({})
  other = small_rl(**{"model": dataclasses.replace(config.model, num_layers=1)})
  with pytest.raises(ValueError, match=r"another config\n  config\.model\.num_layers: 2 there, 1"):
    policy_of_run(tmp_path, other, Setting.of(other), None)
  same = small_rl(**{"rollout.prompts": 7})
  assert policy_of_run(tmp_path, same, Setting.of(same), None)


def test_a_policy_is_that_which_a_run_left(tmp_path):
  config = small_rl()
  setting = Setting.of(config)
  params = setting.source.params()
  WorkDir(tmp_path, config).begin({})
  with pytest.raises(ValueError, match="no checkpoint of a run 'bf16-0'"):
    policy_of_run(tmp_path, config, setting, "bf16-0")
  trained = jax.tree.map(lambda x: x + 1, params)
  state = setting.learner(config, "mxfp4").trainer.init(trained)
  save(tmp_path, "mxfp4-0", 3, state)
  found = policy_of_run(tmp_path, config, setting, "mxfp4-0")
  jax.tree.map(np.testing.assert_array_equal, found, trained)
