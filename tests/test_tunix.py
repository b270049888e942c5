"""tunix trains our policy: what its rollout samples, what its trainer reads, and that it learns."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rl_cases import SMALL, letters

from experiments.config import Quantize
from experiments.programs import compiled
from experiments.rl.arms import arm_of
from experiments.rl.config import RolloutSettings
from experiments.rl.rollouts import make_sampler, padded_prompts
from experiments.text import Bytes
from experiments.train import quantized_policy
from fp4jax.models import LanguageModel
from fp4jax.quantized_array import QuantizedArray

pytest.importorskip("tunix", reason="needs tunix: pip install '.[rl]'")

import optax
from tunix.rl.agentic import agentic_grpo_learner
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from experiments.rl.tunix_rollout import Actor, QuantizedRollout, Tokenizer

# tunix calls what JAX is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TEXT, NEW, WIDTH = Bytes(), 5, 10
ONE_LAYER = dataclasses.replace(SMALL, num_layers=1)
QUESTIONS = ["12 ab", "3 fedcb", "45 c"]
GREEDY = RolloutConfig(
  max_tokens_to_generate=NEW, max_prompt_length=WIDTH, temperature=0.0, return_logprobs=True
)
SAMPLING = dataclasses.replace(GREEDY, temperature=1.0)


def new_model(seed: int = 0) -> LanguageModel:
  return LanguageModel(ONE_LAYER, TEXT.vocab_size, nnx.Rngs(seed))


def policies(arm: str):
  """Of the rollout and of the trainer."""
  arm = arm_of(arm)
  return [quantized_policy(recipe, Quantize(), None) for recipe in (arm.rollout, arm.trainer)]


def new_rollout(arm: str, model: LanguageModel | None = None, **options) -> QuantizedRollout:
  rollout, trainer = policies(arm)
  actor = Actor(model or new_model(), trainer)
  return QuantizedRollout(actor, Tokenizer(TEXT), None, SAMPLING, policy=rollout, **options)


def answers(rollout: QuantizedRollout, config: RolloutConfig = GREEDY):
  """Tokens and their log-probabilities, end to end."""
  out = rollout.generate(QUESTIONS, config)
  return np.concatenate(out.tokens), np.concatenate(out.logprobs)


def expected(arm: str, model: LanguageModel):
  """What `experiments.rl.rollouts` says, greedily and without noise."""
  graph, params = nnx.split(model)
  settings = RolloutSettings(max_prompt_tokens=WIDTH, max_new_tokens=NEW)
  sample = make_sampler(graph, policies(arm)[0], settings, TEXT, temperature=0.0)
  prompts = padded_prompts(QUESTIONS, TEXT, WIDTH)
  found = sample(nnx.to_pure_dict(params), *prompts, jax.random.key(9), 0.0)
  is_new = np.arange(NEW) < np.asarray(found.lengths)[:, None]
  return np.asarray(found.answers)[is_new], np.asarray(found.logprobs)[np.asarray(found.mask)]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["mxfp4", "mxfp4+of", "mxfp4@forward"])
def test_a_rollout_is_that_of_our_own_sampler(arm):
  """To the bit, packed or not; the rollout of the last arm is bf16's."""
  rollout = new_rollout(arm)
  tokens, logprobs = answers(rollout)
  is_packed = lambda x: isinstance(x, QuantizedArray)  # noqa: E731
  kept = jax.tree.leaves(rollout._weights, is_leaf=is_packed)
  assert any(map(is_packed, kept)) == (arm == "mxfp4")
  of_arm, of_bf16 = expected(arm, new_model()), expected("bf16", new_model())
  np.testing.assert_array_equal(tokens, of_arm[0])
  np.testing.assert_array_equal(logprobs, of_arm[1])
  gap = np.abs(logprobs - of_bf16[1]).max() if len(tokens) == len(of_bf16[0]) else np.inf
  assert gap == 0 if arm == "mxfp4@forward" else gap > 0.02


@pytest.mark.slow
def test_an_update_reaches_the_rollout():
  rollout, other = new_rollout("mxfp4"), new_model(1)
  before = answers(rollout)
  rollout.update_params(nnx.state(Actor(other, None), nnx.Param), (nnx.Param,))
  after, of_other = answers(rollout), expected("mxfp4", other)
  np.testing.assert_array_equal(after[1], of_other[1])
  assert not np.array_equal(before[1], after[1])
  rollout.update_params(nnx.state(Actor(new_model(), None)))
  np.testing.assert_array_equal(answers(rollout)[1], before[1])


@pytest.mark.slow
def test_noise_is_drawn_anew_upon_clean_weights():
  sigmas = (0.0, 0.3, 0.3, 0.0)
  rollout = new_rollout("mxfp4+aqn", sigmas=sigmas)
  clean = jax.device_get(nnx.to_pure_dict(nnx.state(rollout.model())))
  found = []
  for _ in (*sigmas, "after the last"):
    found.append(answers(rollout))
    kept = nnx.state(rollout.model())
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(kept), clean)
    rollout.update_params(kept)
  for quiet in (3, 4):
    np.testing.assert_array_equal(found[quiet][1], found[0][1])
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert not np.array_equal(found[a][1], found[b][1])


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["bf16", "mxfp4", "mxfp4@rollout"])
def test_the_trainer_reads_what_was_sampled_under_its_own_numerics(arm):
  """Rows padded on both sides, which the rollout read one token after the other."""
  rollout = new_rollout(arm)
  out = rollout.generate(QUESTIONS, dataclasses.replace(SAMPLING, eos_tokens=list(range(128, 256))))
  lengths = [len(row) for row in out.tokens]
  assert len(set(lengths)) > 1
  padded = np.array([np.pad(row, (0, NEW - len(row)), constant_values=256) for row in out.tokens])
  # By itself tunix leaves it to XLA where to round.
  logps = compiled(rollout.get_per_token_logps)(out.left_padded_prompt_tokens, padded)
  is_new = np.arange(NEW) < np.array(lengths)[:, None]
  gap = np.abs(np.asarray(logps)[is_new] - np.concatenate(out.logprobs)).max()
  assert gap > 0.05 if arm == "mxfp4@rollout" else gap < 1e-5


@pytest.mark.slow
def test_every_call_draws_anew_and_a_seed_says_how():
  def two(seed):
    rollout = new_rollout("bf16", seed=seed)
    return [answers(rollout, SAMPLING)[1] for _ in range(2)]

  first, again, other = two(3), two(3), two(4)
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], other[0])


@pytest.mark.slow
def test_one_prompt_may_come_alone_and_without_log_probabilities():
  rollout = new_rollout("bf16")
  out = rollout.generate("12 ab", dataclasses.replace(SAMPLING, return_logprobs=False))
  np.testing.assert_array_equal(out.left_padded_prompt_tokens, [[256] * 4 + [*b"12 ab\n"]])
  assert out.logits is None and out.logprobs is None
  assert out.text == [TEXT.decode(out.tokens[0].tolist())]


def test_the_padding_is_no_token_of_the_policy():
  tokenizer = Tokenizer(TEXT)
  assert (tokenizer.pad_id(), tokenizer.eos_id()) == (256, 0)
  assert tokenizer.decode(tokenizer.encode("é")) == "é\n"
  said = [{"role": "system", "content": "no"}, {"role": "user", "content": np.array("12 ab")}]
  assert tokenizer.parse(said, add_generation_prompt=True, is_first_msg=True) == "12 ab"
  actor = Actor(new_model(), policies("bf16")[1])
  mask = jnp.tril(jnp.ones((1, 3, 3), bool))
  logits, cache = actor(jnp.array([[1, 2, 256]]), attention_mask=mask)
  assert logits.shape == (1, 3, 257) and cache is None
  assert not jax.nn.softmax(logits)[..., 256].any()
  with pytest.raises(ValueError, match="max_seq_token_per_tpu must be None"):
    actor(jnp.array([[1, 2]]))


def test_what_would_be_misread_is_refused():
  rollout = new_rollout("bf16")
  for change, said in (
    ({"temperature": 0.9}, "temperature=0.9 is neither 1 nor 0"),
    ({"top_k": 5}, "top_k=5"),
    ({"top_p": 0.9}, "top_p=0.9"),
    ({"seed": 1}, "the same numbers"),
    ({"data_type": jnp.bfloat16}, "data_type="),
    ({"max_prompt_length": 6}, r"prompt 1 has 8 tokens, c.max_prompt_length=6"),
  ):
    with pytest.raises(ValueError, match=said):
      rollout.generate(QUESTIONS, dataclasses.replace(GREEDY, **change))


def rewards_into(means: list[float]):
  """What share of an answer's first three bytes are letters below n; appends each step's mean."""

  def low_letters(prompts, completions, **_):
    found = [letters(0).score(text) for text in completions]
    means.append(np.mean(found))
    return found

  return low_letters


def cluster_of(arm: str, steps: int, config: RolloutConfig = SAMPLING, **options) -> RLCluster:
  rollout, trainer = policies(arm)
  mesh = jax.make_mesh((1,), ("fsdp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
  cluster = ClusterConfig(
    role_to_mesh=dict.fromkeys((Role.ACTOR, Role.ROLLOUT, Role.REFERENCE), mesh),
    rollout_engine=functools.partial(QuantizedRollout, policy=rollout, **options),
    training_config=RLTrainingConfig(
      eval_every_n_steps=10**6, max_steps=steps, actor_optimizer=optax.adam(1e-2)
    ),
    rollout_config=config,
  )
  return RLCluster(
    actor=Actor(new_model(), trainer),
    reference=Actor(new_model(), policies("bf16")[1]),
    tokenizer=Tokenizer(TEXT),
    cluster_config=cluster,
  )


def prompts(steps: int, count: int):
  """tunix repeats the entries of arrays, not of lists."""
  return [
    {"prompts": np.array([letters(i).question for i in range(count * s, count * s + count)])}
    for s in range(steps)
  ]


def params_of(actor: Actor):
  return jax.device_get(nnx.to_pure_dict(nnx.state(actor)))


def same(one, other) -> list[bool]:
  return jax.tree.leaves(jax.tree.map(np.array_equal, one, other))


@pytest.mark.slow
def test_grpo_raises_the_reward():
  steps, rewards = 15, []
  cluster = cluster_of("mxfp4+aqn", steps, sigmas=(0.0, 1e-2, 1e-3))
  config = GRPOConfig(num_generations=8, beta=0.0, epsilon=0.2)
  GRPOLearner(cluster, config, rewards_into(rewards)).train(prompts(steps, 4))
  assert len(rewards) == steps
  assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2


@pytest.mark.slow
def test_a_step_changes_the_weights_and_reads_the_reference_and_the_old_policy():
  cluster, said = cluster_of("mxfp4@rollout", 2), collections.defaultdict(list)
  before = params_of(cluster.rollout.model())

  def log(prefix, name, value, *_):
    if prefix == "actor":
      said[name].append(float(value))

  cluster.actor_trainer.metrics_logger.log = log
  config = GRPOConfig(num_generations=4, num_iterations=2, beta=0.1, kl_loss_mode="low_var_kl")
  GRPOLearner(cluster, config, rewards_into([])).train(prompts(1, 2))
  after = params_of(cluster.rollout.model())
  assert not any(same(before, after))
  assert all(same(after, params_of(cluster.actor_trainer.model)))
  # The first update begins where the reference and the old policy are, whose numerics the trainer
  # has: those of the rollout would move the ratio out of its clip and the KL off 0.
  kl, clipped = said["kl"], said["pg_clipfrac"]
  assert kl[0] < 1e-3 < kl[1]
  assert clipped[0] == 0 < clipped[1]


@pytest.mark.slow
def test_the_gap_between_rollout_and_trainer_weights_the_loss():
  """Truncated importance sampling, of tunix's learner for agents."""
  config = dataclasses.replace(SAMPLING, max_tokens_to_generate=8, eos_tokens=list(range(128, 256)))
  cluster, said = cluster_of("mxfp4@rollout", 1, config), {}
  before = params_of(cluster.rollout.model())
  cluster.with_external_metrics_logger(lambda buffer: said.update(buffer.metrics))
  settings = agentic_grpo_learner.GRPOConfig(
    num_generations=4, beta=0.0, max_response_length=8, sampler_is="token", max_concurrency=1
  )
  learner = agentic_grpo_learner.GRPOLearner(
    cluster, settings, rewards_into([]), chat_parser=Tokenizer(TEXT)
  )
  learner.train(prompts(1, 2))
  gap, weight = (
    np.mean(said[name][0]) for name in ("sampler_trainer/logp_diff_mean", "sampler_is/weight_mean")
  )
  assert 0.05 < gap < 0.5 and 0.02 < abs(weight - 1) < 0.5
  assert not any(same(before, params_of(cluster.rollout.model())))
