"""The loss of GRPO, its gradient and what is said beside it, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.rl import grpo
from experiments.rl.grpo import GRPOSettings, Sampled

B, T, VOCAB = 6, 5, 7
ADVANTAGES = np.array([0.8, -1.2, 0.5, -1.3, 0.9, -0.6])  # ratios meet both clips
SETTINGS = {
  "grpo": GRPOSettings(),
  "dapo": grpo.dapo(),
  "kl": GRPOSettings(beta=0.3),
  "no importance sampling": GRPOSettings(importance_cap=None),
  "one side clips sooner": GRPOSettings(clip_low=0.05, clip_high=0.6),
  "tight clip and cap": GRPOSettings(clip_low=0.01, clip_high=0.02, importance_cap=1.01),
}


def case(seed=0):
  """Logits of a policy, the tokens, and of other policies their log-probabilities."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(B, T, VOCAB))
  tokens = rng.integers(VOCAB, size=(B, T))
  near = lambda scale: log_softmax(logits + scale * rng.normal(size=logits.shape))  # noqa: E731
  taken = lambda x: np.take_along_axis(x, tokens[..., None], 2)[..., 0]  # noqa: E731
  lengths = np.array([5, 1, 3, 5, 2, 4])
  mask = np.arange(T) < lengths[:, None]
  return logits, tokens, mask, taken(near(0.2)), taken(near(0.15)), taken(near(0.5))


def log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(settings, advantages, logits, tokens, mask, rollout, old, of_start):
  """The loss token by token, and its gradient in the logits by hand, all in float64."""
  loss, gradient = 0.0, np.zeros_like(logits)
  for i in range(B):
    n = mask[i].sum()
    for t in range(n):
      share = 1 / mask.sum() if settings.mean == "token" else 1 / (B * n)
      p = np.exp(log_softmax(logits[i, t]))
      logp = np.log(p[tokens[i, t]])
      ratio, a = np.exp(logp - old[i, t]), advantages[i]
      cap = settings.importance_cap
      weight = 1.0 if cap is None else min(np.exp(old[i, t] - rollout[i, t]), cap)
      bounded = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
      loss -= share * weight * min(ratio * a, bounded * a)
      in_logp = -weight * ratio * a if ratio * a <= bounded * a else 0.0
      if settings.beta:
        d = of_start[i, t] - logp
        loss += share * settings.beta * (np.exp(d) - d - 1)
        in_logp += settings.beta * (1 - np.exp(d))
      one_hot = np.eye(VOCAB)[tokens[i, t]]
      gradient[i, t] = share * in_logp * (one_hot - p)
  return loss, gradient


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradient_are_those_of_the_definition(settings):
  """float32 log-probabilities are off by some 2^-22, their ratios as much; the loss is a mean of
  terms below 4."""
  logits, tokens, mask, rollout, old, of_start = case()
  advantages = ADVANTAGES
  expected, gradient = reference(settings, advantages, logits, tokens, mask, rollout, old, of_start)
  sampled = Sampled(
    *(jnp.asarray(a, jnp.float32) for a in (advantages,)),
    jnp.asarray(mask),
    jnp.asarray(rollout, jnp.float32),
    jnp.asarray(old, jnp.float32),
    jnp.asarray(of_start, jnp.float32) if settings.beta else None,
  )

  def loss(logits):
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], 2)[..., 0]
    return grpo.loss(logp, sampled, settings)

  (found, said), of_logits = jax.value_and_grad(loss, has_aux=True)(
    jnp.asarray(logits, jnp.float32)
  )
  np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2.0**-20)
  np.testing.assert_allclose(of_logits, gradient, rtol=0, atol=4 * 2.0**-20)
  assert ("kl" in said) == bool(settings.beta)


def test_the_clip_share_counts_the_tokens_without_a_gradient():
  settings = SETTINGS["tight clip and cap"]
  logits, tokens, mask, rollout, old, _ = case()
  advantages = ADVANTAGES
  logp = np.take_along_axis(log_softmax(logits), tokens[..., None], 2)[..., 0]
  ratio, a = np.exp(logp - old), advantages[:, None]
  cut = np.where(a > 0, ratio > 1 + settings.clip_high, ratio < 1 - settings.clip_low)
  sampled = Sampled(jnp.asarray(advantages), jnp.asarray(mask), rollout, jnp.asarray(old))
  _, said = grpo.loss(jnp.asarray(logp), sampled, settings)
  assert 0 < cut[mask].mean() < 1
  np.testing.assert_allclose(said["pg_clipfrac"], cut[mask].mean(), rtol=1e-6)
  np.testing.assert_allclose(said["is_ratio/max"], ratio[mask].max(), rtol=1e-5)
  np.testing.assert_allclose(said["is_ratio/min"], ratio[mask].min(), rtol=1e-5)


def test_what_was_not_sampled_has_no_part():
  """Whatever stands there, infinities too: neither in the loss nor in its gradient."""
  logits, tokens, mask, rollout, old, of_start = case()
  logp = np.take_along_axis(log_softmax(logits), tokens[..., None], 2)[..., 0]

  def run(fill):
    arrays = [jnp.asarray(np.where(mask, x, fill), jnp.float32) for x in (rollout, old, of_start)]
    sampled = Sampled(jnp.arange(-2.0, 4), jnp.asarray(mask), *arrays)
    loss = lambda x: grpo.loss(x, sampled, SETTINGS["kl"])[0]  # noqa: E731
    return jax.value_and_grad(loss)(jnp.asarray(np.where(mask, logp, 0.5 * fill), jnp.float32))

  (loss, gradient), (other, other_gradient) = run(0.0), run(-200.0)
  assert loss == other
  np.testing.assert_array_equal(gradient, other_gradient)
  assert not np.asarray(gradient)[~mask].any()


def test_without_old_the_update_is_on_policy():
  """The ratio is 1, and its gradient that of the log-probability."""
  logits, tokens, mask, *_ = case()
  logp = np.take_along_axis(log_softmax(logits), tokens[..., None], 2)[..., 0]
  a = jnp.arange(1.0, B + 1)
  sampled = Sampled(a, jnp.asarray(mask), jnp.asarray(logp, jnp.float32))
  loss = lambda x: grpo.loss(x, sampled, GRPOSettings(mean="token"))  # noqa: E731
  gradient, said = jax.grad(loss, has_aux=True)(jnp.asarray(logp, jnp.float32))
  np.testing.assert_allclose(gradient, -np.where(mask, a[:, None], 0) / mask.sum(), rtol=1e-6)
  assert said["is_ratio/max"] == said["is_ratio/min"] == said["sampler_is/weight_mean"] == 1


def test_advantages_are_relative_to_their_group():
  rewards = np.array([[1, 0, 0, 1], [0.2, 0.2, 0.2, 0.2], [0, 0, 0, 3]], np.float32)
  found = np.asarray(grpo.advantages(jnp.asarray(rewards)))
  wide = rewards.astype(np.float64)
  centred = wide - wide.mean(1, keepdims=True)
  expected = centred / (wide.std(1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert not found[1].any()
  np.testing.assert_allclose(
    grpo.advantages(jnp.asarray(rewards), normalize_std=False), centred, atol=1e-6
  )


@pytest.mark.parametrize("group", [2, 3, 8, 16, 31])
def test_a_group_worth_the_same_has_no_advantage(group):
  """The mean of equal float32 numbers may be an ulp off them."""
  worth = np.linspace(0, 1, 101, dtype=np.float32)
  rewards = np.repeat(worth[:, None], group, axis=1)
  means = np.asarray(jnp.mean(jnp.asarray(rewards), axis=1))
  assert group < 8 or (means != worth).any()  # so that this is no test of nothing
  for normalize_std in (True, False):
    assert not np.asarray(grpo.advantages(jnp.asarray(rewards), normalize_std)).any()


def test_long_answers_lose_linearly():
  """arXiv 2503.14476, equation 13, for 16 tokens of which the last 4 cost."""
  found = grpo.overlong_penalty(np.array([1, 12, 13, 14, 16]), 16, 4)
  np.testing.assert_allclose(found, [0, 0, -0.25, -0.5, -1])
  assert not grpo.overlong_penalty(np.array([16]), 16, 0).any()


def test_the_divergence_of_equal_numerics_is_zero_and_of_others_is_not():
  _, _, mask, rollout, old, _ = case()
  same = grpo.divergence(jnp.asarray(rollout), jnp.asarray(rollout), jnp.asarray(mask))
  assert same.keys() == set(grpo.DIVERGENCE)
  assert same.pop("token_mult_prob_error") == 1
  assert not any(map(float, same.values()))
  found = grpo.divergence(jnp.asarray(rollout), jnp.asarray(old), jnp.asarray(mask))
  gap = (old - rollout)[mask]
  expected = (
    -gap.mean(),
    (np.exp(gap) - gap - 1).mean(),
    np.abs(gap).mean(),
    np.abs(gap).max(),
    np.exp(np.abs(gap)).mean(),
  )
  np.testing.assert_allclose([found[name] for name in grpo.DIVERGENCE], expected, rtol=1e-4)
