"""Each part of the quantization error alone, on each path alone: what it does to a policy.

    python -m experiments.rl.microscope --config=configs/rl_demo.py --workdir=runs/rl_demo \\
      --out=results/rl_parts.jsonl

The policy is the one that the workdir's arms began with, or `--arm=bf16-0` as that run left it. Its
answers are sampled in bf16; over them, and over nothing else, a row for each part and path says

- how far the numbers' distribution of the next token lies from bf16's: `kl`, the exact
  KL(quantized || bf16), `entropy_gap`, quantized less bf16, both means in nats, and
  `token_mult_prob_error`; of the rollout and the forward path, which are one pass;
- the error of the gradient of GRPO's loss: `gradient_error`, |g - g_bf16| / |g_bf16|, `cosine` and
  `gradient_ratio`, |g| / |g_bf16|; of the paths that the trainer runs;
- for a mixture of experts, both once with the routing of the sampling pass replayed and once
  without, and then the share of the tokens whose experts differ.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.config import Quantize
from experiments.rl import grpo
from experiments.rl.arms import PARTS, arm_of
from experiments.rl.config import RLExperiment
from experiments.rl.learner import Answers, Learner
from experiments.rl.rollouts import Rollout
from experiments.rl.train import flip_shares
from experiments.tasks import Problems
from experiments.text import Text
from experiments.train import quantized_policy
from fp4jax import recipes
from fp4jax.models import LanguageModel, Policy

# Each alone, all but one, all.
SUBSETS = tuple(
  subset for n in range(1, len(PARTS) + 1) for subset in itertools.combinations(PARTS, n)
)


def part_rows(
  config: RLExperiment,
  model: LanguageModel,
  params: Any,
  text: Text,
  problems: Problems,
  base: str = "mxfp4",
  subsets: tuple[tuple[str, ...], ...] = SUBSETS,
  seed: int = 0,
) -> Iterator[dict[str, Any]]:
  """A row for each subset of the parts, path, and with experts each way to route."""
  make = lambda arm: Learner(config, arm_of(arm), model, text, problems)  # noqa: E731
  reference = make("bf16")
  answers, said = reference.collect(params, seed, 0)
  yield {"path": "sampled", "base": "bf16", "replay": None} | said
  ways = (False, True) if model.is_mixture else (False,)
  gradients = {
    replay: _gradient(config, model, text, problems, "bf16", replay, params, answers, seed)
    for replay in ways
  }
  for parts, replay in itertools.product(subsets, ways):
    name = ".".join([base, *parts])
    shared = {"base": base, "parts": list(parts), "replay": replay if model.is_mixture else None}
    recipe = arm_of(f"{name}@rollout").rollout
    gap = distance(model, recipe, config.quantize, params, answers.rollout, replay)
    yield {"path": "rollout"} | shared | gap
    for path in ("forward", "backward"):
      arm = f"{name}@{path}"
      own = _gradient(config, model, text, problems, arm, replay, params, answers, seed)
      error = gradient_error(own, gradients[replay])
      yield {"path": path} | shared | error | (gap if path == "forward" else {})


def _gradient(config, model, text, problems, arm, replay, params, answers: Answers, seed):
  rollout = dataclasses.replace(config.rollout, replay_routing=replay)
  config = dataclasses.replace(config, rollout=rollout)
  learner = Learner(config, arm_of(arm), model, text, problems)
  return learner.gradients(params, answers, seed)


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
) -> dict[str, float]:
  """Of the next tokens' distributions under `recipe` from those in bf16, over sampled tokens."""
  graph, _ = nnx.split(model)
  policies = [quantized_policy(r, quantize, None) for r in (recipe, recipes.BF16)]
  found = _distance(graph, *policies, replay, params, rollout)
  return {name: float(value) for name, value in jax.device_get(found).items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _distance(graph, policy: Policy, reference: Policy, replay: bool, params, rollout: Rollout):
  model = nnx.merge(graph, params)
  tokens, mask = rollout.tokens, rollout.mask
  routing = rollout.routing if replay and model.is_mixture else None

  def of_all(policy, routing):
    says = model.is_mixture
    logits, said = model(tokens[:, :-1], policy, routing=routing, return_routing=says)
    return jax.nn.log_softmax(logits), said.get("experts")

  own, experts = of_all(policy, routing)
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
