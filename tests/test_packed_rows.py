"""Few rows times packed weights: what reaches the kernel, or a stand-in for it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp4jax
from fp4jax import dot_general, implementation, operands, pack_weights, recipes
from fp4jax.models import LanguageModel, ModelConfig, Policy, generate, pack_model
from fp4jax.quantizers import Operand, OutlierFallback

BF16 = jnp.bfloat16
RCEIL = dataclasses.replace(fp4jax.MXFP4, scale_rule="rceil")
W4A16 = recipes.BF16.replace({"fprop.rhs": Operand(RCEIL), "name": "w4a16"})
_OF_KEPT = Operand(BF16, source="residual")
KEPT = recipes.BF16.replace(
  {"fprop.rhs": _OF_KEPT, "dgrad.rhs": _OF_KEPT, "residual.rhs": RCEIL, "name": "kept"}
)
W8A16 = recipes.BF16.replace({"fprop.rhs": Operand(fp4jax.FP8_BLOCK_2D), "name": "w8a16"})
STOCHASTIC = recipes.MXFP4.replace({"dgrad.lhs.rounding": "stochastic", "name": "sr"})
MATMUL = (((1,), (0,)), ((), ()))


@pytest.fixture
def device(request):
  """The calls of the stand-ins; None with the kernels themselves."""
  return request.getfixturevalue("hopper") if request.param == "stand-ins" else None


either = pytest.mark.parametrize(
  "device", ["stand-ins", pytest.param("kernels", marks=pytest.mark.gpu)], indirect=True
)


def normal(seed, *shape, dtype=BF16):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def assert_near(actual, expected, x, w):
  """float32 sums in two orders, of which wgmma keeps 13 bits; then a step of bf16."""
  x, w, actual, expected = (np.abs(np.float32(a)) for a in (x, w, actual, expected))
  magnitude = (x @ w).reshape(expected.shape)
  bound = magnitude * (2 * len(w) * 2.0**-24 + 2.0**-12) + np.abs(expected) * 2.0**-7
  assert (np.abs(actual - expected) <= bound).all()


@either
@pytest.mark.parametrize(
  ("recipe", "shape"),
  [
    *itertools.product((W4A16, KEPT, recipes.MXFP4), ((1, 128), (128, 128), (3, 8, 192))),
    *itertools.product((W8A16, recipes.FP8_POW2), ((1, 128), (64, 128), (3, 8, 384))),
  ],
  ids=lambda value: getattr(value, "name", None),
)
def test_a_product_is_that_of_xla(recipe, shape, device):
  x, w = normal(0, *shape), normal(1, shape[-1], 256)
  packed, dims = pack_weights(w, recipe), (((len(shape) - 1,), (0,)), ((), ()))
  expected = dot_general(recipe, implementation="xla")(x, packed, dims)
  assert not device
  for wanted in (None, "mosaic"):
    dot = dot_general(recipe, implementation=wanted)
    for call in (dot, jax.jit(dot, static_argnums=2)):
      found = call(x, packed, dims)
      assert found.dtype == BF16 and found.shape == expected.shape
      assert_near(found, expected, x.reshape(-1, shape[-1]), w)
  if device is not None:
    assert set(device) == {"few_rows_matmul"}


@either
def test_an_axis_in_the_middle_is_contracted(device):
  x, w = normal(0, 2, 64, 5), normal(1, 64, 128)
  packed, dims = pack_weights(w, W4A16), (((1,), (0,)), ((), ()))
  found = dot_general(W4A16, implementation="mosaic")(x, packed, dims)
  expected = dot_general(W4A16, implementation="xla")(x, packed, dims)
  assert_near(found, expected, x.swapaxes(1, 2).reshape(-1, 64), w)


@either
@pytest.mark.parametrize("recipe", [W4A16, W8A16, recipes.MXFP4], ids=lambda r: r.name)
def test_a_gradient_is_that_of_xla(recipe, device):
  x, packed = normal(0, 8, 128), pack_weights(normal(1, 128, 256), recipe)

  def gradient(wanted):
    dot = dot_general(recipe, implementation=wanted)
    return jax.jit(jax.grad(lambda x: jnp.sum(dot(x, packed, MATMUL).astype(jnp.float32))))(x)

  np.testing.assert_array_equal(gradient("mosaic"), gradient("xla"))  # of a sum: ones times w


def test_what_the_kernel_can_not_do_raises_or_is_left_to_xla(hopper, monkeypatch):
  x, w = normal(0, 8, 128), normal(1, 128, 256)
  packed = pack_weights(w, W4A16)
  scaled = recipes.MXFP4.replace({"fprop.lhs.format": fp4jax.NVFP4, "name": "nvfp4"})
  stacked, batched = pack_weights(normal(1, 2, 128, 128), W4A16), (((2,), (1,)), ((0,), (0,)))
  nvfp4 = W4A16.replace({"fprop.rhs.format": fp4jax.NVFP4, "name": "weights"})
  w8, fp8 = pack_weights(w, W8A16), pack_weights(w, recipes.FP8)
  two = {"fprop.rhs": OutlierFallback(W4A16.fprop.rhs), "name": "of"}
  two = W4A16.replace(two | {"dgrad.rhs.source": "fprop"})
  of_quantize = fp4jax.quantize(w, RCEIL, axis=-2, implementation="xla")
  calls = {
    r"in MXFP4\[rceil\] multiplies 1 to 128 rows, not 129": (W4A16, normal(0, 129, 128), packed),
    "in FP8_BLOCK_2D multiplies 1 to 64 rows, not 65": (W8A16, normal(0, 65, 128), w8),
    "k=96 is not a multiple of 64": (W4A16, x[:, :96], pack_weights(w[:96], W4A16)),
    "n=192 is not a multiple of 128": (W4A16, x, pack_weights(w[:, :192], W4A16)),
    "the kernels take bfloat16; lhs is float32": (W4A16, x.astype(jnp.float32), packed),
    "take no batch axes": (W4A16, normal(0, 2, 8, 128), stacked, batched),
    "MXFP4 or FP8 of 128 x 128, not recipe 'weights'": (nvfp4, x, pack_weights(w, nvfp4)),
    "lhs in bf16, MXFP4 or FP8_BLOCK_POW2, not recipe 'fp8'": (recipes.FP8, x, fp8),
    "reads fprop.lhs in bf16 or MXFP4, not recipe 'nvfp4'": (scaled, x, pack_weights(w, scaled)),
    "reads them in one term, not recipe 'of'": (two, x, pack_weights(w, two)),
    "not of fp4jax.quantize": (W4A16, x, of_quantize),
  }
  for message, (recipe, *args) in calls.items():
    args = args if len(args) == 3 else [*args, MATMUL]
    with pytest.raises(ValueError, match=f'^implementation="mosaic": .*{message}'):
      dot_general(recipe, implementation="mosaic")(*args)
    found = dot_general(recipe)(*args)
    expected = dot_general(recipe, implementation="xla")(*args)
    np.testing.assert_array_equal(found, expected)
  args = x, packed, MATMUL
  with pytest.raises(ValueError, match="the kernels return bfloat16, not float32"):
    dot_general(W4A16, implementation="mosaic")(*args, preferred_element_type=jnp.float32)
  with pytest.raises(ValueError, match="taps are read by"):
    dot_general(W4A16, implementation="mosaic", tap=operands.new_tap())(*args)
  with pytest.raises(ValueError, match="draws nothing at random, not recipe 'sr'"):
    key, mxfp4 = jax.random.key(0), pack_weights(w, STOCHASTIC)
    dot_general(STOCHASTIC, implementation="mosaic", key=key)(x, mxfp4, MATMUL)
  monkeypatch.setattr(implementation, "compute_capability", lambda: "10.0")
  with pytest.raises(ValueError, match=r"this device has 10\.0"):
    dot_general(W4A16, implementation="mosaic")(*args)
  assert not hopper


@pytest.mark.slow
@either
@pytest.mark.parametrize("recipe", [W4A16, W8A16, recipes.FP8], ids=lambda r: r.name)
def test_a_rollout_takes_the_kernel_where_it_serves(recipe, device):
  sizes = dict(d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=128)
  config = ModelConfig(num_layers=1, num_experts=0, **sizes)
  policy = Policy(experts=recipe, attention=recipe)
  model = pack_model(LanguageModel(config, 50, nnx.Rngs(0)), policy)
  prompts = jax.random.randint(jax.random.key(1), (2, 70), 0, 50)  # 140 rows, then 2

  def rollout(wanted, new):
    how = dataclasses.replace(policy, implementation=wanted)
    key = jax.random.key(2)
    return generate(model, prompts, jnp.array([70, 40]), how, key=key, max_new_tokens=new)

  found, expected = rollout(None, 4), rollout("xla", 4)
  # Steps of bf16 in logits of a few units.
  np.testing.assert_allclose(found.logprobs[:, :2], expected.logprobs[:, :2], atol=0.1)
  if device is not None:  # each of four products of the step is traced, none of the prompts'
    assert device.count("few_rows_matmul") == (0 if recipe is recipes.FP8 else 4)
