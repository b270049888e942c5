"""Whole training steps of the language model: the Hopper kernels against XLA."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import gradients
from experiments.config import Experiment, Names, Optimizer, Quantize
from experiments.train import make_trainer, parameter_counts, policy_of
from fp4jax import recipes
from fp4jax.models import ModelConfig

CONFIG = Experiment(
  steps=10,
  quantize=Quantize(attention=False),
  model=ModelConfig(
    num_layers=2,
    d_model=256,
    num_heads=2,
    num_kv_heads=1,
    head_dim=128,
    num_experts=4,
    top_k=2,
    d_ff=128,
  ),
  optimizer=Optimizer(learning_rate=1e-4, warmup_steps=0),
)


@functools.cache
def trainer_of(name, implementation):
  policy = policy_of(
    recipes.by_name(name), dataclasses.replace(CONFIG, implementation=implementation)
  )
  return make_trainer(CONFIG, 256, policy)


@functools.cache
def trained(name, implementation, moved=0.0):
  """Losses and gradient norms of three steps, and Adam's first moments after them in one vector.

  The moments are sums of the three gradients, so errors show in them as they are; in the weights
  Adam makes a step of the full rate of every small gradient, whatever its sign. `moved` multiplies
  every weight by 1 +- moved first.
  """
  trainer, rng = trainer_of(name, implementation), np.random.default_rng(0)
  state, scalars = trainer.init(jnp.int32(0)), []
  move = lambda p: p * (1 + moved * rng.choice([-1, 1], p.shape)).astype(np.float32)  # noqa: E731
  state = type(state)(state.step, jax.tree.map(move, state.params), state.opt_state)
  for tokens in np.random.default_rng(1).integers(0, 256, (3, 8, 129)).astype(np.int32):
    state, row = trainer.step(state, tokens, jnp.int32(0))
    scalars.append([float(row["loss"]), float(row["grad_norm"])])
  moments = jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))
  return np.array(scalars), np.concatenate([np.float64(leaf).ravel() for leaf in moments])


# Two right programs add in different orders. That moves a bf16 or FP8 value here and there to its
# neighbour, and a token between two experts that it likes as well, and from layer to layer that
# grows. So XLA with weights moved by 2^-20, which is as little, says on any machine what the bounds
# leave room for: of the first moments it changes, for BF16, FP8 and HOPPER_FP4, 6, 12 and 27 %;
# their distance to BF16, the noise of the products, is 14 (FP8) and 38 %.
MOVED = {"implementation": "xla", "moved": 2.0**-20}


@pytest.mark.slow
@pytest.mark.parametrize(
  "other",
  [
    pytest.param(MOVED, id="xla, weights moved"),
    pytest.param({"implementation": "mosaic"}, id="mosaic", marks=pytest.mark.gpu),
  ],
)
@pytest.mark.parametrize("name", ["bf16", "fp8", "hopper_fp4"])
def test_three_steps_agree_within_the_noise_of_the_products(name, other):
  scalars, moments = trained(name, **other)
  expected, expected_moments = trained(name, "xla")
  bf16, fp8 = trained("bf16", "xla")[1], trained("fp8", "xla")[1]
  noise = np.linalg.norm((fp8 if name == "bf16" else expected_moments) - bf16)
  assert np.linalg.norm(moments - expected_moments) < noise
  if name != "bf16":  # and it is as far from BF16: each does round its operands
    assert np.linalg.norm(moments - bf16) == pytest.approx(noise, rel=0.2)
  # The loss of a token so moves by 0.2 nats (HOPPER_FP4, standard deviation) at the first step, the
  # mean of 1024 by 0.006; by the third step it is three times that. The norm moves by up to 1 %.
  np.testing.assert_allclose(scalars[:, 0], expected[:, 0], atol=0.05)
  np.testing.assert_allclose(scalars[:, 1], expected[:, 1], rtol=0.03)


@pytest.mark.slow
def test_gradients_are_those_of_a_step():
  trainer = trainer_of("bf16", "xla")
  tokens = np.random.default_rng(1).integers(0, 256, (8, 129)).astype(np.int32)
  state, seed = trainer.init(jnp.int32(0)), jnp.int32(3)
  norm = optax.tree.norm(trainer.gradients(state, tokens, seed))
  _, scalars = trainer.step(state, tokens, seed)
  assert float(norm) == pytest.approx(float(scalars["grad_norm"]), rel=1e-5)


SMALL = ModelConfig(
  num_layers=1, d_model=32, num_heads=1, num_kv_heads=1, head_dim=32, num_experts=0, d_ff=32
)


def in_parts(recipe, parts):
  config = Experiment(model=SMALL, optimizer=Optimizer(warmup_steps=0))
  config.data.microbatches = parts
  return make_trainer(config, 256, policy_of(recipe, config))


def test_a_step_writes_its_state_where_the_old_one_lies():
  trainer = in_parts(recipes.BF16, 1)
  state = trainer.init.eval_shape(jnp.int32(0))
  tokens = jax.ShapeDtypeStruct((2, 65), jnp.int32)
  memory = trainer.step.lower(state, tokens, jnp.int32(0)).compile().memory_analysis()
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  assert memory.alias_size_in_bytes == size


@pytest.mark.slow
def test_microbatches_have_the_mean_of_their_gradients():
  tokens = np.random.default_rng(1).integers(0, 256, (6, 65)).astype(np.int32)
  whole, parts = in_parts(recipes.MXFP4, 1), in_parts(recipes.MXFP4, 3)
  state, seed = whole.init(jnp.int32(0)), jnp.int32(3)
  own = [whole.gradients(state, part, seed) for part in np.split(tokens, 3)]
  expected = jax.tree.map(lambda *g: np.mean(g, axis=0), *own)
  actual = parts.gradients(state, tokens, seed)
  # One program rounds a value to another neighbour here and there: a step of 1/4 in E2M1.
  error = optax.tree.norm(jax.tree.map(jnp.subtract, actual, expected)) / optax.tree.norm(expected)
  assert error < 0.02
  losses = [float(whole.evaluate(state, part, seed)) for part in np.split(tokens, 3)]
  assert float(parts.evaluate(state, tokens, seed)) == pytest.approx(np.mean(losses), rel=1e-3)
  _, said = parts.step(state, tokens, seed)
  assert float(said["loss"]) == pytest.approx(np.mean(losses), rel=1e-3)
  assert float(said["grad_norm"]) == pytest.approx(float(optax.tree.norm(actual)), rel=1e-3)


@pytest.mark.slow
def test_microbatches_draw_numbers_of_their_own():
  """Under one key for all, their order would not matter."""
  recipe = recipes.MXFP4.replace({"fprop.lhs.rounding": "stochastic"})
  tokens = np.random.default_rng(1).integers(0, 256, (2, 65)).astype(np.int32)
  trainer, seed = in_parts(recipe, 2), jnp.int32(3)
  state = trainer.init(jnp.int32(0))
  for run in (trainer.evaluate, lambda *a: optax.tree.norm(trainer.gradients(*a))):
    assert float(run(state, tokens, seed)) != float(run(state, tokens[::-1].copy(), seed))


@pytest.mark.slow
def test_a_probe_reads_the_first_microbatch_alone():
  first, second, other = np.random.default_rng(1).integers(0, 256, (3, 1, 65)).astype(np.int32)
  trainer, seed = in_parts(recipes.MXFP4, 2), jnp.int32(3)
  state = trainer.init(jnp.int32(0))

  def probe(*parts):
    return jax.tree.leaves(trainer.probe(state, np.concatenate(parts), seed))

  found = probe(first, second)
  jax.tree.map(np.testing.assert_array_equal, found, probe(first, other))
  assert any((np.asarray(a) != b).any() for a, b in zip(found, probe(second, first), strict=True))


@pytest.mark.slow
def test_evaluation_draws_its_own_numbers_for_each_batch():
  """Stochastic rounding in fprop: one batch has other losses under other keys."""
  recipe = recipes.MXFP4.replace({"fprop.lhs.rounding": "stochastic"})
  trainer = in_parts(recipe, 1)
  tokens = np.random.default_rng(1).integers(0, 256, (2, 65)).astype(np.int32)
  state, seed = trainer.init(jnp.int32(0)), jnp.int32(3)
  losses = [float(trainer.evaluate(state, tokens, seed, batch)) for batch in (0, 1, 2, 0)]
  assert losses[0] == losses[3]
  losses[3] = float(trainer.step(state, tokens, seed)[1]["loss"])
  assert len(set(losses)) == 4


def test_comparison_of_gradients():
  reference = {"a": {"w": jnp.array([3.0, 4.0])}, "b": jnp.array([1.0])}
  own = {"a": {"w": jnp.array([3.0 + 4, 4.0 - 3])}, "b": jnp.array([0.9])}
  found = gradients.compare(own, reference)
  assert found["a/w"] == pytest.approx((1, 1))  # at a right angle: no projection of the error
  assert found["b"] == pytest.approx((0.1, 0.9))


def test_gradients_are_of_the_state_and_the_batches_that_follow(monkeypatch):
  """Steps of mxfp4 add 10, others 1; fp8 is off by the state over 100: -, +, +, -."""

  def gradient(name, state, batch):
    off = state / 100 * (-1) ** (batch // 2) if name == "fp8" else 0.0
    return {"w": jnp.array([1.0 + off])}

  def make_trainer(_, vocab_size, recipe, mesh):
    del vocab_size, mesh
    return types.SimpleNamespace(
      init=lambda seed: 0.0,
      adopt=lambda state: state,
      step=lambda state, batch, seed: (state + (10 if recipe.name == "mxfp4" else 1), {}),
      gradients=lambda state, batch, seed: gradient(recipe.name, state, batch),
    )

  monkeypatch.setattr(gradients, "make_trainer", make_trainer)
  monkeypatch.setattr(gradients, "policy_of", lambda recipe, *_: recipe)
  monkeypatch.setattr(gradients.data, "load_corpus", lambda _: types.SimpleNamespace(vocab_size=1))
  monkeypatch.setattr(gradients.data, "batches", lambda *_: range(100))
  config = Experiment(recipes=Names(("bf16", "fp8", "mxfp4")))
  rows = {(r["recipe"], r["batches"]): r for r in gradients.measure(config, "mxfp4", 3, 4)}
  assert list(rows) == [("fp8", 1), ("fp8", 4), ("mxfp4", 1), ("mxfp4", 4)]
  found = {key: (row["relative_error"], row["projection"]) for key, row in rows.items()}
  assert found["fp8", 1] == pytest.approx((0.3, 0.7))  # batch 3, after 3 steps of 10
  assert found["fp8", 4] == pytest.approx((0, 1), abs=1e-6)
  assert found["mxfp4", 4] == (0, 1)


def test_active_parameters_are_those_that_a_token_meets():
  config = Experiment(model=ModelConfig(num_layers=3, d_model=32, num_experts=8, top_k=2, d_ff=16))
  config.model.num_heads, config.model.num_kv_heads, config.model.head_dim = 4, 2, 8
  counts = parameter_counts(config, 50)
  attention = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32
  rest = 3 * (attention + 2 * 32 + 32 * 8) + 32 + 32 * 50  # norms, router, last norm, head
  expert = 3 * 32 * 16
  assert counts["parameters"] == rest + 3 * 8 * expert + 50 * 32
  assert counts["active_parameters"] == rest + 3 * 2 * expert
  config.model.num_experts = 0
  dense = parameter_counts(config, 50)
  assert dense["parameters"] - dense["active_parameters"] == 50 * 32
