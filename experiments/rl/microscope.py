"""Each part of the quantization error alone, on each path alone: what it does to a policy.

    python -m experiments.rl.microscope --config=configs/rl_demo.py --workdir=runs/rl_demo \\
      --out=results/rl_demo_parts.jsonl

The policy is the one that the workdir's runs began with or, with `--run=bf16-0`, as that run left
it. Its answers are sampled in bf16, once for each seed of problems and answers; over them, and over
nothing else, a row for each part and path says

- how far the numbers' distribution of the next token lies from bf16's: `kl`, the exact
  KL(quantized || bf16), `entropy_gap`, quantized less bf16, both means in nats, and
  `token_mult_prob_error`; of the rollout and the forward path, which are one pass;
- the error of the gradient of GRPO's loss: `gradient_error`, |g - g_bf16| / |g_bf16|, `cosine` and
  `gradient_ratio`, |g| / |g_bf16|; of the paths that the trainer runs;
- for a mixture of experts, both once with the routing of the sampling pass replayed and once
  without, and then the share of the tokens whose experts differ. The backward path routes as bf16
  does either way.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from flax import nnx

from experiments import command_line, logs
from experiments.config import Quantize
from experiments.environment import COMMIT
from experiments.load import policy_of_run
from experiments.programs import compiled
from experiments.rl import grpo
from experiments.rl.arms import PARTS, arm_of_any_parts
from experiments.rl.config import RLExperiment
from experiments.rl.rollouts import Rollout
from experiments.rl.run import Setting
from experiments.rl.train import flip_shares
from experiments.step_cost import describe_source
from experiments.train import quantized_policy
from fp4jax import recipes
from fp4jax.models import LanguageModel, Policy
from fp4jax.models.language_model import States

# Each alone, all but one, all.
SUBSETS = tuple(
  subset for n in range(1, len(PARTS) + 1) for subset in itertools.combinations(PARTS, n)
)


def part_rows(
  config: RLExperiment,
  setting: Setting,
  params: Any,
  base: str = "mxfp4",
  subsets: tuple[tuple[str, ...], ...] = SUBSETS,
  seed: int = 0,
  replays: tuple[bool, ...] = (False, True),
) -> Iterator[dict[str, Any]]:
  """A row for what was sampled, then for each subset of the parts, path, and with experts each way
  to route."""
  model, arm = setting.model, arm_of_any_parts(base)
  answers, said = setting.learner(config, "bf16").collect(params, seed, 0)
  if not said["groups/mixed"]:
    raise ValueError(
      f"all answers to each of the {config.rollout.prompts} questions are worth the same: there is"
      " no gradient; raise rollout.prompts or rollout.group"
    )
  yield {"path": "sampled", "base": base, "answers": len(answers.rewards)} | said
  ways = replays if model.is_mixture else (False,)

  def gradients(replay: bool, path: str, parts: tuple[str, ...]) -> Any:
    rollout = dataclasses.replace(config.rollout, replay_routing=replay)
    learner = setting.learner(dataclasses.replace(config, rollout=rollout), arm)
    states = states_of(model, learner.trainer.policy, path, parts)
    return learner.gradients(params, answers, seed, quantizers=states)

  @functools.cache
  def reference(replay: bool) -> Any:
    return gradients(replay, "forward", ())

  for parts, replay in itertools.product(subsets, ways):
    shared = {"base": base, "parts": list(parts), "replay": replay if model.is_mixture else None}
    recipe = arm.rollout
    gap = distance(model, recipe, config.quantize, params, answers.rollout, replay, parts)
    yield {"path": "rollout"} | shared | gap
    for path in ("forward", "backward")[: 1 if replay else 2]:
      error = gradient_error(gradients(replay, path, parts), reference(replay))
      yield {"path": path} | shared | error


def states_of(model: LanguageModel, policy: Policy, path: str, parts: tuple[str, ...]) -> States:
  """Of the quantizers of `arm_of_any_parts`: those on `path`, "forward" or "backward", add `parts`
  of their error, the others none of it, and so they read what bf16 holds."""

  def share(where, one):
    role, part = where[-2].key, where[-1].key
    return jnp.full_like(one, part in parts and role.startswith("fprop") == (path == "forward"))

  return jax.tree.map_with_path(share, model.new_states(policy))


def gradient_error(found: Any, reference: Any) -> dict[str, float]:
  """Relative error, cosine and ratio of the norms of two gradients."""
  norm, of_reference = optax.tree.norm(found), optax.tree.norm(reference)
  error = optax.tree.norm(optax.tree.sub(found, reference)) / of_reference
  cosine = optax.tree.vdot(found, reference) / (norm * of_reference)
  told = {"gradient_error": error, "cosine": cosine, "gradient_ratio": norm / of_reference}
  return {name: float(value) for name, value in told.items()}


def distance(
  model: LanguageModel,
  recipe,
  quantize: Quantize,
  params: Any,
  rollout: Rollout,
  replay: bool,
  parts: tuple[str, ...] | None = None,
) -> dict[str, float]:
  """Of the next tokens' distributions under `recipe` from those in bf16, over sampled tokens.

  `parts` are of the error, and for a recipe of `arm_of_any_parts` alone.
  """
  graph, _ = nnx.split(model)
  policies = [quantized_policy(r, quantize, None) for r in (recipe, recipes.BF16)]
  states = None if parts is None else states_of(model, policies[0], "forward", parts)
  found = _distance(graph, *policies, replay, params, rollout, states)
  return {name: float(value) for name, value in jax.device_get(found).items()}


@functools.partial(compiled, static_argnums=(0, 1, 2, 3))
def _distance(
  graph, policy: Policy, reference: Policy, replay: bool, params, rollout: Rollout, states=None
):
  model = nnx.merge(graph, params)
  tokens, mask = rollout.tokens, rollout.mask
  routing = rollout.routing if replay and model.is_mixture else None

  def of_all(policy, routing, states=None):
    how = {"states": states, "routing": routing, "return_routing": model.is_mixture}
    logits, said = model(tokens[:, :-1], policy, **how)
    return jax.nn.log_softmax(logits), said.get("experts")

  own, experts = of_all(policy, routing, states)
  base, _ = of_all(reference, routing)
  entropy = lambda logp: -jnp.sum(jnp.exp(logp) * logp, axis=-1)  # noqa: E731
  taken = lambda logp: jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)[..., 0]  # noqa: E731
  told = {
    "kl": grpo.mean_of(jnp.sum(jnp.exp(own) * (own - base), axis=-1), mask),
    "entropy": grpo.mean_of(entropy(own), mask),
    "entropy_gap": grpo.mean_of(entropy(own) - entropy(base), mask),
    "token_mult_prob_error": grpo.mean_of(jnp.exp(jnp.abs(taken(own) - taken(base))), mask),
  }
  if model.is_mixture and not replay:
    told |= flip_shares(rollout.routing, experts, mask)
  return told


def main(_) -> None:
  config, folder = _CONFIG.value, Path(_WORKDIR.value)
  setting = Setting.of(config)
  params = policy_of_run(folder, config, setting, _RUN.value)
  log, source = logs.Rewritten(_OUT.value), describe_source(COMMIT.value)
  subsets = SUBSETS[: len(PARTS)] if _SINGLE.value else SUBSETS
  for seed in range(_SEEDS.value):
    for row in part_rows(config, setting, params, _BASE.value, subsets, seed):
      told = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()}
      print("  ".join(f"{name}={value}" for name, value in told.items()))
      log.write(row | {"run": _RUN.value, "seed": seed} | source)
  log.close()


if __name__ == "__main__":
  _CONFIG = command_line.define_config(RLExperiment, "configs/rl_demo.py")
  _WORKDIR = command_line.define_workdir("Folder of a run of experiments.rl.")
  _OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
  _RUN = flags.DEFINE_string("run", None, "Such as bf16-0; without: what all runs began with.")
  _BASE = flags.DEFINE_string("base", "mxfp4", "The format, as in the name of an arm.")
  _SEEDS = flags.DEFINE_integer("seeds", 8, "Of problems and answers: 0, 1, ...", lower_bound=1)
  _SINGLE = flags.DEFINE_bool("single", False, "Parts alone, without their sums.")
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
