"""`moe_ffn` of the few rows that a decoding step has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import equations

import fp4jax
from fp4jax import moe_ffn, operands, recipes


def operands_of_experts(tokens, experts, d=32, f=32, k=2):
  keys = jax.random.split(jax.random.key(0), 5)
  x = jax.random.normal(keys[0], (tokens, d))
  w13 = jax.random.normal(keys[1], (experts, d, 2 * f)) * d**-0.5
  w2 = jax.random.normal(keys[2], (experts, f, d)) * f**-0.5
  chosen = jax.random.randint(keys[3], (tokens, k), 0, experts)
  return x, w13, w2, chosen, jax.random.uniform(keys[4], (tokens, k))


TENSOR_SCALES = dict.fromkeys(("fprop.lhs.format", "fprop.rhs.format"), fp4jax.NVFP4)
RECIPES = (
  recipes.FP32,
  recipes.FP8,
  recipes.MXFP4,
  recipes.MXFP4.replace(TENSOR_SCALES | {"name": "nvfp4"}),
  recipes.MXFP4.replace({"fprop.lhs.rounding": "stochastic", "name": "sr"}),
)
OF_ALL = [(1, 4), (8, 16), (8, 4), (33, 4)]  # tokens, experts
IN_TILES = [(1, 16), (300, 4)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
@pytest.mark.parametrize(("tokens", "experts"), OF_ALL + IN_TILES)
def test_few_rows_have_the_numbers_of_whole_tiles(recipe, tokens, experts):
  args, keys = operands_of_experts(tokens, experts), tuple(jax.random.split(jax.random.key(7)))
  expected = moe_ffn(*args, recipe, keys=keys, implementation="xla")
  found = moe_ffn(*args, recipe, keys=keys, few_rows=True, implementation="xla")
  # Two sums of 32 terms of up to 5 standard deviations, in another order.
  np.testing.assert_allclose(found, expected, rtol=0, atol=2 * 32 * 2.0**-24 * 32)


def results(args, primitive):
  """Shapes of what all of a program's products return, or its gathers."""
  program = jax.make_jaxpr(lambda *a: moe_ffn(*a, recipes.FP32, few_rows=True))(*args)
  found = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == primitive]
  return [eqn.outvars[0].aval.shape for eqn in found]


@pytest.mark.parametrize(("tokens", "experts"), OF_ALL)
def test_every_expert_multiplies_all_of_few_tokens(tokens, experts):
  args = operands_of_experts(tokens, experts)
  d, f2 = args[1].shape[1:]
  assert results(args, "dot_general") == [(experts, tokens, f2), (experts, tokens, d)]
  # No weights are gathered, and nothing is sorted.
  assert not any(shape[-2:] == (d, f2) for shape in results(args, "gather"))
  assert not results(args, "sort")


@pytest.mark.parametrize(("tokens", "experts"), IN_TILES)
def test_tiles_are_multiplied_less_than_three_times(tokens, experts):
  args = operands_of_experts(tokens, experts)
  d, f2, rows = *args[1].shape[1:], 2 * tokens
  shapes = results(args, "dot_general")
  assert [n for *_, n in shapes] == [f2, d]
  for tiles, rows_of_tile, _ in shapes:
    assert tiles * rows_of_tile < 3 * rows and tiles <= 2 * experts


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_an_expert_that_does_not_exist_is_nan(wrong):
  *operands, experts, weights = operands_of_experts(8, 4)
  run = jax.jit(lambda experts: moe_ffn(*operands, experts, weights, recipes.FP32, few_rows=True))
  assert np.isfinite(run(experts)).all()
  assert np.isnan(run(experts.at[3, 1].set(wrong))).all()


def test_few_rows_have_no_gradient():
  args = operands_of_experts(8, 4)
  with pytest.raises(ValueError, match="few_rows=True has no backward pass"):
    jax.grad(lambda x: jnp.sum(moe_ffn(x, *args[1:], recipes.FP32, few_rows=True)))(args[0])


# Packed weights, by the kernel's definition in its place (`conftest.hopper`).

BF16 = recipes.BF16
PACKED = (
  BF16.replace({"fprop.rhs.format": fp4jax.MXFP4, "name": "w4a16"}),
  BF16.replace({"fprop.rhs.format": fp4jax.FP8_BLOCK_POW2_2D, "name": "w8a16"}),
  recipes.MXFP4,
)


def packed_operands(recipe, tokens, experts, d=128, f=256):
  x, w13, w2, *chosen = operands_of_experts(tokens, experts, d, f)
  w13, w2 = (fp4jax.pack_weights(w.astype(jnp.bfloat16), recipe) for w in (w13, w2))
  return x.astype(jnp.bfloat16), w13, w2, *chosen


@pytest.mark.parametrize("recipe", PACKED, ids=lambda r: r.name)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (8, 4), (33, 3)])
def test_packed_experts_are_multiplied_as_they_lie(recipe, tokens, experts, hopper):
  args = packed_operands(recipe, tokens, experts)
  expected = moe_ffn(*args, recipe, few_rows=True, implementation="xla")
  assert not hopper
  found = moe_ffn(*args, recipe, few_rows=True)
  assert hopper == ["few_rows_matmul"] * 2 and found.dtype == jnp.bfloat16
  # Sums in two orders: few results fall on the other side of a rounding.
  error = np.linalg.norm(np.float32(found) - np.float32(expected))
  assert error < 0.002 * np.linalg.norm(np.float32(expected))


def test_where_packed_experts_have_no_kernel(hopper):
  def refused(message, recipe=PACKED[0], tokens=8, experts=4, f=256, **options):
    args = packed_operands(recipe, tokens, experts, f=f)
    run = functools.partial(moe_ffn, *args, recipe, few_rows=True, **options)
    with pytest.raises(ValueError, match=f'implementation="mosaic": .*{message}'):
      run(implementation="mosaic")
    hopper.clear()
    jax.eval_shape(run)
    assert "few_rows_matmul" not in hopper

  refused("multiplies 1 to 128 rows, not 129", tokens=129)
  refused("multiplies 1 to 64 rows, not 65", PACKED[1], tokens=65)
  refused("k=192 is not a multiple of 128", PACKED[1], f=192)
  refused("n=192 is not a multiple of 128", f=96)
  refused("capacity_factor=0.5 may leave choices no room", capacity_factor=0.5)
  refused('taps are read by implementation="xla"', taps=(operands.new_tap(), None))


def test_packed_experts_that_do_not_exist_and_gradients(hopper):
  x, w13, w2, experts, weights = packed_operands(PACKED[0], 8, 4)
  run = jax.jit(lambda x, e: moe_ffn(x, w13, w2, e, weights, PACKED[0], few_rows=True))
  assert np.isfinite(run(x, experts)).all()
  for wrong in (-1, 4):
    assert np.isnan(run(x, experts.at[3, 1].set(wrong))).all()
  out, dropped = moe_ffn(
    x, w13, w2, experts, weights, PACKED[0], few_rows=True, capacity_factor=1.0
  )
  np.testing.assert_array_equal(out, run(x, experts))
  assert dropped == 0
  with pytest.raises(ValueError, match="few_rows=True has no backward pass"):
    jax.grad(lambda x: jnp.sum(run(x, experts).astype(jnp.float32)))(x)
  with pytest.raises(ValueError, match='exchange="mosaic": without expert_axis'):
    moe_ffn(x, w13, w2, experts, weights, PACKED[0], few_rows=True, exchange="mosaic")


@pytest.mark.parametrize(("dtype", "number"), [(jnp.uint8, 256), (jnp.int8, 128), (jnp.int16, 4)])
def test_packed_experts_are_integers_of_any_dtype(dtype, number, hopper):
  x, w13, w2, experts, weights = packed_operands(PACKED[0], 8, number, f=128)
  run = functools.partial(moe_ffn, x, w13, w2, weights=weights, recipe=PACKED[0], few_rows=True)
  found = run(experts=experts.astype(dtype))
  np.testing.assert_array_equal(found, run(experts=experts))
  assert np.isfinite(found).all()


def test_packed_experts_that_are_divided_have_no_kernel(hopper):
  x, w13, w2, experts, weights = packed_operands(PACKED[0], 8, 4)
  mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,))
  rows = P("expert")

  def layer(x, w13, w2, experts, weights):
    options = {"few_rows": True, "expert_axis": "expert"}
    return moe_ffn(x, w13, w2, experts, weights, PACKED[0], **options)

  run = jax.shard_map(layer, mesh=mesh, in_specs=rows, out_specs=rows)
  found = run(x, w13, w2, experts, weights)
  assert "few_rows_matmul" not in hopper
  expected = moe_ffn(x, w13, w2, experts, weights, PACKED[0], implementation="xla")
  error = np.linalg.norm(np.float32(found) - np.float32(expected))
  assert error < 0.002 * np.linalg.norm(np.float32(expected))
