"""No module of the model sees the future: a change of the last token changes no output before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stateful import Clipped, with_state

from fp4jax import Hadamard, formats, recipes
from fp4jax.models import LanguageModel, ModelConfig, MoE, Numerics, Policy
from fp4jax.models.attention import Attention, attend
from fp4jax.models.moe import FeedForward
from fp4jax.models.scores import check_causal, recipe_of_av, recipe_of_qk
from fp4jax.recipe import Residual

CONFIG = ModelConfig(
  num_layers=1,
  d_model=32,
  num_heads=2,
  num_kv_heads=1,
  head_dim=16,
  num_experts=3,
  top_k=2,
  d_ff=32,
  d_ff_shared=32,
)
TOKENS = 40  # more than a block of 32, fewer than two
HADAMARD = recipes.MXFP4.replace(
  {"name": "hadamard", "fprop.lhs.transform": Hadamard(), "fprop.rhs.transform": Hadamard()}
)
# The two that are left out differ from BF16 and FP8 in their values alone, not in their blocks.
RECIPES = [r for r in recipes.RECIPES.values() if r not in (recipes.FP32, recipes.FP8_POW2)]
by_recipe = pytest.mark.parametrize("recipe", [*RECIPES, HADAMARD], ids=lambda r: r.name)


def policy_of(recipe):
  return Policy(*[recipe] * 5)


def numerics_of(recipe):
  return Numerics(policy_of(recipe), jax.random.key(5))


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def assert_no_leak(f, x, changed):
  """f of x and of x with another last token: every token before comes out bit for bit the same."""
  before, after = (np.asarray(f(v), np.float32) for v in (x, changed))
  np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
  assert np.isfinite(before).all() and (before[:, -1] != after[:, -1]).any()


@pytest.mark.slow
@by_recipe
def test_scores_of_one_large_value_to_come(recipe):
  """v = 1 and v[31] = 100: in a block of 32 tokens every 1 became 0. k likewise, in its tiles."""
  q, k = normal(0, 1, 32, 1, 2, 32), normal(1, 1, 32, 1, 32)
  numerics = numerics_of(recipe)
  ones = jnp.ones_like(k)
  assert_no_leak(lambda v: attend(q, k, v, numerics), ones, ones.at[:, 31].set(100))
  out = attend(q, k, ones.at[:, 31].set(100), numerics)
  np.testing.assert_allclose(np.float32(out[:, :31]), 1, rtol=2.0**-7)  # sums of bf16 probabilities
  assert_no_leak(lambda k: attend(q, k, normal(2, *k.shape), numerics), k, k.at[:, 31].set(1e4))
  queries = q.at[:, 31].set(1e4)
  assert_no_leak(lambda q: attend(q, k, normal(2, *k.shape), numerics), q, queries)


MODULES = {
  "attention": lambda: Attention(32, 2, 1, 16, 100.0, 1.0, nnx.Rngs(0)),
  "dense": lambda: FeedForward(32, 32, 1.0, nnx.Rngs(0)),
  "experts": lambda: MoE(32, 32, 3, 2, 32, 1.0, nnx.Rngs(0)),
}


@pytest.mark.slow
@by_recipe
@pytest.mark.parametrize("module", MODULES)
def test_no_module_leaks(module, recipe):
  """Among them experts, whose rows lie in other places when the last token goes elsewhere."""
  module, numerics = MODULES[module](), numerics_of(recipe)

  @jax.jit
  def f(x):
    out = module(x, numerics)
    return out[0] if isinstance(out, tuple) else out

  x = normal(3, 2, TOKENS, 32)
  for value in (-x[:, -1], 1e4 * x[:, -1]):
    assert_no_leak(f, x, x.at[:, -1].set(value))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipes.MXFP4, recipes.HOPPER_FP4], ids=lambda r: r.name)
def test_no_language_model_leaks(recipe):
  model = LanguageModel(CONFIG, 50, nnx.Rngs(0))
  graph, params = nnx.split(model)

  @jax.jit
  def f(tokens):
    return nnx.merge(graph, params)(tokens, policy_of(recipe), key=jax.random.key(5))[0]

  tokens = jax.random.randint(jax.random.key(1), (2, TOKENS), 0, 50)
  assert_no_leak(f, tokens, tokens.at[:, -1].add(1))


def test_k_is_read_and_kept_as_the_activation_is():
  recipe = recipe_of_qk(recipes.HOPPER_FP4)
  assert recipe.name == "hopper_fp4[q k^T]"
  kept = recipes.HOPPER_FP4.fprop.lhs
  assert recipe.fprop.lhs == recipe.fprop.rhs == recipe.dgrad.rhs == kept
  assert recipe.residual == Residual(lhs=formats.MXFP4, rhs=formats.MXFP4)
  assert recipe.wgrad == recipes.HOPPER_FP4.wgrad
  assert recipe.dgrad.lhs == recipes.HOPPER_FP4.dgrad.lhs

  forward_of_x = recipes.HOPPER_FP4.replace({"fprop.lhs.source": "original"})
  recipe = recipe_of_qk(forward_of_x)
  assert recipe.fprop.rhs.source == "original" and recipe.dgrad.rhs.source == "residual"
  # dgrad's own pair of transforms still cancels.
  assert recipe_of_qk(HADAMARD).fprop.rhs.transform == Hadamard()
  assert recipe_of_qk(HADAMARD).dgrad.rhs.transform is None


def test_a_quantizer_that_rounds_by_an_operand_reads_k_too():
  recipe = recipe_of_qk(with_state(recipes.HOPPER_FP4, Clipped, "fprop.lhs"))
  assert recipe.fprop.rhs == recipe.dgrad.rhs == Clipped(recipes.HOPPER_FP4.fprop.lhs)
  changes = {"fprop.lhs.source": "original"}
  recipe = recipe_of_qk(with_state(recipes.HOPPER_FP4.replace(changes), Clipped, "fprop.lhs"))
  assert recipe.dgrad.rhs == Clipped(recipes.HOPPER_FP4.wgrad.lhs)


def test_a_recipe_that_stays_as_it_is_keeps_its_name():
  for recipe in (recipes.BF16, recipes.FP32, recipes.MXFP4):
    assert recipe_of_qk(recipe) == recipe and recipe_of_qk(recipe).name == recipe.name
  assert recipe_of_qk(recipes.FP8).name == "fp8[q k^T]"


def test_av_never_quantizes():
  assert recipe_of_av(recipes.FP32) is recipes.FP32
  backward_only = recipes.BF16.replace({"name": "b", "wgrad.rhs": recipes.MXFP4.wgrad.rhs})
  for recipe in (*RECIPES, backward_only):
    assert recipe_of_av(recipe) is recipes.BF16


@pytest.mark.parametrize(
  ("changes", "shared"),
  [
    ({"fprop.lhs.format": formats.FP8_BLOCK_2D}, "blocks of more than one token"),
    ({"fprop.lhs.format": formats.FP8_TENSOR}, "one scale for the whole array"),
    ({"fprop.lhs.format": formats.NVFP4}, "one scale for the whole array"),
    (
      {
        "residual.lhs": formats.NVFP4,
        "fprop.lhs.source": "residual",
        "wgrad.lhs.source": "residual",
      },
      "one scale for the whole array",
    ),
  ],
)
def test_scales_that_tokens_share_are_refused(changes, shared):
  recipe = recipes.MXFP4.replace({"name": "mine"} | changes)
  fmt = changes.get("residual.lhs") or changes["fprop.lhs.format"]
  message = (
    rf"^scores\.qk: recipe 'mine\[q k\^T\]' reads fprop\.lhs in {fmt.name}, which has {shared}"
  )
  q, k = normal(0, 1, 32, 1, 2, 32), normal(1, 1, 32, 1, 32)
  with pytest.raises(ValueError, match=message):
    attend(q, k, k, numerics_of(recipe))


def test_what_backward_operands_share_only_gradients_feel():
  changes = {"wgrad.lhs.format": formats.FP8_TENSOR, "dgrad.lhs.format": formats.NVFP4}
  check_causal("scores.qk", recipes.MXFP4.replace({"name": "mine"} | changes))


def test_quantized_av_is_refused_by_name():
  with pytest.raises(
    ValueError, match=r"^scores\.av sums over tokens, .* 'mxfp4' has blocks of MXFP4:"
  ):
    check_causal("scores.av", recipes.MXFP4)
  check_causal("scores.av", recipes.FP32)
