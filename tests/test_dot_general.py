"""Three GEMMs, six operands: each against NumPy products of operands from the oracles."""

import dataclasses
import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from flax import nnx
from jax import lax

import fp4jax
from fp4jax import Gemm, Hadamard, Operand, Recipe, Residual, operands, recipes

MATMUL = (((1,), (0,)), ((), ()))
KEY = jax.random.key(11)
RCEIL = dataclasses.replace(fp4jax.MXFP4, scale_rule="rceil")
ROLES = [f"{gemm}.{side}" for gemm in ("fprop", "dgrad", "wgrad") for side in ("lhs", "rhs")]
ALL = [
  *recipes.RECIPES.values(),
  recipes.MXFP4.replace({f"{role}.format": fp4jax.NVFP4 for role in ROLES} | {"name": "nvfp4"}),
  recipes.MXFP4.replace(  # two block lengths, and two dtypes, in every GEMM
    {f"{gemm}.lhs.format": fp4jax.FP8_BLOCK for gemm in ("fprop", "dgrad")}
    | {"wgrad.rhs.format": fp4jax.FP8_BLOCK_POW2, "name": "mixed"}
  ),
]
strict = pytest.mark.usefixtures("strict_promotion")  # which Flax itself does not pass


def uniform(operand):
  """A recipe with the same operand everywhere."""
  gemm = Gemm(operand, operand)
  return Recipe(name="uniform", fprop=gemm, dgrad=gemm, wgrad=gemm, citation="a test")


RECIPE_OF_RCEIL = uniform(Operand(RCEIL))


def random(*shape, seed=0):
  """Rows and columns of very different size, so that blocks along another axis show."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape)
  for axis, n in enumerate(shape):
    sizes = 2.0 ** rng.integers(-3, 4, n)
    x = x * sizes.reshape([-1 if a == axis else 1 for a in range(len(shape))])
  return x.astype(np.float32)


def gemms(recipe, x, w, dy, key=KEY, dimension_numbers=MATMUL, preferred=None):
  """y, dx, dw"""

  def f(x, w):
    dot = fp4jax.dot_general(recipe, key=key)
    return dot(x, w, dimension_numbers, preferred_element_type=preferred)

  y, pull = jax.vjp(f, x, w)
  return (y, *pull(dy))


# Compiling pays for one recipe at sizes of its own; op by op is faster where many share sizes.
jit_gemms = jax.jit(gemms, static_argnames=("recipe", "dimension_numbers", "preferred"))
jit_fake_quantize = jax.jit(fp4jax.fake_quantize, static_argnames=("fmt", "axis", "rounding"))
jit_decompose = jax.jit(
  lambda x, fmt, axis, rounding, key: fp4jax.decompose(
    x, fmt, axis, rounding=rounding, key=key
  ).summary(),
  static_argnames=("fmt", "axis", "rounding"),
)


# The reference: operands in float64 from the oracles, products in NumPy.


def pad(x, axis, multiple):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return np.pad(x, widths)


def quantized(x, fmt, axis, **rounding):
  """By the oracle where it is exact, else by `fake_quantize`, which test_quantize proves."""
  shape = x.shape
  if fmt.block_shape is not None:
    x = pad(x, axis, fmt.block_shape[-1])
    if len(fmt.block_shape) == 2:
      x = pad(x, -3 - axis, fmt.block_shape[0])
  if fmt.scale_dtype == fp4jax.MXFP4.scale_dtype and not rounding:
    table = oracles.E2M1 if fmt.element_bits == 4 else oracles.E4M3
    lengths = oracles.block_lengths(x.shape, axis, fmt.block_size)
    values = oracles.quantize_mx(x, table, fmt.scale_rule, lengths).values
  else:
    values = np.asarray(jit_fake_quantize(x.astype(np.float32), fmt, axis, **rounding))
  return values[tuple(slice(n) for n in shape)].astype(np.float64)


def as_read(recipe, role, x, axis, key, by_row=False):
  """The float64 values of an operand that its GEMM contracts along `axis`.

  `by_row`: each row draws by a key of its own, that of the role with 0 and the row's number.
  """
  spec = recipe.operand(role)
  if spec.source == "residual":
    kept_axis = {"lhs": -1, "rhs": -2}[role[-3:]]  # packed along k, the axis of fprop
    x = quantized(x, getattr(recipe.residual, role[-3:]), kept_axis)
  x = np.asarray(x, np.float32)
  if spec.transform is not None:
    signs = spec.transform.signs()
    x = pad(x, axis, spec.transform.block)
    x = np.asarray(fp4jax.hadamard(x, axis, spec.transform.block, jnp.asarray(signs)))
  if not spec.is_quantized:
    return x.astype(spec.format).astype(np.float64)
  rounding = {}
  if spec.rounding == "stochastic":  # "an operand's place in ROLES seeds its stochastic rounding"
    key = jax.random.fold_in(key, ROLES.index(role))
    rounding = {"rounding": "stochastic", "key": key}
    if by_row:
      own = functools.partial(jit_fake_quantize, fmt=spec.format, axis=axis, rounding="stochastic")
      key = jax.random.fold_in(key, 0)
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x)))
      return np.asarray(jax.vmap(lambda row, key: own(row, key=key))(x, keys), np.float64)
  return quantized(x, spec.format, axis, **rounding)


def reference(recipe, x, w, dy, key=KEY):
  """For y, dx and dw: the float64 product, and how far float32 accumulation may be off.

  n products of which each may be rounded once, in any order of n - 1 additions: every term passes
  at most n roundings of 2^-24; one more 2^-24 covers their second order.
  """
  pairs = (
    (as_read(recipe, "fprop.lhs", x, -1, key), as_read(recipe, "fprop.rhs", w, -2, key)),
    (as_read(recipe, "dgrad.lhs", dy, -1, key), as_read(recipe, "dgrad.rhs", w, -1, key).T),
    (as_read(recipe, "wgrad.lhs", x, -2, key).T, as_read(recipe, "wgrad.rhs", dy, -2, key)),
  )
  return [(a @ b, (a.shape[1] + 1) * 2.0**-24 * (np.abs(a) @ np.abs(b))) for a, b in pairs]


def assert_gemms(actual, expected, relative=0.0):
  for name, a, (exact, bound) in zip(("y", "dx", "dw"), actual, expected, strict=True):
    error = np.abs(np.asarray(a, np.float64) - exact)
    assert (error <= bound + relative * (np.abs(exact) + bound)).all(), name


@strict
@pytest.mark.parametrize("recipe", ALL, ids=lambda r: r.name)
@pytest.mark.parametrize("m, k, n", [(64, 96, 128), (7, 50, 33)])
def test_every_gemm_reads_its_operands(recipe, m, k, n):
  x, w, dy = random(m, k), random(k, n, seed=1), random(m, n, seed=2)
  if recipe.is_stochastic and m == 7:
    # The draws of padded rows are not this reference's business.
    recipe = recipe.replace({"dgrad.lhs.rounding": "nearest", "wgrad.rhs.rounding": "nearest"})
  actual = jit_gemms(recipe, x, w, dy)
  assert [a.dtype for a in actual] == [np.float32] * 3
  assert_gemms(actual, reference(recipe, x, w, dy))


@strict
@pytest.mark.parametrize("recipe", [recipes.MXFP4, recipes.HOPPER_FP4], ids=lambda r: r.name)
def test_dtypes_of_inputs_and_outputs(recipe):
  for x_type, w_type, preferred, out_type in (
    (jnp.bfloat16, jnp.bfloat16, None, jnp.bfloat16),
    (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32),
    (jnp.float16, jnp.float16, None, jnp.float16),
  ):
    x, w = random(32, 64).astype(x_type), random(64, 96, seed=1).astype(w_type)
    dy = random(32, 96, seed=2).astype(out_type)
    actual = jit_gemms(recipe, x, w, dy, preferred=preferred)
    assert [a.dtype for a in actual] == [out_type, x_type, w_type]
    # One last rounding to 8 bits of bfloat16 or 11 of float16, whose range nothing here leaves.
    assert_gemms(actual, reference(recipe, x, w, dy), relative=2.0**-8)


def test_mixed_inputs_promote_as_in_lax():
  x, w = random(32, 64).astype(ml_dtypes.bfloat16), random(64, 96)
  actual = jit_gemms(recipes.MXFP4, x, w, random(32, 96))
  assert [a.dtype for a in actual] == [np.float32, jnp.bfloat16, np.float32]
  assert lax.dot_general(x, w, MATMUL).dtype == np.float32
  x, w = x.astype(jnp.float16), w.astype(jnp.bfloat16)
  y = fp4jax.dot_general(recipes.MXFP4)(x, w, MATMUL)
  assert y.dtype == lax.dot_general(x, w, MATMUL).dtype == jnp.bfloat16


@strict
def test_bf16_is_lax_dot_general():
  x, w, dy = random(64, 96), random(96, 128, seed=1), random(64, 128, seed=2)
  actual = jit_gemms(recipes.BF16, x, w, dy)
  bx, bw, bdy = (jnp.asarray(v, jnp.bfloat16) for v in (x, w, dy))
  dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)

  @jax.jit
  def plain(bx, bw, bdy):
    return (
      dot(bx, bw, MATMUL),
      dot(bdy, bw, (((1,), (1,)), ((), ()))),
      dot(bx, bdy, (((0,), (0,)), ((), ()))),
    )

  for a, b in zip(actual, plain(bx, bw, bdy), strict=True):
    np.testing.assert_array_equal(a, b)
  # In bf16 throughout it is the gradient of lax.dot_general itself.
  y, pull = jax.vjp(lambda x, w: lax.dot_general(x, w, MATMUL), bx, bw)
  for a, b in zip(gemms(recipes.BF16, bx, bw, bdy), (y, *pull(bdy)), strict=True):
    assert a.dtype == b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, b)


@strict
def test_fp32_is_lax_dot_general():
  x, w, dy = random(64, 96), random(96, 128, seed=1), random(64, 128, seed=2)
  f = functools.partial(lax.dot_general, dimension_numbers=MATMUL, precision=lax.Precision.HIGHEST)
  y, pull = jax.vjp(lambda x, w: f(x, w), x, w)
  expected = reference(recipes.FP32, x, w, dy)
  assert_gemms((y, *pull(dy)), expected)
  assert_gemms(gemms(recipes.FP32, x, w, dy), expected)


# Independence of the operands.


@pytest.mark.slow
@strict
@pytest.mark.parametrize("role", ROLES)
def test_a_change_to_one_operand_changes_its_gemm_alone(role):
  x, w, dy = random(64, 96), random(96, 128, seed=1), random(64, 128, seed=2)
  before = gemms(RECIPE_OF_RCEIL, x, w, dy)
  changes = [
    {"rounding": "stochastic"},
    {"format": fp4jax.MXFP8},
    {"format.scale_rule": "floor"},
    {"format": jnp.bfloat16},
  ]
  after = []
  for change in changes:
    recipe = RECIPE_OF_RCEIL.replace({f"{role}.{name}": value for name, value in change.items()})
    products = gemms(recipe, x, w, dy)
    after.append(products)
    assert_gemms(products, reference(recipe, x, w, dy))
    changed = [(np.asarray(a) != b).any() for a, b in zip(products, before, strict=True)]
    assert changed == [gemm == role[:5] for gemm in ("fprop", "dgrad", "wgrad")]
  for a, b in itertools.combinations(after, 2):  # and every change is another one
    assert any((np.asarray(p) != q).any() for p, q in zip(a, b, strict=True))


@pytest.mark.slow
@strict
@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
def test_a_transform_of_one_gemm(gemm):
  x, w, dy = random(64, 96), random(96, 128, seed=1), random(64, 128, seed=2)
  before = gemms(RECIPE_OF_RCEIL, x, w, dy)
  for transform in (Hadamard(32), Hadamard(32, seed=1), Hadamard(16)):
    changes = {f"{gemm}.{side}.transform": transform for side in ("lhs", "rhs")}
    recipe = RECIPE_OF_RCEIL.replace(changes)
    products = gemms(recipe, x, w, dy)
    assert_gemms(products, reference(recipe, x, w, dy))
    changed = [(np.asarray(a) != b).any() for a, b in zip(products, before, strict=True)]
    assert changed == [g == gemm for g in ("fprop", "dgrad", "wgrad")]
    # Unrounded, it cancels: (block + 1) roundings in each transform, and those of the product.
    changes |= {f"{gemm}.{side}.format": jnp.float32 for side in ("lhs", "rhs")}
    i = ("fprop", "dgrad", "wgrad").index(gemm)
    lhs, rhs = ((x, w), (dy, w.T), (x.T, dy))[i]
    block = transform.block
    spread = np.kron(np.eye(lhs.shape[1] // block), np.abs(oracles.sylvester(block)))
    sums = (np.abs(lhs) @ spread) @ (spread @ np.abs(rhs))
    actual = np.asarray(gemms(RECIPE_OF_RCEIL.replace(changes), x, w, dy)[i], np.float64)
    bound = (2 * (block + 1) + lhs.shape[1] + 1) * 2.0**-24 * sums
    assert (np.abs(actual - lhs.astype(np.float64) @ rhs) <= bound).all()


# The residual.


@pytest.mark.slow
@strict
def test_residual_is_quantized_twice():
  x, w, dy = random(64, 96), random(96, 128, seed=1), random(64, 128, seed=2)
  hopper = recipes.HOPPER_FP4
  unrounded = hopper.replace({"fprop.lhs.source": "original"})
  both = uniform(Operand(fp4jax.MXFP8)).replace(
    {"residual": Residual(fp4jax.MXFP4, fp4jax.NVFP4)}
    | {f"{role}.source": "residual" for role in ("fprop.rhs", "dgrad.rhs", "wgrad.lhs")}
  )
  for recipe in (unrounded, both):
    assert_gemms(jit_gemms(recipe, x, w, dy), reference(recipe, x, w, dy))
  products, others = jit_gemms(hopper, x, w, dy), jit_gemms(unrounded, x, w, dy)
  same = [(np.asarray(a) == b).all() for a, b in zip(products, others, strict=True)]
  assert same == [False, True, True]  # fprop reads another x; the backward pass does not
  # x in MXFP4 costs nothing more in FP8 with power-of-two scales: fprop reads x as it was kept.
  kept = quantized(x, fp4jax.MXFP4, -1)
  np.testing.assert_array_equal(quantized(kept, fp4jax.FP8_BLOCK_POW2, -1), kept)
  weights = quantized(w, fp4jax.FP8_BLOCK_POW2_2D, -2)
  bound = 97 * 2.0**-24 * (np.abs(kept) @ np.abs(weights))
  assert (np.abs(np.asarray(products[0]) - kept @ weights) <= bound).all()
  # wgrad sees x rounded along k first, which a residual along m would not give.
  assert (kept != quantized(x, fp4jax.MXFP4, -2)).any()


@strict
@pytest.mark.parametrize("jitted", [False, True])
def test_residual_is_kept_packed(jitted):
  x, w = random(64, 96), random(96, 128, seed=1)

  def kept(recipe):
    f = lambda x, w: jax.vjp(lambda x, w: fp4jax.dot_general(recipe)(x, w, MATMUL), x, w)[1]  # noqa: E731
    leaves = jax.tree.leaves(
      jax.eval_shape(f, x, w) if jitted else f(jnp.asarray(x), jnp.asarray(w))
    )
    return {(leaf.shape, str(leaf.dtype)) for leaf in leaves if leaf.size}

  weights = ((96, 128), "float32")  # a parameter: it costs nothing to keep
  assert kept(recipes.MXFP4) == {((64, 96), "float32"), weights}
  assert kept(recipes.HOPPER_FP4) == {((64, 48), "uint8"), ((64, 3), "uint8"), weights}
  both = recipes.HOPPER_FP4.replace({"residual.rhs": fp4jax.MXFP8, "dgrad.rhs.source": "residual"})
  packed_weights = {((96, 128), "uint8"), ((3, 128), "uint8")}
  assert kept(both) == {((64, 48), "uint8"), ((64, 3), "uint8")} | packed_weights


# Dimension numbers.


@strict
@pytest.mark.parametrize(
  "lhs, rhs, dimension_numbers",
  [
    ((5, 64), (64, 3), MATMUL),
    ((64, 5), (3, 64), (((0,), (1,)), ((), ()))),
    ((2, 3, 64), (64, 5), (((2,), (0,)), ((), ()))),  # nn.Dense on a batch
    ((5, 4, 16), (4, 16, 3), (((1, 2), (0, 1)), ((), ()))),  # contracts heads x head_dim
    ((5, 4, 16), (16, 3, 4), (((1, 2), (2, 0)), ((), ()))),
    ((2, 5, 64), (2, 64, 3), (((2,), (1,)), ((0,), (0,)))),
    ((64, 2, 5, 3), (3, 7, 64, 2), (((0,), (2,)), ((3, 1), (0, 3)))),
    ((64,), (64,), (((0,), (0,)), ((), ()))),
    ((4, 64), (64,), (((1,), (0,)), ((), ()))),
    ((4,), (3,), (((), ()), ((), ()))),  # an outer product contracts nothing
  ],
)
def test_dimension_numbers(lhs, rhs, dimension_numbers):
  x, w = random(*lhs), random(*rhs, seed=1)
  plain = functools.partial(
    lax.dot_general, dimension_numbers=dimension_numbers, precision=lax.Precision.HIGHEST
  )
  y, pull = jax.vjp(lambda x, w: plain(x, w), x, w)
  dy = random(*y.shape, seed=2)
  expected = (y, *pull(jnp.asarray(dy)))
  sums, pull = jax.vjp(lambda x, w: plain(x, w), np.abs(x), np.abs(w))
  bounds = (sums, *pull(jnp.asarray(np.abs(dy))))
  actual = jit_gemms(recipes.FP32, x, w, dy, dimension_numbers=dimension_numbers)
  for a, e, bound in zip(actual, expected, bounds, strict=True):
    assert a.shape == e.shape
    # Two float32 sums of at most 130 terms in different order.
    assert (np.abs(np.asarray(a) - e) <= 2 * 130 * 2.0**-24 * np.asarray(bound)).all()


@strict
def test_batches_and_several_axes_are_quantized_as_matrices():
  """MXFP4 with a batch axis, two contracted axes and two free ones, against a loop."""
  x, w = random(4, 3, 2, 5, 16), random(2, 16, 4, 7, seed=1)  # k: axes 2 and 4; batch: 0 and 2
  dimension_numbers = (((2, 4), (0, 1)), ((0,), (2,)))
  dy = random(4, 3, 5, 7, seed=2)
  y, dx, dw = (
    np.asarray(v) for v in jit_gemms(recipes.MXFP4, x, w, dy, dimension_numbers=dimension_numbers)
  )
  assert (y.shape, dx.shape, dw.shape) == (dy.shape, x.shape, w.shape)
  for b in range(4):
    x2 = x[b].transpose(0, 2, 1, 3).reshape(15, 32)
    w2 = w[:, :, b].reshape(32, 7)
    actual = (
      y[b].reshape(15, 7),
      dx[b].transpose(0, 2, 1, 3).reshape(15, 32),
      dw[:, :, b].reshape(32, 7),
    )
    assert_gemms(actual, reference(recipes.MXFP4, x2, w2, dy[b].reshape(15, 7)))


@strict
@pytest.mark.parametrize("recipe", ALL, ids=lambda r: r.name)
def test_padding_changes_nothing(recipe):
  """Sizes that no block divides give what zeros appended by hand give."""
  if recipe.is_stochastic:
    recipe = recipe.replace({"dgrad.lhs.rounding": "nearest", "wgrad.rhs.rounding": "nearest"})
  x, w, dy = random(7, 50), random(50, 33, seed=1), random(7, 33, seed=2)
  padded = [pad(pad(v, 0, 128), 1, 128) for v in (x, w, dy)]
  y, dx, dw = (np.asarray(p) for p in jit_gemms(recipe, *padded))
  assert (y[7:] == 0).all() and (y[:, 33:] == 0).all()
  bounds = [bound for _, bound in reference(recipe, x, w, dy)]
  cut = (y[:7, :33], dx[:7, :50], dw[:50, :33])
  for actual, by_hand, bound in zip(jit_gemms(recipe, x, w, dy), cut, bounds, strict=True):
    # The same terms in another order: each sum may be off by the bound. Power-of-two scales of like
    # size leave the sums of MXFP4 no bits to lose.
    slack = 0 if recipe is recipes.MXFP4 else 2 * bound
    assert (np.abs(np.asarray(actual) - by_hand) <= slack).all()


@strict
def test_vmap_is_a_loop():
  x, w, dy = random(3, 16, 64), random(3, 64, 32, seed=1), random(3, 16, 32, seed=2)
  mapped = jax.vmap(lambda *a: jit_gemms(recipes.HOPPER_FP4, *a))(x, w, dy)
  for i in range(3):
    one = reference(recipes.HOPPER_FP4, x[i], w[i], dy[i])
    assert_gemms([m[i] for m in mapped], one)


# In models.


def test_einsum_attention():
  """Scores and outputs of every head, contracted along head_dim and along the keys."""
  q, k, v = (random(2, 32, 2, 64, seed=s) for s in range(3))
  dot = fp4jax.dot_general(recipes.MXFP4)

  @jax.jit
  def attend(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, _dot_general=dot)
    weights = jax.nn.softmax(scores / 64)
    return scores, weights, jnp.einsum("bhqk,bkhd->bqhd", weights, v, _dot_general=dot)

  scores, weights, out = (np.asarray(a) for a in attend(q, k, v))
  for b, h in itertools.product(range(2), range(2)):
    a, c = quantized(q[b, :, h], fp4jax.MXFP4, 1), quantized(k[b, :, h], fp4jax.MXFP4, 1)
    bound = 65 * 2.0**-24 * (np.abs(a) @ np.abs(c).T)
    assert (np.abs(scores[b, h] - a @ c.T) <= bound).all()
    a, c = quantized(weights[b, h], fp4jax.MXFP4, 1), quantized(v[b, :, h], fp4jax.MXFP4, 0)
    bound = 33 * 2.0**-24 * (np.abs(a) @ np.abs(c))
    assert (np.abs(out[b, :, h] - a @ c) <= bound).all()
  grads = jax.jit(jax.grad(lambda *a: attend(*a)[2].sum(), (0, 1, 2)))(q, k, v)
  assert all(np.isfinite(g).all() and (np.asarray(g) != 0).any() for g in grads)


def test_linen_nnx_and_plain_jax_agree():
  x, w = random(4, 8, 64), random(64, 32, seed=1)
  dot = fp4jax.dot_general(recipes.MXFP4)
  dense = nn.Dense(32, use_bias=False, dot_general=dot)
  linear = nnx.Linear(64, 32, use_bias=False, dot_general=dot, rngs=nnx.Rngs(0))

  def with_nnx(w, x):
    linear.kernel[...] = w
    return linear(x)

  ways = {
    "plain": lambda w, x: dot(x, w, (((2,), (0,)), ((), ()))),
    "linen": lambda w, x: dense.apply({"params": {"kernel": w}}, x),
    "nnx": lambda w, x: nnx.merge(graph, jax.tree.map(lambda _: w, state))(x),
  }
  graph, state = nnx.split(linear)
  dy = random(4, 8, 32, seed=2)
  flat = reference(recipes.MXFP4, x.reshape(32, 64), w, dy.reshape(32, 32))
  results = {}
  for name, way in ways.items():

    @jax.jit
    def step(w, x, way=way):
      y, pull = jax.vjp(way, w, x)
      return y, *pull(jnp.asarray(dy))

    y, dw, dx = step(w, x)
    assert_gemms((y.reshape(32, 32), dx.reshape(32, 64), dw), flat)
    results[name] = (y, dw, dx)
    # Without jit, the same bits.
    jax.tree.map(np.testing.assert_array_equal, (way(w, x),), (y,))
  for name in ("linen", "nnx"):
    jax.tree.map(np.testing.assert_array_equal, results[name], results["plain"])


def test_linen_stream_of_keys():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      for _ in range(2):
        key = self.make_rng("rounding")
        dot = fp4jax.dot_general(recipes.MXFP4_RHT_SR, key=key)
        x = nn.Dense(64, use_bias=False, dot_general=dot)(x)
      return x

  model, x = Model(), random(32, 64)
  params = model.init({"params": jax.random.key(0), "rounding": jax.random.key(1)}, x)

  @jax.jit
  def grads(params, seed):
    def loss(params):
      return (model.apply(params, x, rngs={"rounding": jax.random.key(seed)}) ** 2).sum()

    return jax.value_and_grad(loss)(params)

  (loss, first), (_, again), (other_loss, other) = (grads(params, seed) for seed in (0, 0, 1))
  assert loss == other_loss  # the forward pass rounds to nearest
  jax.tree.map(np.testing.assert_array_equal, first, again)
  for layer in ("Dense_0", "Dense_1"):
    a, b = (np.asarray(g["params"][layer]["kernel"]) for g in (first, other))
    assert (a != b).mean() > 0.5


def test_nnx_stream_of_keys():
  def layers(recipe, rngs):
    return [
      nnx.Linear(64, 64, dot_general=fp4jax.nnx.DotGeneral(recipe, rngs), rngs=rngs)
      for _ in range(2)
    ]

  rngs = nnx.Rngs(0)
  plain = [nnx.Linear(64, 64, rngs=rngs) for _ in range(2)]
  model = layers(recipes.MXFP4_RHT_SR, nnx.Rngs(0, rounding=1))
  for a, b in zip(model, plain, strict=True):  # two recipes start from the same weights
    np.testing.assert_array_equal(a.kernel[...], b.kernel[...])
  with pytest.raises(ValueError, match=r"streams \['params'\], not \"rounding\", such as nnx.Rngs"):
    layers(recipes.MXFP4_RHT_SR, nnx.Rngs(params=0))
  with pytest.raises(ValueError, match=r"streams \['default'\], not \"rounding\""):
    layers(recipes.MXFP4_RHT_SR, nnx.Rngs(0))
  # Each call of each layer draws anew: dw depends on nothing else that differs here.
  x, dy = random(32, 64), random(32, 64, seed=2)
  grad = nnx.jit(nnx.grad(lambda layer: (layer(x) * dy).sum()))
  dw = [np.asarray(grad(layer).kernel[...]) for layer in (*model, model[0])]
  for a, b in itertools.combinations(dw, 2):
    assert (a != b).mean() > 0.5


@strict
def test_stochastic_gradients_are_unbiased():
  """The mean of dx over keys tends to the product of the unrounded dy."""
  x, w, dy = random(32, 32), random(32, 64, seed=1), random(32, 64, seed=2)
  recipe = recipes.MXFP4_RHT_SR
  keys = jax.random.split(jax.random.key(5), 256)
  # Not vmap: XLA's CPU dot fails on bf16 where a batch axis is on one operand alone.
  dx = np.asarray(jax.lax.map(lambda key: gemms(recipe, x, w, dy, key)[1], keys)).astype(np.float64)
  exact = dy.astype(np.float64) @ quantized(w, RCEIL, -1).T
  z = (dx.mean(0) - exact) / (dx.std(0, ddof=1) / 16)
  # 1024 correlated scores near a standard normal: their mean square is near 1, none is beyond 6.
  assert np.abs(z).max() < 6 and 0.7 < (z**2).mean() < 1.4


# Taps.


def summary_row(x, fmt, axis, **rounding):
  s = jit_decompose(x, fmt, axis, rounding.get("rounding", "nearest"), rounding.get("key"))
  return np.array([getattr(s, f.name) for f in dataclasses.fields(s)])


@functools.partial(jax.jit, static_argnames="recipe")
def tapped(recipe, x, w, dy, tap):
  def loss(x, w, tap):
    return (fp4jax.dot_general(recipe, key=KEY, tap=tap)(x, w, MATMUL) * dy).sum()

  return jax.value_and_grad(loss, (0, 1) if tap is None else (0, 1, 2))(x, w, tap)


@pytest.mark.slow
@strict
def test_a_layer_of_a_model_that_is_there_takes_a_stream_of_keys():
  rngs = nnx.Rngs(0, rounding=1)
  layer = nnx.Linear(64, 64, rngs=rngs)
  layer.dot_general = nnx.data(fp4jax.nnx.DotGeneral(recipes.MXFP4_RHT_SR, rngs))
  grad = nnx.jit(nnx.grad(lambda layer: (layer(random(32, 64)) * random(32, 64, seed=2)).sum()))
  one, other = (np.asarray(grad(layer).kernel[...]) for _ in range(2))
  assert (one != other).mean() > 0.5


@pytest.mark.parametrize(
  "recipe", [recipes.MXFP4_RHT_SR, recipes.HOPPER_FP4, recipes.BF16], ids=lambda r: r.name
)
def test_tap_summarizes_the_very_tensors(recipe):
  x, w, dy = (
    jnp.asarray(random(*s, seed=i)) for i, s in enumerate([(128, 256), (256, 128), (128, 128)])
  )
  value, (dx, dw, rows) = tapped(recipe, x, w, dy, operands.new_tap())
  assert rows.shape == (8, 10) and rows.dtype == np.float32
  expected = np.zeros((8, 10))
  tensors = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (x, dy)}
  axes = {"fprop": (-1, -2), "dgrad": (-1, -1), "wgrad": (-2, -2)}
  for i, role in enumerate(ROLES):
    spec = recipe.operand(role)
    side = ("lhs", "rhs").index(role[-3:])
    tensor, axis = tensors[role[:5]][side], axes[role[:5]][side]
    if spec.source == "residual":
      tensor = fp4jax.fake_quantize(tensor, fp4jax.MXFP4, -1)
    if spec.transform is not None:
      tensor = fp4jax.hadamard(tensor, axis, 32, jnp.asarray(spec.transform.signs()))
    if spec.is_quantized:
      key = jax.random.fold_in(KEY, i) if spec.rounding == "stochastic" else None
      expected[i] = summary_row(tensor, spec.format, axis, rounding=spec.rounding, key=key)
  if recipe.residual.lhs is not None:
    expected[6] = summary_row(x, recipe.residual.lhs, -1)
  # Float32 sums of at most 2^15 terms in two orders; XLA adds in chunks.
  np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)
  assert tuple(operands.ROLES) == (*ROLES, "residual.lhs", "residual.rhs")
  live = [i for i, role in enumerate(operands.ROLES) if role in operands.quantized_roles(recipe)]
  np.testing.assert_array_equal(np.asarray(rows).any(1), np.isin(np.arange(8), live))
  told = fp4jax.read_tap(rows, recipe)
  assert list(told) == [operands.ROLES[i] for i in live]
  for i in live:
    found = np.array([*vars(told[operands.ROLES[i]]).values()])
    np.testing.assert_array_equal(found, rows[i])
  # Looking changes nothing.
  plain_value, (plain_dx, plain_dw) = tapped(recipe, x, w, dy, None)
  assert value == plain_value
  np.testing.assert_array_equal(dx, plain_dx)
  np.testing.assert_array_equal(dw, plain_dw)


@pytest.mark.slow
@strict
def test_tap_of_padded_tensors():
  x, w, dy = (jnp.asarray(random(*s, seed=i)) for i, s in enumerate([(7, 50), (50, 33), (7, 33)]))
  _, (_, _, rows) = tapped(recipes.MXFP4, x, w, dy, operands.new_tap())
  cases = ((x, -1), (w, -2), (dy, -1), (w, -1), (x, -2), (dy, -2))
  for row, (tensor, axis) in zip(np.asarray(rows), cases, strict=False):
    padded = pad(np.asarray(tensor), axis, 32)
    expected = summary_row(padded, fp4jax.MXFP4, axis)
    np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-7)
  assert not rows[6:].any()


# Refusals.


@strict
@pytest.mark.parametrize("dtype", ["int32", "complex64", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("side", ["lhs", "rhs"])
def test_dtypes_are_refused(dtype, side):
  arrays = {"lhs": random(4, 32), "rhs": random(32, 4)}
  arrays[side] = arrays[side].astype(dtype)
  with pytest.raises(TypeError, match=f"{side} is {dtype}; a recipe takes float32, bfloat16 or"):
    fp4jax.dot_general(recipes.MXFP4)(*arrays.values(), MATMUL)


@strict
def test_bad_calls_are_refused():
  x, w = random(4, 32), random(32, 4)
  dot = fp4jax.dot_general(recipes.MXFP4)
  with pytest.raises(
    ValueError,
    match=r"recipe 'mxfp4_rht_sr' rounds stochastically and needs key=, such as "
    r"jax.random.key\(0\), another one each step",
  ):
    fp4jax.dot_general(recipes.MXFP4_RHT_SR)
  with pytest.raises(TypeError, match=r"recipe has type str, not Recipe such as fp4jax.recipes"):
    fp4jax.dot_general("mxfp4")
  for arguments in ((x, w, MATMUL), (recipes.MXFP4, x, w, MATMUL)):
    with pytest.raises(TypeError, match=r"call dot_general\(recipe\)\(x, w, dimension_numbers\)"):
      fp4jax.dot_general(*arguments)
  layer = nn.Dense(4, dot_general=fp4jax.dot_general)  # passes one operand, the rest by name
  with pytest.raises(TypeError, match=r"give a layer dot_general=dot_general\(recipe\)"):
    layer.init(KEY, x)
  for tap, found in (
    (jnp.zeros((3, 3)), r"float32 \(3, 3\)"),
    (jnp.zeros((8, 10), "bfloat16"), r"bfloat16 \(8,"),
  ):
    with pytest.raises(
      ValueError, match=rf"tap is {found}.*, not float32 \(8, 10\): fp4jax.new_tap"
    ):
      fp4jax.dot_general(recipes.MXFP4, tap=tap)
  with pytest.raises(TypeError, match=r"rhs has type list, not jax.Array"):
    dot(x, w.tolist(), MATMUL)
  with pytest.raises(ValueError, match=r"precision=<?.*HIGHEST.*'mxfp4' sets the precision"):
    dot(x, w, MATMUL, precision=lax.Precision.HIGHEST)
  with pytest.raises(ValueError, match="does not support window=3"):
    dot(x, w, MATMUL, window=3)


@strict
@pytest.mark.parametrize(
  "lhs, rhs, dimension_numbers, message",
  [
    ((4, 32), (4, 32), MATMUL, r"got \(32,\) and \(4,\)"),
    ((4, 8, 16), (16, 8, 3), (((1, 2), (0, 1)), ((), ())), r"got \(8, 16\) and \(16, 8\)"),
    ((2, 3, 8), (3, 2, 8), (((2,), (2,)), ((0, 1), (0, 1))), r"got \(2, 3\) and \(3, 2\)"),
    ((2, 4, 8), (3, 8, 5), (((2,), (1,)), ((0,), (0,))), r"got \(2,\) and \(3,\)"),
    ((4, 8), (8, 3), (((1,), ()), ((), ())), r"got \(8,\) and \(\)"),
    ((4, 8), (8, 3), (((2,), (0,)), ((), ())), r"less than the number of axes of the lhs"),
    ((4, 8), (8, 3), (((1,), (-2,)), ((), ())), r"nonnegative .* rhs_contracting of \(-2,\)"),
    ((8, 8), (8, 8), (((1, 1), (0, 0)), ((), ())), r"distinct, got lhs_contracting \(1, 1\)"),
    ((4, 8), (8, 3), (((1,), (0,)), ((1,), (0,))), "disjoint from contracting dimensions"),
  ],
)
def test_axes_are_refused_as_in_lax(lhs, rhs, dimension_numbers, message):
  x, w = np.ones(lhs, np.float32), np.ones(rhs, np.float32)
  named = re.escape(f"lhs {lhs}, rhs {rhs}, dimension_numbers={dimension_numbers}: ")
  with pytest.raises(TypeError, match=f"{named}.*{message}"):
    fp4jax.dot_general(recipes.FP32)(x, w, dimension_numbers)
  with pytest.raises(TypeError, match=message):
    lax.dot_general(x, w, dimension_numbers)


@strict
@pytest.mark.parametrize("dimension_numbers", [None, ((1, 0), ((), ())), (((1,), (0,)),)])
def test_dimension_numbers_of_another_form_are_refused(dimension_numbers):
  message = re.escape(f"dimension_numbers={dimension_numbers}: ")
  with pytest.raises(TypeError, match=message):
    fp4jax.dot_general(recipes.FP32)(random(4, 8), random(8, 3), dimension_numbers)
