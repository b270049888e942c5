"""The divergence from the teacher against NumPy, and what is trained by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qat_cases import small_model

from experiments.qat import policies
from experiments.qat.distillation import (
  Distillation,
  kl_divergence,
  make_optimizer,
  mean_loss,
  own_text,
)
from fp4jax import MXFP4
from fp4jax.models import generate

W4A4 = policies.policy_of(policies.nearest(MXFP4, activations=True))


def logits(seed, *shape):
  return 3 * np.random.default_rng(seed).standard_normal(shape)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_the_divergence_and_its_gradient_are_those_of_the_definition():
  teacher, student, weight = logits(0, 3, 5, 40), logits(1, 3, 5, 40), logits(2, 3, 5)
  p, q = softmax(teacher), softmax(student)
  found = kl_divergence(jnp.float32(teacher), jnp.float32(student))
  np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1), rtol=1e-5)
  loss = lambda s: jnp.sum(weight * kl_divergence(jnp.float32(teacher), s))  # noqa: E731
  gradient = jax.grad(loss)(jnp.float32(student))
  np.testing.assert_allclose(gradient, weight[..., None] * (q - p), rtol=0, atol=1e-6)


def test_where_the_student_says_what_the_teacher_says_both_are_zero():
  same = jnp.float32(logits(0, 8, 50))
  assert (kl_divergence(same, same) == 0).all()
  gradient = jax.grad(lambda s: kl_divergence(same, s).sum())(same)
  # Of p (1 - sum of p), where the sum is off by a few roundings of 2^-24.
  assert np.abs(gradient).max() < 4e-7


@pytest.fixture(scope="module")
def model():
  return small_model()


def batch(seed=0, rows=4, length=17):
  return np.random.default_rng(seed).integers(0, 256, (rows, length)).astype(np.int32)


@pytest.mark.slow
def test_a_model_in_bf16_has_nothing_to_learn_of_itself(model):
  graph, params = nnx.split(model)
  run = lambda p: mean_loss(graph, policies.TEACHER, "kl", p, None, params, batch())  # noqa: E731
  loss, grads = jax.jit(jax.value_and_grad(run))(params)
  assert loss == 0
  quantized = lambda p: mean_loss(graph, W4A4, "kl", p, None, params, batch())  # noqa: E731
  others = jax.jit(jax.grad(quantized))(params)
  for zero, other in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
    assert np.abs(zero).max() < 1e-3 * np.abs(other).max()


def test_a_quantized_student_comes_nearer_and_the_teacher_stays(model):
  before = jax.tree.map(np.array, nnx.state(model))
  training = Distillation(model, W4A4, make_optimizer(1e-3, 20))
  trained = training.train([batch()] * 20)
  assert trained.tokens == 20 * 4 * 16 and len(trained.losses) == 20
  assert trained.losses[-1] < 0.8 * trained.losses[0]
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
  again = Distillation(model, W4A4, make_optimizer(1e-3, 20)).train([batch()] * 20)
  assert again.losses == trained.losses
  jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


def test_cross_entropy_is_of_the_text(model):
  graph, params = nnx.split(model)
  tokens = batch()
  found = mean_loss(graph, policies.TEACHER, "cross_entropy", params, None, params, tokens)
  said, _ = model(tokens[:, :-1], policies.TEACHER)
  p = softmax(np.asarray(said, np.float64))
  expected = -np.log(np.take_along_axis(p, tokens[:, 1:, None], -1)).mean()
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  with pytest.raises(ValueError, match="loss='mse' is not 'kl' or 'cross_entropy'"):
    mean_loss(graph, policies.TEACHER, "mse", params, None, params, tokens)


def test_the_learning_rate_rises_then_falls():
  optimizer, params = make_optimizer(1e-2, 40), {"w": jnp.ones(1)}
  state, found = optimizer.init(params), []
  for _ in range(40):
    updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
    found.append(-float(updates["w"][0]))  # Adam of a constant gradient: the rate
  assert found[0] < found[1] < found[2] == max(found)
  np.testing.assert_allclose([max(found), found[-1]], [1e-2, 1e-3], rtol=0.05)


@pytest.mark.slow
def test_own_text_is_likeliest_at_first_and_sampled_then(model):
  text = np.asarray(own_text(model, 96, 12, jax.random.key(0)))
  assert text.shape == (96, 12)
  assert len(np.unique(text[:, 0])) > 64  # of 256, drawn evenly
  likeliest = generate(
    model,
    text[:, :1],
    np.ones(96, np.int32),
    policies.TEACHER,
    key=jax.random.key(1),
    max_new_tokens=11,
    temperature=0,
  ).tokens
  same = text[:, 1:] == np.asarray(likeliest)
  for i, count in enumerate((3, 4, 5)):
    rows = same[i::3]
    assert rows[:, :count].all()
    assert rows[:, count].mean() < 0.8  # one in some is drawn even so
  # What is sampled follows what is before it: the row is one text.
  scored, _ = model.cross_entropy(text[:, :-1], text[:, 1:], policies.TEACHER)
  shuffled = np.concatenate([text[:, :6], np.roll(text[:, 6:], 1, axis=0)], 1)
  others, _ = model.cross_entropy(shuffled[:, :-1], shuffled[:, 1:], policies.TEACHER)
  assert scored[:, 5].mean() < others[:, 5].mean() - 0.5
  np.testing.assert_array_equal(text, own_text(model, 96, 12, jax.random.key(0)))
  assert (text != own_text(model, 96, 12, jax.random.key(1))).any()


def test_text_too_short_to_sample_is_refused(model):
  with pytest.raises(ValueError, match="length=6 leaves no token to sample after 5"):
    own_text(model, 2, 6, jax.random.key(0))
