"""A run over a mesh of devices: losses of one device, a state in shards, a share of the work."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import equations

from experiments.checks import validate
from experiments.config import Experiment
from experiments.mesh import make_mesh, shardings
from experiments.step_cost import lower_step
from experiments.train import make_trainer, policy_of
from fp4jax import MXFP4, NVFP4, recipes
from fp4jax.models import ModelConfig
from fp4jax.models.over_mesh import AXES, moe_ffn_over_mesh
from fp4jax.quantizers import DelayedScaling, Operand, QEma
from fp4jax.quantizers.learned_scale import LearnedScale

STEPS, SEED = 20, jnp.int32(0)
MODEL = ModelConfig(
  num_layers=2,
  d_model=64,
  num_heads=2,
  num_kv_heads=1,
  head_dim=32,
  num_experts=4,
  top_k=2,
  d_ff=64,
  d_ff_shared=32,
)


# Half of its columns are a multiple of FP8's blocks.
WIDE = dataclasses.replace(MODEL, num_layers=1, d_model=256, d_ff=128)


def config_of(data=1, fsdp=1, expert=1, model=MODEL, **of_mesh):
  config = Experiment(steps=STEPS, model=model)
  config.data.batch_size, config.data.sequence_length = 8, 32
  config.optimizer.warmup_steps = 4
  config.mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, expert=expert, **of_mesh)
  return config


@functools.cache
def batches():
  """Text of a kind: each token follows from the one before, mostly."""
  rng = np.random.default_rng(0)
  following = rng.permutation(256)
  found = rng.integers(0, 256, (STEPS, 8, 33))
  for i in range(1, 33):
    known = rng.random((STEPS, 8)) < 0.8
    found[..., i] = np.where(known, following[found[..., i - 1]], found[..., i])
  return found.astype(np.int32)


def trainer_of(recipe, config):
  devices = jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.expert]
  recipe = recipes.RECIPES[recipe] if isinstance(recipe, str) else recipe
  policy = policy_of(recipe, config)
  return make_trainer(config, 256, policy, make_mesh(config, devices))


def losses(trainer, moved=None):
  """Of each step; with `moved`, from weights that are half an ulp elsewhere."""
  state = trainer.init(SEED)
  if moved is not None:
    signs = functools.partial(jax.random.rademacher, jax.random.key(moved), dtype=jnp.float32)
    params = jax.tree.map(lambda p: p * (1 + 2.0**-24 * signs(p.shape)), state.params)
    state = dataclasses.replace(state, params=params)
  found = []
  for tokens in batches():
    state, scalars = trainer.step(state, tokens, SEED)
    found.append(float(scalars["loss"]))
  return np.array(found)


@functools.cache
def on_one_device(recipe):
  """Losses, and how far they go where the weights begin half an ulp elsewhere."""
  trainer = trainer_of(recipe, config_of(token_parts=4))
  plain = losses(trainer)
  return plain, max(np.abs(losses(trainer, moved) - plain).max() for moved in range(4))


# Each recipe on two devices and on four; `test_dispatch` divides a layer in more ways.
CASES = [
  *(("bf16", (2, 1, 1)), ("bf16", (1, 4, 1))),
  *(("fp8", (1, 1, 2)), ("fp8", (4, 1, 1))),
  *(("mxfp4_rht_sr", (1, 1, 2)), ("mxfp4_rht_sr", (1, 2, 2))),
  *(("hopper_fp4", (2, 1, 1)), ("hopper_fp4", (1, 1, 4)), ("hopper_fp4_dispatch", (2, 1, 2))),
]


@pytest.mark.slow
@pytest.mark.parametrize("recipe, mesh", CASES)
def test_losses_are_those_of_one_device(recipe, mesh):
  """The first loss to the last bits of 256 tokens' sum. The later ones grow apart as two runs on
  one device do whose weights differ by half an ulp: by at most four times the largest of four such.
  """
  expected, apart = on_one_device(recipe)
  found = losses(trainer_of(recipe, config_of(*mesh, token_parts=4)))
  # Or all results of experts, where each device rounds its sum to bf16.
  sums = recipes.RECIPES[recipe].payload.sums
  ulps = 8 * 2.0**-21  # of numbers from 4 to 8
  assert abs(found[0] - expected[0]) <= (ulps if sums == jnp.float32 else 2.0**-9 * expected[0])
  assert np.abs(found - expected).max() <= 4 * apart
  assert apart < 0.1 and expected[-1] < expected[0] - 0.3  # it learns, and the bound is one


FIRST = [
  ("mxfp4", (1, 2, 2)),
  *(
    pytest.param(recipe, mesh, marks=pytest.mark.slow)
    for recipe, mesh in (
      ("bf16", (1, 4, 1)),
      ("fp8", (1, 2, 2)),
      ("fp8_pow2", (1, 1, 4)),
      ("fp8_mxfp4_weights", (4, 1, 1)),
      ("mxfp4", (4, 1, 1)),
      ("mxfp4_rht_sr", (2, 1, 2)),
      ("hopper_fp4", (1, 2, 2)),
      ("hopper_fp4_dispatch", (2, 1, 2)),
    )
  ),
]


@pytest.mark.parametrize("recipe, mesh", FIRST)
def test_the_first_gradient_is_that_of_one_device(recipe, mesh):
  """Of each parameter. A sum in another order moves a bf16 activation to the next one, 2^-8 away,
  where it lies within 2^-21 of a tie: 1 of 2^13 values, so that a vector moves by 2^-14.5; a few
  such vectors follow each other. Where sums of experts are rounded on each device all values move.
  """
  one = trainer_of(recipe, config_of(model=WIDE, token_parts=4))
  many = trainer_of(recipe, config_of(*mesh, model=WIDE, token_parts=4))
  states = [trainer.init(SEED) for trainer in (one, many)]
  for a, b in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(a, b)
  a, b = (t.gradients(s, batches()[0], SEED) for t, s in zip((one, many), states, strict=True))
  bound = 2.0**-12 if recipes.RECIPES[recipe].payload.sums == jnp.float32 else 2.0**-4
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(x))
    assert error < bound, (jax.tree_util.keystr(path), error)


@functools.cache
def compiled_step(recipe, mesh, num_experts=MODEL.num_experts, **of_mesh):
  model = dataclasses.replace(MODEL, num_experts=num_experts)
  trainer = trainer_of(recipe, config_of(*mesh, model, token_parts=4, **of_mesh))
  state = trainer.init(SEED)
  return trainer.step.lower(state, batches()[0], SEED).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
  "recipe, mesh, capacity_factor",
  [
    ("bf16", (4, 1, 1), None),
    ("bf16", (1, 1, 4), 1.15),
    ("hopper_fp4", (4, 1, 1), None),
    ("hopper_fp4", (1, 1, 4), 1.15),
  ],
)
def test_four_devices_do_a_quarter_of_the_work_each(recipe, mesh, capacity_factor):
  """Without a capacity each device of `expert` has room for all rows, and XLA computes them all."""
  own = compiled_step(recipe, mesh, capacity_factor=capacity_factor).cost_analysis()["flops"]
  assert own <= 0.30 * compiled_step(recipe, (1, 1, 1)).cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "mxfp4"])
def test_a_dense_model_over_fsdp_brings_weights_to_tokens(recipe):
  """With more tokens than columns it is less to send, and a device keeps its own tokens alone."""
  one, many = (compiled_step(recipe, mesh, num_experts=0) for mesh in ((1, 1, 1), (1, 4, 1)))
  assert many.cost_analysis()["flops"] <= 0.30 * one.cost_analysis()["flops"]
  gathered = re.findall(r"= b?f\d+\[([\d,]*)\]\S* all-gather\(", many.as_text())
  assert gathered and not any(shape.startswith("8,32,") for shape in gathered), gathered


def scans(jaxpr):
  """What each scan returns, with whether it goes back."""
  for eqn in equations(jaxpr):
    if eqn.primitive is lax.scan_p:
      yield eqn.params["reverse"], [v.aval for v in eqn.outvars]


@pytest.mark.parametrize("mesh", [(4, 1, 1), (1, 1, 4), (1, 2, 2)])
def test_experts_are_not_kept_beside_themselves(mesh):
  """By the scan over the layers for the one that goes back; the stacks of their weights are all
  that is float32 and has four axes."""
  trainer = trainer_of("bf16", config_of(*mesh, token_parts=4))
  state = trainer.init.eval_shape(SEED)
  found = list(scans(trainer.gradients.trace(state, batches()[0], SEED).jaxpr.jaxpr))

  def stacks(back):
    returned = [x for goes_back, own in found if goes_back is back for x in own]
    return [x.shape for x in returned if x.ndim == 4 and x.dtype == jnp.float32]

  assert stacks(back=True) == [(2, 4, 64, 128), (2, 4, 64, 64)]  # their gradients
  assert stacks(back=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(4, 1, 1), (1, 2, 2)])
def test_a_step_compiled_before_there_is_a_state_reuses_its_memory(mesh):
  config = config_of(*mesh, token_parts=4)
  trainer = trainer_of("bf16", config)
  mesh = make_mesh(config, jax.devices()[:4])
  memory = lower_step(trainer, config, mesh).compile().memory_analysis()
  parts = (leaf.addressable_shards[0].data for leaf in jax.tree.leaves(trainer.init(SEED)))
  assert memory.alias_size_in_bytes == sum(part.nbytes for part in parts)


# Where the state lies.


@pytest.mark.slow
def test_the_state_is_made_in_shards():
  trainer = trainer_of("bf16", config_of(1, 2, 2))
  state = trainer.init(SEED)
  w13 = state.params["blocks"]["feed_forward"]["w13"]
  assert w13.sharding.spec == P(None, "expert", None, "fsdp")
  assert {s.data.shape for s in w13.addressable_shards} == {(2, 2, 64, 64)}
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if jax.tree_util.keystr(path, simple=True, separator="/").endswith("feed_forward/w13")
  ]
  assert len(moments) == 2 and all(m.sharding == w13.sharding for m in moments)
  after, _ = trainer.step(state, batches()[0], SEED)
  for old, new in zip(*map(jax.tree.leaves, (trainer.init(SEED), after)), strict=True):
    assert old.sharding == new.sharding
  # Nothing is made whole that is kept in shards: the largest array of `init` is a shard.
  sizes = trainer.init.lower(SEED).compile().memory_analysis()
  shards = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(after))
  assert sizes.output_size_in_bytes <= 1.01 * shards + 4096
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(after))
  assert shards < 0.45 * whole


def test_every_matrix_is_in_the_table():
  mesh = make_mesh(config_of(1, 2, 2), jax.devices())
  for experts, shared in ((4, 32), (0, 0)):
    model = dataclasses.replace(MODEL, num_experts=experts, d_ff_shared=shared)
    config = dataclasses.replace(config_of(1, 4, 1), model=model)
    state = trainer_of("bf16", config).init.eval_shape(SEED)
    places = shardings(state.params, mesh)
    for (path, leaf), place in zip(
      jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(places), strict=True
    ):
      small = leaf.ndim < 2 or "norm" in str(path) or "router" in str(path)
      assert small == (place.spec == P()), path


def test_what_an_optimizer_keeps_for_a_matrix_is_divided_only_where_it_is_one():
  config = config_of(1, 2, 2)
  config.optimizer.name = "stable_spam"
  state = trainer_of("bf16", config).init.eval_shape(SEED)
  leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
  single = [x for path, x in leaves if "w13" in str(path) and set(x.shape[1:]) == {1}]
  assert single and all(x.sharding.is_fully_replicated for x in single)
  assert any("fsdp" in x.sharding.spec for path, x in leaves if "w13" in str(path))


def test_averages_of_weights_lie_where_the_weights_do():
  recipe = recipes.MXFP4.replace({"name": "with_ema", "fprop.rhs": QEma(Operand(MXFP4))})
  state = trainer_of(recipe, config_of(1, 2, 2)).init.eval_shape(SEED)
  specs = {
    (name, x.ndim): x.sharding.spec
    for path, x in jax.tree_util.tree_leaves_with_path(state.quantizers)
    for name in [path[-3].key]
    if path[-1].key == "ema"
  }
  assert specs[("experts.w13", 4)] == P(None, "expert", None, "fsdp")
  assert specs[("attention.qkv", 3)] == specs[("experts.shared_w2", 3)] == P(None, None, "fsdp")


# Taps, states, capacity.


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 1, 4), (2, 1, 2)])
def test_the_gradient_of_a_learned_state_is_a_sum_over_devices(fmt, shape):
  """Scales that are learned, of experts: on one device and on four, up to the order of sums."""
  learned = LearnedScale(Operand(fmt))
  changes = {"fprop.rhs": learned, "dgrad.rhs": Operand(jnp.bfloat16, source="fprop")}
  recipe = recipes.BF16.replace({"name": "learned"} | changes)
  rng = np.random.default_rng(0)
  x, dout, w13, w2 = (
    jnp.asarray(rng.normal(size=s), jnp.float32)
    for s in ((64, 64),) * 2 + ((4, 64, 128), (4, 64, 64))
  )
  experts = jnp.asarray([rng.choice(4, 2, replace=False) for _ in range(64)], jnp.int32)
  weights = jnp.asarray(rng.uniform(0.1, 1, (64, 2)), jnp.float32)

  def loss(states):
    how = {"keys": (None, None), "taps": (None, None), "states": states, "token_parts": 4}
    y = moe_ffn_over_mesh(x.astype("bfloat16"), w13, w2, experts, weights, recipe, **how)
    return jnp.sum(y.astype(jnp.float32) * dout)

  states = tuple({"fprop.rhs": learned.first_state(w)} for w in (w13, w2))
  expected = jax.jit(jax.grad(loss))(states)
  mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    found = jax.jit(jax.grad(loss))(states)
  for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())
  assert all(np.abs(state["fprop.rhs"]["scale"]).max() > 1 for state in expected)


@pytest.mark.slow
def test_probes_read_the_mean_of_the_devices():
  one, many = (trainer_of("hopper_fp4", config_of(*m, token_parts=4)) for m in ((), (1, 1, 4)))
  a, b = (t.probe(t.init(SEED), batches()[0], SEED) for t in (one, many))
  for name, expected in a.items():
    expected, found = np.asarray(expected), np.asarray(b[name])
    finite = np.isfinite(expected)
    assert (finite == np.isfinite(found)).all(), name
    # Of experts: a mean of ratios in place of the ratio of means, over devices that are alike.
    tolerance = {"rtol": 0.2, "atol": 0.3} if name.startswith("experts.w") else {"rtol": 0.05}
    np.testing.assert_allclose(found[finite], expected[finite], err_msg=name, **tolerance)


@pytest.mark.slow
def test_states_of_quantizers_follow_those_of_one_device():
  recipe = recipes.MXFP4.replace(
    {
      "name": "with_states",
      "fprop.lhs": DelayedScaling(history=4),
      "fprop.rhs": QEma(Operand(MXFP4)),
    }
  )
  found = []
  for trainer in (trainer_of(recipe, config_of(*m, token_parts=4)) for m in ((), (4, 1, 1))):
    state = trainer.init(SEED)
    for tokens in batches()[:3]:
      state, _ = trainer.step(state, tokens, SEED)
    found.append(state.quantizers)
  leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in found]
  assert len(leaves[0]) > 8
  for (path, a), (_, b) in zip(*leaves, strict=True):
    # Weights, and the largest of some thousand activations, after two steps in 4 bits.
    np.testing.assert_allclose(a, b, rtol=0.15, atol=0.01, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_what_is_dropped_is_told():
  trainer = trainer_of("bf16", config_of(1, 1, 4, token_parts=4, capacity_factor=0.5))
  _, scalars = trainer.step(trainer.init(SEED), batches()[0], SEED)
  assert 0.4 < float(scalars["dropped"]) < 1
  trainer = trainer_of("bf16", config_of(1, 1, 4, token_parts=4, capacity_factor=4.0))
  _, scalars = trainer.step(trainer.init(SEED), batches()[0], SEED)
  assert float(scalars["dropped"]) == 0


# Refusals.


@pytest.mark.parametrize(
  "of_mesh, message",
  [
    ({"data": 3}, "mesh.data=3 mesh.fsdp=1 mesh.expert=1 are 3 devices; there are 4"),
    ({"data": None, "fsdp": 3}, "mesh.data=1 mesh.fsdp=3 mesh.expert=1 are 3 devices; there are 4"),
    ({"data": 4, "token_parts": 6}, "mesh.token_parts=6 is no multiple of 4 devices that divides"),
    (
      {"data": 4, "token_parts": 512},
      "512 is no multiple of 4 devices that divides the 256 tokens",
    ),
  ],
)
def test_a_mesh_that_does_not_fit(of_mesh, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(config_of(**of_mesh), jax.devices()[:4])


def test_a_model_or_batch_that_does_not_fit():
  def refused(message, config):
    with pytest.raises(ValueError, match=message):
      make_mesh(config, jax.devices()[:4])

  config = config_of(data=4)
  config.data.batch_size = 6
  refused("data.batch_size=6 in data.microbatches=1 gives 6 sequences, which 4 devices", config)
  config = config_of(expert=4)
  config.model = dataclasses.replace(MODEL, num_experts=6)
  refused("mesh.expert=4 does not divide model.num_experts=6", config)
  config.model = dataclasses.replace(MODEL, num_experts=0)
  refused("mesh.expert=4, but model.num_experts=0", config)
  config = config_of(fsdp=4)
  config.model = dataclasses.replace(MODEL, d_model=66)
  with pytest.raises(ValueError, match=r"mesh.fsdp=4 does not divide axis . of .* "):
    trainer_of("bf16", config)
  assert make_mesh(config_of(), jax.devices()[:1]) is None
  assert make_mesh(config_of(data=None), jax.devices()).shape == {"data": 4, "fsdp": 1, "expert": 1}


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("data", 0, "mesh.data=0 is not None or at least 1"),
    ("fsdp", 0, "mesh.fsdp=0 is not at least 1"),
    ("fsdp", 2, "mesh.fsdp=2: the 64 columns of w2 on a device are no multiple of 128, .* 'fp8'"),
    ("token_parts", 0, "mesh.token_parts=0 is not None or at least 1"),
    ("capacity_factor", 0.0, "mesh.capacity_factor=0.0 is not None or above 0"),
  ],
)
def test_settings_are_checked(field, value, message):
  config = Experiment()
  setattr(config.mesh, field, value)
  with pytest.raises(ValueError, match=message):
    validate(config)
