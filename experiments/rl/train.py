"""The trainer of a policy: compiled functions of arrays, no files."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32

from experiments.optimizers import make_optimizer
from experiments.optimizers.norms import norm_of
from experiments.programs import compiled
from experiments.rl import grpo
from experiments.rl.config import RLExperiment
from experiments.train import Scalars, TrainState, matrices
from fp4jax import operands
from fp4jax.models import LanguageModel, Policy


class Scored(NamedTuple):
  """What a pass of the trainer says of a rollout's tokens."""

  logprobs: Float32[Array, "b t"]
  routing: Int32[Array, "layer b t k"] | None  # the router's own choice, or what it was given


@dataclasses.dataclass(frozen=True)
class PolicyTrainer:
  """The compiled functions of one policy; randomness comes from the key alone."""

  policy: Policy
  init: Callable[[Any], TrainState]  # of params
  score: Callable[..., Scored]  # of (params, rollout, routing, key)
  update: Callable[..., tuple[TrainState, Scalars]]  # of (state, rollout, sampled, key)
  gradients: Callable[..., Any]  # of the same, like params
  probe: Callable[..., dict[str, operands.Tap]]


def make_policy_trainer(
  config: RLExperiment,
  model: LanguageModel,
  policy: Policy,
  compiled: Callable[..., Callable] = compiled,
) -> PolicyTrainer:
  """Functions that train the weights of `model` under `policy`; nothing is compiled before."""
  graph, _ = nnx.split(model)
  updates = config.steps * config.grpo.iterations * config.grpo.minibatches
  norm_of_grads = norm_of(model.unroll)
  optimizer = make_optimizer(config.optimizer, updates, matrices(model), norm_of_grads)
  taps = jax.tree.map(jnp.zeros_like, jax.eval_shape(model.new_taps))
  replay = config.rollout.replay_routing and model.is_mixture

  def logprobs_of(params, rollout, routing, key, taps=None, states=None, returns=False):
    """Of each token after the first, and what the model says of its routing."""
    entropy, said = nnx.merge(graph, params).cross_entropy(
      rollout.tokens[:, :-1],
      rollout.tokens[:, 1:],
      policy,
      key=key,
      taps=taps,
      states=states,
      routing=routing,
      return_routing=returns,
    )
    return -entropy, said

  def init(params):
    # A copy: what an update gives away is not what others begin with.
    params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), model.new_states(policy))

  def score(params, rollout, routing=None, key=None):
    logprobs, said = logprobs_of(params, rollout, routing, key, returns=model.is_mixture)
    return Scored(logprobs, said.get("experts"))

  def total_loss(params, quantizers, rollout, sampled, key, taps=None):
    routing = rollout.routing if replay else None
    logprobs, said = logprobs_of(params, rollout, routing, key, taps, quantizers)
    loss, of_loss = grpo.loss(logprobs, sampled, config.grpo)
    weights = {
      "load_balance_loss": config.optimizer.load_balance_weight,
      "router_z_loss": config.optimizer.router_z_weight,
    }
    auxiliary = sum(weight * said[name] for name, weight in weights.items() if name in said)
    of_loss |= grpo.divergence(sampled.rollout, jax.lax.stop_gradient(logprobs), sampled.mask)
    return loss + auxiliary, (loss, of_loss)

  def update(state, rollout, sampled, key):
    key = jax.random.fold_in(key, state.step)
    run = jax.value_and_grad(total_loss, argnums=(0, 1), has_aux=True)
    found = run(state.params, state.quantizers, rollout, sampled, key)
    (_, (loss, said)), (grads, quantizers) = found
    norm = norm_of_grads(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = TrainState(
      state.step + 1, optax.apply_updates(state.params, updates), opt_state, quantizers
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return new, {"loss": loss, "grad_norm": norm} | said

  def gradients(state, rollout, sampled, key):
    loss = lambda params: total_loss(params, state.quantizers, rollout, sampled, key)[0]  # noqa: E731
    return jax.grad(loss)(state.params)

  def probe(state, rollout, sampled, key):
    own = state.params, state.quantizers, rollout, sampled, key
    return jax.grad(lambda taps: total_loss(*own, taps)[0])(taps)

  return PolicyTrainer(
    policy,
    compiled(init),
    compiled(score),
    compiled(update, donate_argnums=0),
    compiled(gradients),
    compiled(probe),
  )


def flip_shares(
  rollout: Int32[Array, "layer b t k"], trainer: Int32[Array, "layer b t k"], mask
) -> dict[str, jax.Array]:
  """Of the tokens of `mask`, whether the router sends them to other experts than the rollout's:
  in any layer, and the share of single choices."""
  is_other = jnp.sort(rollout, axis=-1) != jnp.sort(trainer, axis=-1)
  kept = (rollout[..., :, None] == trainer[..., None, :]).any(axis=-1)
  tokens = is_other.any(axis=(0, 3))
  mean = functools.partial(grpo.mean_of, mask=mask)
  return {
    "router_flips/tokens": mean(tokens),
    "router_flips/choices": mean(1.0 - kept.mean(axis=(0, 3))),
  }
