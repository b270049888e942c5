"""How far a rollout lies from its trainer where XLA rounds as it likes, and where the code does.

    python -m experiments.rl.rounding --config=configs/rl_demo.py --workdir=runs/rl_demo \\
      --arms=bf16,mxfp4 --out=results/rl_rounding.jsonl

Answers of the policy that the workdir's runs began with, under the same numerics on both sides; a
row for each arm and way to compile, with the routing free.
"""

from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from flax import nnx

from experiments import command_line, logs
from experiments.environment import COMMIT
from experiments.rl import grpo
from experiments.rl.config import RLExperiment
from experiments.rl.microscope import policy_of_run
from experiments.rl.programs import compiler
from experiments.rl.rollouts import make_sampler, padded_prompts
from experiments.rl.run import Setting
from experiments.rl.train import flip_shares, make_policy_trainer
from experiments.step_cost import describe_source
from experiments.train import quantized_policy


def gap(
  config: RLExperiment, setting: Setting, params: Any, arm: str, excess_precision: bool
) -> dict[str, float]:
  """Between the arm's rollout of one step's answers and its trainer's pass over them."""
  model, own = setting.model, config.rollout
  jit = compiler(excess_precision)
  recipes = config.arm(arm)
  sides = [
    quantized_policy(recipe, config.quantize, config.implementation)
    for recipe in (recipes.rollout, recipes.trainer)
  ]
  sample = make_sampler(nnx.split(model)[0], sides[0], own, setting.source.text, compiled=jit)
  problems = setting.problems.train(0, 0, own.prompts)
  questions = [problem.question for problem in problems for _ in range(own.group)]
  prompts = padded_prompts(questions, setting.source.text, own.max_prompt_tokens)
  rollout = sample(params, *prompts, jax.random.key(0), 0.0)
  score = make_policy_trainer(config, model, sides[1], jit).score(params, rollout)
  said = grpo.divergence(rollout.logprobs, score.logprobs, rollout.mask)
  if model.is_mixture:
    said |= flip_shares(rollout.routing, score.routing, rollout.mask)
  return {name: float(value) for name, value in said.items()}


def main(_) -> None:
  config = _CONFIG.value
  setting = Setting.of(config)
  params = policy_of_run(Path(_WORKDIR.value), config, setting, None)
  source, log = describe_source(COMMIT.value), logs.Rewritten(_OUT.value)
  for arm in _ARMS.value:
    for excess_precision in (True, False):
      row = {"arm": arm, "excess_precision": excess_precision}
      row |= gap(config, setting, params, arm, excess_precision)
      print(
        "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
      )
      log.write(row | {"task": config.task.name} | source)
  log.close()


if __name__ == "__main__":
  _CONFIG = command_line.define_config(RLExperiment, "configs/rl_demo.py")
  _WORKDIR = command_line.define_workdir("Folder of a run of experiments.rl.")
  _OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
  _ARMS = flags.DEFINE_list("arms", ["bf16", "mxfp4"], "With the same numerics on both sides.")
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
