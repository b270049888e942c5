"""Products with packed weights against those with the arrays that were packed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import (
  Operand,
  decompose,
  dequantize,
  dot_general,
  fake_quantize,
  formats,
  moe_ffn,
  pack_weights,
  quantize,
  recipes,
)
from fp4jax.models.over_mesh import moe_ffn_over_mesh
from fp4jax.operands import whole
from fp4jax.quantizers import Context, OutlierClamp, OutlierFallback

NVFP4 = recipes.MXFP4.replace(
  {f"fprop.{side}.format": formats.NVFP4 for side in ("lhs", "rhs")} | {"name": "nvfp4"}
)


def fallback(fmt, alpha=0.5, **sides):
  """Weights in two terms; the backward pass reads what fprop read."""
  second = OutlierFallback(Operand(fmt), alpha)
  read = Operand(jnp.bfloat16, source="fprop")
  changes = {"fprop.rhs": second, "dgrad.rhs": read, "name": f"{fmt.name.lower()}+of"}
  return recipes.BF16.replace(changes | sides)


FALLBACKS = [
  fallback(formats.MXFP4),
  fallback(formats.MXFP4, **{"fprop.lhs": OutlierFallback(Operand(formats.MXFP4))}),
  fallback(formats.MXFP4_MBS_D, **{"fprop.lhs.format": formats.MXFP4_MBS_S}),
  fallback(formats.NVFP4, 0.3),
]
CASES = [
  *[(recipe, "bfloat16") for recipe in FALLBACKS],
  *[(recipe, "bfloat16") for recipe in (recipes.FP8, recipes.MXFP4, recipes.HOPPER_FP4)],
  *[(recipe, "bfloat16") for recipe in (recipes.FP8_MXFP4_WEIGHTS, NVFP4)],
  *[(recipe, "float32") for recipe in (recipes.FP8, recipes.FP8_MXFP4_WEIGHTS)],
]
every_case = pytest.mark.parametrize(
  ("recipe", "dtype"), CASES, ids=[f"{recipe.name}-{dtype}" for recipe, dtype in CASES]
)
ROWS_TIMES_WEIGHTS = (((1,), (0,)), ((), ()))


def normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@every_case
def test_a_product_is_that_of_the_array(recipe, dtype):
  # 18 binades within a tile of 128: more than E4M3 has, so that FP8 of MXFP4 is not MXFP4.
  sizes = (2.0 ** (-6 * (jnp.arange(256) // 32))).astype(dtype)
  x, w = normal(0, 24, 256, dtype=dtype) / sizes, normal(1, 256, 128, dtype=dtype) * sizes[:, None]
  xla = dot_general(recipe, implementation="xla")
  dot = jax.jit(lambda x, w: xla(x, w, ROWS_TIMES_WEIGHTS))
  found, expected = dot(x, pack_weights(w, recipe)), dot(x, w)
  assert found.dtype == expected.dtype == dtype
  np.testing.assert_array_equal(found, expected)
  exact = jnp.matmul(x, w, preferred_element_type=jnp.float32)
  assert (np.float32(found) != np.float32(exact)).mean() > 0.5


@every_case
def test_a_last_block_that_is_not_full(recipe, dtype):
  x, w = normal(0, 24, 250, dtype=dtype), normal(1, 250, 128, dtype=dtype)
  packed = pack_weights(w, recipe)
  assert packed.shape == w.shape and packed.codes.shape[-2] * 8 // packed.fmt.element_bits == 256
  xla = dot_general(recipe, implementation="xla")
  dot = jax.jit(lambda x, w: xla(x, w, ROWS_TIMES_WEIGHTS))
  np.testing.assert_array_equal(dot(x, packed), dot(x, w))


def test_as_many_values_are_contracted_as_of_the_array():
  """Zeros too: a GPU may sum in another order where there are fewer."""
  weights_alone = {"fprop.lhs.format": jnp.bfloat16, "name": "weights"}
  macro = recipes.MXFP4.replace(weights_alone | {"fprop.rhs.format": formats.MXFP4_MBS_D})
  x, w = normal(0, 24, 250, dtype=jnp.bfloat16), normal(1, 250, 128, dtype=jnp.bfloat16)
  for recipe in (macro, FALLBACKS[0], recipes.FP8_MXFP4_WEIGHTS):
    dot = jax.jit(dot_general(recipe, implementation="xla"), static_argnums=2)
    lowered = [dot.lower(x, rhs, ROWS_TIMES_WEIGHTS) for rhs in (w, pack_weights(w, recipe))]
    of_product = re.compile(r"dot_general.*: \(tensor<24x(\d+)x")
    plain, packed = (set(of_product.findall(program.as_text())) for program in lowered)
    assert plain == packed == {"256"}


def test_codes_fill_whole_bytes_where_there_are_no_blocks():
  one_block = dataclasses.replace(formats.MXFP4, block_shape=None)
  recipe = recipes.MXFP4.replace({"fprop.rhs.format": one_block, "name": "one_block"})
  x, w = normal(0, 24, 31), normal(1, 31, 64)
  packed, dot = pack_weights(w, recipe), jax.jit(dot_general(recipe), static_argnums=2)
  assert packed.shape == w.shape and packed.codes.shape == (16, 64)
  np.testing.assert_array_equal(dot(x, packed, ROWS_TIMES_WEIGHTS), dot(x, w, ROWS_TIMES_WEIGHTS))


@pytest.mark.slow
@every_case
def test_experts_are_those_of_the_arrays(recipe, dtype):
  x, weights = normal(0, 20, 128, dtype=dtype), jax.nn.softmax(normal(4, 20, 2))
  # Experts of other sizes, so that a scale of all of them would be none of theirs.
  sizes = jnp.array([1.0, 30.0, 0.1], dtype)[:, None, None]
  w13, w2 = (normal(i, 3, 128, n, dtype=dtype) * sizes for i, n in ((1, 256), (2, 128)))
  experts = jax.random.randint(jax.random.key(3), (20, 2), 0, 3)
  ffn = jax.jit(lambda w13, w2: moe_ffn(x, w13, w2, experts, weights, recipe))
  found = ffn(pack_weights(w13, recipe), pack_weights(w2, recipe))
  np.testing.assert_array_equal(found, ffn(w13, w2))


def test_packed_weights_take_the_bytes_of_their_codes():
  w = normal(0, 4, 256, 128, dtype=jnp.bfloat16)
  assert pack_weights(w, recipes.MXFP4).nbytes == w.size * (4 + 8 / 32) / 8
  assert pack_weights(w, recipes.FP8_MXFP4_WEIGHTS).nbytes == w.size * (4 + 8 / 32) / 8
  assert pack_weights(w, recipes.FP8).nbytes == w.size + w.size / 128**2 * 4
  assert pack_weights(w, FALLBACKS[0]).nbytes == w.size * 2 * (4 + 8 / 32) / 8


def test_the_values_of_two_terms_are_what_the_quantizer_reads():
  w = normal(1, 256, 128)
  for recipe in FALLBACKS:
    packed = pack_weights(w, recipe)
    read = recipe.fprop.rhs.read(w, -2, Context())
    assert packed.fmt.bits_per_value == 2 * recipe.fprop.rhs.format.bits_per_value
    values = whole(read)
    # A sum of two float32 terms may be fused with the products that make them.
    ulps = 0 if read.terms[0].dtype == jnp.bfloat16 else 2.0**-22
    np.testing.assert_allclose(dequantize(packed), values, rtol=ulps, atol=0)
    again = fake_quantize(w, packed.fmt, axis=-2)
    np.testing.assert_allclose(again, values, rtol=ulps, atol=0)


def test_the_gradient_of_x_is_that_of_the_values():
  x, w = normal(0, 24, 256), normal(1, 256, 128)
  packed = pack_weights(w, recipes.MXFP4)

  def gradient(w):
    dot = dot_general(recipes.MXFP4)
    return jax.grad(lambda x: jnp.sum(dot(x, w, ROWS_TIMES_WEIGHTS) ** 2))(x)

  values = dequantize(quantize(w, formats.MXFP4, axis=0))
  np.testing.assert_array_equal(gradient(packed), gradient(values))


@pytest.mark.parametrize("recipe", FALLBACKS, ids=lambda recipe: recipe.name)
def test_the_gradient_of_x_is_that_of_the_two_terms(recipe):
  x, w = normal(0, 24, 256), normal(1, 256, 128)
  dot = dot_general(recipe)
  gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(dot(x, w, ROWS_TIMES_WEIGHTS) ** 2)))
  np.testing.assert_array_equal(gradient(x, pack_weights(w, recipe)), gradient(x, w))


def test_what_can_not_be_read_packed_is_refused():
  x, w = normal(0, 24, 256), normal(1, 256, 128)

  def refused(match, function, *args):
    with pytest.raises(ValueError, match=match):
      function(*args)

  refused("'bf16' reads fprop.rhs in bfloat16, which is not packed", pack_weights, w, recipes.BF16)
  stochastic = recipes.MXFP4.replace({"fprop.rhs.rounding": "stochastic", "name": "sr"})
  refused("'sr' reads fprop.rhs by .*stochastic", pack_weights, w, stochastic)
  exact = recipes.MXFP4.replace({"fprop.lhs": OutlierClamp(Operand(formats.MXFP4)), "name": "occ"})
  refused("'occ' reads fprop.lhs by .*, whose exact term meets", pack_weights, w, exact)
  two_dtypes = fallback(formats.MXFP4, 0.3)
  refused("alpha=0.3 is no power of two", pack_weights, w, two_dtypes)
  refused("two codes of MXFP8 do not fill a byte", pack_weights, w, fallback(formats.MXFP8))
  again = fallback(formats.MXFP4, **{"dgrad.rhs.source": "original"})
  refused("packed where fprop reads the original and dgrad", pack_weights, w, again)
  kept = fallback(
    formats.MXFP4,
    **{"residual.rhs": formats.MXFP4, "fprop.rhs.operand.source": "residual"},
  )
  refused("packed where fprop reads the original and dgrad", pack_weights, w, kept)
  two = FALLBACKS[0].fprop.rhs.packed_format
  with pytest.raises(ValueError, match=r"MXFP4\+0.5\*MXFP4 rounds to nearest alone"):
    quantize(w, two, rounding="stochastic", key=jax.random.key(0))
  refused("has no parts of its error", decompose, w, two)
  match = r"w \(256, 120\): 120 is not a multiple of FP8_BLOCK_2D's 128"
  refused(match, pack_weights, w[:, :120], recipes.FP8)
  refused(r"w \(256,\) is not \(\*b, k, n\)", pack_weights, w[:, 0], recipes.MXFP4)
  packed, dot = pack_weights(w, recipes.MXFP4), dot_general(recipes.MXFP4)
  other = dot_general(recipes.FP8)
  match = "rhs is packed in MXFP4 along axis -2; recipe 'fp8' needs FP8_BLOCK_2D along axis -2"
  refused(match, other, x, packed, ROWS_TIMES_WEIGHTS)
  along_n = quantize(w, formats.MXFP4, axis=1)
  refused("MXFP4 along axis -1; recipe 'mxfp4' needs", dot, x, along_n, ROWS_TIMES_WEIGHTS)
  transposed = (((1,), (1,)), ((), ()))
  refused("contracts rhs .* along another axis than -2", dot, x[:, :128], packed, transposed)
  kernels = dot_general(recipes.MXFP4, implementation="mosaic")
  refused('implementation="mosaic"', kernels, x, packed, ROWS_TIMES_WEIGHTS)

  experts, weights = jnp.zeros((24, 1), int), jnp.ones((24, 1))
  w13, w2 = normal(2, 1, 256, 256), normal(3, 1, 128, 256)
  half = (x, pack_weights(w13, recipes.MXFP4), w2, experts, weights, recipes.MXFP4)
  refused("one of w13 and w2 is packed", moe_ffn, *half)
  wrong = [pack_weights(w, recipes.MXFP4) for w in (w13, w2)]
  refused("w13 is packed in MXFP4", moe_ffn, x, *wrong, experts, weights, recipes.FP8)


def test_packed_experts_over_several_devices_are_refused():
  args = jnp.zeros((4, 1), int), jnp.ones((4, 1)), recipes.MXFP4
  w13, w2 = (pack_weights(normal(i, 2, 32, n), recipes.MXFP4) for i, n in ((0, 64), (1, 32)))
  how = {name: (None, None) for name in ("keys", "taps", "states")}
  mesh = jax.make_mesh((2,), ("expert",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"packed .* over the 2 devices"):
    moe_ffn_over_mesh(normal(2, 4, 32), w13, w2, *args, **how)
