"""Grouped matmul: every expert against its own NumPy products, and nothing across experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_dot_general as plain
from test_dot_general import KEY, ROLES, as_read, random

import fp4jax
from fp4jax import grouped_dot, operands, recipes
from fp4jax.formats.roundings import fold_in

pytestmark = pytest.mark.usefixtures("strict_promotion")

M, K, N, EXPERTS = 300, 64, 96, 5
SIZES = {
  "tail": [0, 130, 1, 77, 40],  # 52 rows belong to nobody
  "one": [0, 0, 300, 0, 0],
  "tiles": [128, 128, 44, 0, 0],
  "none": [0, 0, 0, 0, 0],
}
# The reference draws along rows: wgrad, which rounds along the tokens, goes to nearest there.
NEAREST_WGRAD = recipes.MXFP4_RHT_SR.replace({"wgrad.rhs.rounding": "nearest"})
ALL = [*(r for r in recipes.RECIPES.values() if r is not recipes.MXFP4_RHT_SR), NEAREST_WGRAD]


def gemms(recipe, x, w, dy, sizes, key=KEY):
  """y, dx, dw"""
  y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, sizes, recipe, key=key), x, w)
  return (y, *pull(dy))


jit_gemms = jax.jit(gemms, static_argnames="recipe")


def tensors(m=M, k=K, n=N, experts=EXPERTS):
  return random(m, k), random(experts, k, n, seed=1), random(m, n, seed=2)


def spans(sizes):
  ends = np.cumsum(sizes)
  return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def reference(recipe, x, w, dy, sizes, key=KEY):
  """As `test_dot_general.reference`, one expert at a time; rows past the last group are zero."""
  used = sum(sizes)
  x, dy = (np.where(np.arange(len(v))[:, None] < used, v, 0) for v in (x, dy))
  out = [
    np.zeros((2, len(x), w.shape[2])),
    np.zeros((2, len(x), w.shape[1])),
    np.zeros((2, *w.shape)),
  ]
  rows_x = as_read(recipe, "fprop.lhs", x, -1, key, by_row=True)
  rows_dy = as_read(recipe, "dgrad.lhs", dy, -1, key, by_row=True)
  for i, span in enumerate(spans(sizes)):
    pairs = (
      (rows_x[span], as_read(recipe, "fprop.rhs", w[i], -2, key)),
      (rows_dy[span], as_read(recipe, "dgrad.rhs", w[i], -1, key).T),
      (
        as_read(recipe, "wgrad.lhs", x[span], -2, key).T,
        as_read(recipe, "wgrad.rhs", dy[span], -2, key),
      ),
    )
    for o, where, (a, b) in zip(out, (span, span, i), pairs, strict=True):
      o[0, where] = a @ b
      o[1, where] = (a.shape[1] + 1) * 2.0**-24 * (np.abs(a) @ np.abs(b))
  return [(exact, bound) for exact, bound in out]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ALL, ids=lambda r: r.name)
def test_every_gemm_of_every_expert(recipe):
  for sizes in SIZES.values():
    x, w, dy = tensors()
    expected = reference(recipe, x, w, dy, sizes)
    used = sum(sizes)
    x[used:], dy[used:] = np.nan, np.nan  # never read
    y, dx, dw = jit_gemms(recipe, x, w, dy, jnp.asarray(sizes))
    # `assert_gemms` allows empty experts and rows past the last group exactly zero, nothing else.
    plain.assert_gemms((y, dx, dw), expected)


def test_eagerly():
  x, w, dy = tensors()
  expected = reference(recipes.BF16, x, w, dy, SIZES["tail"])
  x[248:], dy[248:] = np.inf, np.nan
  actual = gemms(recipes.BF16, x, w, dy, jnp.asarray(SIZES["tail"]))
  plain.assert_gemms(actual, expected)


@pytest.mark.parametrize("recipe", [recipes.MXFP4, recipes.HOPPER_FP4], ids=lambda r: r.name)
def test_sizes_that_no_block_divides(recipe):
  x, w, dy = tensors(41, 50, 33, 3)
  sizes = [7, 0, 29]
  expected = reference(recipe, x, w, dy, sizes)
  plain.assert_gemms(jit_gemms(recipe, x, w, dy, jnp.asarray(sizes)), expected)


def test_half_precision():
  x, w, dy = (v.astype(jnp.bfloat16) for v in tensors(64, 32, 32, 2))
  actual = jit_gemms(recipes.MXFP4, x, w, dy, jnp.asarray([33, 20]))
  assert [a.dtype for a in actual] == [jnp.bfloat16] * 3
  expected = reference(recipes.MXFP4, x, w, dy, [33, 20])
  plain.assert_gemms(actual, expected, relative=2.0**-8)  # one rounding to bf16


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32, np.int16])
def test_dtypes_of_sizes(dtype):
  x, w, dy = tensors(200, 32, 32, 3)
  sizes = np.array([20, 110, 60])
  expected = jit_gemms(recipes.BF16, x, w, dy, sizes.astype(np.int32))
  for actual in (
    jit_gemms(recipes.BF16, x, w, dy, sizes.astype(dtype)),
    (grouped_dot(x, w, sizes.astype(dtype), recipes.BF16),),
  ):
    for a, e in zip(actual, expected, strict=False):
      np.testing.assert_array_equal(a, e)


def test_a_scale_of_the_whole_tensor_ignores_the_tail():
  x, w, dy = tensors(64, 32, 32, 2)
  sizes = jnp.asarray([33, 20])
  changes = {f"{gemm}.lhs.format": fp4jax.FP8_TENSOR for gemm in ("fprop", "dgrad")}
  recipe = recipes.BF16.replace(changes)
  x[53:], dy[53:] = 0, 0
  expected = jit_gemms(recipe, x, w, dy, sizes)
  x[53:], dy[53:] = 1e30, -1e30
  for a, e in zip(jit_gemms(recipe, x, w, dy, sizes), expected, strict=True):
    np.testing.assert_array_equal(a, e)


# Nothing crosses experts.


def loud(x, sizes, expert):
  """x with the rows of every other expert changed, enough to set the scale of a shared block."""
  changed = x * np.float32(3000)
  changed[spans(sizes)[expert]] = x[spans(sizes)[expert]]
  return changed


@pytest.mark.slow
@pytest.mark.parametrize(
  "recipe",
  [recipes.MXFP4, recipes.MXFP4_RHT_SR, recipes.FP8, recipes.HOPPER_FP4],
  ids=lambda r: r.name,
)
def test_experts_do_not_touch(recipe):
  x, w, dy = tensors()
  sizes = SIZES["tail"]
  before = jit_gemms(recipe, x, w, dy, jnp.asarray(sizes))
  for expert in (1, 2, 3, 4):
    span = spans(sizes)[expert]
    other_w = w * np.float32(3000)
    other_w[expert] = w[expert]
    other_x, other_dy = loud(x, sizes, expert), loud(dy, sizes, expert)
    y, dx, dw = jit_gemms(recipe, other_x, other_w, other_dy, jnp.asarray(sizes))
    np.testing.assert_array_equal(y[span], before[0][span])
    np.testing.assert_array_equal(dx[span], before[1][span])
    np.testing.assert_array_equal(dw[expert], before[2][expert])
    assert (np.asarray(dw) != before[2]).any()
    # Blocks that ran through the rows as they lie would have shown it.
    through = [
      as_read(to_nearest(recipe), "wgrad.lhs", v[:248], -2, KEY)[span] for v in (x, other_x)
    ]
    assert (through[0] != through[1]).any()


def to_nearest(recipe):
  return recipe.replace({f"{role}.rounding": "nearest" for role in ROLES})


@pytest.mark.parametrize("recipe", [recipes.MXFP4, NEAREST_WGRAD], ids=lambda r: r.name)
def test_permuting_experts_permutes_results(recipe):
  recipe = to_nearest(recipe)  # draws belong to places, not to experts
  x, w, dy = tensors()
  sizes, order = np.array(SIZES["tail"]), np.array([3, 1, 4, 0, 2])
  rows = np.concatenate([np.arange(M)[spans(sizes)[e]] for e in order] + [np.arange(248, M)])
  y, dx, dw = jit_gemms(recipe, x, w, dy, jnp.asarray(sizes))
  permuted = jit_gemms(recipe, x[rows], w[order], dy[rows], jnp.asarray(sizes[order]))
  for a, b in zip(permuted, (y[rows], dx[rows], dw[order]), strict=True):
    np.testing.assert_array_equal(a, b)


def test_one_expert_is_dot_general():
  x, w, dy = tensors(96, 64, 32, 1)
  for recipe in (recipes.MXFP4, recipes.BF16):
    actual = jit_gemms(recipe, x, w, dy, jnp.asarray([96]))
    expected = plain.reference(recipe, x, w[0], dy)
    plain.assert_gemms((actual[0], actual[1], actual[2][0]), expected)


def test_stochastic_wgrad_draws():
  """Each expert's mean dw over keys is that of the unrounded dy; other keys, other draws."""
  x, w, dy = tensors(90, 32, 32, 3)
  sizes = [50, 0, 37]
  recipe = recipes.MXFP4_RHT_SR.replace({"wgrad.lhs.format": jnp.float32})
  keys = jax.random.split(jax.random.key(3), 256)

  @jax.jit
  def draw(keys):
    return jax.lax.map(lambda key: gemms(recipe, x, w, dy, jnp.asarray(sizes), key)[2], keys)

  dw = np.asarray(draw(keys)).astype(np.float64)
  assert (dw[:, 1] == 0).all()
  for expert in (0, 2):
    span = spans(sizes)[expert]
    exact = x[span].astype(np.float64).T @ dy[span]  # the transform cancels
    z = (dw[:, expert].mean(0) - exact) / (dw[:, expert].std(0, ddof=1) / 16)
    # 1024 correlated scores near a standard normal: their mean square is near 1, none is beyond 6.
    assert np.abs(z).max() < 6 and 0.7 < (z**2).mean() < 1.4
  assert (dw[0] != dw[1]).mean() > 0.5


# Taps.


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipes.MXFP4_RHT_SR, recipes.BF16], ids=lambda r: r.name)
def test_tap(recipe):
  x, w, dy = tensors()
  sizes = SIZES["tail"]
  x[248:], dy[248:] = np.nan, np.nan

  @functools.partial(jax.jit, static_argnames="looks")
  def step(x, w, tap, looks):
    def f(x, w, tap):
      return grouped_dot(x, w, jnp.asarray(sizes), recipe, key=KEY, tap=tap if looks else None)

    y, pull = jax.vjp(f, x, w, tap)
    return y, *pull(jnp.asarray(dy))

  *results, rows = step(x, w, operands.new_tap(), looks=True)
  *plain_results, _ = step(x, w, operands.new_tap(), looks=False)
  for a, b in zip(results, plain_results, strict=True):
    np.testing.assert_array_equal(a, b)
  if recipe is recipes.BF16:
    assert not rows.any()
    return
  assert np.isfinite(rows).all() and rows[:6].all(0).any() and not rows[6:].any()
  x, dy = np.nan_to_num(x), np.nan_to_num(dy)
  tiles = np.concatenate([plain.pad(x[span], 0, 128) for span in spans(sizes)])
  signs = jnp.asarray(recipe.wgrad.lhs.transform.signs())
  turned = fp4jax.hadamard(tiles, 0, 32, signs)
  rceil = recipe.fprop.lhs.format
  cases = ((0, x, -1), (1, w, -2), (2, dy, -1), (3, w, -1), (4, turned, -2))
  for row, tensor, axis in cases:
    # Float32 sums in two orders; zeros between the experts add nothing to any of them.
    expected = plain.summary_row(tensor, rceil, axis)
    if row == 2:  # each row draws by a key of its own
      keys = fold_in(KEY, row, 0, jnp.arange(M))
      expected = operands.error_summary(tensor, rceil, axis, rounding="stochastic", key=keys)
    np.testing.assert_allclose(rows[row], expected, rtol=1e-5, atol=1e-7)


# Refusals.


def test_bad_sizes_are_refused():
  x, w, _ = tensors(40, 32, 32, 3)
  for sizes, message in (
    ([10, -3, 5], r"group_sizes\[1\]=-3 is negative"),
    ([20, 20, 1], r"group_sizes sum to 41, more than the 40 rows of lhs"),
    ([1, 2], r"group_sizes are int32 \(2,\); rhs \(3, 32, 32\) needs 3 integers"),
    ([1.0, 2.0, 3.0], r"group_sizes are float32 \(3,\); rhs \(3, 32, 32\) needs 3 integers"),
  ):
    with pytest.raises(ValueError, match=message):
      grouped_dot(x, w, jnp.asarray(sizes), recipes.MXFP4)


def test_bad_sizes_give_nan_under_jit():
  x, w, _ = tensors(40, 32, 32, 3)
  run = jax.jit(lambda sizes: grouped_dot(x, w, sizes, recipes.MXFP4))
  assert np.isfinite(run(jnp.asarray([20, 20, 0]))).all()
  for sizes in ([10, -3, 5], [20, 20, 1], [-1, 0, 0], [41, 0, 0]):
    assert np.isnan(run(jnp.asarray(sizes))).all()


def test_bad_arguments_are_refused():
  x, w, _ = tensors(40, 32, 32, 3)
  sizes = jnp.asarray([10, 10, 10])
  with pytest.raises(ValueError, match=r"lhs \(40, 32\) and rhs \(32, 32\) are not \(m, k\) and"):
    grouped_dot(x, w[0], sizes, recipes.MXFP4)
  with pytest.raises(ValueError, match=r"lhs \(40, 16\) and rhs \(3, 32, 32\) are not"):
    grouped_dot(x[:, :16], w, sizes, recipes.MXFP4)
  with pytest.raises(ValueError, match=r"lhs \(40, 32, 1\) and rhs \(3, 32, 32\) are not"):
    grouped_dot(x[..., None], w, sizes, recipes.MXFP4)
  with pytest.raises(TypeError, match="lhs is float64; a recipe takes float32, bfloat16 or"):
    grouped_dot(x.astype(np.float64), w, sizes, recipes.MXFP4)
  with pytest.raises(TypeError, match="rhs is int32; a recipe takes"):
    grouped_dot(x, w.astype(np.int32), sizes, recipes.MXFP4)
  with pytest.raises(
    ValueError, match=r"'mxfp4_rht_sr' rounds stochastically and needs key=, such as jax.random.key"
  ):
    grouped_dot(x, w, sizes, recipes.MXFP4_RHT_SR)
  with pytest.raises(TypeError, match=r"recipe has type str, not Recipe such as fp4jax\.recipes"):
    grouped_dot(x, w, sizes, "mxfp4")
  with pytest.raises(TypeError, match=r"^recipe has type ArrayImpl, not Recipe such as [^ ]*$"):
    grouped_dot(x, w, recipes.MXFP4, sizes)
  with pytest.raises(TypeError, match=r"lhs has type list, not jax.Array"):
    grouped_dot(x.tolist(), w, sizes, recipes.MXFP4)
  with pytest.raises(TypeError, match=r"group_sizes has type list, not jax.Array"):
    grouped_dot(x, w, [10, 10, 10], recipes.MXFP4)
  with pytest.raises(ValueError, match=r"lhs \(0, 32\) has no rows"):
    grouped_dot(x[:0], w, jnp.asarray([0, 0, 0]), recipes.MXFP4)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"fprop.lhs.format": fp4jax.FP8_BLOCK_2D}, "2-D blocks of FP8_BLOCK_2D in fprop.lhs would"),
    ({"dgrad.lhs.format": fp4jax.FP8_BLOCK_2D}, "2-D blocks of FP8_BLOCK_2D in dgrad.lhs would"),
    ({"wgrad.rhs.format": fp4jax.FP8_BLOCK_2D}, "2-D blocks of FP8_BLOCK_2D in wgrad.rhs would"),
    (
      {f"wgrad.{side}.transform": fp4jax.Hadamard(256) for side in ("lhs", "rhs")},
      "wgrad blocks of 256 do not divide tiles of 128 rows",
    ),
    (
      {"wgrad.lhs.format": dataclasses.replace(fp4jax.MXFP4, block_shape=(48,))},
      "wgrad blocks of 96 do not divide tiles of 128 rows",
    ),
  ],
)
def test_recipes_that_would_cross_experts_are_refused(changes, message):
  x, w, _ = tensors(40, 32, 32, 3)
  with pytest.raises(ValueError, match=message):
    grouped_dot(x, w, jnp.asarray([10, 10, 10]), recipes.MXFP4.replace(changes))
