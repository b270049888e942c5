"""Group-relative policy optimization (arXiv 2402.03300) and its DAPO variant (2503.14476).

Of a token y_t of answer i in a group of G answers to one question:

    A_i   = (r_i - mean(r)) / (std(r) + 1e-6)            its advantage
    rho_t = p(y_t) / p_old(y_t)                          of the policy that the update began with
    w_t   = min(p_old(y_t) / p_rollout(y_t), C)          truncated importance sampling
    loss  = mean of -w_t min(rho_t A_i, clip(rho_t, 1 - eps_low, 1 + eps_high) A_i) + beta k3_t
    k3_t  = p_ref / p - log(p_ref / p) - 1               towards the reference

p_old is the trainer's own, p_rollout what the token was sampled from: other numerics of the same
weights. A constant w_t has no gradient.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32

_STD_FLOOR = 1e-6
Means = Literal["sequence", "token"]


@dataclasses.dataclass
class GRPOSettings:
  """GRPO's by default; `dapo()` has those of DAPO."""

  clip_low: float = 0.2
  clip_high: float = 0.2
  beta: float = 0.0  # of the KL divergence to the policy that training began with
  importance_cap: float | None = 2.0  # of w; None: w is 1, the rollout is taken for the trainer
  normalize_std: bool = True  # divide advantages by the group's standard deviation
  mean: str = "sequence"  # "sequence": of each answer, then over answers; "token": over all tokens
  iterations: int = 1  # passes over the answers of one rollout
  minibatches: int = 1  # updates in a pass
  # Groups whose answers are all worth the same are replaced by others, up to so many rollouts a
  # step; 1: they stay, and teach nothing.
  max_rollouts: int = 1
  # Answers longer than max_new_tokens less this many lose up to 1, linearly; 0: none does.
  overlong_buffer: int = 0


def dapo() -> GRPOSettings:
  """Clip-higher, mean over tokens, dynamic sampling; no KL."""
  return GRPOSettings(clip_high=0.28, mean="token", max_rollouts=3)


def advantages(
  rewards: Float32[Array, "group answer"], normalize_std: bool = True
) -> Float32[Array, "group answer"]:
  """Of each answer within its group; 0 throughout where all are worth the same."""
  centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
  # The float32 mean of equal rewards may be an ulp off, which the division would blow up.
  is_mixed = jnp.ptp(rewards, axis=1, keepdims=True) > 0
  centred = jnp.where(is_mixed, centred, 0)
  if not normalize_std:
    return centred
  return centred / (jnp.std(rewards, axis=1, keepdims=True) + _STD_FLOOR)


def overlong_penalty(lengths, max_new_tokens: int, buffer: int):
  """DAPO's soft punishment, 0 to -1, of answers of `lengths` tokens."""
  if buffer == 0:
    return 0.0 * lengths
  return -jnp.clip((lengths - (max_new_tokens - buffer)) / buffer, 0, 1)


class Sampled(NamedTuple):
  """What the loss reads of each token of the answers, beside what the policy says now."""

  advantages: Float32[Array, " b"]
  mask: Bool[Array, "b t"]  # whether a token was sampled: not of a prompt, not past the end
  rollout: Float32[Array, "b t"]  # log-probabilities: as sampled,
  # by the trainer when the updates began; None: as the trainer says now,
  old: Float32[Array, "b t"] | None = None
  reference: Float32[Array, "b t"] | None = None  # by the policy that training began with


def loss(
  logprobs: Float32[Array, "b t"], sampled: Sampled, settings: GRPOSettings
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
  """What is minimized, and of it: `pg_clipfrac` (tokens whose gradient the clip takes away),
  `is_ratio/*` (rho), `sampler_is/*` (w) and, with a reference, `kl`."""
  s, mask = settings, sampled.mask
  old = lax.stop_gradient(logprobs if sampled.old is None else sampled.old)
  a = sampled.advantages[:, None]
  ratio = jnp.exp(jnp.where(mask, logprobs - old, 0))
  clipped = jnp.clip(ratio, 1 - s.clip_low, 1 + s.clip_high)
  gain = jnp.minimum(ratio * a, clipped * a)
  weight = jnp.exp(jnp.where(mask, old - sampled.rollout, 0))
  if s.importance_cap is None:
    weight = jnp.ones_like(weight)
  else:
    weight = jnp.minimum(weight, s.importance_cap)
  of_token = -lax.stop_gradient(weight) * gain
  said = {
    "pg_clipfrac": mean_of(clipped * a < ratio * a, mask),
    "is_ratio/mean": mean_of(ratio, mask),
    "is_ratio/max": _extreme(jnp.max, ratio, mask, -jnp.inf),
    "is_ratio/min": _extreme(jnp.min, ratio, mask, jnp.inf),
    "sampler_is/weight_mean": mean_of(weight, mask),
    "sampler_is/weight_min": _extreme(jnp.min, weight, mask, jnp.inf),
  }
  if sampled.reference is not None:
    kl = k3(logprobs, sampled.reference, mask)
    of_token += s.beta * kl
    said["kl"] = mean_of(kl, mask)
  return mean_of(of_token, mask, s.mean), said


def k3(logprobs, reference, mask):
  """An estimate of KL(p || reference) from one token of p, never negative."""
  d = jnp.where(mask, lax.stop_gradient(reference) - logprobs, 0)
  return jnp.expm1(d) - d


def mean_of(x, mask, mean: Means = "token") -> Float32[Array, ""]:
  """Over the tokens of `mask`; "sequence": over each row's, then over rows."""
  x, count = jnp.where(mask, x, 0), jnp.sum(mask, axis=1)
  if mean == "sequence":
    return jnp.mean(jnp.sum(x, axis=1) / jnp.maximum(count, 1))
  return jnp.sum(x) / jnp.maximum(jnp.sum(count), 1)


DIVERGENCE = (
  "ppo_kl",
  "rollout_kl",
  "sampler_trainer/logp_diff_mean",
  "sampler_trainer/logp_diff_max",
  "token_mult_prob_error",
)


def divergence(
  rollout: Float32[Array, "b t"], trainer: Float32[Array, "b t"], mask: Bool[Array, "b t"]
) -> dict[str, jax.Array]:
  """How far the numerics of the rollout lie from the trainer's on the tokens that it sampled.

  `ppo_kl` is the mean of log(p_rollout / p_trainer), an estimate of KL(p_rollout || p_trainer);
  `rollout_kl` the estimate that is never negative, k3; `token_mult_prob_error` the mean of
  exp |log p_trainer - log p_rollout|, which is healthy below 1.03 to 1.05.
  """
  d = jnp.where(mask, trainer - rollout, 0)
  gap = jnp.abs(d)
  return {
    "ppo_kl": mean_of(-d, mask),
    "rollout_kl": mean_of(jnp.expm1(d) - d, mask),
    "sampler_trainer/logp_diff_mean": mean_of(gap, mask),
    "sampler_trainer/logp_diff_max": _extreme(jnp.max, gap, mask, 0),
    "token_mult_prob_error": mean_of(jnp.exp(gap), mask),
  }


def _extreme(of, x, mask, nothing):
  return of(jnp.where(mask, x, nothing))
