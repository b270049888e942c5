"""One arm at work: it samples answers, has them rewarded, and updates the policy."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import probes
from experiments.rl import grpo
from experiments.rl.arms import Arm
from experiments.rl.config import RLExperiment
from experiments.rl.noise import noise_at
from experiments.rl.rollouts import Rollout, answers_of, make_sampler, padded_prompts
from experiments.rl.train import flip_shares, make_policy_trainer
from experiments.tasks import Problem, Problems, answer_in
from experiments.text import Text
from experiments.train import TrainState, quantized_policy
from fp4jax import recipes
from fp4jax.models import LanguageModel
from fp4jax.models.language_model import States

_FORWARD = ("fprop", "residual")
_EVALUATION = zlib.crc32(b"evaluation")
Scalars = dict[str, float]


class Answers(NamedTuple):
  """Sampled answers of one step, a row each; the answers to one question follow each other."""

  rollout: Rollout
  problems: list[Problem]
  texts: list[str]
  rewards: np.ndarray  # float32, before any penalty


class Programs:
  """The compiled functions of an experiment; arms that have a side in common share its programs."""

  def __init__(self, config: RLExperiment, model: LanguageModel, text: Text):
    graph, _ = nnx.split(model)
    self.sampler = functools.cache(
      lambda policy, temperature: make_sampler(graph, policy, config.rollout, text, temperature)
    )
    self.trainer = functools.cache(functools.partial(make_policy_trainer, config, model))


class Learner:
  """One arm: what of a step is done on the host, around the compiled functions.

  Everything depends on (params, seed, step) alone.
  """

  def __init__(
    self,
    config: RLExperiment,
    arm: Arm,
    model: LanguageModel,
    text: Text,
    problems: Problems,
    programs: Programs | None = None,
  ):
    self._config, self._arm, self._text, self._problems = config, arm, text, problems
    programs = programs or Programs(config, model, text)
    policies = [
      quantized_policy(recipe, config.quantize, config.implementation)
      for recipe in (arm.rollout, arm.trainer, recipes.BF16)
    ]
    self._sample = programs.sampler(policies[0], 1.0)
    self._sample_held_out = programs.sampler(policies[0], config.rollout.eval_temperature)
    self._rollout_side, self.trainer, self._reference = map(programs.trainer, policies)
    self._replays = config.rollout.replay_routing and model.is_mixture
    self._is_mixture, self._num_layers = model.is_mixture, model.num_layers

  def check(self, params: Any) -> None:
    """Raises what a step would, without computing one; of `params` shapes suffice."""
    own, settings = self._config.rollout, self._config.grpo
    count, key = own.prompts * own.group, _key(0, 0)

    def prompts(rows):
      shapes = (rows, own.max_prompt_tokens), (rows,)
      return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]

    held_out = prompts(len(self._problems.held_out))
    self._sample_held_out.eval_shape(params, *held_out, key, 0.0)
    rollout = self._sample.eval_shape(params, *prompts(count), key, 0.0)
    state = self.trainer.init.eval_shape(params)
    likelihood = rollout.logprobs
    routing = rollout.routing if self._replays else None
    for side in (self.trainer, self._reference)[: 2 if settings.beta else 1]:
      side.score.eval_shape(params, rollout, routing, key)
    sampled = grpo.Sampled(
      jax.ShapeDtypeStruct((count,), jnp.float32),
      rollout.mask,
      likelihood,
      likelihood if settings.iterations * settings.minibatches > 1 else None,
      likelihood if settings.beta else None,
    )
    self.trainer.update.eval_shape(state, rollout, sampled, key)

  def collect(self, params: Any, seed: int, step: int) -> tuple[Answers, Scalars]:
    """Answers to the step's questions, of which more are drawn where all answers to one are worth
    the same and `grpo.max_rollouts` allows; and what is said of all that were sampled."""
    settings, own = self._config.grpo, self._config.rollout
    found: list[Answers] = []
    informative: list[np.ndarray] = []
    for draw in range(settings.max_rollouts):
      problems = self._problems.train(seed, step, own.prompts, draw)
      key = jax.random.fold_in(_key(seed, step), draw)
      found.append(self._answers(self._sample, params, problems, own.group, key, self.noise(step)))
      groups = found[-1].rewards.reshape(own.prompts, own.group)
      informative.append(groups.min(axis=1) < groups.max(axis=1))
      if sum(map(np.sum, informative)) >= own.prompts:
        break
    every = functools.reduce(_joined, found)
    said = self._said(every) | {"groups/mixed": float(np.mean(informative))}
    said["sampled"] = float(len(every.rewards))  # answers, of all draws
    if len(found) == 1:
      return every, said
    order = np.argsort(~np.concatenate(informative), kind="stable")[: own.prompts]
    rows = (order[:, None] * own.group + np.arange(own.group)).ravel()
    return _taken(every, rows), said

  def update(
    self, state: TrainState, answers: Answers, reference: Any, seed: int, step: int
  ) -> tuple[TrainState, Scalars]:
    """The state after all updates of a step, and what they said: means over the updates, extremes
    of extremes, and the distance between rollout and trainer before anything had changed."""
    settings, b = self._config.grpo, len(answers.rewards)
    key, said = _key(seed, step), []
    sampled = self._sampled(state.params, answers, reference, key)
    rng = np.random.default_rng([seed, step])
    for _ in range(settings.iterations):
      order = np.arange(b) if settings.minibatches == 1 else rng.permutation(b)
      for rows in np.split(order, settings.minibatches):
        part = (answers.rollout, sampled)
        if settings.minibatches > 1:
          part = _rows(answers.rollout, rows), jax.tree.map(lambda x, own=rows: x[own], sampled)
        state, of_update = self.trainer.update(state, *part, key)
        said.append(of_update)
    said = jax.device_get(said)
    first = said[0]
    if settings.minibatches > 1:  # the first update saw some of the answers alone
      rollout = answers.rollout
      first = jax.device_get(grpo.divergence(rollout.logprobs, sampled.old, rollout.mask))
    of_step = {name: float(_over_updates(name)([s[name] for s in said])) for name in said[0]}
    return state, of_step | {name: float(first[name]) for name in grpo.DIVERGENCE}

  def evaluate(self, params: Any) -> tuple[Scalars, list[dict[str, Any]]]:
    """On the held-out problems; some of them are told with their answers."""
    problems, key = list(self._problems.held_out), jax.random.key(_EVALUATION)
    found = self._answers(self._sample_held_out, params, problems, 1, key, 0.0)
    said = self._said(found)
    told = [
      {"question": p.question, "answer": text, "expected": p.answer, "reward": float(reward)}
      for p, text, reward in zip(problems, found.texts, found.rewards, strict=True)
    ]
    return said, told[: self._config.samples_kept]

  def probe(
    self, state: TrainState, answers: Answers, reference: Any, seed: int, step: int
  ) -> tuple[list[dict[str, Any]], Scalars]:
    """The errors of every operand by path, and how far rollout and trainer are apart without
    replay, with the share of the tokens whose experts differ."""
    rollout, key = answers.rollout, _key(seed, step)
    sampled = self._sampled(state.params, answers, reference, key)
    of_trainer, of_rollout = (
      probes.probe_rows(
        jax.device_get(side.probe(state, rollout, sampled, key)), side.policy, self._num_layers
      )
      for side in (self.trainer, self._rollout_side)
    )
    rows = [
      {"path": "forward" if row["gemm"] in _FORWARD else "backward"} | row for row in of_trainer
    ]
    rows += [{"path": "rollout"} | row for row in of_rollout if row["gemm"] in _FORWARD]
    score = self.trainer.score(state.params, rollout, None, key)
    said = grpo.divergence(rollout.logprobs, score.logprobs, rollout.mask)
    said = {f"unreplayed/{name}": value for name, value in said.items()}
    if self._is_mixture:
      said |= flip_shares(rollout.routing, score.routing, rollout.mask)
    return rows, {name: float(value) for name, value in jax.device_get(said).items()}

  def gradients(
    self, params: Any, answers: Answers, seed: int, step: int = 0, quantizers: States | None = None
  ) -> Any:
    """Of the loss of the first update, shaped like `params`; `quantizers` are the trainer's states,
    where they are not the first."""
    state = self.trainer.init(params)
    if quantizers is not None:
      state = dataclasses.replace(state, quantizers=quantizers)
    key = _key(seed, step)
    sampled = self._sampled(params, answers, params, key)
    return self.trainer.gradients(state, answers.rollout, sampled, key)

  def noise(self, step: int) -> float:
    """The standard deviation of a step."""
    return noise_at(self._config.noise, step, self._config.steps) if self._arm.has_noise else 0.0

  def _answers(self, sample, params, problems: Sequence[Problem], group: int, key, noise):
    repeated = [problem for problem in problems for _ in range(group)]
    width = self._config.rollout.max_prompt_tokens
    prompts = padded_prompts([problem.question for problem in repeated], self._text, width)
    rollout = sample(params, *prompts, key, noise)
    texts = answers_of(rollout, self._text)
    pattern = self._config.task.pattern
    rewards = [p.reward(answer_in(text, pattern)) for p, text in zip(repeated, texts, strict=True)]
    return Answers(rollout, repeated, texts, np.array(rewards, np.float32))

  def _said(self, answers: Answers) -> Scalars:
    rollout, new = answers.rollout, self._config.rollout.max_new_tokens
    lengths, entropy = jax.device_get(
      (rollout.lengths, grpo.mean_of(rollout.entropy, rollout.mask))
    )
    ends = np.take_along_axis(np.asarray(rollout.answers), lengths[:, None] - 1, axis=1)
    return {
      "reward": float(answers.rewards.mean()),
      "accuracy": float(np.mean(answers.rewards == 1)),
      "entropy": float(entropy),
      "length": float(lengths.mean()),
      "truncated": float(np.mean((lengths == new) & (ends[:, 0] != self._text.stop_token))),
    }

  def _sampled(self, params, answers: Answers, reference, key) -> grpo.Sampled:
    settings, own, rollout = self._config.grpo, self._config.rollout, answers.rollout
    penalty = grpo.overlong_penalty(
      np.asarray(rollout.lengths), own.max_new_tokens, settings.overlong_buffer
    )
    rewards = jnp.asarray(answers.rewards + penalty, jnp.float32).reshape(-1, own.group)
    old = of_reference = None
    routing = rollout.routing if self._replays else None
    if settings.iterations * settings.minibatches > 1:
      old = self.trainer.score(params, rollout, routing, key).logprobs
    if settings.beta:
      of_reference = self._reference.score(reference, rollout, routing, key).logprobs
    return grpo.Sampled(
      grpo.advantages(rewards, settings.normalize_std).ravel(),
      rollout.mask,
      rollout.logprobs,
      old,
      of_reference,
    )


def _over_updates(name: str) -> Callable[[Sequence[float]], np.floating]:
  """What tells of all updates of a step what each says by that name."""
  if name.endswith("max"):
    return np.max
  return np.min if name.endswith("min") else np.mean


def _key(seed: int, step: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), step)


def _rows(rollout: Rollout, rows: np.ndarray) -> Rollout:
  routing = None if rollout.routing is None else rollout.routing[:, rows]
  others = jax.tree.map(lambda x: x[rows], dataclasses.replace(rollout, routing=None))
  return dataclasses.replace(others, routing=routing)


def _taken(answers: Answers, rows: np.ndarray) -> Answers:
  return Answers(
    _rows(answers.rollout, rows),
    [answers.problems[i] for i in rows],
    [answers.texts[i] for i in rows],
    answers.rewards[rows],
  )


def _joined(one: Answers, other: Answers) -> Answers:
  a, b = one.rollout, other.rollout
  routing = None
  if a.routing is not None:
    routing = jnp.concatenate([a.routing, b.routing], axis=1)
  both = jax.tree.map(
    lambda x, y: jnp.concatenate([x, y]),
    *(dataclasses.replace(rollout, routing=None) for rollout in (a, b)),
  )
  return Answers(
    dataclasses.replace(both, routing=routing),
    one.problems + other.problems,
    one.texts + other.texts,
    np.concatenate([one.rewards, other.rewards]),
  )
