"""A policy of ours in tunix 0.1.7 (`pip install '.[rl]'`), whose rollout is quantized.

    arm = arm_of("mxfp4+aqn")
    rollout, trainer = (quantized_policy(r, Quantize(), None) for r in (arm.rollout, arm.trainer))
    sigmas = [noise_at(NoiseSettings(), step, steps) for step in range(steps)]
    engine = functools.partial(QuantizedRollout, policy=rollout, sigmas=sigmas)
    mesh = jax.make_mesh((1,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    roles = dict.fromkeys((Role.ACTOR, Role.ROLLOUT, Role.REFERENCE), mesh)
    cluster = ClusterConfig(role_to_mesh=roles, rollout_engine=engine, training_config=...,
                            rollout_config=RolloutConfig(temperature=1.0, return_logprobs=True))
    cluster = RLCluster(actor=Actor(model, trainer), tokenizer=Tokenizer(Bytes()),
                        cluster_config=cluster)
    GRPOLearner(cluster, GRPOConfig(num_generations=8, beta=0.0), reward).train(prompts)

Set XLA_FLAGS=--xla_allow_excess_precision=false: tunix compiles the trainer's passes itself, and
without it they round otherwise than the rollout (see `experiments.programs`). A small policy in
mxfp4 on both sides then says 0.013 nats a token of a difference that is 0 with it.

What tunix 0.1.7 does not do: replay the routing of a rollout, or give keys to a trainer that rounds
stochastically. `use_rollout_logps` and `sampler_is` are settings of its learner for agents alone,
`tunix.rl.agentic.agentic_grpo_learner`, which asks for a `chat_parser`, the same `Tokenizer`, and
empties answers that reach max_response_length. Prompts come as NumPy arrays: of a list tunix makes
each string an array. `offload_to_cpu` would quantize the weights at every call.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int
from tunix.rl import common
from tunix.rl.rollout import base_rollout

from experiments.programs import compiled, decoding
from experiments.rl.noise import with_noise
from experiments.text import Text
from fp4jax.models import LanguageModel, Policy, can_pack, generate, pack_model
from fp4jax.models.kv_cache import align_left

_IMPOSSIBLE = -1e9  # a logit: its probability is 0 in float32, and differences of it are finite


class Tokenizer:
  """What tunix asks of a tokenizer, and of a chat parser.

  The padding is a token that the policy doesn't have: tunix takes every token that is the padding
  for one, sampled or not, and leaves it out of the loss.
  """

  def __init__(self, text: Text):
    self._text = text

  def encode(self, question: str) -> list[int]:
    return self._text.prompt(question)

  def decode(self, tokens: Sequence[int]) -> str:
    return self._text.decode(tokens)

  def eos_id(self) -> int:
    return self._text.stop_token

  def pad_id(self) -> int:
    return self._text.vocab_size

  def bos_id(self) -> int:
    return self.pad_id()  # none: tunix would take two in a row for a mistake

  def parse(self, messages: Sequence[dict[str, Any]], **_) -> str:
    """The question of a conversation of one; `encode` puts it into the policy's own words."""
    return "".join(str(m["content"]) for m in messages if m["role"] == "user")


class Actor(nnx.Module):
  """A model under a policy, as tunix calls it: rows are padded on both sides."""

  def __init__(self, model: LanguageModel, policy: Policy):
    self.model, self.policy = model, policy

  def __call__(
    self,
    tokens: Int[Array, "b s"],
    positions: Int[Array, "b s"] | None = None,
    cache: None = None,
    attention_mask: Bool[Array, "b s s"] | None = None,
  ) -> tuple[Float32[Array, "b s vocab_and_padding"], None]:
    """Logits; those of the padding are the last.

    Raises:
      ValueError: several sequences in a row, which have no `attention_mask`, or a cache.
    """
    if attention_mask is None or cache is not None:
      raise ValueError(
        "an actor reads whole rows of one sequence each, with an attention_mask and no cache:"
        " max_seq_token_per_tpu must be None"
      )
    before = jnp.argmax(attention_mask[:, -1], axis=1).astype(jnp.int32)
    vocab = self.model.embedding.num_embeddings
    rows = align_left(jnp.where(tokens < vocab, tokens, 0), before, axis=1)
    logits, _ = self.model(rows, self.policy)
    logits = align_left(logits, -before, axis=1)
    return jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=_IMPOSSIBLE), None


class QuantizedRollout(base_rollout.BaseRollout):
  """Samples under `policy`, from weights that are quantized and packed once an update.

  The rest is the actor's: `get_per_token_logps` are under its policy.

  Args:
    rollout_actor: an `Actor`; it is copied, since tunix sends no update to a rollout that shares
      the trainer's arrays.
    mesh: not read; the rollout computes where the actor's weights are.
    policy: the recipe of each GEMM of the rollout.
    sigmas: standard deviations of the noise on the weights of the norms, after so many updates; the
      last one stays. Each update draws anew, on top of clean weights.
    packed: whether weights are packed; None: where the policy only rounds them.
    seed: of the noise and of the tokens. Each call of `generate` draws anew.
  """

  def __init__(
    self,
    rollout_actor: Actor,
    tokenizer: Any,
    mesh: Any,
    rollout_config: base_rollout.RolloutConfig,
    *,
    policy: Policy,
    sigmas: Sequence[float] = (0.0,),
    packed: bool | None = None,
    seed: int = 0,
  ):
    _check(rollout_config)
    graph, params = nnx.split(rollout_actor)
    self._actor: Actor = nnx.merge(graph, jax.tree.map(jnp.copy, params))
    self._tokenizer, self._policy = tokenizer, policy
    self._graph, _ = nnx.split(self._actor.model)
    self._packed = can_pack(self._actor.model, policy) if packed is None else packed
    self._noise_key, self._key = jax.random.split(jax.random.key(seed))
    self._calls = itertools.count()
    # On the device, since tunix forbids all transfers from and to the host during an update.
    self._sigmas, self._updates = jnp.asarray(sigmas, jnp.float32), jnp.int32(0)
    self._quantize()

  def generate(
    self, prompts: Sequence[str], rollout_config: base_rollout.RolloutConfig, **_
  ) -> base_rollout.RolloutOutput:
    """An answer to each prompt; a string is one prompt.

    Raises:
      ValueError: a prompt that is empty or longer than `max_prompt_length`, or settings that would
        sample something else than what the log-probabilities say.
    """
    _check(rollout_config)
    c, pad = rollout_config, self.pad_id()
    rows = [self._tokenizer.encode(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
    padded = np.full((len(rows), c.max_prompt_length), pad, np.int32)
    for i, row in enumerate(rows):
      if not 0 < len(row) <= c.max_prompt_length:
        raise ValueError(f"prompt {i} has {len(row)} tokens, {c.max_prompt_length=}")
      padded[i, -len(row) :] = row
    stops = tuple(c.eos_tokens or (self.eos_id(),))
    found = _sample(
      self._graph,
      self._policy,
      (c.max_tokens_to_generate, c.temperature, stops),
      self._weights,
      padded,
      np.array([len(row) for row in rows], np.int32),
      self._key,
      np.int32(next(self._calls)),
    )
    tokens, logprobs, lengths = jax.device_get((found.tokens, found.logprobs, found.lengths))
    answers = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    return base_rollout.RolloutOutput(
      text=[self._tokenizer.decode([t for t in row.tolist() if t not in stops]) for row in answers],
      logits=None,
      tokens=answers,
      left_padded_prompt_tokens=padded,
      logprobs=[row[:n] for row, n in zip(logprobs, lengths, strict=True)]
      if c.return_logprobs
      else None,
    )

  def get_per_token_logps(
    self, prompt_tokens: Int[Array, "b p"], completion_tokens: Int[Array, "b n"]
  ) -> Float32[Array, "b n"]:
    """Of the completions, under the actor's policy and without noise."""
    return common.compute_per_token_logps(
      *nnx.split(self._actor), prompt_tokens, completion_tokens, self.pad_id(), self.eos_id()
    )

  def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
    """Takes the weights of an `Actor`, all or those of `filter_types`, and quantizes all."""
    own = nnx.state(self._actor) if filter_types is None else nnx.state(self._actor, filter_types)
    places = jax.tree.map(lambda x: x.sharding, own)
    nnx.update(self._actor, jax.device_put(params, places))
    self._quantize()

  def _quantize(self):
    clean = nnx.to_pure_dict(nnx.state(self._actor.model))
    how = self._graph, self._policy, self._packed
    self._weights, self._updates = _quantized(
      *how, clean, self._noise_key, self._sigmas, self._updates
    )

  def pad_id(self) -> int:
    return self._tokenizer.pad_id()

  def eos_id(self) -> int:
    return self._tokenizer.eos_id()

  def model(self) -> Actor:
    """With the weights as they came, under the actor's policy."""
    return self._actor


def _check(config: base_rollout.RolloutConfig) -> None:
  """Raises ValueError for settings under which tunix would misread what is sampled."""
  c = config
  if c.temperature not in (0.0, 1.0):
    raise ValueError(
      f"{c.temperature=} is neither 1 nor 0, the likeliest tokens: log-probabilities are those of"
      " the policy itself"
    )
  if c.top_p not in (None, 1.0) and c.temperature:
    raise ValueError(f"{c.top_p=} would sample from less than the policy, whose are the logprobs")
  if c.top_k not in (None, -1):
    raise ValueError(f"{c.top_k=} would sample from less than the policy, whose are the logprobs")
  if c.seed is not None:
    raise ValueError("a seed in RolloutConfig would give every rollout the same numbers")
  if c.data_type is not None:
    raise ValueError(f"{c.data_type=}: the policy says in which numbers a rollout computes")


@functools.partial(compiled, static_argnums=(0, 1, 2))
def _quantized(graph, policy, is_packed, clean, key, sigmas, updates):
  """What a rollout samples from after so many updates, and the number of the next."""
  sigma = sigmas[jnp.minimum(updates, len(sigmas) - 1)]
  model = nnx.merge(graph, with_noise(clean, jax.random.fold_in(key, updates), sigma))
  return nnx.state(pack_model(model, policy) if is_packed else model), updates + 1


@functools.partial(decoding, static_argnums=(0, 1, 2))
def _sample(graph, policy, settings, weights, prompts, lengths, key, call):
  max_new_tokens, temperature, stops = settings
  answer_key, numerics_key = jax.random.split(jax.random.fold_in(key, call))
  return generate(
    nnx.merge(graph, weights),
    prompts,
    lengths,
    policy,
    key=answer_key,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    stop_tokens=stops,
    pad_token=stops[0],
    numerics_key=numerics_key,
  )
