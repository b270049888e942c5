"""Optimizers against transcriptions of their papers in NumPy, in float64, a tensor at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxprs import equations

from experiments.config import Experiment, Optimizer, StableSpam
from experiments.optimizers import OPTIMIZERS, learning_rate, make_optimizer
from experiments.optimizers.norms import norm_of
from experiments.optimizers.stable_spam import scale_by_stable_spam
from experiments.train import make_trainer, matrices
from fp4jax import recipes
from fp4jax.models import LanguageModel, ModelConfig, Policy

STEPS = 30


class PublishedStableSpam:
  """One tensor, in the order of II.10: decay, AdaClip, AdaGN, reset, Adam."""

  def __init__(self, weight, decay, settings):
    self.weight, self.decay, self.s = np.float64(weight), decay, settings
    self.t = self.total = 0
    self.clip = self.norm = self.square = 0.0
    self.m = self.v = np.zeros_like(self.weight)

  def step(self, gradient, rate):
    s, g = self.s, np.float64(gradient)
    self.total += 1
    half = (1 + math.cos(math.pi * self.total / (STEPS + 1))) / 2
    scale = s.final_scale + (1 - s.final_scale) * half
    self.weight = self.weight * (1 - rate * self.decay)
    self.t += 1
    largest = np.abs(g).max()
    self.clip = s.gamma3 * self.clip + (1 - s.gamma3) * largest
    limit = self.clip / (1 - s.gamma3**self.t)
    if (np.abs(g) > limit).any():
      g = np.where(np.abs(g) > limit, g / largest * limit, g)
    a, length = s.gamma1 * scale, np.sqrt((g**2).sum())
    self.norm = a * self.norm + (1 - a) * length
    self.square = s.gamma2 * self.square + (1 - s.gamma2) * length**2
    rms = np.sqrt(self.square / (1 - s.gamma2**self.t))
    if length > 0:
      g = g / length * (self.norm / (1 - a**self.t)) / (rms + s.eps)
    if self.total % s.reset_every == 0:
      self.m, self.v, self.t = 0 * self.m, 0 * self.v, 1
    b1 = s.b1 * scale
    self.m = b1 * self.m + (1 - b1) * g
    self.v = s.b2 * self.v + (1 - s.b2) * g**2
    root = np.sqrt(self.v / (1 - s.b2**self.t))
    self.weight = self.weight - rate * self.m / (1 - b1**self.t) / (root + s.eps)


SHAPES = {
  ("w_head",): ((6, 10), ()),
  ("embedding",): ((10, 6), ()),
  ("norm",): ((6,), ()),
  ("blocks", "w2"): ((2, 3, 4, 6), (2, 3)),  # layers, experts
  ("blocks", "qkv"): ((2, 6, 8), (2,)),
  ("blocks", "norm"): ((2, 6), (2,)),
}
DECAYED = {path: path[-1] in ("w_head", "w2", "qkv") for path in SHAPES}


def nested(by_path):
  tree = {}
  for path, leaf in by_path.items():
    (tree if len(path) == 1 else tree.setdefault(path[0], {}))[path[-1]] = leaf
  return tree


def gradients(rng, step):
  """Normal, of a size that wanders, now and then with a spike; an expert is often not chosen."""
  found = {}
  for path, (shape, _) in SHAPES.items():
    g = rng.standard_normal(shape) * math.exp(0.3 * rng.standard_normal())
    if rng.random() < 0.2:
      g.flat[rng.integers(g.size)] *= 1000
    found[path] = np.float32(g)
  found["blocks", "w2"][1, 2] *= step % 3 == 0
  return found


@pytest.mark.parametrize("final_scale", [1.0, 0.5])
def test_stable_spam_is_the_published_code_tensor_by_tensor(final_scale):
  settings = StableSpam(reset_every=7, final_scale=final_scale)
  config = Optimizer(
    name="stable_spam", learning_rate=0.01, warmup_steps=3, weight_decay=0.3, stable_spam=settings
  )
  optimizer = make_optimizer(config, STEPS, nested(DECAYED))
  rates = learning_rate(config, STEPS)
  rng = np.random.default_rng(0)
  start = {p: rng.standard_normal(shape).astype(np.float32) for p, (shape, _) in SHAPES.items()}
  apart = {
    (path, index): PublishedStableSpam(start[path][index], 0.3 * DECAYED[path], settings)
    for path, (_, stack) in SHAPES.items()
    for index in np.ndindex(stack)
  }
  params = jax.tree.map(jnp.asarray, nested(start))
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for step in range(STEPS):
    g = gradients(rng, step)
    updates, state = update(jax.tree.map(jnp.asarray, nested(g)), state, params)
    params = optax.apply_updates(params, updates)
    for (path, index), tensor in apart.items():
      tensor.step(g[path][index], float(rates(step)))
  for (path, index), tensor in apart.items():
    leaf = params[path[0]] if len(path) == 1 else params[path[0]][path[1]]
    # 30 steps of at most some 0.01, each to a few ulp of float32 (6e-8) times the 100 by which
    # 1 - 0.999 of the moments of a young t magnifies them: 30 * 0.01 * 6e-6 and less.
    np.testing.assert_allclose(leaf[index], tensor.weight, atol=2e-6, err_msg=f"{path} {index}")
    moved = np.abs(tensor.weight - start[path][index]).max()
    assert moved > 0.02


@pytest.mark.parametrize("unrolled", [False, True])
def test_adamw_is_the_published_algorithm(unrolled):
  """Loshchilov and Hutter, arXiv 1711.05101, behind a clip of the norm of all gradients."""
  config = Optimizer(
    learning_rate=0.01, warmup_steps=3, weight_decay=0.3, b1=0.8, b2=0.9, clip_norm=100.0
  )
  optimizer = make_optimizer(config, STEPS, nested(DECAYED), norm_of(unrolled))
  rng = np.random.default_rng(0)
  weights = {p: rng.standard_normal(shape) for p, (shape, _) in SHAPES.items()}
  params = jax.tree.map(jnp.float32, nested(weights))
  m, v = ({p: np.zeros(shape) for p, (shape, _) in SHAPES.items()} for _ in range(2))
  state, update, clipped = optimizer.init(params), jax.jit(optimizer.update), 0
  for step in range(STEPS):
    rate = 0.01 * (step + 1) / 3 if step < 2 else 0.01 * cosine((step - 2) / (STEPS - 3), 0.1)
    g = gradients(rng, step)
    updates, state = update(jax.tree.map(jnp.asarray, nested(g)), state, params)
    params = optax.apply_updates(params, updates)
    norm = math.sqrt(sum((np.float64(x) ** 2).sum() for x in g.values()))
    clipped += norm > 100
    for p, x in g.items():
      x = np.float64(x) * min(1, 100 / norm)
      m[p], v[p] = 0.8 * m[p] + 0.2 * x, 0.9 * v[p] + 0.1 * x**2
      adam = m[p] / (1 - 0.8 ** (step + 1)) / (np.sqrt(v[p] / (1 - 0.9 ** (step + 1))) + 1e-8)
      weights[p] = weights[p] - rate * (adam + 0.3 * DECAYED[p] * weights[p])
  assert 5 < clipped < STEPS
  # 30 steps of at most 0.04, each to some ulps of float32.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, nested(weights))


def cosine(at, end):
  """From 1 to `end`."""
  return end + (1 - end) * (1 + math.cos(math.pi * at)) / 2


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
  config = Optimizer(learning_rate=0.5, warmup_steps=10, final_fraction=0.2)
  rates = [float(learning_rate(config, 110)(step)) for step in range(110)]
  expected = [0.5 * step / 10 for step in range(1, 10)]
  expected += [0.5 * cosine(step / 100, 0.2) for step in range(101)]
  np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_the_first_step_moves_the_weights():
  for warmup in (0, 5):
    assert learning_rate(Optimizer(warmup_steps=warmup), 20)(0) > 0


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_step_sums_no_gradients_of_all_unrolled_layers(unrolled):
  model = ModelConfig(
    num_layers=3, d_model=32, num_heads=1, num_kv_heads=1, head_dim=32, d_ff=64, unroll=unrolled
  )
  trainer = make_trainer(Experiment(model=model), 64, Policy(recipes.BF16))
  state = jax.eval_shape(trainer.init, jnp.int32(0))
  step = trainer.step.trace(state, jax.ShapeDtypeStruct((2, 17), jnp.int32), jnp.int32(0))
  stacked = {leaf.shape for leaf in jax.tree.leaves(state.params["blocks"])}
  sums = [eqn for eqn in equations(step.jaxpr.jaxpr) if eqn.primitive.name == "reduce_sum"]
  assert stacked.isdisjoint(eqn.invars[0].aval.shape for eqn in sums) == unrolled


@pytest.mark.parametrize("num_experts", [0, 4])
def test_weight_decay_shrinks_the_matrices_of_the_model(num_experts):
  config = ModelConfig(num_layers=1, num_experts=num_experts, d_ff_shared=32 if num_experts else 0)
  model = nnx.eval_shape(lambda: LanguageModel(config, 50, nnx.Rngs(0)))
  found = {
    "/".join(str(key.key) for key in path)
    for path, decayed in jax.tree_util.tree_leaves_with_path(matrices(model))
    if decayed
  }
  expected = {"w_head", "blocks/attention/w_qkv", "blocks/attention/w_out"}
  expected |= {"blocks/feed_forward/w13", "blocks/feed_forward/w2"}
  if num_experts:
    expected |= {"blocks/feed_forward/w_router"}
    expected |= {"blocks/feed_forward/shared/w13", "blocks/feed_forward/shared/w2"}
  assert found == expected


@pytest.mark.slow
def test_routing_losses_enter_with_their_weights():
  """The gradient is linear in them."""
  model = ModelConfig(
    num_layers=1, d_model=16, num_heads=1, num_kv_heads=1, head_dim=16, num_experts=4, d_ff=16
  )
  tokens, seed = np.random.default_rng(0).integers(0, 50, (2, 17)).astype(np.int32), jnp.int32(0)

  def gradient(balance, z):
    weights = Optimizer(load_balance_weight=balance, router_z_weight=z)
    trainer = make_trainer(Experiment(model=model, optimizer=weights), 50, Policy())
    found = trainer.gradients(trainer.init(seed), tokens, seed)
    return np.asarray(found["blocks"]["feed_forward"]["w_router"], np.float64)

  none, balance, z = gradient(0.0, 0.0), gradient(1.0, 0.0), gradient(0.0, 1.0)
  size = np.abs(none).max()
  assert np.abs(balance - none).max() > 0.1 * size and np.abs(z - none).max() > 0.1 * size
  expected = none + 0.5 * (balance - none) + 0.25 * (z - none)
  np.testing.assert_allclose(gradient(0.5, 0.25), expected, atol=2e-2 * np.abs(expected).max())


def run(gradients, **settings):
  """Directions and states of one vector's steps."""
  optimizer = scale_by_stable_spam(StableSpam(**settings), STEPS)
  state = optimizer.init({"norm": jnp.zeros_like(gradients[0])})
  found = []
  for g in gradients:
    updates, state = optimizer.update({"norm": g}, state)
    found.append((updates["norm"], jax.tree.map(lambda x: x, state)))
  return found


def test_under_a_constant_gradient_it_is_adam():
  g = jnp.array([3.0, -0.5, 2.0, 1e-3])
  adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
  state = adam.init({"norm": g})
  own = run([g] * 12)
  for direction, _ in own:
    updates, state = adam.update({"norm": g}, state)
    # eps is 1e-5 of the smallest value in the one, 4e-5 of the normalized one in the other.
    np.testing.assert_allclose(direction, updates["norm"], rtol=6e-5)
  np.testing.assert_allclose(
    own[-1][1].m["norm"] / (1 - 0.9**12), g / jnp.linalg.norm(g), rtol=1e-5
  )


def test_a_spike_is_clipped_to_the_mean_of_the_largest_values():
  at, before = 10, 2.0
  spike = [jnp.array([before])] * (at - 1) + [jnp.array([1000 * before])]
  *_, (_, earlier), (_, after) = run(spike)
  # One value alone: its norm is the value after the clip.
  clipped = (after.norm["norm"][0] - 0.7 * earlier.norm["norm"][0]) / 0.3
  bound = 0.999 * (1 - 0.999 ** (at - 1)) * before + 0.001 * 1000 * before
  bound /= 1 - 0.999**at
  assert clipped == pytest.approx(bound, rel=1e-4)
  assert clipped < 0.12 * 1000 * before


def test_a_reset_leaves_the_moments_of_one_step_and_keeps_the_rest():
  rng = np.random.default_rng(0)
  steps = run([jnp.asarray(rng.standard_normal(5), jnp.float32) for _ in range(9)], reset_every=8)
  (_, before), (direction, at), (_, next_) = steps[6:]
  assert [s.since_reset for s in (before, at, next_)] == [7, 1, 2]
  assert [s.steps for s in (before, at, next_)] == [7, 8, 9]
  np.testing.assert_allclose(np.square(at.m["norm"] / 0.1), at.v["norm"] / 0.001, rtol=1e-4)
  np.testing.assert_allclose(np.abs(direction), 1, rtol=1e-4)
  for kept in ("largest", "norm", "square"):
    old, new = (getattr(s, kept)["norm"][0] for s in (before, at))
    assert 0.5 < new / old < 2, kept


@pytest.mark.slow
def test_every_optimizer_takes_a_step_and_an_unknown_one_is_refused():
  model = ModelConfig(
    num_layers=1, d_model=16, num_heads=1, num_kv_heads=1, head_dim=16, num_experts=0, d_ff=16
  )
  tokens = np.arange(18, dtype=np.int32).reshape(2, 9)
  for name in OPTIMIZERS:
    config = Experiment(model=model, optimizer=Optimizer(name=name, warmup_steps=0))
    trainer = make_trainer(config, 50, Policy())
    before = trainer.init(jnp.int32(0))
    state, _ = trainer.step(trainer.init(jnp.int32(0)), tokens, jnp.int32(0))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before.params, state.params)
    assert all(0 < m < 0.01 for m in jax.tree.leaves(moved)), moved
  config = Experiment(model=model, optimizer=Optimizer(name="adam"))
  with pytest.raises(ValueError, match=r"optimizer\.name='adam' is not one of adamw, stable_spam"):
    make_trainer(config, 50, Policy())
