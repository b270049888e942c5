"""Linear layers over a mesh: each device multiplies its tokens by a kernel, or XLA divides them."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp4jax import dot_general, formats, new_tap, recipes
from fp4jax.models.over_mesh import AXES, matmul_over_mesh, moe_ffn_over_mesh
from fp4jax.recipe import Residual


def linear_layer(mesh, implementation="mosaic", recipe=recipes.FP8, batch=4):
  """y, gradients and what is kept of them, for x of 4 sequences, w in float32 and dy."""
  rng = np.random.default_rng(0)
  shapes = (batch, 128, 256), (256, 512), (batch, 128, 512)
  x, w, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
  dot = dot_general(recipe, implementation=implementation)
  with jax.set_mesh(jax.make_mesh(mesh, AXES, axis_types=(AxisType.Auto,) * 3)):
    product = functools.partial(matmul_over_mesh, dot)
    kept = jax.eval_shape(lambda x, w: jax.vjp(product, x, w)[1], x, w)

    @jax.jit
    def run(x, w, dy):
      y, pull = jax.vjp(product, x, w)
      return y, *pull(dy)

    return *(np.asarray(v, np.float32) for v in run(x, w, dy)), jax.tree.leaves(kept)


def check_linear_layer(mesh, recipe):
  """To the bits of one device; dw up to the order in which float32 parts are added, one for each
  128 tokens. A sum of four has three roundings of at most 2^-24 of what they have in magnitude, and
  parts that are independent have half of dw's norm each."""
  y, dx, dw, _ = linear_layer((1, 1, 1), recipe=recipe)
  *many, kept = linear_layer(mesh, recipe=recipe)
  for one, found in zip((y, dx), many, strict=False):
    np.testing.assert_array_equal(found, one)
  assert np.linalg.norm(many[2] - dw) < 2 * 3 * 2.0**-24 * (4 / 2) * np.linalg.norm(dw)
  for found in (dw, many[2]):
    assert (found != jnp.asarray(found, jnp.bfloat16)).mean() > 0.9
  # Nobody keeps copies of w that devices cast or gather: x or its codes, w, a number of rows.
  assert sum(v.size * v.dtype.itemsize for v in kept) <= 2 * 4 * 128 * 256 + 4 * 256 * 512 + 4


LINEAR = pytest.mark.parametrize("recipe", [recipes.FP8, recipes.HOPPER_FP4], ids=lambda r: r.name)


@LINEAR
def test_kernels_read_float32_weights_as_those_in_bf16(recipe, hopper):
  rng = np.random.default_rng(1)
  x, w, dy = (jnp.asarray(rng.normal(size=s)) for s in ((256, 384), (384, 512), (256, 512)))
  x, w, dy = x.astype(jnp.bfloat16), w.astype(jnp.float32), dy.astype(jnp.bfloat16)
  dot = dot_general(recipe, implementation="mosaic")
  y, pull = jax.vjp(functools.partial(matmul_over_mesh, dot), x, w)
  of_cast = lambda x, w: dot(x, w, (((1,), (0,)), ((), ())))  # noqa: E731
  expected, pull_cast = jax.vjp(of_cast, x, w.astype(jnp.bfloat16))
  (dx, dw), (expected_dx, rounded_dw) = pull(dy), pull_cast(dy)
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(dx, expected_dx)
  np.testing.assert_array_equal(dw.astype(jnp.bfloat16), rounded_dw)


@LINEAR
@pytest.mark.parametrize("mesh", [(4, 1, 1), (1, 4, 1), (1, 2, 2)])
def test_each_device_multiplies_its_tokens_by_a_kernel(recipe, mesh, hopper):
  check_linear_layer(mesh, recipe)
  assert hopper.count("grouped_matmul") >= 4 and hopper.count("grouped_wgrad") >= 2


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs or more")
@LINEAR
@pytest.mark.parametrize("axis", AXES)
def test_each_gpu_multiplies_its_tokens_by_a_kernel(recipe, axis):
  devices = min(jax.device_count(), 4)
  check_linear_layer(tuple(devices if a == axis else 1 for a in AXES), recipe)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
  "message, shape, k_and_n, axes, kinds, how",
  [
    ("4 devices do not divide the 6 rows of x", (6, 128), (256, 256), {"data": 4}, AUTO, {}),
    ("64 tokens of a device, no multiple of the 128", (4, 64), (128, 128), {"data": 4}, AUTO, {}),
    ("3 devices of 'fsdp' do not divide the 256", (3, 128), (128, 256), {"fsdp": 3}, AUTO, {}),
    ("64 columns of w on a device are no multiple", (4, 128), (128, 256), {"fsdp": 4}, AUTO, {}),
    (r"axes \['model'\] divide what XLA", (4, 128), (256, 256), {"data": 2, "model": 2}, AUTO, {}),
    (r"axes \('data',\) are Explicit", (4, 128), (256, 256), {"data": 4}, EXPLICIT, {}),
    ("taps are read by", (4, 128), (256, 256), {"data": 4}, AUTO, {"tap": new_tap()}),
  ],
)
def test_what_the_kernels_can_not_multiply_over_a_mesh(
  message, shape, k_and_n, axes, kinds, how, hopper
):
  """It is left to XLA, which computes what it does on one device, or raises."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(*shape, k_and_n[0])), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=k_and_n), jnp.float32)
  product = lambda implementation: jax.jit(  # noqa: E731
    functools.partial(
      matmul_over_mesh, dot_general(recipes.FP8, implementation=implementation, **how)
    )
  )
  expected = product("xla")(x, w)
  devices = jax.devices()[: math.prod(axes.values())]
  types = (kinds,) * len(axes)
  with jax.set_mesh(jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)):
    np.testing.assert_array_equal(product(None)(x, w), expected)
    assert not hopper
    with pytest.raises(ValueError, match=message):
      product("mosaic")(x, w)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_operands_on_a_mesh_that_is_not_around_the_call_are_left_to_xla(kind, hopper):
  product = lambda implementation: functools.partial(  # noqa: E731
    matmul_over_mesh, dot_general(recipes.FP8, implementation=implementation)
  )
  x, w = jnp.ones((4, 128, 256), jnp.bfloat16), jnp.ones((256, 256))
  place = NamedSharding(jax.make_mesh((4,), ("data",), (kind,)), P("data"))
  x = jax.device_put(x, place)
  w = jax.device_put(w, NamedSharding(place.mesh, P()))
  np.testing.assert_array_equal(product(None)(x, w), jnp.full((4, 128, 256), 256, jnp.bfloat16))
  assert not hopper
  with pytest.raises(ValueError, match="a mesh divides the operands"):
    product("mosaic")(x, w)


@pytest.mark.parametrize("implementation", [None, "mosaic"])
def test_operands_that_do_not_fit(implementation, hopper):
  dot = dot_general(recipes.FP8, implementation=implementation)
  x, w = jnp.ones((4, 128, 384), jnp.bfloat16), jnp.ones((256, 256))
  with pytest.raises(TypeError, match=r"lhs \(4, 128, 384\), rhs \(256, 256\)"):
    matmul_over_mesh(dot, x, w)


def test_columns_that_share_one_scale_are_not_divided(hopper):
  kept = dataclasses.replace(recipes.FP8.fprop.rhs, source="residual")
  recipe = recipes.FP8.replace(
    {
      "name": "fp8_kept_in_nvfp4",
      "fprop": dataclasses.replace(recipes.FP8.fprop, rhs=kept),
      "dgrad": dataclasses.replace(recipes.FP8.dgrad, rhs=kept),
      "residual": Residual(rhs=formats.NVFP4),
    }
  )
  x, w = jnp.ones((4, 128, 256), jnp.bfloat16), jnp.ones((256, 512))
  product = functools.partial(matmul_over_mesh, dot_general(recipe, implementation="mosaic"))
  with jax.set_mesh(jax.make_mesh((4,), ("data",), (AUTO,))):
    jax.eval_shape(product, x, w)
  refused = pytest.raises(ValueError, match=r"NVFP4 in residual\.rhs has one scale for a weight")
  with refused, jax.set_mesh(jax.make_mesh((4,), ("fsdp",), (AUTO,))):
    jax.eval_shape(product, x, w)


def test_weights_in_bf16_have_gradients_in_bf16(hopper):
  """So that another use of them can be added."""
  x, w = jnp.ones((4, 128, 256), jnp.bfloat16), jnp.ones((256, 256), jnp.bfloat16)
  dot = dot_general(recipes.FP8, implementation="mosaic")

  def loss(w):
    y = matmul_over_mesh(dot, x, w).astype(jnp.float32)
    return jnp.sum(y) + 64 * jnp.sum(w.astype(jnp.float32))

  with jax.set_mesh(jax.make_mesh((2, 2, 1), AXES, axis_types=(AUTO,) * 3)):
    gradient = jax.jit(jax.grad(loss))(w)
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient, jnp.full(w.shape, 4 * 128 + 64, jnp.bfloat16))


def linear(x, weights):
  (w,) = weights
  return matmul_over_mesh(dot_general(recipes.FP8, implementation="mosaic"), x, w)


def experts(x, weights):
  chosen = jnp.zeros((512, 2), jnp.int32), jnp.ones((512, 2))
  how = dict.fromkeys(("keys", "taps", "states"), (None, None))
  x = x.reshape(512, -1)
  return moe_ffn_over_mesh(x, *weights, *chosen, recipes.BF16, token_parts=4, **how)


@pytest.mark.parametrize(
  "layer, shapes, travels, gathers",
  [
    (linear, [(512, 512)], {"1x512x512xf8E4M3FN", "1x4x4xf32"}, 2 * (2 * 4 - 2)),
    (
      experts,
      [(4, 512, 1024), (4, 512, 512)],
      {"4x512x1024xbf16", "4x512x512xbf16"},
      2 * (2 * 4 - 1),
    ),
  ],
)
def test_weights_are_gathered_as_they_are_read_and_again(layer, shapes, travels, gathers, hopper):
  """Also of unrolled layers, where XLA sees both. The first has no dx to compute, the last no y."""
  x, weights = jnp.ones((4, 128, 512), jnp.bfloat16), [jnp.ones(shape) for shape in shapes]

  def loss(layers):
    return jnp.sum(functools.reduce(layer, layers, x).astype(jnp.float32))

  with jax.set_mesh(jax.make_mesh((1, 4, 1), AXES, axis_types=(AUTO,) * 3)):
    places = [P(*(None,) * (w.ndim - 1), "fsdp") for w in weights]
    layers = [jax.device_put(weights, places) for _ in range(4)]
    lowered = jax.jit(jax.grad(loss)).lower(layers)
  assert set(re.findall("all_gather.*-> tensor<(.*)>$", lowered.as_text(), re.M)) == travels
  assert len(re.findall(r" all-gather(?:-start)?\(", lowered.compile().as_text())) == gathers
