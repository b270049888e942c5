"""Edges of the core: every octave, every integer dtype, keys of inner traces, stacks, equality."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax import dequantize, fake_quantize, grouped_dot, moe_ffn, operands, quantize, recipes

KEY = jax.random.key(3)
MATMUL = (((1,), (0,)), ((), ()))
RULES = ("floor", "even", "rceil", "oas")
E5M2 = ml_dtypes.float8_e5m2
VARIANTS = [
  *(fp4jax.FORMATS[name] for name in oracles.FORMATS),
  *(dataclasses.replace(fp4jax.MXFP4, scale_rule=rule) for rule in RULES[1:]),
  *(dataclasses.replace(fp4jax.MXFP8, scale_rule=rule) for rule in RULES[1:3]),
  dataclasses.replace(fp4jax.MXFP8, element_dtype=E5M2),
  dataclasses.replace(fp4jax.NVFP4, has_tensor_scale=False),
  *(  # larger elements under E4M3 scales
    dataclasses.replace(fp4jax.NVFP4, has_tensor_scale=False, element_dtype=element)
    for element in (fp4jax.formats.E4M3, E5M2)
  ),
]


# Every octave.


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("fmt", VARIANTS, ids=lambda f: f.name)
def test_no_finite_value_becomes_infinite_or_nan(fmt, dtype):
  """One block for each octave of float32, its largest value over its smallest mantissas and one."""
  info = ml_dtypes.finfo(dtype)
  octaves = np.arange(-149, 128)
  fractions = np.array([1, 1.25, 1.5, 1.75, 1.99, 0.5, 0.04, -1.99])
  with np.errstate(over="ignore", under="ignore"):
    x = np.resize(fractions, 128) * 2.0 ** octaves[:, None]
  x = np.clip(x, float(info.min), float(info.max)).astype(dtype)
  x = np.tile(x, (128, 1, 1)).swapaxes(0, 1) if fmt.block_shape == (128, 128) else x[:, None]
  values = jax.jit(jax.vmap(lambda x: fake_quantize(x, fmt)))(x)
  assert values.dtype == dtype and np.isfinite(np.asarray(values, np.float64)).all()
  unpacked = jax.jit(jax.vmap(lambda x: dequantize(quantize(x, fmt), dtype)))(x)
  np.testing.assert_array_equal(np.asarray(values, np.float64), np.asarray(unpacked, np.float64))
  # What a format holds it does not lose: within a quarter of the largest value of its block, or of
  # what the format saturates at.
  largest = float(info.max)
  if fmt.codec.max < 2.0**100 and not fmt.has_tensor_scale:
    largest = fmt.q_max * fmt.codec.max
  top = np.abs(x.astype(np.float64)).max((1, 2))
  normal = (top > 2.0**-120) & (top > 2.0**-7 * fmt.q_max if fmt.codec.bits == 8 else True)
  error = np.abs(np.asarray(values, np.float64) - np.clip(x.astype(np.float64), -largest, largest))
  assert (error.max((1, 2)) <= 0.25 * np.minimum(top, largest))[normal].all()


def test_a_block_beyond_its_scale_saturates():
  fmt = dataclasses.replace(fp4jax.NVFP4, has_tensor_scale=False)
  for size in (3e34, 4e34, 3.4e38):
    x = jnp.full(16, size)
    np.testing.assert_array_equal(fake_quantize(x, fmt), np.float32(6 * 448))
    np.testing.assert_array_equal(dequantize(quantize(x, fmt)), np.float32(6 * 448))


@pytest.mark.parametrize("rule", RULES)
def test_values_saturate_in_the_dtype_of_the_caller(rule):
  fmt = dataclasses.replace(fp4jax.MXFP4, scale_rule=rule)
  for dtype, size in ((np.float32, 3.3e38), (ml_dtypes.bfloat16, 3.3e38), (np.float16, 65000)):
    x = np.full(32, size, dtype)
    expected = np.asarray(fake_quantize(x, fmt), np.float64)
    assert np.isfinite(expected).all() and (expected >= 0.74 * size).all()
    np.testing.assert_array_equal(np.asarray(dequantize(quantize(x, fmt), dtype)), expected)


# Keys.


def stochastic(x, key):
  return fake_quantize(x, fp4jax.MXFP4, rounding="stochastic", key=key)


def scanned(x, key):
  return jax.lax.scan(lambda c, k: (c, stochastic(x, k)), 0.0, jax.random.split(key, 1))[1][0]


INNER_TRACES = {
  "checkpoint": jax.checkpoint(stochastic),
  "jit": jax.jit(stochastic),
  "scan": scanned,
  "cond": lambda x, k: jax.lax.cond(k is not None, stochastic, lambda x, k: x, x, k),
  "fori_loop": lambda x, k: jax.lax.fori_loop(0, 1, lambda i, y: stochastic(y, k), x),
  "vmap": lambda x, k: jax.vmap(stochastic)(x[None], k[None])[0],
}


@pytest.mark.parametrize("name", INNER_TRACES)
def test_a_key_may_be_of_an_inner_trace(name):
  x = jnp.linspace(-1, 1, 32)
  f = INNER_TRACES[name]
  g = jax.grad(lambda x, key: f(x, key).sum())(x, KEY)
  np.testing.assert_array_equal(g, np.ones(32))
  expected = jax.random.split(KEY, 1)[0] if name == "scan" else KEY
  np.testing.assert_array_equal(f(x, KEY), stochastic(x, expected))


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
    lambda: stochastic(x, key),
  )
  for call in calls:
    with pytest.raises((TypeError, ValueError), match=message):
      call()
  fp4jax.dot_general(recipes.MXFP4_RHT_SR, key=jax.random.PRNGKey(0))  # the older kind of one key


def test_draws_do_not_hang_on_the_order_of_roles():
  """Numbers of a role are typed in: a table in another order may not change what is drawn."""
  assert operands.recipe_lib.ROLES == {
    "fprop.lhs": 0,
    "fprop.rhs": 1,
    "dgrad.lhs": 2,
    "dgrad.rhs": 3,
    "wgrad.lhs": 4,
    "wgrad.rhs": 5,
  }


# Slices: a scale of a whole tensor belongs to what one GEMM reads.


def uniform(fmt):
  roles = [f"{gemm}.{side}" for gemm in ("fprop", "dgrad", "wgrad") for side in ("lhs", "rhs")]
  return recipes.MXFP4.replace({f"{role}.format": fmt for role in roles} | {"name": fmt.name})


@pytest.mark.parametrize("fmt", [fp4jax.FP8_TENSOR, fp4jax.NVFP4], ids=lambda f: f.name)
def test_an_expert_has_a_scale_of_its_own(fmt):
  rng = np.random.default_rng(0)
  x, w = rng.standard_normal((70, 32)), rng.standard_normal((3, 32, 48))
  sizes, owner = np.array([20, 20, 20]), np.repeat([0, 1, 2, 2], [20, 20, 20, 10])
  scale = 2.0 ** np.array([40, 0, -40])
  x, w = (x * scale[owner][:, None]).astype(np.float32), w.astype(np.float32)
  dy = rng.standard_normal((70, 48)).astype(np.float32)

  def run(x, w, dy):
    y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, jnp.asarray(sizes), uniform(fmt)), x, w)
    return y, *pull(dy)

  @jax.jit
  def one(x, w, dy):
    y, pull = jax.vjp(lambda x, w: fp4jax.dot_general(uniform(fmt))(x, w, MATMUL), x, w)
    return y, *pull(dy)

  y, dx, dw = jax.jit(run)(x, w, dy)
  start = 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    start += size

    expected = one(x[rows], w[e], dy[rows])
    for actual, wanted in zip((y[rows], dx[rows], dw[e]), expected, strict=True):
      # Sums of at most 48 products in two orders.
      bound = 48 * 2.0**-24 * 48 * np.abs(wanted).max()
      np.testing.assert_allclose(actual, wanted, rtol=0, atol=bound)
      assert np.abs(actual).max() > 0


@pytest.mark.parametrize("fmt", [fp4jax.FP8_TENSOR, fp4jax.NVFP4], ids=lambda f: f.name)
def test_a_batched_dot_is_its_vmap(fmt):
  rng = np.random.default_rng(1)
  sizes = (2.0 ** np.array([0, 30, -30]))[:, None, None]
  x, w = rng.standard_normal((3, 16, 32)) * sizes, rng.standard_normal((3, 32, 16)) / sizes
  x, w = x.astype(np.float32), w.astype(np.float32)
  dot = fp4jax.dot_general(uniform(fmt))

  def with_gradients(f):
    def run(x, w):
      y, pull = jax.vjp(f, x, w)
      return y, *pull(jnp.ones_like(y))

    return jax.jit(run)(x, w)

  batched = with_gradients(lambda x, w: dot(x, w, (((2,), (1,)), ((0,), (0,)))))
  mapped = with_gradients(jax.vmap(lambda x, w: dot(x, w, MATMUL)))
  for a, b in zip(batched, mapped, strict=True):
    np.testing.assert_array_equal(a, b)


# Sizes of groups, ids of experts.


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


def moe(recipe=recipes.MXFP4, experts=None, num_experts=4, asarray=np.asarray, **options):
  experts = np.array([[0, 1], [2, 3], [1, 0]]) if experts is None else experts
  x = np.ones((len(experts), 32), np.float32)
  w13 = np.full((num_experts, 32, 64), 2.0**-5, np.float32)
  w2 = np.full((num_experts, 32, 32), 2.0**-5, np.float32)
  weights = np.full(experts.shape, 0.5, np.float32)
  arrays = map(asarray, (x, w13, w2, experts, weights))
  return moe_ffn(*arrays, recipe, **options)


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
  experts = np.array([[0, bad], [1, 2]]).astype(np.uint32 if bad > 4 else np.int32)
  arrays = [np.ones((2, 32)), np.ones((4, 32, 64)), np.ones((4, 32, 32)), np.ones((2, 2))]
  arrays = [a.astype(np.float32) for a in arrays]

  @jax.jit
  def gradients(experts, x, w13, w2, weights):
    f = lambda x, w13, w2, weights: moe_ffn(x, w13, w2, experts, weights, recipes.BF16).sum()  # noqa: E731
    return jax.grad(f, (0, 1, 2, 3))(x, w13, w2, weights)

  assert all(np.isnan(g).all() for g in gradients(experts, *arrays))
  with pytest.raises(ValueError, match="which is not one of the 4 experts"):
    moe(experts=experts)


def test_numpy_is_taken_everywhere():
  x, w = np.ones((32, 32), np.float32), np.ones((2, 32, 32), np.float32)
  sizes = np.array([20, 12])
  np.testing.assert_array_equal(moe(), moe(asarray=jnp.asarray))
  f = lambda x: grouped_dot(x, w, sizes, recipes.MXFP4).sum()  # noqa: E731
  assert np.isfinite(jax.grad(f)(x)).all()
  assert fp4jax.decompose(x, fp4jax.MXFP4).summary().gain == 1
  np.testing.assert_array_equal(fp4jax.hadamard(x, -1), fp4jax.hadamard(jnp.asarray(x), -1))
  np.testing.assert_array_equal(fake_quantize(x, fp4jax.MXFP4), x)


# Stacks and gradients of packed arrays.


@pytest.mark.parametrize("layers", [16, 3])
@pytest.mark.parametrize("name", fp4jax.FORMATS)
def test_a_stack_of_packed_arrays_is_read_layer_by_layer(name, layers):
  fmt = fp4jax.FORMATS[name]
  x = jax.random.normal(KEY, (layers, 128, 128)) * 2.0 ** jnp.arange(layers)[:, None, None]
  stack = jax.jit(jax.vmap(lambda x: quantize(x, fmt)))(x)
  expected = jnp.stack([fake_quantize(layer, fmt) for layer in x])
  np.testing.assert_array_equal(dequantize(stack), expected)
  np.testing.assert_array_equal(jax.vmap(dequantize)(stack), expected)
  assert stack.shape == x.shape


def test_codes_that_scales_do_not_divide_are_refused():
  q = quantize(jnp.ones((4, 64)), fp4jax.MXFP4)
  with pytest.raises(ValueError, match=r"scales \(4, 3\) do not divide codes \(4, 64\)"):
    dequantize(dataclasses.replace(q, scales=jnp.zeros((4, 3), jnp.uint8)))


def test_a_gradient_through_codes_is_refused():
  for fmt in (fp4jax.MXFP4, fp4jax.NVFP4, fp4jax.FP8_BLOCK):
    f = lambda x: dequantize(quantize(x, fmt)).sum()  # noqa: B023, E731
    with pytest.raises(TypeError, match=r"has no gradient: .* Use fake_quantize"):
      jax.grad(f)(jnp.ones((1, 128)))
    frozen = lambda x: x.sum() * dequantize(quantize(jax.lax.stop_gradient(x), fmt)).sum()  # noqa: B023, E731
    assert np.isfinite(jax.grad(frozen)(jnp.ones((1, 128)))).all()
    packed = quantize(jnp.ones((1, 128)), fmt)  # codes of a checkpoint are constants
    assert np.isfinite(jax.grad(lambda x, q=packed: (x * dequantize(q)).sum())(jnp.ones(128))).all()


# Refusals.


def test_only_packing_needs_whole_bytes():
  fmt = dataclasses.replace(fp4jax.MXFP4, scale_dtype=np.float32, block_shape=None)
  x = jnp.linspace(-1, 1, 33)
  assert fake_quantize(x, fmt).shape == fp4jax.decompose(x, fmt).total.shape == (33,)
  with pytest.raises(ValueError, match="4-bit codes are packed in pairs"):
    quantize(x, fmt)


@pytest.mark.parametrize("axis", [1.0, None, "0", True])
@pytest.mark.parametrize("f", [quantize, fake_quantize, fp4jax.decompose])
def test_an_axis_is_an_int(f, axis):
  with pytest.raises(TypeError, match=f"axis={axis!r} has type {type(axis).__name__}, not int"):
    f(jnp.ones((32, 32)), fp4jax.MXFP4, axis)


@pytest.mark.parametrize("dtype", [np.int32, bool, np.uint8])
def test_values_are_floats(dtype):
  with pytest.raises(TypeError, match="is no float: codes would be cut off"):
    dequantize(quantize(jnp.ones(32), fp4jax.MXFP4), dtype)


@pytest.mark.parametrize("element", [ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn])
def test_six_bits_are_packed(element):
  fmt = dataclasses.replace(fp4jax.MXFP8, element_dtype=element, name="MXFP6")
  x = jax.random.normal(KEY, (6, 64))
  for axis in (0, 1):
    x = x.T
    q = quantize(x, fmt, axis - 2)
    assert q.codes.size * 8 == 6 * x.size and q.shape == x.shape
    np.testing.assert_array_equal(dequantize(q), fake_quantize(x, fmt, axis - 2))
    break


# Equality and names.


def test_a_dot_general_is_a_value():
  dot, again = fp4jax.dot_general(recipes.MXFP4), fp4jax.dot_general(recipes.MXFP4)
  assert dot == again and hash(dot) == hash(again) and dot != fp4jax.dot_general(recipes.FP8)
  assert pickle.loads(pickle.dumps(dot)) == dot and copy.deepcopy(dot) == dot
  with pytest.raises(dataclasses.FrozenInstanceError):
    dot.recipe = recipes.FP8
  traces = []

  def f(dot, x):
    traces.append(dot)
    return dot(x, x, MATMUL)

  jitted = jax.jit(f, static_argnums=0)
  for d in (dot, again):
    jitted(d, jnp.ones((32, 32)))
  assert len(traces) == 1
  keyed = [fp4jax.dot_general(recipes.MXFP4_RHT_SR, key=jax.random.key(0)) for _ in range(2)]
  assert keyed[0] == keyed[0] != keyed[1] and not isinstance(keyed[0] == keyed[1], jax.Array)


def test_a_name_takes_no_part_in_equality():
  renamed = dataclasses.replace(fp4jax.MXFP4, name="other")
  assert renamed == fp4jax.MXFP4 and hash(renamed) == hash(fp4jax.MXFP4)
  assert recipes.MXFP4.replace({"name": "other", "citation": "ours"}) == recipes.MXFP4
  q = jax.lax.cond(
    True, lambda x: quantize(x, fp4jax.MXFP4), lambda x: quantize(x, renamed), jnp.ones(32)
  )
  assert q.codes.shape == (16,)


def test_a_changed_value_has_a_name_that_says_so():
  rceil = dataclasses.replace(fp4jax.MXFP4, scale_rule="rceil")
  assert rceil.name == "MXFP4[rceil]"
  assert dataclasses.replace(rceil, scale_rule="floor").name == "MXFP4"
  wide = dataclasses.replace(rceil, block_shape=(16,))
  assert wide.name == "MXFP4[block_shape=(16,), rceil]"
  assert dataclasses.replace(rceil, name="MINE").name == "MINE"
  mine = dataclasses.replace(fp4jax.MXFP4, name="MINE")
  assert dataclasses.replace(mine, scale_rule="oas").name == "MINE[oas]"
  recipe = recipes.MXFP4.replace({"wgrad.lhs.rounding": "stochastic"})
  assert recipe.name == "mxfp4[wgrad.lhs.rounding=stochastic]"
  assert recipe.replace({"wgrad.lhs.rounding": "nearest"}).name == "mxfp4"
  assert recipes.MXFP4.replace({"wgrad.lhs.format": rceil, "name": "mine"}).name == "mine"
  assert recipes.MXFP4.replace({"wgrad.lhs.format": rceil}).name.endswith("=MXFP4[rceil]]")
  for name, recipe in recipes.RECIPES.items():
    assert recipe.name == name
