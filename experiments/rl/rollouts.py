"""Answers sampled from a policy, laid out as its trainer reads them."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from experiments.programs import decoding
from experiments.rl.config import RLExperiment, RolloutSettings
from experiments.rl.noise import with_noise
from experiments.tasks import Problems
from experiments.text import Text
from fp4jax.models import LanguageModel, Policy, can_pack, generate, pack_model
from fp4jax.models.kv_cache import align_left


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
  """A row for each answer: its prompt, the answer, then padding. Column t of what is said of tokens
  is of tokens[:, t + 1], which a causal model's column t predicts."""

  tokens: Int32[Array, "b s"]
  mask: Bool[Array, "b t"]  # tokens that were sampled
  logprobs: Float32[Array, "b t"]  # as sampled, nats; 0 elsewhere
  entropy: Float32[Array, "b t"]  # of what each token was sampled from, nats; 0 elsewhere
  lengths: Int32[Array, " b"]  # of the answers, a stop token included
  answers: Int32[Array, "b n"]
  routing: Int32[Array, "layer b t k"] | None  # the experts of tokens[:, :-1]


Sampler = Callable[..., Rollout]


def make_sampler(
  graph: nnx.GraphDef,
  policy: Policy,
  settings: RolloutSettings,
  text: Text,
  temperature: float = 1.0,
  compiled: Callable[..., Callable] = decoding,
) -> Sampler:
  """`sample(params, prompts, prompt_lengths, key, noise)`, compiled. `noise` is the standard
  deviation of what the weights of the norms get; every row has its own numbers of `key`."""

  @compiled
  def sample(params, prompts, prompt_lengths, key, noise):
    noise_key, answer_key, numerics_key = jax.random.split(key, 3)
    model = nnx.merge(graph, with_noise(params, noise_key, noise))
    if packed(settings, policy, model):
      model = pack_model(model, policy)
    found = generate(
      model,
      prompts,
      prompt_lengths,
      policy,
      key=answer_key,
      max_new_tokens=settings.max_new_tokens,
      temperature=temperature,
      stop_tokens=(text.stop_token,),
      pad_token=text.pad_token,
      numerics_key=numerics_key,
      return_routing=model.is_mixture,
    )
    return _laid_out(prompts, prompt_lengths, found)

  return sample


def packed(settings: RolloutSettings, policy: Policy, model: LanguageModel) -> bool:
  """Whether the rollout's weights are packed; raises where that is asked for and can't be."""
  return can_pack(model, policy) if settings.packed is None else settings.packed


def _laid_out(prompts, prompt_lengths, found) -> Rollout:
  width, new = prompts.shape[1], found.tokens.shape[1]
  padding = width - prompt_lengths
  is_new = jnp.arange(new) < found.lengths[:, None]

  def after_prompt(x):
    """Of the answers' tokens, in their columns."""
    before = jnp.zeros((len(x), width - 1), x.dtype)
    return align_left(jnp.concatenate([before, x], axis=1), padding, axis=1)

  routing = found.routing
  return Rollout(
    tokens=align_left(jnp.concatenate([prompts, found.tokens], axis=1), padding, axis=1),
    mask=after_prompt(is_new),
    logprobs=after_prompt(found.logprobs),
    entropy=after_prompt(found.entropy),
    lengths=found.lengths,
    answers=found.tokens,
    routing=None if routing is None else align_left(routing, padding, axis=2),
  )


def padded_prompts(
  questions: Sequence[str], text: Text, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts padded on the left to `width` tokens, and their lengths.

  Raises:
    ValueError: a prompt that is longer, or one of no tokens.
  """
  prompts = [text.prompt(question) for question in questions]
  question, longest = max(zip(questions, prompts, strict=True), key=lambda pair: len(pair[1]))
  if len(longest) > width:
    raise ValueError(
      f"rollout.max_prompt_tokens={width}: the prompt of {question[:60]!r} has {len(longest)}"
    )
  if not all(prompts):
    raise ValueError("a question has a prompt of no tokens")
  rows = np.full((len(prompts), width), text.pad_token, np.int32)
  for row, prompt in zip(rows, prompts, strict=True):
    row[width - len(prompt) :] = prompt
  return rows, np.array([len(prompt) for prompt in prompts], np.int32)


_LOOKED_AT = 2000  # training problems, before a run


def check_prompts(problems: Problems, text: Text, config: RLExperiment) -> None:
  """Raises ValueError for a prompt too long for `config`: of all that are held out, and of the
  first that are trained on."""
  steps = min(config.steps, -(-_LOOKED_AT // config.rollout.prompts))
  found = [p for step in range(steps) for p in problems.train(0, step, config.rollout.prompts)]
  questions = [problem.question for problem in (*problems.held_out, *found)]
  padded_prompts(questions, text, config.rollout.max_prompt_tokens)


def answers_of(rollout: Rollout, text: Text) -> list[str]:
  answers, lengths = jax.device_get((rollout.answers, rollout.lengths))
  return [text.decode(row[:n].tolist()) for row, n in zip(answers, lengths, strict=True)]
