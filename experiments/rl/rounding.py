"""How far a rollout lies from its trainer where XLA rounds as it likes and where the code does, and
how far a trainer from itself where a last bit differs.

    python -m experiments.rl.rounding --config=configs/rl_demo.py --workdir=runs/rl_demo \\
      --arms=bf16,mxfp4 --out=rounding.jsonl

Answers of the policy that the workdir's runs began with, under the same numerics on both sides; a
row for each arm and way to compile, with the routing free. In a row with `nudged` both sides are
the trainer, one with every value of the embedding at the next bf16 value, above or below.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from experiments import command_line, logs
from experiments.environment import COMMIT
from experiments.load import policy_of_run
from experiments.programs import compiler
from experiments.rl import grpo
from experiments.rl.config import RLExperiment
from experiments.rl.rollouts import Rollout, make_sampler, padded_prompts
from experiments.rl.run import Setting
from experiments.rl.train import Scored, flip_shares, make_policy_trainer
from experiments.step_cost import describe_source
from experiments.train import quantized_policy


def gaps(
  config: RLExperiment, setting: Setting, params: Any, arm: str
) -> Iterator[dict[str, float | bool]]:
  """Between the arm's rollout of one step's answers and its trainer's pass over them, in each way
  to compile; then between the trainer's pass and the same with nudged params."""
  for excess_precision in (True, False):
    rollout, score = _both(config, setting, params, arm, excess_precision)
    found = score(params)
    where = {"excess_precision": excess_precision, "nudged": False}
    yield where | _divergence(rollout, rollout.logprobs, rollout.routing, found)
  other = score(nudged(params, jax.random.key(1)))
  where = {"excess_precision": False, "nudged": True}
  yield where | _divergence(rollout, found.logprobs, found.routing, other)


def _both(config, setting, params, arm, excess) -> tuple[Rollout, Callable[[Any], Scored]]:
  """The rollout, and the trainer's pass over it as a function of the params."""
  model, own = setting.model, config.rollout
  recipes = config.arm(arm)
  sides = [
    quantized_policy(recipe, config.quantize, config.implementation)
    for recipe in (recipes.rollout, recipes.trainer)
  ]
  jit = compiler(excess, decodes=True)
  sample = make_sampler(nnx.split(model)[0], sides[0], own, setting.source.text, compiled=jit)
  problems = setting.problems.train(0, 0, own.prompts)
  questions = [problem.question for problem in problems for _ in range(own.group)]
  prompts = padded_prompts(questions, setting.source.text, own.max_prompt_tokens)
  key = jax.random.key(0)
  rollout = sample(params, *prompts, key, 0.0)
  trainer = make_policy_trainer(config, model, sides[1], compiler(excess))
  return rollout, lambda params: trainer.score(params, rollout, None, key)


def _divergence(rollout: Rollout, logprobs, routing, other: Scored) -> dict[str, float]:
  said = grpo.divergence(logprobs, other.logprobs, rollout.mask)
  if routing is not None:
    said |= flip_shares(routing, other.routing, rollout.mask)
  return {name: float(value) for name, value in said.items()}


def nudged(params: Any, key: jax.Array) -> Any:
  """`params` with every value of the embedding, in bf16, one unit in the last place up or down."""
  found = params | {"embedding": dict(params["embedding"])}
  table = found["embedding"]["embedding"]
  bits = jax.lax.bitcast_convert_type(table.astype(jnp.bfloat16), jnp.uint16)
  step = jnp.where(jax.random.bernoulli(key, shape=table.shape), 1, 0xFFFF).astype(jnp.uint16)
  moved = jax.lax.bitcast_convert_type(bits + step, jnp.bfloat16)
  found["embedding"]["embedding"] = jnp.where(table == 0, table, moved.astype(table.dtype))
  return found


def main(_) -> None:
  config = _CONFIG.value
  for arm in _ARMS.value:
    config.arm(arm)  # before the first is measured
  setting = Setting.of(config)
  params = policy_of_run(Path(_WORKDIR.value), config, setting, None)
  source, log = describe_source(COMMIT.value), logs.Rewritten(_OUT.value)
  for arm in _ARMS.value:
    for found in gaps(config, setting, params, arm):
      row = {"arm": arm} | found
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
