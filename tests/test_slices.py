"""A scale of a whole tensor belongs to what one GEMM reads: an expert, a batch entry, a layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from fp4jax import dequantize, fake_quantize, grouped_dot, quantize, recipes

KEY = jax.random.key(3)
MATMUL = (((1,), (0,)), ((), ()))


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


@pytest.mark.slow
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
