"""What public functions take and refuse: arrays, sizes, ids, keys, axes, dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from fp4jax import dequantize, fake_quantize, grouped_dot, moe_ffn, quantize, recipes

KEY = jax.random.key(3)


def moe(recipe=recipes.MXFP4, experts=None, num_experts=4, asarray=np.asarray, **options):
  experts = np.array([[0, 1], [2, 3], [1, 0]]) if experts is None else experts
  x = np.ones((len(experts), 32), np.float32)
  w13 = np.full((num_experts, 32, 64), 2.0**-5, np.float32)
  w2 = np.full((num_experts, 32, 32), 2.0**-5, np.float32)
  weights = np.full(experts.shape, 0.5, np.float32)
  arrays = map(asarray, (x, w13, w2, experts, weights))
  return moe_ffn(*arrays, recipe, **options)


def test_numpy_is_taken_everywhere():
  x, w = np.ones((32, 32), np.float32), np.ones((2, 32, 32), np.float32)
  sizes = np.array([20, 12])
  np.testing.assert_array_equal(moe(), moe(asarray=jnp.asarray))
  f = lambda x: grouped_dot(x, w, sizes, recipes.MXFP4).sum()  # noqa: E731
  assert np.isfinite(jax.grad(f)(x)).all()
  assert fp4jax.decompose(x, fp4jax.MXFP4).summary().gain == 1
  np.testing.assert_array_equal(fp4jax.hadamard(x, -1), fp4jax.hadamard(jnp.asarray(x), -1))
  np.testing.assert_array_equal(fake_quantize(x, fp4jax.MXFP4), x)


@pytest.mark.parametrize(
  "sizes",
  [
    [2**30] * 4 + [1],
    [2**31 - 1, 2**31 - 1, 2],
    [-1, 20],
    [40, -(2**31)],
    [33],
    np.array([2**32 - 1, 1], np.uint32),
  ],
)
def test_sizes_that_are_not_valid_give_nan_and_nan_gradients(sizes):
  sizes = np.asarray(sizes if hasattr(sizes, "dtype") else np.array(sizes, np.int32))
  x, w = jnp.ones((32, 32)), jnp.ones((len(sizes), 32, 32))

  @jax.jit
  def run(x, w, sizes):
    y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, sizes, recipes.MXFP4), x, w)
    return y, *pull(jnp.ones_like(y))

  for result in run(x, w, sizes):
    assert np.isnan(result).all()
  with pytest.raises(ValueError, match="group_sizes"):
    grouped_dot(x, w, sizes, recipes.MXFP4)
  valid = np.zeros_like(sizes)
  valid[0] = 32
  assert all(np.isfinite(result).all() for result in run(x, w, valid))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32"])
def test_every_integer_dtype_names_the_same_experts(dtype):
  experts = np.array([[0, 255], [254, 127], [128, 1]])
  expected = moe(recipes.FP32, experts.astype(np.int32), 256)
  assert np.isfinite(expected).all()
  for jitted in (False, True):
    f = lambda e: moe(recipes.FP32, e, 256, asarray=jnp.asarray)  # noqa: E731
    np.testing.assert_array_equal((jax.jit(f) if jitted else f)(experts.astype(dtype)), expected)


def test_narrow_ids_with_more_experts_than_they_can_name():
  experts = np.array([[0, 127], [5, 126]])
  np.testing.assert_array_equal(
    moe(recipes.FP32, experts.astype(np.int8), 200), moe(recipes.FP32, experts, 200)
  )


@pytest.mark.parametrize("bad", [4, -1, 2**32 - 1])
def test_experts_that_do_not_exist_give_nan_and_nan_gradients(bad):
  experts = np.array([[bad, bad], [1, 2]]).astype(np.uint32 if bad > 4 else np.int32)
  arrays = [np.ones((2, 32)), np.ones((4, 32, 64)), np.ones((4, 32, 32)), np.ones((2, 2))]
  arrays = [a.astype(np.float32) for a in arrays]

  @jax.jit
  def gradients(experts, x, w13, w2, weights):
    f = lambda x, w13, w2, weights: moe_ffn(x, w13, w2, experts, weights, recipes.BF16).sum()  # noqa: E731
    return jax.grad(f, (0, 1, 2, 3))(x, w13, w2, weights)

  assert all(np.isnan(g).all() for g in gradients(experts, *arrays))
  with pytest.raises(ValueError, match="which is not one of the 4 experts"):
    moe(experts=experts)


@pytest.mark.parametrize(
  "key, message",
  [
    (0, "key has type int, not a key such as"),
    ("abc", "key has type str, not a key such as"),
    (jax.random.split(jax.random.key(0)), r"key of shape \(2,\) is a batch of keys"),
    (jax.random.split(jax.random.PRNGKey(0)), r"key of shape \(2, 2\) is a batch of keys"),
    (np.float32(1), r"key is float32 \(\), not a key"),
  ],
)
def test_what_is_no_key_is_refused_at_once(key, message):
  x = jnp.ones((32, 32))
  calls = (
    lambda: fp4jax.dot_general(recipes.MXFP4_RHT_SR, key=key),
    lambda: grouped_dot(x, x[None], jnp.array([32]), recipes.MXFP4_RHT_SR, key=key),
    lambda: moe(recipes.MXFP4_RHT_SR, keys=(KEY, key)),
    lambda: fake_quantize(x, fp4jax.MXFP4, rounding="stochastic", key=key),
  )
  for call in calls:
    with pytest.raises((TypeError, ValueError), match=message):
      call()
  fp4jax.dot_general(recipes.MXFP4_RHT_SR, key=jax.random.PRNGKey(0))  # the older kind of one key


@pytest.mark.parametrize("axis", [1.0, None, "0", True])
@pytest.mark.parametrize("f", [quantize, fake_quantize, fp4jax.decompose])
def test_an_axis_is_an_int(f, axis):
  with pytest.raises(TypeError, match=f"axis={axis!r} has type {type(axis).__name__}, not int"):
    f(jnp.ones((32, 32)), fp4jax.MXFP4, axis)


@pytest.mark.parametrize("dtype", [np.int32, bool, np.uint8])
def test_values_are_floats(dtype):
  with pytest.raises(TypeError, match="is not a float: codes would be cut off"):
    dequantize(quantize(jnp.ones(32), fp4jax.MXFP4), dtype)


def test_only_packing_needs_whole_bytes():
  fmt = dataclasses.replace(fp4jax.MXFP4, scale_dtype=np.float32, block_shape=None)
  x = jnp.linspace(-1, 1, 33)
  assert fake_quantize(x, fmt).shape == fp4jax.decompose(x, fmt).total.shape == (33,)
  with pytest.raises(ValueError, match="4-bit codes are packed in pairs"):
    quantize(x, fmt)


def test_a_gradient_through_codes_is_refused():
  for fmt in (fp4jax.MXFP4, fp4jax.NVFP4, fp4jax.FP8_BLOCK):
    f = lambda x: dequantize(quantize(x, fmt)).sum()  # noqa: B023, E731
    with pytest.raises(TypeError, match=r"has no gradient: .* Use fake_quantize"):
      jax.grad(f)(jnp.ones((1, 128)))
    frozen = lambda x: x.sum() * dequantize(quantize(jax.lax.stop_gradient(x), fmt)).sum()  # noqa: B023, E731
    assert np.isfinite(jax.grad(frozen)(jnp.ones((1, 128)))).all()
    packed = quantize(jnp.ones((1, 128)), fmt)  # codes of a checkpoint are constants
    assert np.isfinite(jax.grad(lambda x, q=packed: (x * dequantize(q)).sum())(jnp.ones(128))).all()


@pytest.mark.parametrize("function", ["grouped_dot", "moe_ffn"])
def test_looking_for_bad_sizes_and_experts_changes_no_bit(function):
  """A select can keep XLA from fusing bfloat16 casts with what a model does next."""
  normal = lambda i, *s: jax.random.normal(jax.random.key(i), s).astype(jnp.bfloat16)  # noqa: E731
  x, w, w13, w2 = (
    normal(0, 96, 64),
    normal(1, 4, 64, 64),
    normal(2, 4, 64, 64),
    normal(3, 4, 32, 64),
  )
  experts = np.random.default_rng(0).integers(0, 4, (96, 2))

  def loss(x, index):
    h = (x.astype(jnp.float32) * 1.01).astype(jnp.bfloat16)
    if function == "grouped_dot":
      y = grouped_dot(h, w, index, recipes.BF16)
    else:
      y = moe_ffn(h, w13, w2, index, jnp.full((96, 2), 0.3), recipes.BF16)
    return jnp.sum(y.astype(jnp.float32) ** 2)

  index = np.array([30, 0, 50, 10]) if function == "grouped_dot" else experts
  traced = jax.jit(jax.grad(loss))(x, index)
  np.testing.assert_array_equal(traced, jax.jit(jax.grad(lambda x: loss(x, index)))(x))
