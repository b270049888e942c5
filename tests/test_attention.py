"""Attention whose products only cast: against float64, against the products of recipes, and what
it keeps for the backward pass."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import recipes
from fp4jax.models import Numerics, Policy, attention
from fp4jax.models.attention import attend, fused_implementation

BF16, FP32 = Numerics(Policy()), Numerics(Policy(scores=recipes.FP32))
RESULTS = ("out", "dq", "dk", "dv")
ON_A_GPU = [  # of which float32 sees that no product is rounded to TF32
  pytest.param(dtype, 64, marks=pytest.mark.gpu, id=f"{dtype}-gpu")
  for dtype in ("float32", "bfloat16")
]


def operands(dtype, heads, groups, t=40, d=16):
  """q, k, v and the gradient of the result."""
  shapes = ((2, t, heads, groups, d), (2, t, heads, d), (2, t, heads, d), (2, t, heads, groups, d))
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes, strict=True)]


def reference(q, k, v, g):
  """The result and the gradients of q, k and v in float64, and a bound of the error of each value.

  A score is a sum of d products in float32, each step off by 2^-24 of the sum of their magnitudes;
  exp makes that a relative error of p, twice with the sum of p, and the sums over d and t add
  theirs. In bfloat16 p, dp, ds and the results are rounded by 2^-9 of themselves: at most 4 times
  on the way to any of them. Each error passes on as the magnitudes of what it is multiplied by.
  """
  rounding = 4 * 2.0**-9 if q.dtype == jnp.bfloat16 else 0
  (_, t, _, _, d), scale = q.shape, q.shape[-1] ** -0.5
  q, k, v, g = (np.float64(x) for x in (q, k, v, g))
  aq, ak, av, ag = map(np.abs, (q, k, v, g))
  scores = np.einsum("bqhgd,bkhd->bhgqk", q, k) * scale
  largest = np.einsum("bqhgd,bkhd->bhgqk", aq, ak).max() * scale
  scores[..., ~np.tri(t, dtype=bool)] = -np.inf
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = np.einsum("bqhgd,bkhd->bhgqk", g, v)
  of_dp = np.einsum("bqhgd,bkhd->bhgqk", ag, av)
  ds = scale * p * (dp - np.sum(p * dp, -1, keepdims=True))
  of_ds = 2 * scale * p * (of_dp + np.sum(p * of_dp, -1, keepdims=True))
  e = 2.0**-24 * (2 * (d + 2) * largest + 2 * (t + d) + 16) + rounding
  to_q, to_k = "bhgqk,bkhd->bqhgd", "bhgqk,bqhgd->bkhd"
  products = ((to_q, p, v), (to_q, ds, k), (to_k, ds, q), (to_k, p, g))
  magnitudes = ((to_q, p, av), (to_q, of_ds, ak), (to_k, of_ds, aq), (to_k, p, ag))
  return [np.einsum(*x) for x in products], [e * np.einsum(*x) for x in magnitudes]


@jax.jit
def attended(q, k, v, g, numerics):
  out, pull = jax.vjp(lambda *x: attend(*x, numerics), q, k, v)
  return out, *pull(g)


@pytest.mark.parametrize(("heads", "groups"), [(3, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize(("dtype", "d"), [("float32", 16), ("bfloat16", 16), *ON_A_GPU])
def test_result_and_gradients_are_those_of_the_formulas(dtype, d, heads, groups):
  args = operands(dtype, heads, groups, d=d)
  numerics = FP32 if dtype == "float32" else BF16
  found = attended(*args, numerics)
  for name, own, exact, bound in zip(RESULTS, found, *reference(*args), strict=True):
    assert own.dtype == jnp.dtype(dtype)
    assert (np.abs(np.float64(own) - exact) <= bound).all(), name
    assert bound.max() < (0.6 if dtype == "bfloat16" else 1e-2) * np.abs(exact).max(), name


@pytest.mark.parametrize("numerics", [BF16, FP32], ids=["bf16", "fp32"])
def test_it_is_the_attention_of_recipes_that_only_cast(numerics):
  """Both lie within the bounds of float64."""
  dtype = "float32" if numerics is FP32 else "bfloat16"
  q, k, v, g = operands(dtype, 2, 3)
  out, pull = jax.vjp(lambda *x: attention._attend_as_recipes_say(*x, numerics), q, k, v)
  found = attended(q, k, v, g, numerics)
  _, bounds = reference(q, k, v, g)
  for name, own, other, bound in zip(RESULTS, found, (out, *pull(g)), bounds, strict=True):
    assert (np.abs(np.float64(own) - np.float64(other)) <= 2 * bound).all(), name


def test_only_recipes_that_cast_to_the_dtype_at_hand_are_fused(monkeypatch):
  calls = []
  monkeypatch.setattr(attention, "_fused", lambda q, k, v, _: calls.append(q.dtype.name) or q)
  for scores in (recipes.BF16, recipes.FP32, recipes.MXFP4):
    for dtype in ("float32", "bfloat16"):
      attend(*operands(dtype, 1, 2)[:3], Numerics(Policy(scores=scores)))
  assert calls == ["bfloat16", "float32"]


@pytest.mark.parametrize("scores", ["bf16", "mxfp4"])
def test_nothing_of_t_times_t_is_kept(scores):
  """Twice the tokens, twice the bytes."""
  numerics = Numerics(Policy(scores=recipes.by_name(scores)))

  def kept(t):
    args = operands("bfloat16", 2, 3, t=t)[:3]
    leaves = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend, *x, numerics)[1], *args))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

  assert 0 < kept(512) == 2 * kept(256)


@pytest.mark.parametrize(
  ("platform", "dtype", "head_dim", "tokens", "expected"),
  [
    ("gpu", jnp.bfloat16, 128, 38, "cudnn"),
    ("gpu", jnp.bfloat16, 8, 38, "cudnn"),
    ("gpu", jnp.bfloat16, 128, 37, "xla"),
    ("gpu", jnp.bfloat16, 12, 38, "xla"),
    ("gpu", jnp.bfloat16, 136, 38, "xla"),
    ("gpu", jnp.float32, 128, 38, "xla"),
    ("cpu", jnp.bfloat16, 128, 38, "xla"),
  ],
)
def test_cudnn_serves_bf16_on_a_gpu(monkeypatch, platform, dtype, head_dim, tokens, expected):
  device = types.SimpleNamespace(platform=platform)
  monkeypatch.setattr(attention, "default_device", lambda: device)
  assert fused_implementation(jnp.dtype(dtype), head_dim, tokens) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [37, 38])
def test_a_gradient_through_any_number_of_tokens(tokens):
  q, k, v, g = operands("bfloat16", 2, 3, t=tokens, d=64)
  for gradient in attended(q, k, v, g, BF16):
    assert jnp.isfinite(gradient).all()


@pytest.mark.gpu
def test_cudnn_is_what_runs_on_a_gpu():
  q, k, v, g = operands("bfloat16", 2, 3, d=64)
  compiled = attended.lower(q, k, v, g, BF16).compile().as_text()
  assert '"__cudnn$fmhaSoftmax"' in compiled and '"__cudnn$fmhaSoftmaxBackward"' in compiled
