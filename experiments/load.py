"""A trained model, from the folder of its runs.

config, model = load_run("runs/demo", "mxfp4_rht_sr-0")
logits, routing = model(tokens, policy)  # under any policy
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import logs
from experiments.checkpoints import Checkpoints
from experiments.comparison import Comparison
from experiments.config import Experiment
from experiments.rl.config import RLExperiment
from experiments.rl.run import POLICY, Setting
from experiments.rl.start import start_params
from experiments.train import make_trainer, schedule_of
from experiments.workdir import check_same, read_config, read_settings
from fp4jax.models import LanguageModel


def load_run(workdir: str | Path, run: str) -> tuple[Comparison, LanguageModel]:
  """The workdir's config and the model as the run of that name, `bf16-0`, last saved it: of
  pre-training or of reinforcement learning, on one device.

  Raises:
    FileNotFoundError: no config.json.
    ValueError: no checkpoint of such a run.
  """
  folder = Path(workdir)
  if RLExperiment.ARMS in read_settings(folder):
    config = read_config(folder, RLExperiment)
    setting = Setting.of(config)
    params = policy_of_run(folder, config, setting, run)
    return config, nnx.merge(nnx.split(setting.model)[0], params)
  config = read_config(folder, Experiment)
  vocab_size = logs.read_json(folder / "environment.json")["corpus"]["vocab_size"]
  recipe = run.rpartition("-")[0]

  def state_of(step):
    policy = [policy for start, policy in schedule_of(config, recipe) if start <= step][-1]
    return make_trainer(config, vocab_size, policy).init.eval_shape(jnp.int32(0))

  model = nnx.eval_shape(lambda: LanguageModel(config.model, vocab_size, nnx.Rngs(0)))
  return config, nnx.merge(nnx.split(model)[0], _saved_params(folder, run, state_of))


def policy_of_run(folder: Path, config: RLExperiment, setting: Setting, run: str | None) -> Any:
  """Of reinforcement learning: the weights of a run or, for None, those that all runs begin with.

  Raises ValueError where the workdir has no such policy yet, or is of another config.
  """
  if (folder / "config.json").exists():
    check_same(folder, config, "start", "task", "model")
  if run is None:
    if config.start.teaching.steps and not (folder / POLICY).is_dir():
      raise ValueError(f"{folder} has no policy yet: its runs have not begun")
    return start_params(folder / POLICY, config, setting.source, setting.problems, _too_early)
  learner = setting.learner(config, run.rpartition("-")[0])
  shapes = jax.eval_shape(setting.source.params)
  return _saved_params(folder, run, learner.trainer.init.eval_shape(shapes))


def _saved_params(folder: Path, run: str, abstract_state: Any) -> Any:
  """Of the run's newest checkpoint, whose state is that of `Checkpoints.restore_latest`."""
  with contextlib.closing(Checkpoints(folder / "runs" / run / "checkpoints", keep=1)) as kept:
    restored = kept.restore_latest(abstract_state)
  if restored is None:
    raise ValueError(f"{folder} has no checkpoint of a run {run!r}")
  return restored[1].params


def _too_early(step: int, loss: float) -> None:
  raise ValueError("the workdir's policy has not been taught to the end")
