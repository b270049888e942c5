"""Experts divided among devices compute what one device computes in as many parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import equations

import fp4jax
from fp4jax import moe_ffn, operands, recipes
from fp4jax.dispatch import AllToAll, Choices

pytestmark = pytest.mark.usefixtures("strict_promotion")

T, D, F, E, K = 64, 128, 64, 8, 3
KEYS = tuple(jax.random.split(jax.random.key(5)))
NAMES = ("y", "dx", "dw13", "dw2", "dweights")
RECIPES = ("fp32", "bf16", "fp8", "mxfp4_rht_sr", "hopper_fp4", "fp8_dispatch")
RECIPES += ("hopper_fp4_dispatch",)


def inputs(dtype=jnp.bfloat16, tokens=T, d=D, f=F):
  """x, w13, w2, weights, experts, dout; no token asks for expert 5, most ask for expert 0."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  shares = np.r_[6.0, np.ones(E - 1)]
  shares[5] = 0
  picks = [rng.choice(E, K, replace=False, p=shares / shares.sum()) for _ in range(tokens)]
  weights = jnp.asarray(rng.uniform(0.1, 1, (tokens, K)), jnp.float32)
  x, dout = (normal(tokens, d).astype(dtype) for _ in range(2))
  w13, w2 = normal(E, d, 2 * f) / d**0.5, normal(E, f, d) / f**0.5
  return x, w13, w2, weights, jnp.asarray(picks), dout


def with_gradients(function):
  def run(x, w13, w2, weights, experts, dout):
    of_floats = lambda *floats: function(*floats, experts)  # noqa: E731
    y, pull = jax.vjp(of_floats, x, w13, w2, weights)
    return (y, *pull(dout))

  return run


def on_one_device(recipe, parts):
  def layer(x, w13, w2, weights, experts):
    return moe_ffn(x, w13, w2, experts, weights, recipe, keys=KEYS, token_parts=parts)

  return jax.jit(with_gradients(layer))


def make_mesh(data, expert):
  devices = jax.devices()[: data * expert]
  axes = dict(axis_types=(AxisType.Auto,) * 2, devices=devices)
  return jax.make_mesh((data, expert), ("data", "expert"), **axes)


ROWS, EXPERTS = P(("data", "expert")), P("expert")


def over_mesh(recipe, mesh, parts=1, of_weights=EXPERTS, **options):
  """Each device has its part of the tokens and its experts."""

  def layer(x, w13, w2, weights, experts):
    options_of_all = dict(keys=KEYS, expert_axis="expert", token_parts=parts)
    return moe_ffn(x, w13, w2, experts, weights, recipe, **options_of_all | options)

  specs = (ROWS, of_weights, of_weights, ROWS, ROWS)
  sharded = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=ROWS)
  return jax.jit(with_gradients(sharded))


@functools.cache
def expected(name, parts):
  return [np.asarray(r, np.float64) for r in on_one_device(recipes.RECIPES[name], parts)(*inputs())]


def assert_same(name, got, expected, data):
  """Equal but for the order of float32 sums, each followed by at most one rounding to bf16.

  A token's sum has K terms; its order may move it by K half ulps of float32 of the sum of
  magnitudes, and so to the next bf16: 2^-8 of it. What is summed are bf16 products that cancel, so
  that the sum of magnitudes is at most some 16 times the largest result. A weight's gradient is
  summed within its device alone, but where `data` devices have the same experts. A routing weight's
  is a sum of F terms, which XLA may cut into vectors in two ways.
  """
  for what, a, b in zip(NAMES, got, expected, strict=True):
    a, largest = np.asarray(a, np.float64), np.abs(b).max()
    assert largest > 0, what
    if what in ("y", "dx") and recipes.RECIPES[name].payload.sums == jnp.bfloat16:
      bound = 4 * 2.0**-8 * largest  # four sums of a device are rounded before the last
    elif what in ("y", "dx"):
      bound = np.abs(b) * 2.0**-8 + 16 * K * 2.0**-24 * largest
    elif what == "dweights":
      bound = 16 * F * 2.0**-24 * largest
    elif data == 1:
      bound = np.zeros_like(b)
    else:
      bound = 16 * data * 2.0**-24 * largest
    assert (np.abs(a - b) <= bound).all(), (name, what, np.abs(a - b).max() / largest)


def cases():
  """Every recipe over both axes; those that differ most in all other ways, too."""
  most = ("fp8", "mxfp4_rht_sr", "hopper_fp4_dispatch")
  for data, expert, parts in ((1, 2, 2), (1, 4, 1), (2, 2, 1), (4, 1, 1)):
    for name in RECIPES if (data, expert) == (2, 2) else most:
      quick = (data, expert) == (2, 2) and name == "hopper_fp4_dispatch"
      yield pytest.param(name, data, expert, parts, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("name, data, expert, parts", list(cases()))
def test_numbers_are_those_of_one_device(name, data, expert, parts):
  devices = data * expert
  run = over_mesh(recipes.RECIPES[name], make_mesh(data, expert), parts)
  assert_same(name, run(*inputs()), expected(name, devices * parts), data)


def test_no_token_is_dropped_however_they_choose():
  x, w13, w2, weights, experts, dout = inputs()
  one = jnp.full_like(experts, 6).at[:, 1].set(7)  # both are the last device's
  arguments = (x, w13, w2, weights, one, dout)
  got = over_mesh(recipes.BF16, make_mesh(1, 4))(*arguments)
  want = [np.asarray(r, np.float64) for r in on_one_device(recipes.BF16, 4)(*arguments)]
  assert_same("bf16", got, want, 1)


@pytest.mark.slow
def test_choices_beyond_the_capacity_count_as_zero_and_are_counted():
  x, w13, w2, weights, experts, _ = inputs(jnp.float32)
  mesh = make_mesh(1, 4)

  def run(experts, capacity_factor):
    def layer(x, w13, w2, weights, experts):
      how = {"expert_axis": "expert", "capacity_factor": capacity_factor}
      y, dropped = moe_ffn(x, w13, w2, experts, weights, recipes.FP32, **how)
      return y, dropped[None]

    specs = (ROWS, EXPERTS, EXPERTS, ROWS, ROWS)
    sharded = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=(ROWS, ROWS))
    return jax.jit(sharded)(x, w13, w2, weights, experts)

  y, dropped = run(experts, 4.0)
  assert not dropped.any()
  np.testing.assert_array_equal(y, over_mesh(recipes.FP32, mesh)(*inputs(jnp.float32))[0])
  # All choices of all tokens are the first device's: it has room for those of a quarter of them,
  # in the order of experts; each device sends at most a quarter of its choices, 12 tokens.
  all_first = jnp.broadcast_to(jnp.asarray([0, 1, 1]), experts.shape)
  y, dropped = run(all_first, 1.0)
  sent, room = 4 * 12 * K, 16 * K
  np.testing.assert_array_equal(dropped, [4 * K + sent - room, *[4 * K] * 3])
  assert not y[12:16].any() and y[:12].any(axis=1).all()  # the last of device 0 were not sent
  y, dropped = run(experts[:, :], 0.5)
  assert dropped.sum() > 0 and np.isfinite(y).all()


# Weights in parts of their columns, each gathered as it is read (FSDP): here along "data".


COLUMNS = P("expert", None, "data")


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, data, expert",
  [
    *((name, 2, 2) for name in ("bf16", "fp8", "mxfp4_rht_sr", "hopper_fp4")),
    ("hopper_fp4", 2, 1),
  ],
)
def test_weights_in_parts_have_the_numbers_of_whole_ones(name, data, expert):
  arguments, recipe = inputs(d=256, f=128), recipes.RECIPES[name]
  axis = "expert" if expert > 1 else None
  mesh, options = make_mesh(data, expert), {"expert_axis": axis}
  run = over_mesh(recipe, mesh, of_weights=COLUMNS, weight_axis="data", **options)
  whole = over_mesh(recipe, mesh, **options)(*arguments)
  for what, a, b in zip(NAMES, run(*arguments), whole, strict=True):
    np.testing.assert_array_equal(a, b, err_msg=what)  # each gradient is a sum of two


def test_parts_of_weights_that_are_read_once_have_the_same_numbers(hopper):
  arguments = inputs(tokens=64, d=256, f=256, dtype=jnp.bfloat16)
  options = {"implementation": "mosaic", "exchange": "xla", "expert_axis": None}
  run = functools.partial(over_mesh, recipes.FP8, make_mesh(2, 1), **options)
  twice = run()(*arguments)
  hopper.clear()
  once = run(of_weights=COLUMNS, weight_axis="data", weights_once=True)(*arguments)
  assert hopper.count("quantize_fp8_weights") == 2
  for what, a, b in zip(NAMES, once, twice, strict=True):
    np.testing.assert_array_equal(np.float32(a), np.float32(b), err_msg=what)


def gathered(recipe):
  """Dtypes of what a layer gathers, but for its plan."""
  run = over_mesh(recipe, make_mesh(2, 2), of_weights=COLUMNS, weight_axis="data")
  program = jax.make_jaxpr(run)(*inputs(d=256, f=128)).jaxpr
  gathers = [eqn for eqn in equations(program) if eqn.primitive.name == "all_gather"]
  return [v.aval.dtype.name for eqn in gathers for v in eqn.invars if v.aval.ndim == 3]


def test_codes_and_scales_of_weights_are_gathered():
  assert gathered(recipes.BF16) == ["bfloat16"] * 4  # two weights, forth and back
  assert gathered(recipes.FP8) == ["uint8", "float32"] * 4
  assert gathered(recipes.MXFP4) == ["uint8", "uint8"] * 4


def test_columns_that_cut_what_is_read_as_one_are_refused():
  def refused(message, recipe, **sizes):
    run = over_mesh(recipe, make_mesh(2, 2), of_weights=COLUMNS, weight_axis="data")
    with pytest.raises(ValueError, match=message):
      run(*inputs(**sizes))

  refused("the 64 columns of w13 on a device are no multiple of 128, the blocks of", recipes.FP8)
  refused("the 48 columns of w2 on a device are no multiple of 32", recipes.MXFP4, d=96)
  one_scale = recipes.FP8.replace({"fprop.rhs.format": fp4jax.FP8_TENSOR})
  refused("FP8_TENSOR in fprop.rhs has one scale for a weight", one_scale)
  stochastic = recipes.MXFP4.replace({"fprop.rhs.rounding": "stochastic"})
  refused("parts of a weight are read by plain operands rounded to nearest", stochastic)


# What travels.


def exchanged(recipe, d=D):
  """Bytes a token-slot of each all-to-all of forward and backward pass, by dtype and width."""
  run = over_mesh(recipe, make_mesh(1, 4))
  program = jax.make_jaxpr(run)(*inputs()).jaxpr
  sent = [eqn for eqn in equations(program) if eqn.primitive.name == "all_to_all"]
  return [(str(v.aval.dtype), *v.aval.shape[2:]) for eqn in sent for v in eqn.invars]


def test_rows_travel_packed():
  plan = [("int32", K), ("int32",), ("int32", K), ("float32", K), ("float32", K)]
  expected = {
    "bf16": [("bfloat16", D)] * 2,
    "hopper_fp4": [("uint8", D // 2), ("uint8", D // 32), ("bfloat16", D)],
    "fp8_dispatch": [("uint8", D), ("float32", D // 128)] * 2,
    "hopper_fp4_dispatch": [
      ("uint8", D // 2),
      ("uint8", D // 32),
      ("uint8", D),
      ("float32", D // 128),
    ],
  }
  for name, payload in expected.items():
    recipe = recipes.RECIPES[name]
    back = [(recipe.payload.sums.name, D)] * 2  # results and dx, sums over a device's experts
    assert sorted(exchanged(recipe)) == sorted(plan + back + payload), name


def test_what_arrives_is_what_is_kept():
  mesh, recipe = make_mesh(1, 4), recipes.HOPPER_FP4

  def kept(x, w13, w2, weights, experts):
    def layer(x, w13, w2, weights):
      return moe_ffn(x, w13, w2, experts, weights, recipe, expert_axis="expert")

    pull = jax.vjp(layer, x, w13, w2, weights)[1]
    return [leaf for leaf in jax.tree.leaves(pull) if leaf.ndim == 2 and leaf.dtype == jnp.uint8]

  specs = (ROWS, EXPERTS, EXPERTS, ROWS, ROWS)
  sharded = jax.shard_map(kept, mesh=mesh, in_specs=specs, out_specs=ROWS)
  leaves = jax.eval_shape(sharded, *inputs()[:5])
  widths = sorted(leaf.shape[1] for leaf in leaves)
  assert widths == sorted([D // 2, D // 32, F, 2 * F // 32])  # of x, and of h


def test_a_payload_of_codes_has_a_gradient():
  """The trap: autodiff through what is sent gives zero for bytes, and casts gradients to E4M3."""
  x = inputs()[0].astype(jnp.float32)
  mesh = make_mesh(1, 4)

  def sent_by_hand(x, as_bytes):
    codes = x.astype(jnp.float8_e4m3fn)
    codes = lax.bitcast_convert_type(codes, jnp.uint8) if as_bytes else codes
    codes = lax.all_to_all(codes.reshape(4, -1, D), "expert", 0, 0)
    codes = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn) if as_bytes else codes
    return codes.astype(jnp.float32).reshape(-1, D)

  def gradient(as_bytes, size):
    by_shards = jax.shard_map(
      functools.partial(sent_by_hand, as_bytes=as_bytes), mesh=mesh, in_specs=ROWS, out_specs=ROWS
    )
    return jax.jit(jax.grad(lambda x: size * by_shards(x).sum()))(x)

  assert not gradient(True, 1.0).any()
  assert gradient(False, 1.0).all() and not gradient(False, 1e-6).any()
  for size in (1.0, 1e-6):
    *arguments, dout = inputs()
    for name in ("fp8_dispatch", "hopper_fp4_dispatch"):
      run = over_mesh(recipes.RECIPES[name], mesh)
      _, dx, *_ = run(*arguments, dout * size)
      exact = over_mesh(recipes.FP32, mesh)(*arguments, dout)[1].astype(jnp.float32)
      # E4M3 and MXFP4 are off by some 3 and 12 % in each of the products.
      error = np.linalg.norm(dx.astype(jnp.float32) / size - exact) / np.linalg.norm(exact)
      assert 0 < error < 0.4, (name, size, error)


@pytest.mark.slow
def test_payload_is_rounded_on_one_device_too():
  recipe = recipes.BF16.replace({"payload.forward": fp4jax.MXFP4})
  x, *others, dout = inputs()
  rounded = fp4jax.fake_quantize(x, fp4jax.MXFP4)
  got = on_one_device(recipe, 1)(x, *others, dout)
  want = on_one_device(recipes.BF16, 1)(rounded, *others, dout)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  recipe = recipes.BF16.replace({"payload.backward": fp4jax.FP8_BLOCK})
  got = on_one_device(recipe, 1)(x, *others, dout)
  want = on_one_device(recipes.BF16, 1)(x, *others, fp4jax.fake_quantize(dout, fp4jax.FP8_BLOCK))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_plan_of_an_exchange():
  """Which slot holds which token, by a loop over them."""
  mesh = make_mesh(1, 4)
  experts = inputs()[4].astype(jnp.int32)

  def plan(experts):
    tokens = len(experts)
    places = jnp.arange(tokens * K, dtype=jnp.int32).reshape(tokens, K)
    part = lax.axis_index("expert").astype(jnp.int32)[None]
    parts = jnp.zeros_like(experts[:, 0])
    dispatch, arrived = AllToAll.of(Choices(experts, parts, places, part), "expert", 2, 16)
    return dispatch.token_of_slot[None], arrived

  sharded = jax.shard_map(plan, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
  token_of_slot, arrived = jax.jit(sharded)(experts)
  wanted, parts = (np.asarray(v).reshape(4, 4, 16, -1) for v in (arrived.experts, arrived.parts))
  for device in range(4):
    own = np.asarray(experts)[16 * device : 16 * (device + 1)]
    for peer in range(4):
      goes = [t for t in range(16) if (own[t] // 2 == peer).any()]
      assert list(token_of_slot[device, peer]) == goes + [16] * (16 - len(goes))
      for slot, token in enumerate(goes):
        here = np.where(own[token] // 2 == peer, own[token] - 2 * peer, 2)
        assert list(wanted[peer, device, slot]) == list(here)
        assert parts[peer, device, slot] == device
      assert (wanted[peer, device, len(goes) :] == 2).all()


# Refusals.


def test_bad_arguments_are_refused():
  x, w13, w2, weights, experts, _ = inputs()
  mesh = make_mesh(1, 4)

  def refused(message, recipe=recipes.BF16, in_mesh=True, w_spec=EXPERTS, **options):
    def layer(x, w13, w2, weights, experts):
      return moe_ffn(x, w13, w2, experts, weights, recipe, **options)

    specs = (ROWS, w_spec, w_spec, ROWS, ROWS)
    call = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=ROWS) if in_mesh else layer
    with pytest.raises(ValueError, match=message):
      call(x, w13, w2, weights, experts)

  refused("token_parts=7 does not divide 64 tokens", in_mesh=False, token_parts=7)
  refused("expert_axis='expert' is no mesh axis", in_mesh=False, expert_axis="expert")
  refused("expert_axis='model' is no mesh axis", expert_axis="model")
  refused("w13 is whole on each device of expert_axis='expert'", w_spec=P(), expert_axis="expert")
  refused("capacity_factor=0 is not above 0", expert_axis="expert", capacity_factor=0)
  tiles = recipes.HOPPER_FP4.replace({"residual.lhs": fp4jax.FP8_BLOCK_2D})
  refused("residual.lhs=FP8_BLOCK_2D has scales that several tokens share", tiles, token_parts=2)
  for fmt in (fp4jax.NVFP4, fp4jax.FP8_BLOCK_2D, "mxfp4"):
    with pytest.raises(ValueError, match=r"payload.forward=.* is no format whose rows stand alone"):
      recipes.BF16.replace({"payload.forward": fmt})


def test_an_expert_that_does_not_exist_gives_nan_on_every_device():
  arguments = list(inputs())
  arguments[4] = arguments[4].at[3, 1].set(E)
  for result in over_mesh(recipes.BF16, make_mesh(1, 4))(*arguments):
    assert np.isnan(result).all()


@pytest.mark.slow
def test_a_tap_of_each_device():
  x, w13, w2, weights, experts, dout = inputs()
  mesh, recipe = make_mesh(1, 4), recipes.HOPPER_FP4

  def layer(x, w13, w2, weights, experts, tap):
    taps = (tap[0], None)
    return moe_ffn(x, w13, w2, experts, weights, recipe, taps=taps, expert_axis="expert")

  specs = (ROWS, EXPERTS, EXPERTS, ROWS, ROWS, ROWS)
  sharded = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=ROWS)
  taps = jnp.broadcast_to(operands.new_tap(), (4, *operands.new_tap().shape))

  @jax.jit
  def run(tap):
    y, pull = jax.vjp(lambda tap: sharded(x, w13, w2, weights, experts, tap), tap)
    return y, pull(dout)[0]

  y, found = run(taps)
  found = np.asarray(found)[:, operands.ROLES.index("residual.lhs")]
  assert np.isfinite(found).all() and len(np.unique(found[:, 0])) == 4  # of what arrived at each
  np.testing.assert_array_equal(y, over_mesh(recipe, mesh)(*inputs())[0])
