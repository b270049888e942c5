"""The MoE feed-forward: NumPy's gradients, the composed layers' numbers, and what is saved."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
import pallas_kernels
from fp4jax import grouped_dot, implementation, moe_ffn, operands, recipes
from fp4jax.dispatch import Choices, Order
from fp4jax.models.remat import Remat, rematerialize
from fp4jax.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("strict_promotion")

TOKENS, D, F, EXPERTS, K = 90, 64, 32, 5, 2
KEYS = tuple(jax.random.split(jax.random.key(5)))
HOPPER = recipes.HOPPER_FP4
READS_ORIGINAL = HOPPER.replace({"fprop.lhs.source": "original", "name": "fprop_reads_original"})
ALL = [
  *recipes.RECIPES.values(),
  READS_ORIGINAL,
  HOPPER.replace({"residual.hidden": None, "name": "hidden_as_it_is"}),
  HOPPER.replace({"residual.hidden": fp4jax.MXFP8, "name": "hidden_in_mxfp8"}),
  HOPPER.replace({"residual.lhs": fp4jax.FP8_BLOCK_2D, "name": "tiles_of_tokens"}),
  recipes.FP8.replace(
    {"residual.rhs": fp4jax.FP8_BLOCK_2D, "dgrad.rhs.source": "residual", "name": "packed_weights"}
  ),
]


def inputs(tokens=TOKENS, d=D, f=F, experts=EXPERTS, k=K, dtype=jnp.float32, seed=0):
  """x, w13, w2, experts, weights, dout; expert 1 gets no token, expert 0 more than its share."""
  rng = np.random.default_rng(seed)
  x, dout = (rng.standard_normal((tokens, d)) * 2.0 ** rng.integers(-2, 3, d) for _ in range(2))
  w13 = rng.standard_normal((experts, d, 2 * f)) / np.sqrt(d)
  w2 = rng.standard_normal((experts, f, d)) / np.sqrt(f)
  shares = np.r_[4.0, 0.0, np.ones(experts - 2)]
  choices = [rng.choice(experts, k, replace=False, p=shares / shares.sum()) for _ in range(tokens)]
  weights = rng.uniform(0.05, 1, (tokens, k))
  x, w13, w2, dout = (jnp.asarray(v, dtype) for v in (x, w13, w2, dout))
  return x, w13, w2, jnp.asarray(choices), jnp.asarray(weights, jnp.float32), dout


def run(recipe, x, w13, w2, experts, weights, dout, taps=(None, None), **options):
  """out, dx, dw13, dw2, dweights, and what the taps got."""

  def f(x, w13, w2, weights, taps):
    return moe_ffn(x, w13, w2, experts, weights, recipe, keys=KEYS, taps=taps, **options)

  out, pull = jax.vjp(f, x, w13, w2, weights, taps)
  return (out, *pull(dout))


jit_run = jax.jit(run, static_argnames=("recipe", "implementation"))


def oracle(x, w13, w2, experts, weights, dout):
  """The same in float64, one token and choice at a time."""
  x, w13, w2, weights, dout = (np.asarray(v, np.float64) for v in (x, w13, w2, weights, dout))
  out, dx, dw13, dw2, dweights = (np.zeros_like(v) for v in (x, x, w13, w2, weights))
  for t, j in np.ndindex(*experts.shape):
    e = int(experts[t, j])
    gate, up = np.split(x[t] @ w13[e], 2)
    sigmoid = 1 / (1 + np.exp(-gate))
    a = gate * sigmoid * up
    out[t] += weights[t, j] * (a @ w2[e])
    dweights[t, j] = dout[t] @ (a @ w2[e])
    dw2[e] += weights[t, j] * np.outer(a, dout[t])
    da = weights[t, j] * (w2[e] @ dout[t])
    silu_slope = sigmoid * (1 + gate * (1 - sigmoid))
    dh = np.concatenate([da * up * silu_slope, da * gate * sigmoid])
    dw13[e] += np.outer(x[t], dh)
    dx[t] += w13[e] @ dh
  return out, dx, dw13, dw2, dweights


NAMES = ("out", "dx", "dw13", "dw2", "dweights")


def assert_near(actual, expected, tolerance):
  """Errors of each result below `tolerance` of its root mean square."""
  for name, a, e in zip(NAMES, actual, expected, strict=False):
    e = np.asarray(e, np.float64)
    error = np.abs(np.asarray(a, np.float64) - e)
    assert error.max() <= tolerance * np.sqrt(np.mean(e**2)), name


def test_float32_gradients():
  # Three sums of at most 180 float32 terms in a row, the largest entry some 10 times the mean.
  arguments = inputs()
  actual = jit_run(recipes.FP32, *arguments)
  expected = oracle(*arguments)
  assert_near(actual, expected, 2e-5)
  assert (np.asarray(actual[2][1]) == 0).all() and (np.asarray(actual[3][1]) == 0).all()  # no token
  assert all(np.abs(e).max() > 0 for e in expected)


def test_bfloat16_gradients():
  # Five values in a row rounded by 2^-9 each at most, entries up to 6 times the mean: below 0.1.
  arguments = inputs(dtype=jnp.bfloat16)
  actual = jit_run(recipes.BF16, *arguments)
  assert [a.dtype for a in actual[:5]] == [jnp.bfloat16] * 4 + [jnp.float32]
  assert_near(actual, oracle(*arguments), 0.1)


def test_weights_of_zero_and_of_either_sign_have_gradients():
  x, w13, w2, experts, weights, dout = inputs()
  weights = weights.at[::4, 0].set(0).at[1::4, 1].set(1e-40).at[2::4].multiply(-1)
  weights = weights.at[3::4, 0].set(2.0**-70)
  arguments = (x, w13, w2, experts, weights, dout)
  assert_near(jit_run(recipes.FP32, *arguments), oracle(*arguments), 2e-5)


def test_master_weights_in_float32():
  x, w13, w2, *rest = inputs(dtype=jnp.bfloat16)
  actual = jit_run(recipes.BF16, x, w13.astype(jnp.float32), w2.astype(jnp.float32), *rest)
  expected = jit_run(recipes.BF16, x, w13, w2, *rest)
  assert actual[2].dtype == actual[3].dtype == jnp.float32
  for a, e in zip(actual[:5], expected[:5], strict=True):
    np.testing.assert_array_equal(a.astype(e.dtype), e)


# The numbers of the composed layers.


def as_sent(x, fmt):
  if fmt is None:
    return x
  padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % fmt.block_shape[0])])
  return fp4jax.fake_quantize(padded, fmt)[:, : x.shape[1]]


def composed(recipe, x, w13, w2, experts, weights, dout, taps):
  """Two `grouped_dot` on permuted rows, each differentiated on its own."""
  k = experts.shape[1]
  payload = recipe.payload
  x = x if payload.forward == recipe.residual.lhs else as_sent(x, payload.forward)  # rounded anyway
  dout = as_sent(dout, payload.backward)
  order = np.argsort(np.asarray(experts).ravel(), kind="stable")
  back = np.argsort(order)
  sizes = jnp.asarray(np.bincount(np.asarray(experts).ravel(), minlength=len(w13)))
  rows, weight = x[order // k], weights.ravel()[order][:, None]
  ids = jnp.asarray(order, jnp.int32)  # a row draws by the number of its choice
  second, hidden = recipe, recipe.residual.hidden
  if hidden is not None:
    sources = {f"{gemm}.lhs.source": "original" for gemm in ("fprop", "wgrad")}
    second = recipe.replace(sources | {"residual": fp4jax.Residual()})
  if recipe.residual.lhs is not None and len(recipe.residual.lhs.block_shape) == 2:
    # Tiles of tokens, not of permuted rows: x is rounded before.
    padded = jnp.pad(x, [(0, -n % 128) for n in x.shape])
    kept = fp4jax.fake_quantize(padded, recipe.residual.lhs, -1)[: len(x), : x.shape[1]]
    rows = kept[order // k]
    recipe = second

  def first_gemm(rows, w13, tap):
    return grouped_dot(rows, w13, sizes, recipe, key=KEYS[0], tap=tap, row_ids=ids)

  def second_gemm(a, w2, tap):
    return grouped_dot(a, w2, sizes, second, key=KEYS[1], tap=tap, row_ids=ids)

  h, pull_first = jax.vjp(first_gemm, rows, w13, taps[0])
  kept = h if hidden is None else fp4jax.fake_quantize(h, hidden, -1)
  a, pull_a = jax.vjp(swiglu, kept)
  y, pull_second = jax.vjp(second_gemm, a, w2, taps[1])
  if hidden is not None and recipe.fprop.lhs.source == "original" and recipe is not second:
    y = second_gemm(swiglu(h), w2, None)

  def choices(rows):
    return rows[back].reshape(len(x), k, -1).astype(jnp.float32)

  out = jnp.sum(choices(y) * weights[..., None], axis=1).astype(x.dtype)
  da, dw2, tap2 = pull_second((dout[order // k].astype(jnp.float32) * weight).astype(x.dtype))
  dweights = choices(jnp.sum(a.astype(jnp.float32) * da.astype(jnp.float32), 1, keepdims=True))
  drows, dw13, tap1 = pull_first(pull_a(da)[0])
  dx = choices(drows).sum(1).astype(x.dtype)
  return (out, dx, dw13, dw2, dweights[..., 0] / weights, (tap1, tap2)), h


@pytest.mark.slow
@pytest.mark.parametrize(
  "recipe, dtype",
  [
    *((recipe, jnp.float32) for recipe in ALL),
    *((recipe, jnp.bfloat16) for recipe in (recipes.BF16, recipes.FP8, recipes.HOPPER_FP4)),
  ],
  ids=lambda x: getattr(x, "name", None) or x.__name__,
)
@jax.disable_jit()  # XLA fuses and rounds otherwise where it sees more of the layer
def test_numbers_are_those_of_the_composed_layers(recipe, dtype):
  arguments = inputs(dtype=dtype)
  taps = (operands.new_tap(), operands.new_tap())
  *actual, actual_taps = run(recipe, *arguments, taps)
  (*expected, taps), h = composed(recipe, *arguments, taps)
  for name, a, e in zip(NAMES, actual, expected, strict=True):
    if name == "dweights":  # a sum that both take, in two programs
      np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
    else:
      np.testing.assert_array_equal(a, e, err_msg=name)
  if recipe.name == "tiles_of_tokens":
    return
  first, second = (np.array(tap) for tap in taps)
  if recipe.residual.hidden is not None:  # the second layer's residual is h as it is kept
    second[6] = operands.error_summary(h, recipe.residual.hidden, -1)
  if recipe.name == "fprop_reads_original":  # its tap was at the kept h
    second[0] = actual_taps[1][0]
  for a, e in zip(actual_taps, (first, second), strict=True):
    np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-6)
  live = [role in operands.quantized_roles(recipe) for role in operands.ROLES]
  np.testing.assert_array_equal(np.asarray(actual_taps[1]).any(1), live)
  untapped = run(recipe, *arguments)
  for a, e in zip(untapped[:5], actual, strict=True):
    np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("recipe", [recipes.FP32, recipes.MXFP4, HOPPER], ids=lambda r: r.name)
def test_permuting_experts_changes_nothing(recipe):
  x, w13, w2, experts, weights, dout = inputs()
  before = jit_run(recipe, x, w13, w2, experts, weights, dout)
  new = np.array([3, 1, 4, 0, 2])  # expert i becomes new[i]
  old = np.argsort(new)
  after = jit_run(recipe, x, w13[old], w2[old], jnp.asarray(new)[experts], weights, dout)
  expected = (before[0], before[1], before[2][old], before[3][old], before[4])
  for a, e in zip(after, expected, strict=False):
    np.testing.assert_array_equal(a, e)


# What is saved.


def saved_bytes(recipe, tokens, d, f, experts, k):
  """Bytes of each leaf of the vjp that is no weight of an expert, by shape and dtype."""
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  chosen = jax.ShapeDtypeStruct((tokens, k), jnp.int32)
  weights = jax.ShapeDtypeStruct((tokens, k), jnp.float32)

  def pull(x, w13, w2, experts, weights):
    f = lambda x, w13, w2, weights: moe_ffn(x, w13, w2, experts, weights, recipe)  # noqa: E731
    return jax.vjp(f, x, w13, w2, weights)[1]

  w13, w2 = bf16((experts, d, 2 * f)), bf16((experts, f, d))
  leaves = jax.tree.leaves(jax.eval_shape(pull, bf16((tokens, d)), w13, w2, chosen, weights))
  shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves if leaf.size > 1]
  for w in (w13, w2):  # each once, as it was passed
    shapes.remove((w.shape, "bfloat16"))
  return shapes


def total(shapes):
  return sum(np.prod(shape, dtype=int) * jnp.dtype(dtype).itemsize for shape, dtype in shapes)


@pytest.mark.parametrize("recipe", [recipes.BF16, recipes.FP8, HOPPER], ids=lambda r: r.name)
def test_only_x_and_h_are_saved(recipe):
  tokens, d, f, k = 48, 256, 128, 2
  if recipe is HOPPER:
    expected = [((tokens, d // 2), "uint8"), ((tokens, d // 32), "uint8")]
    expected += [((tokens * k, f), "uint8"), ((tokens * k, f // 16), "uint8")]
  else:
    expected = [((tokens, d), "bfloat16"), ((tokens * k, 2 * f), "bfloat16")]
  expected += [((tokens, k), "float32"), *[((tokens * k,), "int32")] * 2, ((4,), "int32")]
  assert sorted(saved_bytes(recipe, tokens, d, f, 4, k)) == sorted(expected)


@pytest.mark.parametrize("experts, k", [(8, 2), (64, 8)])
def test_hopper_fp4_saves_at_most_three_tenths(experts, k):
  tokens, d, f = 512, 7168, 2048
  sizes = [total(saved_bytes(r, tokens, d, f, experts, k)) for r in (recipes.BF16, HOPPER)]
  order = 12 * tokens * k + 4 * experts
  assert sizes[0] == tokens * (2 * d + k * 4 * f) + order
  assert sizes[1] == tokens * (d + k * 2 * f) * 17 // 32 + order  # 4.25 bits a value
  assert sizes[1] <= 0.30 * sizes[0]


# The kernels' path, with the kernels' definitions in their place (`conftest.hopper`).


SERVED = [recipes.BF16, recipes.FP8, recipes.FP8_POW2, HOPPER, READS_ORIGINAL, ALL[7]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SERVED, ids=lambda r: r.name)
def test_mosaic_computes_what_xla_computes(recipe, hopper):
  arguments = inputs(150, 256, 128, 4, dtype=jnp.bfloat16)
  expected = jit_run(recipe, *arguments, implementation="xla")
  assert not hopper
  actual = run(recipe, *arguments, implementation="mosaic")
  assert [a.dtype for a in actual[:5]] == [e.dtype for e in expected[:5]]
  for name, a, e in zip(NAMES, actual, expected, strict=False):
    error = np.asarray(a, np.float64) - np.asarray(e, np.float64)
    # Sums in two orders: few results fall on the other side of a rounding, by 2^-8 or 2^-3 of them.
    assert np.linalg.norm(error) < 0.002 * np.linalg.norm(np.asarray(e, np.float64)), name
  counts = {name: hopper.count(name) for name in set(hopper)}
  assert counts["grouped_matmul"] == 4 and counts["grouped_wgrad"] == 2
  if recipe is not recipes.BF16:
    assert counts["gather_fp8_both"] == counts["swiglu_backward_fp8"] == 1
    kept = recipe.residual.lhs is not None
    together = kept and recipe is not READS_ORIGINAL  # h is kept, and read as it is kept
    assert counts.get("keep_swiglu_fp8_rows", 0) == together
    assert counts.get("quantize_mxfp4", 0) == 2 * kept - together


APART = recipes.FP8.replace({"dgrad.rhs.format": fp4jax.FP8_BLOCK_POW2_2D, "name": "apart"})
KEPT_AND_READ = ALL[-1].replace({"fprop.rhs.source": "residual", "name": "kept_and_read"})


@pytest.mark.parametrize(
  "recipe", [recipes.FP8, HOPPER, APART, KEPT_AND_READ], ids=lambda r: r.name
)
def test_weights_are_read_once_to_the_same_numbers(recipe, hopper):
  arguments = inputs(40, 128, 128, 3, dtype=jnp.bfloat16)
  twice = run(recipe, *arguments, implementation="mosaic")
  assert hopper.count("quantize_fp8_weights") == 4
  hopper.clear()
  once = run(recipe, *arguments, implementation="mosaic", weights_once=True)
  assert hopper.count("quantize_fp8_weights") == (4 if recipe is APART else 2)
  for name, a, b in zip(NAMES, once, twice, strict=False):
    np.testing.assert_array_equal(np.float32(a), np.float32(b), err_msg=name)


def test_what_is_kept_of_weights_that_are_read_once(hopper):
  x, *of_experts, experts, weights, _ = inputs(40, 128, 128, 3, dtype=jnp.bfloat16)

  def kept(weights_once):
    f = functools.partial(moe_ffn, x, recipe=HOPPER, weights_once=weights_once)
    run = lambda w13, w2: f(w13, w2, experts, weights)  # noqa: E731
    leaves = jax.tree.leaves(jax.eval_shape(lambda *w: jax.vjp(run, *w)[1], *of_experts))
    return [leaf for leaf in leaves if leaf.ndim == 3]

  assert all(leaf.dtype == jnp.bfloat16 for leaf in kept(False))  # as they were passed
  codes = {leaf.shape for leaf in kept(True) if leaf.dtype == jnp.float8_e4m3fn}
  assert codes == {w.shape for w in of_experts}
  assert not any(leaf.dtype == jnp.bfloat16 for leaf in kept(True))


@pytest.mark.parametrize("remat", get_args(Remat)[1:])
def test_weights_that_are_read_once_are_kept_where_gemms_run_once(remat, hopper):
  x, *of_experts, experts, weights, _ = inputs(40, 128, 128, 3, dtype=jnp.bfloat16)

  def block(w13, w2):
    return moe_ffn(x, w13, w2, experts, weights, HOPPER, weights_once=True)

  block = rematerialize(block, remat, HOPPER.residual)
  kept = jax.tree.leaves(jax.eval_shape(lambda *w: jax.vjp(block, *w)[1], *of_experts))
  codes = [leaf.shape for leaf in kept if leaf.ndim == 3 and leaf.dtype == jnp.float8_e4m3fn]
  assert sorted(codes) == ([] if remat == "everything" else sorted(w.shape for w in of_experts))


def test_a_forward_pass_alone_makes_one_orientation(hopper, monkeypatch):
  found = []
  quantize = pallas_kernels.fp8.quantize_fp8_weights

  def recorded(w, **options):
    found.append((options["rows"], options["columns"]))
    return quantize(w, **options)

  monkeypatch.setattr(pallas_kernels.fp8, "quantize_fp8_weights", recorded)
  *arguments, _ = inputs(40, 128, 128, 3, dtype=jnp.bfloat16)
  jax.eval_shape(functools.partial(moe_ffn, recipe=HOPPER, weights_once=True), *arguments)
  assert found == [(False, True)] * 2


def test_none_picks_by_device_recipe_and_shapes(hopper):
  def kernels(recipe, f=128, dtype=jnp.bfloat16, taps=(None, None), **options):
    """Calls that tracing alone makes."""
    hopper.clear()
    arguments = inputs(40, 128, f, 3, dtype=dtype)
    jax.eval_shape(functools.partial(run, recipe, **options), *arguments, taps)
    return len(hopper)

  assert kernels(recipes.FP8) and kernels(HOPPER)
  assert not kernels(recipes.MXFP4)
  assert not kernels(recipes.FP8, dtype=jnp.float32)
  assert not kernels(recipes.FP8, f=64)
  assert not kernels(recipes.FP8, taps=(operands.new_tap(), None))
  assert not kernels(recipes.FP8, implementation="xla")


# Refusals.


def test_mosaic_runs_or_raises(hopper, monkeypatch):
  def refused(message, recipe=recipes.FP8, taps=(None, None), **changes):
    arguments = inputs(**{"tokens": 40, "d": 128, "f": 128, "dtype": jnp.bfloat16} | changes)
    with pytest.raises(ValueError, match=f'implementation="mosaic": {message}'):
      run(recipe, *arguments, taps, implementation="mosaic")

  refused(
    r"the kernels read fprop.lhs in .*'FP8_BLOCK'.* or bf16, not recipe 'mxfp4'", recipes.MXFP4
  )
  refused("the kernels take bfloat16; x is float32", dtype=jnp.float32)
  refused("d=192 is not a multiple of 128", d=192)
  refused("f=96 is not a multiple of 128", f=96)
  refused('taps are read by implementation="xla"', taps=(None, operands.new_tap()))
  monkeypatch.setattr(implementation, "compute_capability", lambda: "10.0")
  refused(r"the kernels need compute capability 9.0 \(Hopper\); this device has 10.0")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU says")
def test_mosaic_needs_a_gpu():
  arguments = inputs(40, 128, 128, dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match=r"compute capability 9.0 .*this device has none \(cpu\)"):
    run(recipes.FP8, *arguments, implementation="mosaic")


def test_bad_arguments_are_refused():
  good = dict(zip(("x", "w13", "w2", "experts", "weights"), inputs()[:5], strict=True))

  def refused(error, message, recipe=recipes.FP32, options=None, **changes):
    with pytest.raises(error, match=message):
      moe_ffn(**good | changes, recipe=recipe, **options or {})

  w13, w2, experts, weights = (good[name] for name in ("w13", "w2", "experts", "weights"))
  refused(ValueError, r"w13 \(5, 64, 32\) and w2 \(5, 32, 64\) are not", w13=w13[..., :32])
  refused(ValueError, r"x \(90, 32\), w13", x=good["x"][:, :32])
  refused(ValueError, r"w2 \(5, 32, 32\) does not return to the 64 features", w2=w2[..., :32])
  refused(ValueError, r"experts \(90, 1\) and weights \(90, 2\)", experts=experts[:, :1])
  refused(ValueError, r"are not both \(90 tokens, k\)", experts=experts[1:], weights=weights[1:])
  refused(TypeError, "experts are float32", experts=experts.astype(jnp.float32))
  refused(TypeError, "weights bfloat16", weights=weights.astype(jnp.bfloat16))
  refused(TypeError, "w2 is int32; a recipe takes", w2=w2.astype(jnp.int32))
  refused(TypeError, "experts has type list, not jax.Array", experts=experts.tolist())
  refused(TypeError, "weights has type list, not", weights=weights.tolist())
  refused(TypeError, "recipe has type str, not Recipe", recipe="mxfp4")
  none = {name: good[name][:0] for name in ("x", "experts", "weights")}
  refused(ValueError, r"x \(0, 64\) has no tokens", **none)
  refused(ValueError, "experts name 5, which is not one of the 5", experts=experts.at[3, 1].set(5))
  refused(ValueError, "experts name -1, which", experts=experts.at[3, 1].set(-1))
  needed = r"rounds stochastically and needs keys=, such as jax.random.split\(jax.random.key\(0\)\)"
  for keys in ({}, {"keys": (KEYS[0], None)}):
    refused(ValueError, needed, recipe=recipes.MXFP4_RHT_SR, options=keys)
  named = functools.partial(moe_ffn, recipe=recipes.MXFP4_RHT_SR)
  out = jax.eval_shape(lambda key: named(**good, keys=jax.random.split(key)), KEYS[0])
  assert out.shape == good["x"].shape
  refused(ValueError, "implementation='triton' is not", options={"implementation": "triton"})
  crossing = recipes.FP8.replace({"fprop.lhs.format": fp4jax.FP8_BLOCK_2D})
  refused(ValueError, "2-D blocks of FP8_BLOCK_2D in fprop.lhs would cross", recipe=crossing)


def test_an_expert_that_does_not_exist_gives_nan_under_jit():
  x, w13, w2, experts, weights, _ = inputs()
  f = jax.jit(lambda experts: moe_ffn(x, w13, w2, experts, weights, recipes.FP32))
  assert np.isfinite(f(experts)).all()
  for bad in (-1, 5):
    assert np.isnan(f(experts.at[3, 1].set(bad))).all()


def choices_of(experts, parts=(0, 0, 0)):
  experts, parts = (jnp.asarray(v, jnp.int32) for v in (experts, parts))
  return Choices(experts, parts, None, jnp.arange(1 + parts.max()))


def test_order():
  order = Order.of(choices_of([[2, 0], [0, 3], [2, 3]]), 4)
  np.testing.assert_array_equal(order.choice_of_row, [1, 2, 0, 4, 3, 5])
  np.testing.assert_array_equal(order.row_of_choice, [2, 0, 1, 4, 3, 5])
  np.testing.assert_array_equal(order.group_sizes, [2, 0, 2, 2])


def test_order_in_tiles():
  order = Order.of(choices_of([[2, 0], [0, 3], [2, 0]]), 4, 2)
  np.testing.assert_array_equal(order.group_sizes, [4, 0, 2, 2])
  np.testing.assert_array_equal(order.choice_of_row, [1, 2, 5, 6, 0, 4, 3, 6, 6, 6, 6, 6, 6, 6])
  np.testing.assert_array_equal(order.row_of_choice, [4, 0, 1, 6, 5, 2])


def test_order_by_parts():
  choices = choices_of([[2, 0], [0, 9], [2, 0]], (0, 0, 1))  # expert 9 is another device's
  order = Order.of(choices, 4)
  np.testing.assert_array_equal(order.group_sizes, [2, 1, 0, 0, 1, 1, 0, 0])
  np.testing.assert_array_equal(order.choice_of_row, [1, 2, 5, 0, 4, 6])
  np.testing.assert_array_equal(order.row_of_choice, [3, 0, 1, 6, 4, 2])
  np.testing.assert_array_equal(order.expert_sizes, [3, 0, 2, 0])
  assert order.dropped(choices) == 0
  short = Order.of(choices, 4, rows=4)
  np.testing.assert_array_equal(short.group_sizes, [2, 1, 0, 0, 1, 0, 0, 0])
  np.testing.assert_array_equal(short.row_of_choice, [3, 0, 1, 4, 4, 2])
  assert short.dropped(choices) == 1
