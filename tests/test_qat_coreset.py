"""Scores of a coreset against NumPy, and which windows are trained on when."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qat_cases import small_model

from experiments.qat import coreset, policies
from fp4jax import MXFP4

W4A4 = policies.policy_of(policies.nearest(MXFP4, activations=True))


def draws(seed, *shape, size=3.0):
  return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def softmax(x):
  e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_scores_are_the_norms_of_the_definition():
  teacher, student = draws(0, 4, 7, 20), draws(1, 4, 7, 20)
  targets = np.random.default_rng(2).integers(0, 20, (4, 7))
  evs, ds = coreset.token_scores(jnp.array(teacher), jnp.array(student), jnp.array(targets))
  p = softmax(student)
  expected = np.linalg.norm(p - np.eye(20)[targets], axis=-1)
  np.testing.assert_allclose(evs, expected, rtol=1e-5)
  np.testing.assert_allclose(ds, np.linalg.norm(p - softmax(teacher), axis=-1), rtol=1e-4)


def test_scores_lie_between_0_and_the_root_of_2_and_reach_both():
  teacher, student = draws(0, 500, 9, size=30), draws(1, 500, 9, size=30)
  targets = jnp.array(np.random.default_rng(2).integers(0, 9, 500))
  for scores in coreset.token_scores(jnp.array(teacher), jnp.array(student), targets):
    assert (scores >= 0).all() and (scores <= 2**0.5 + 1e-6).all()
    assert scores.min() < 1e-3 and scores.max() > 1.41


def test_a_teacher_that_is_sure_and_right_makes_both_scores_one():
  student, targets = draws(0, 50, 12), np.random.default_rng(1).integers(0, 12, 50)
  sure = jnp.array(200 * np.eye(12, dtype=np.float32)[targets])
  evs, ds = coreset.token_scores(sure, jnp.array(student), jnp.array(targets))
  np.testing.assert_array_equal(evs, ds)


def test_the_share_of_the_error_vector_falls_as_a_cosine():
  shares = [coreset.error_vector_share(t, 6) for t in range(7)]
  np.testing.assert_allclose(shares, np.cos(np.arange(7) * np.pi / 12), atol=1e-12)
  assert shares[0] == 1


def test_the_largest_are_selected_and_of_equals_the_first():
  np.testing.assert_array_equal(coreset.select(np.array([1.0, 3, 2, 3, 0, 2]), 3), [1, 2, 3])


def pool_of(n):
  return np.repeat(np.arange(n, dtype=np.int32)[:, None], 5, axis=1)


def test_each_epoch_is_all_of_the_coreset_that_was_selected_last():
  asked = []

  def score(share):
    asked.append(share)
    return np.roll(np.arange(12.0), 4 * len(asked))  # another third each time

  rng = np.random.default_rng(0)
  batches = list(coreset.epochs_of(pool_of(12), score, 1 / 3, 6, 2, 2, rng))
  assert [b.shape for b in batches] == [(2, 5)] * 12
  np.testing.assert_allclose(asked, [np.cos(np.pi / 12 * t) for t in (0, 2, 4)])
  epochs = [np.concatenate(batches[i : i + 2])[:, 0].tolist() for i in range(0, 12, 2)]
  expected = [coreset.select(np.roll(np.arange(12.0), 4 * (i // 2 + 1)), 4) for i in range(6)]
  assert [sorted(e) for e in epochs] == [e.tolist() for e in expected]
  assert len({tuple(e) for e in epochs}) > 3  # orders of their own
  again = coreset.epochs_of(pool_of(12), score, 1 / 3, 2, 2, 2, np.random.default_rng(0))
  asked.clear()
  np.testing.assert_array_equal(list(again), batches[:4])


@pytest.mark.parametrize("fraction", [0.1, 1.5])
def test_a_coreset_that_is_no_batch_is_refused(fraction):
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match=rf"fraction={fraction} of 12 windows has \d+, which is no"):
    next(coreset.epochs_of(pool_of(12), lambda share: np.zeros(12), fraction, 1, 1, 4, rng))


@pytest.mark.slow
def test_scores_of_windows_are_means_over_their_tokens():
  model = small_model()
  pool = np.random.default_rng(0).integers(0, 256, (5, 9)).astype(np.int32)
  found = [
    coreset.window_scores(model, W4A4, nnx.state(model), pool, 2, share) for share in (0, 0.25, 1)
  ]
  teacher, student = (model(pool[:, :-1], policy)[0] for policy in (policies.TEACHER, W4A4))
  p = softmax(np.asarray(student))
  evs = np.linalg.norm(p - np.eye(256)[pool[:, 1:]], axis=-1).mean(1)
  ds = np.linalg.norm(p - softmax(np.asarray(teacher)), axis=-1).mean(1)
  # Compiled, bf16 may round elsewhere than op by op.
  for share, scores in zip((0, 0.25, 1), found, strict=True):
    np.testing.assert_allclose(scores, share * evs + (1 - share) * ds, rtol=0.1)
  assert ds.max() < 0.9 * evs.min()
