"""States of quantizers: from GEMMs through model, training step and checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stateful import Clipped, Shaped, largest, with_state

from experiments.checkpoints import Checkpoints
from experiments.config import Experiment, Optimizer
from experiments.train import TrainState, make_trainer
from fp4jax import Operand, formats, recipes
from fp4jax.models import LanguageModel, LayerRule, ModelConfig, Numerics, Policy
from fp4jax.quantizers import DelayedScaling, GradScale, QEma

MODEL = ModelConfig(
  num_layers=3,
  d_model=32,
  num_heads=2,
  num_kv_heads=1,
  head_dim=32,
  num_experts=2,
  top_k=2,
  d_ff=32,
  d_ff_shared=64,
)
CLIPPED = with_state(recipes.MXFP4, Clipped, "fprop.rhs")


def gradient(policy, states, b=2, t=16):
  """Of a model's loss by the states."""
  graph, params = nnx.split(LanguageModel(MODEL, 50, nnx.Rngs(0)))
  tokens = jax.random.randint(jax.random.key(1), (b, t), 0, 50)

  def loss(states):
    return jnp.sum(nnx.merge(graph, params)(tokens, policy, states=states)[0] ** 2)

  return jax.grad(loss)(states), loss


def test_the_gradient_of_the_states_is_the_next_ones_layer_by_layer():
  """Oracle: the largest value of each weight."""
  rules = (LayerRule(layers=(0,), modules="experts.*", recipe=recipes.BF16),)
  policy = Policy(attention=CLIPPED, experts=CLIPPED, head=CLIPPED, layers=rules)
  model = LanguageModel(MODEL, 50, nnx.Rngs(0))
  states = model.new_states(policy)
  found = jax.jit(lambda s: gradient(policy, s)[0])(states)
  moe, attention = model.blocks.feed_forward, model.blocks.attention
  of_all = {"attention.qkv": attention.w_qkv, "attention.out": attention.w_out}
  of_last = {"experts.w13": moe.w13, "experts.w2": moe.w2}
  of_last |= {"experts.shared_w13": moe.shared.w13, "experts.shared_w2": moe.shared.w2}

  def expected(weights, layers):
    return {
      name: {"fprop.rhs": np.array([largest(w[...][i]) for i in layers])}
      for name, w in weights.items()
    }

  own = {
    "0:1": expected(of_all, [0]),
    "1:3": expected(of_all | of_last, [1, 2]),
    "head": {"head.logits": {"fprop.rhs": np.array(largest(model.w_head[...]))}},
  }
  jax.tree.map(np.testing.assert_array_equal, found, own)
  assert jax.tree.map(jnp.shape, states) == jax.tree.map(jnp.shape, found)
  assert not any(map(jnp.any, jax.tree.leaves(states)))


def test_policies_without_state_have_none():
  model = LanguageModel(MODEL, 50, nnx.Rngs(0))
  assert model.new_states(Policy(experts=recipes.MXFP4_RHT_SR, head=recipes.FP8)) == {}


@pytest.mark.parametrize("num_experts", [0, 2])
def test_states_begin_with_the_shapes_of_the_weights(num_experts, monkeypatch):
  """Nothing is computed: reading asserts the shape."""
  monkeypatch.setattr(MODEL, "num_experts", num_experts)
  recipe = with_state(recipes.MXFP4, Shaped, "fprop.rhs", "dgrad.rhs")
  policy = Policy(experts=recipe, attention=recipe, head=recipe)
  states = LanguageModel(MODEL, 64, nnx.Rngs(0)).new_states(policy)
  names = {"attention.qkv", "attention.out", "experts.w13", "experts.w2"}
  if num_experts:
    names |= {"experts.shared_w13", "experts.shared_w2"}
  assert set(states["0:3"]) == names and set(states) == {"0:3", "head"}
  graph, params = nnx.split(LanguageModel(MODEL, 64, nnx.Rngs(0)))

  def loss(states):
    tokens = jnp.zeros((2, 32), jnp.int32)
    return jnp.sum(nnx.merge(graph, params)(tokens, policy, states=states)[0])

  jax.eval_shape(jax.grad(loss), states)


def test_a_name_called_twice_or_without_its_state_is_refused():
  x, w = jnp.ones((4, 32)), jnp.ones((32, 32))
  states = {"experts.w2": {"fprop.rhs": jnp.float32(0)}}
  numerics = Numerics(Policy(experts=CLIPPED), states=states)
  numerics.matmul("experts.w2", x, w)
  with pytest.raises(ValueError, match=r"'experts\.w2' is called twice in one pass; its state"):
    numerics.matmul("experts.w2", x, w)
  with pytest.raises(ValueError, match=r"keeps state in .*fprop\.rhs"):
    numerics.matmul("experts.w13", x, w)


CONFIG = Experiment(
  steps=10,
  model=dataclasses.replace(MODEL, num_layers=2, num_experts=0, d_ff_shared=0),
  optimizer=Optimizer(learning_rate=0.1, warmup_steps=0),
)


@pytest.fixture(scope="module")
def trained():
  """A trainer, and the states before and after its third step."""
  trainer = make_trainer(CONFIG, 50, Policy(experts=CLIPPED))
  state, states = trainer.init(jnp.int32(0)), []
  for step in range(3):
    states.append(jax.tree.map(jnp.copy, state))
    state, _ = trainer.step(state, batch(step), jnp.int32(0))
  return trainer, states[-1], state


def batch(seed):
  return np.random.default_rng(seed).integers(0, 50, (2, 17)).astype(np.int32)


def test_a_step_replaces_the_states(trained):
  _, before, after = trained
  for name in ("w13", "w2"):
    w = before.params["blocks"]["feed_forward"][name]
    found = after.quantizers["0:2"][f"experts.{name}"]["fprop.rhs"]
    np.testing.assert_array_equal(found, [largest(layer) for layer in w])
    assert (found != before.quantizers["0:2"][f"experts.{name}"]["fprop.rhs"]).all()


@pytest.mark.slow
def test_states_go_from_microbatch_to_microbatch():
  """Those of delayed scaling, which remember what they read."""
  policy, both = Policy(experts=RECIPES["delayed"]), np.concatenate([batch(0), batch(1)])
  whole = make_trainer(CONFIG, 50, policy)
  config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, microbatches=2))
  state = whole.init(jnp.int32(0))
  after, _ = make_trainer(config, 50, policy).step(
    jax.tree.map(jnp.copy, state), both, jnp.int32(0)
  )
  first, _ = whole.step(jax.tree.map(jnp.copy, state), batch(0), jnp.int32(0))
  state = dataclasses.replace(state, quantizers=first.quantizers)
  second, _ = whole.step(state, batch(1), jnp.int32(0))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2)  # noqa: E731, two programs
  jax.tree.map(close, after.quantizers, second.quantizers)


def test_a_step_that_diverges_keeps_the_states(trained):
  trainer, _, state = trained
  params = jax.tree.map(jnp.copy, state.params)
  params["embedding"]["embedding"] *= jnp.nan
  broken = dataclasses.replace(jax.tree.map(jnp.copy, state), params=params)
  after, scalars = trainer.step(broken, batch(3), jnp.int32(0))
  assert np.isnan(scalars["loss"]) and int(after.step) == int(state.step)
  jax.tree.map(np.testing.assert_array_equal, after.quantizers, state.quantizers)


@pytest.mark.slow
def test_evaluation_gradients_and_probes_read_the_states(trained):
  trainer, _, state = trained
  small = jax.tree.map(lambda s: s / 8, state.quantizers)
  clipped, seed = dataclasses.replace(state, quantizers=small), jnp.int32(0)
  for f in (trainer.evaluate, trainer.gradients, trainer.probe):
    one, other = (jax.tree.leaves(f(s, batch(3), seed)) for s in (state, clipped))
    assert any((a != b).any() for a, b in zip(one, other, strict=True)), f
    assert all(np.isfinite(leaf).all() for leaf in other)


def test_states_are_saved(trained, tmp_path):
  trainer, _, state = trained
  saved = Checkpoints(tmp_path, 1)
  saved.save(3, state, {})
  step, found, _ = saved.restore_latest(lambda step: jax.eval_shape(trainer.init, jnp.int32(step)))
  assert step == 3 and isinstance(found, TrainState) and len(jax.tree.leaves(found.quantizers)) == 2
  jax.tree.map(np.testing.assert_array_equal, found, state)


def test_another_policy_adopts_the_states_that_it_has_too(trained):
  trainer, _, state = trained
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, trainer.adopt(state), state))
  both = with_state(recipes.MXFP4, Clipped, "fprop.rhs", "dgrad.rhs")
  adopted = make_trainer(CONFIG, 50, Policy(experts=both)).adopt(state)
  for name in ("experts.w13", "experts.w2"):
    old, new = (s.quantizers["0:2"][name] for s in (state, adopted))
    assert new["fprop.rhs"] is old["fprop.rhs"]
    np.testing.assert_array_equal(new["dgrad.rhs"], [0, 0])
  assert make_trainer(CONFIG, 50, Policy()).adopt(state).quantizers == {}


RECIPES = {
  "delayed": recipes.FP8.replace(
    {f"{role}.lhs": DelayedScaling(history=4) for role in ("fprop", "dgrad", "wgrad")}
  ),
  "q_ema": recipes.MXFP4.replace({"fprop.rhs": QEma(recipes.MXFP4.fprop.rhs)}),
  "grad_scale": recipes.BF16.replace({"dgrad.lhs": GradScale(Operand(formats.FP8_TENSOR))}),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_resumed_step_of_each_quantizer_with_state_is_the_same(recipe, tmp_path):
  trainer = make_trainer(CONFIG, 50, Policy(experts=recipe))
  states = [trainer.init(jnp.int32(0))]
  for step in range(3):
    before = jax.tree.map(jnp.copy, states[-1])
    states.append(trainer.step(before, batch(step), jnp.int32(0))[0])
  saved = Checkpoints(tmp_path, 1)
  saved.save(2, states[2], {})
  again = make_trainer(CONFIG, 50, Policy(experts=recipe))
  _, found, _ = saved.restore_latest(jax.eval_shape(again.init, jnp.int32(0)))
  found, scalars = again.step(found, batch(2), jnp.int32(0))
  jax.tree.map(np.testing.assert_array_equal, found, states[3])
  assert np.isfinite(scalars["loss"])
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), states[2].quantizers, found.quantizers)
  assert any(jax.tree.leaves(moved))
