"""The kernels serve operand by operand: a recipe whose operands read as FP8 or bf16 has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp4jax
from fp4jax import moe_ffn, recipes

BF16 = jnp.bfloat16
MATMUL = (((1,), (0,)), ((), ()))
RCEIL = dataclasses.replace(fp4jax.MXFP4, scale_rule="rceil")
MIXED = [
  # Weights rounded to MXFP4 first, FP8 of them in fprop and dgrad.
  recipes.FP8_POW2.replace(
    {"fprop.rhs.source": "residual", "dgrad.rhs.source": "residual", "residual.rhs": RCEIL}
    | {"name": "mxfp4_weights"}
  ),
  # FP8 forward, bf16 backward; and the other way round.
  recipes.FP8.replace(
    {"dgrad": recipes.BF16.dgrad, "wgrad": recipes.BF16.wgrad, "name": "fp8_forward"}
  ),
  recipes.BF16.replace(
    {"dgrad": recipes.FP8.dgrad, "wgrad": recipes.FP8.wgrad, "name": "fp8_backward"}
  ),
  recipes.FP8.replace({"wgrad": recipes.BF16.wgrad, "name": "bf16_wgrad"}),
  # Two kinds of scales in one recipe.
  recipes.FP8.replace({"wgrad": recipes.FP8_POW2.wgrad, "name": "two_scales"}),
  recipes.HOPPER_FP4.replace(
    {"residual.lhs": RCEIL, "residual.hidden": RCEIL, "name": "kept_rceil"}
  ),
]


def random(*shape, seed=0, size=1.0):
  rng = np.random.default_rng(seed)
  sizes = 2.0 ** rng.integers(-3, 4, shape[-1])
  return jnp.asarray(size * rng.standard_normal(shape) * sizes, BF16)


def assert_near(actual, expected, limit):
  for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
    assert a.dtype == e.dtype and a.shape == e.shape
    a, e = (np.asarray(v, np.float64) for v in (a, e))
    assert np.linalg.norm(a - e) <= limit * np.linalg.norm(e), i


@pytest.mark.parametrize("recipe", MIXED, ids=lambda r: r.name)
def test_dot_general(recipe, hopper):
  x, w, dy = random(40, 256), random(256, 128, seed=1), random(40, 128, seed=2)

  def run(implementation):
    dot = fp4jax.dot_general(recipe, implementation=implementation)

    @jax.jit
    def gradients(x, w, dy):
      y, pull = jax.vjp(lambda x, w: dot(x, w, MATMUL), x, w)
      return y, *pull(dy)

    return gradients(x, w, dy)

  expected = run("xla")
  assert not hopper
  assert_near(run("mosaic"), expected, 0.002)
  # Each GEMM has the kernel of its operands.
  fp8 = [fp4jax.formats.is_format(getattr(recipe, g).lhs.format) for g in ("fprop", "dgrad")]
  assert hopper.count("grouped_matmul") == 2 and sum(fp8) >= 1
  assert hopper.count("grouped_wgrad") == 1
  assert run(None)[0].dtype == BF16


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MIXED, ids=lambda r: r.name)
def test_moe_ffn(recipe, hopper):
  x, w13, w2 = random(48, 128), random(3, 128, 256, seed=1), random(3, 128, 128, seed=2)
  w13, w2 = w13 / 16, (w2 / 16).astype(jnp.float32)
  weights, experts = jax.lax.top_k(jax.nn.softmax(random(48, 3, seed=3).astype(jnp.float32)), 2)
  dout = random(48, 128, seed=4)

  def run(implementation):
    f = lambda *a: moe_ffn(*a[:3], experts, a[3], recipe, implementation=implementation)  # noqa: E731

    @jax.jit
    def gradients(x, w13, w2, weights, dout):
      y, pull = jax.vjp(f, x, w13, w2, weights)
      return y, *pull(dout)

    return gradients(x, w13, w2, weights, dout)

  expected = run("xla")
  assert not hopper
  # h is rounded to bf16 after sums in two orders: few of its values then fall on another element.
  assert_near(run("mosaic"), expected, 0.02)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"fprop.lhs.format": fp4jax.MXFP4}, r"the kernels read fprop.lhs in \['FP8_BLOCK', "),
    ({"fprop.lhs.format": BF16}, "multiply FP8 with FP8 and bf16 with bf16, .* in fprop"),
    ({"dgrad.rhs.format": fp4jax.FP8_BLOCK}, r"the kernels read dgrad.rhs in \['FP8_BLOCK_2D'"),
    (
      {"dgrad.lhs.transform": fp4jax.Hadamard(), "dgrad.rhs.transform": fp4jax.Hadamard()},
      "plain operands rounded to nearest, .*: dgrad.lhs is",
    ),
    ({"wgrad.rhs.rounding": "stochastic"}, "plain operands rounded to nearest, .*: wgrad.rhs is"),
    (
      {"residual.lhs": fp4jax.MXFP4, "wgrad.lhs.source": "residual"},
      "make FP8_BLOCK_POW2 of what is kept in MXFP4",
    ),
  ],
)
def test_what_no_kernel_reads_is_named(changes, message, hopper):
  recipe = recipes.FP8.replace(changes)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=f'implementation="mosaic": .*{message}'):
    dot = fp4jax.dot_general(recipe, key=key, implementation="mosaic")
    dot(random(64, 128), random(128, 128), MATMUL)


def test_bf16_gradients_of_float32_weights_are_not_rounded_to_bf16(hopper):
  x, w13, w2 = random(48, 128), random(3, 128, 256, seed=1) / 16, random(3, 128, 128, seed=2) / 16
  weights, experts = jax.lax.top_k(jax.nn.softmax(random(48, 3, seed=3).astype(jnp.float32)), 2)

  def gradients(dtype):
    f = lambda a, b: moe_ffn(  # noqa: E731
      x, a, b, experts, weights, recipes.BF16, implementation="mosaic"
    ).astype(jnp.float32)
    return jax.grad(lambda a, b: jnp.sum(f(a, b) ** 2), (0, 1))(w13.astype(dtype), w2.astype(dtype))

  for g in gradients(jnp.float32):
    assert g.dtype == jnp.float32 and (g != g.astype(BF16).astype(jnp.float32)).mean() > 0.9
  for g in gradients(BF16):
    assert g.dtype == BF16
