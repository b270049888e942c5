"""What `implementation=` reaches: with stand-ins for the kernels anywhere, themselves on Hopper."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fp4jax
import pallas_kernels
from fp4jax import QuantizedArray, dequantize, grouped_dot, implementation, operands, recipes
from fp4jax.models import Numerics, Policy

MATMUL = (((1,), (0,)), ((), ()))
BF16 = jnp.bfloat16
HOPPER = recipes.HOPPER_FP4
RULES = [dataclasses.replace(fp4jax.MXFP4, scale_rule=r) for r in ("floor", "even", "rceil", "oas")]
FORMATS = [*RULES, fp4jax.FP8_BLOCK, fp4jax.FP8_BLOCK_POW2]
SIZES = {
  "tail": [0, 130, 1, 77, 40],  # the other rows belong to nobody
  "one": [0, 0, 300, 0, 0],
  "none": [0, 0, 0, 0, 0],
}


def random(*shape, seed=0, dtype=BF16):
  """Rows and columns of very different size, so that scales of another axis show."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape)
  for axis, n in enumerate(shape):
    sizes = 2.0 ** rng.integers(-3, 4, n)
    x = x * sizes.reshape([-1 if a == axis else 1 for a in range(len(shape))])
  return jnp.asarray(x, dtype)


@pytest.fixture
def device(request):
  """The calls of the stand-ins; None with the kernels themselves."""
  return request.getfixturevalue("hopper") if request.param == "stand-ins" else None


either = pytest.mark.parametrize(
  "device",
  ["stand-ins", pytest.param("kernels", marks=pytest.mark.gpu)],
  indirect=True,
)


@either
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name} {f.scale_rule}")
def test_quantize_gives_the_same_bits(fmt, device):
  dtypes = (BF16, jnp.float32) if fmt.name == "MXFP4" else (BF16,)
  for dtype in dtypes:
    for shape in ((3, 40, 256), (24, 128), (2048,))[: 3 if fmt.name == "MXFP4" else 2]:
      x = random(*shape, dtype=dtype)
      expected = fp4jax.quantize(x, fmt, implementation="xla")
      for wanted in ("mosaic", None):
        q = fp4jax.quantize(x, fmt, implementation=wanted)
        assert q.fmt == fmt and q.axis == -1 and q.shape == x.shape
        jax.tree.map(np.testing.assert_array_equal, q, expected)
        assert q.codes.dtype == expected.codes.dtype and q.scales.dtype == expected.scales.dtype
  if device is not None:
    assert set(device) <= {"quantize_mxfp4", "quantize_fp8_rows"} and len(device) >= 4


@either
def test_dequantize_gives_the_same_bits(device):
  for shape in ((3, 40, 256), (2048,)):
    q = fp4jax.quantize(random(*shape), fp4jax.MXFP4, implementation="xla")
    expected = dequantize(q, BF16, implementation="xla")
    for wanted in ("mosaic", None):
      y = dequantize(q, BF16, implementation=wanted)
      assert y.dtype == BF16
      np.testing.assert_array_equal(y, expected)
  if device is not None:
    assert device == ["dequantize_mxfp4"] * 4


@pytest.mark.gpu
def test_stochastic_rounding_draws_its_own():
  x, fmt = jnp.full((64, 64), 0.7, BF16).at[:, ::32].set(6), RULES[2]
  options = {"rounding": "stochastic", "key": jax.random.key(0)}
  q = fp4jax.quantize(x, fmt, implementation="mosaic", **options)
  again = fp4jax.quantize(x, fmt, implementation="mosaic", **options)
  other = fp4jax.quantize(
    x, fmt, implementation="mosaic", rounding="stochastic", key=jax.random.key(1)
  )
  np.testing.assert_array_equal(q.codes, again.codes)
  assert (q.codes != other.codes).any()
  jax.tree.map(
    np.testing.assert_array_equal,
    fp4jax.quantize(x, fmt, **options),
    fp4jax.quantize(x, fmt, implementation="xla", **options),
  )


@pytest.mark.parametrize("fmt", [fp4jax.MXFP4, fp4jax.FP8_BLOCK], ids=lambda f: f.name)
def test_quantize_may_stand_in_a_loss(fmt, monkeypatch):
  """Codes are constants to a gradient; the kernels themselves, traced, have no rule for one."""
  monkeypatch.setattr(implementation, "compute_capability", lambda: "9.0")

  def loss(x):
    q = fp4jax.quantize(x, fmt, implementation="mosaic")
    return jnp.sum(x.astype(jnp.float32)) + jnp.sum(q.scales.astype(jnp.float32))

  assert jax.eval_shape(jax.grad(loss), zeros(64, 128)).shape == (64, 128)


def gradients(f, x, w, dy):
  y, pull = jax.vjp(f, x, w)
  return y, *pull(dy)


def assert_near(actual, expected):
  """Sums in two orders: few results fall on the other side of a rounding to bf16."""
  for name, a, e in zip(("y", "dx", "dw"), actual, expected, strict=True):
    assert a.dtype == e.dtype and a.shape == e.shape
    a, e = (np.asarray(v, np.float64) for v in (a, e))
    assert np.linalg.norm(a - e) <= 0.002 * np.linalg.norm(e), name


@pytest.mark.slow
@either
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("recipe", [recipes.BF16, recipes.FP8, HOPPER], ids=lambda r: r.name)
def test_grouped_dot(recipe, sizes, device):
  x, w, dy = random(300, 256), random(5, 256, 128, seed=1), random(300, 128, seed=2)
  x, dy = (v.at[sum(SIZES[sizes]) :].set(jnp.nan) for v in (x, dy))  # never read
  sizes = jnp.asarray(SIZES[sizes])

  @functools.partial(jax.jit, static_argnums=0)
  def run(wanted, x, w, dy, sizes):
    f = lambda x, w: grouped_dot(x, w, sizes, recipe, implementation=wanted)  # noqa: E731
    return gradients(f, x, w, dy)

  expected = run("xla", x, w, dy, sizes)
  assert not device
  assert_near(run("mosaic", x, w, dy, sizes), expected)
  assert np.isnan(run("mosaic", x, w, dy, sizes.at[0].set(301))[0].astype(jnp.float32)).all()


def test_no_kernel_sees_sizes_beyond_the_rows(hopper, monkeypatch):
  """Under jit nothing raises, and a kernel would read and write where nothing of its own lies."""
  seen, matmul = [], pallas_kernels.grouped_matmul.grouped_matmul

  def watched(*args):
    jax.debug.callback(lambda sizes: seen.append(np.asarray(sizes)), args[-1])
    return matmul(*args)

  monkeypatch.setattr(pallas_kernels.grouped_matmul, "grouped_matmul", watched)
  f = functools.partial(grouped_dot, recipe=recipes.FP8, implementation="mosaic")
  for bad in ([301, 0], [-1, 20], [200, 200]):
    y = jax.jit(f)(random(300, 128), random(2, 128, 128), jnp.asarray(bad))
    assert np.isnan(y.astype(jnp.float32)).all()
  jax.effects_barrier()
  assert len(seen) == 3 and not np.any(seen)


@pytest.mark.slow
@either
@pytest.mark.parametrize("m", [8, 100, 256])
@pytest.mark.parametrize("recipe", [recipes.FP8, HOPPER], ids=lambda r: r.name)
def test_dot_general(recipe, m, device):
  x, w, dy = random(m, 256), random(256, 128, seed=1), random(m, 128, seed=2)

  def run(wanted):
    dot = fp4jax.dot_general(recipe, implementation=wanted)
    return jax.jit(functools.partial(gradients, lambda x, w: dot(x, w, MATMUL)))(x, w, dy)

  expected = run("xla")
  assert not device
  assert_near(run("mosaic"), expected)


@either
def test_dot_general_under_vmap(device):
  x, w = random(3, 128, 256), random(256, 128, seed=1)
  dot = fp4jax.dot_general(recipes.FP8, implementation="mosaic")
  mapped = jax.jit(jax.vmap(lambda x: dot(x, w, MATMUL)))(x)
  for one, y in zip(x, mapped, strict=True):
    np.testing.assert_array_equal(jax.jit(lambda x: dot(x, w, MATMUL))(one), y)


def test_dot_general_with_other_dimension_numbers(hopper):
  x, w = random(4, 256, 8), random(128, 256, seed=1)
  dims = (((1,), (1,)), ((), ()))
  y, expected = (
    fp4jax.dot_general(recipes.FP8, implementation=wanted)(x, w, dims)
    for wanted in ("mosaic", "xla")
  )
  assert y.shape == expected.shape == (4, 8, 128) and hopper
  y, expected = (np.asarray(v, np.float64) for v in (y, expected))
  assert np.linalg.norm(y - expected) < 0.002 * np.linalg.norm(expected)


def test_none_picks_the_kernels_where_they_give_the_same_numbers(hopper):
  def kernels(f, *shapes):
    """Calls that tracing alone makes."""
    hopper.clear()
    jax.eval_shape(f, *(jax.ShapeDtypeStruct(s, d) for s, d in shapes))
    return len(hopper)

  def quantize(x, fmt=fp4jax.MXFP4, **options):
    return fp4jax.quantize(x, fmt, **options)

  x, y = ((64, 128), BF16), ((128, 256), BF16)
  key = jax.random.key(0)
  assert kernels(quantize, x)
  assert not kernels(functools.partial(quantize, implementation="xla"), x)
  assert not kernels(functools.partial(quantize, rounding="stochastic", key=key), x)
  assert not kernels(functools.partial(quantize, fmt=fp4jax.NVFP4), x)
  assert not kernels(functools.partial(quantize, axis=0), x)
  assert not kernels(functools.partial(quantize, fmt=fp4jax.FP8_BLOCK), ((64, 0), BF16))
  dot = fp4jax.dot_general
  assert kernels(lambda x, y: dot(recipes.FP8)(x, y, MATMUL), x, y)
  assert not kernels(lambda x, y: dot(recipes.BF16)(x, y, MATMUL), x, y)
  assert not kernels(lambda x, y: dot(recipes.FP8, tap=operands.new_tap())(x, y, MATMUL), x, y)
  policy = Policy(attention=recipes.FP8)
  named = {name: dataclasses.replace(policy, implementation=name) for name in ("xla", "mosaic")}
  assert kernels(lambda x, y: Numerics(policy).matmul("attention.out", x, y), x, y)
  assert not kernels(lambda x, y: Numerics(named["xla"]).matmul("attention.out", x, y), x, y)
  assert kernels(lambda x, y: Numerics(named["mosaic"]).matmul("attention.out", x, y), x, y)
  assert not kernels(lambda x, y: Numerics(named["mosaic"]).matmul("head.logits", x, y), x, y)


@pytest.mark.parametrize(
  "message, recipe, n, taps",
  [
    ("not recipe 'mxfp4'", recipes.MXFP4, 128, None),
    ("n=192 is not a multiple of 128", recipes.FP8, 192, None),
    ("taps are read by", recipes.FP8, 128, {"attention.out": operands.new_tap()}),
  ],
)
def test_a_policy_of_mosaic_runs_or_raises(message, recipe, n, taps, hopper):
  x, w = zeros(64, 128), zeros(128, n)
  numerics = Numerics(Policy(attention=recipe, implementation="mosaic"), taps=taps)
  with pytest.raises(ValueError, match=f'^implementation="mosaic": .*{message}'):
    numerics.matmul("attention.out", x, w)
  for other in ("xla", None):
    policy = Policy(attention=recipe, implementation=other)
    assert Numerics(policy, taps=taps).matmul("attention.out", x, w).shape == (64, n)
  assert not hopper


def test_recipes_of_plain_dtypes_are_xlas_own_matmul_under_any_policy(hopper):
  policy = Policy(implementation="mosaic")
  for name in ("attention.out", "router.logits"):
    assert Numerics(policy).matmul(name, zeros(64, 128), zeros(128, 192)).shape == (64, 192)
  assert not hopper


def zeros(*shape, dtype=BF16):
  return jnp.zeros(shape, dtype)


def quantize(x, fmt=fp4jax.MXFP4, **options):
  return fp4jax.quantize(x, fmt, implementation="mosaic", **options)


def dot(x, w, recipe=recipes.FP8, dims=MATMUL, preferred=None, **options):
  f = fp4jax.dot_general(recipe, implementation="mosaic", **options)
  return f(x, w, dims, preferred_element_type=preferred)


def grouped(x, w, recipe=recipes.FP8, **options):
  sizes = jnp.array([len(x)] + [0] * (len(w) - 1))
  return grouped_dot(x, w, sizes, recipe, implementation="mosaic", **options)


def codes(*shape, fmt=fp4jax.MXFP4, axis=-1, dtype=BF16):
  q = QuantizedArray(zeros(*shape, dtype=jnp.uint8), zeros(1, dtype=jnp.uint8), None, fmt, axis)
  return dequantize(q, dtype, implementation="mosaic")


@pytest.mark.parametrize(
  "message, call",
  [
    ("along the last axis, not along axis -2", lambda: quantize(zeros(64, 64), axis=0)),
    (
      "the kernels take bfloat16 or float32; x is float16",
      lambda: quantize(zeros(64, 64, dtype=jnp.float16)),
    ),
    ("992 values are fewer than 1024", lambda: quantize(zeros(31, 32))),
    (
      "to MXFP4, FP8_BLOCK and FP8_BLOCK_POW2, not to NVFP4",
      lambda: quantize(zeros(64, 64), fp4jax.NVFP4),
    ),
    (
      "the kernels round FP8_BLOCK to nearest, not 'stochastic'",
      lambda: quantize(
        zeros(64, 128), fp4jax.FP8_BLOCK, rounding="stochastic", key=jax.random.key(0)
      ),
    ),
    (r"\(7, 128\) has fewer than 8 rows", lambda: quantize(zeros(7, 128), fp4jax.FP8_BLOCK)),
    (
      "the kernels take bfloat16; x is float32",
      lambda: quantize(zeros(8, 128, dtype=jnp.float32), fp4jax.FP8_BLOCK),
    ),
    (
      "not FP8_BLOCK along axis -1",
      lambda: codes(8, 128, fmt=fp4jax.FP8_BLOCK),
    ),
    ("not MXFP4 along axis -2", lambda: codes(32, 64, axis=-2)),
    ("dequantize to bfloat16, not float32", lambda: codes(32, 64, dtype=jnp.float32)),
    ("992 values are fewer than 1024", lambda: codes(31, 16)),
    (
      "the kernels take no batch axes",
      lambda: dot(zeros(2, 64, 128), zeros(2, 128, 128), dims=(((2,), (1,)), ((0,), (0,)))),
    ),
    (
      "recipe 'bf16' quantizes nothing: XLA's own matmul",
      lambda: dot(zeros(64, 128), zeros(128, 128), recipes.BF16),
    ),
    (
      "the kernels return bfloat16, not float32",
      lambda: dot(zeros(64, 128), zeros(128, 128), preferred=jnp.float32),
    ),
    ("not recipe 'mxfp4'", lambda: dot(zeros(64, 128), zeros(128, 128), recipes.MXFP4)),
    ("k=64 is not a multiple of 128", lambda: dot(zeros(64, 64), zeros(64, 128))),
    ("n=192 is not a multiple of 128", lambda: dot(zeros(64, 128), zeros(128, 192))),
    ("7 rows are fewer than 8", lambda: dot(zeros(7, 128), zeros(128, 128))),
    (
      "taps are read by implementation=",
      lambda: dot(zeros(64, 128), zeros(128, 128), tap=operands.new_tap()),
    ),
    (
      "the kernels take bfloat16; rhs is float32",
      lambda: grouped(zeros(64, 128), zeros(2, 128, 128, dtype=jnp.float32)),
    ),
    ("n=64 is not a multiple of 128", lambda: grouped(zeros(64, 128), zeros(2, 128, 64))),
  ],
)
def test_mosaic_runs_or_raises(message, call, hopper, monkeypatch):
  with pytest.raises(ValueError, match=f'^implementation="mosaic": .*{message}'):
    call()
  monkeypatch.setattr(implementation, "compute_capability", lambda: "10.0")
  with pytest.raises(ValueError, match=r"this device has 10\.0"):
    call()
  assert not hopper


def test_no_kernel_is_handed_what_a_mesh_divides(hopper):
  """XLA would gather it on every device; inside `jax.shard_map` each has a part of its own."""
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  x, w, rows = random(256, 128), random(128, 128), P("data")
  calls = (
    lambda how: fp4jax.dot_general(recipes.FP8, implementation=how)(x, w, MATMUL),
    lambda how: grouped_dot(x, w[None], jnp.array([256]), recipes.FP8, implementation=how),
    lambda how: fp4jax.quantize(x, fp4jax.MXFP4, implementation=how),
  )
  with jax.set_mesh(mesh):
    for call in calls:
      jax.eval_shape(lambda call=call: call(None))
      assert not hopper
      with pytest.raises(ValueError, match='"mosaic": a mesh divides the operands, and XLA'):
        jax.eval_shape(lambda call=call: call("mosaic"))
    dot = fp4jax.dot_general(recipes.FP8, implementation="mosaic")
    by_shards = jax.shard_map(lambda x, w: dot(x, w, MATMUL), in_specs=(rows, P()), out_specs=rows)
    jax.eval_shape(by_shards, x, w)
  assert hopper


def test_the_device_is_the_one_that_is_set(monkeypatch):
  (cpu, *_), hopper = jax.devices("cpu"), types.SimpleNamespace(compute_capability="9.0")
  monkeypatch.setattr(jax, "devices", lambda platform=None: [cpu if platform else hopper])
  assert implementation.compute_capability() == "9.0"
  for chosen in ("cpu", cpu):
    with jax.default_device(chosen):
      assert implementation.compute_capability() == "none (cpu)"


def test_unknown_implementation():
  for call in (
    lambda: fp4jax.quantize(zeros(64, 64), fp4jax.MXFP4, implementation="triton"),
    lambda: fp4jax.dot_general(recipes.FP8, implementation="triton")(
      zeros(64, 128), zeros(128, 128), MATMUL
    ),
  ):
    with pytest.raises(ValueError, match="implementation='triton' is not one of"):
      call()
