"""Which recipe each GEMM of each layer runs, and what a model makes of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.config import Experiment, Quantize
from experiments.probes import probe_rows
from experiments.train import policy_of
from fp4jax import formats, operands, recipes
from fp4jax.decomposition import SUMMARY_FIELDS
from fp4jax.models import LanguageModel, LayerRule, ModelConfig, Numerics, Policy
from fp4jax.quantizers import Composed, Operand

CONFIG = ModelConfig(
  num_layers=3,
  d_model=32,
  num_heads=2,
  num_kv_heads=1,
  head_dim=16,
  num_experts=2,
  top_k=1,
  d_ff=32,
  dtype="float32",
)
STOCHASTIC = recipes.MXFP4.replace({"wgrad.rhs.rounding": "stochastic", "name": "sr"})
FP32 = Policy(*[recipes.FP32] * 5)
GEMMS = ("attention.qkv", "experts.w13", "experts.w2", "scores.qk", "router.logits")


def names(policy, gemm, num_layers=4):
  return [policy.recipe(gemm, layer, num_layers).name for layer in range(num_layers + 1)]


def test_the_first_rule_that_matches_wins():
  rules = (
    LayerRule(layers=(0, -1), modules="experts.*", recipe=recipes.BF16),
    LayerRule(layers=(-1, 1), recipe=recipes.FP8),
    LayerRule(modules="*.qkv", recipe=recipes.FP32),
  )
  policy = Policy(recipes.MXFP4, attention=recipes.MXFP4, head=recipes.MXFP4, layers=rules)
  assert names(policy, "experts.w2") == ["bf16", "fp8", "mxfp4", "bf16", "mxfp4"]
  assert names(policy, "attention.out") == ["mxfp4", "fp8", "mxfp4", "fp8", "mxfp4"]
  assert names(policy, "attention.qkv") == ["fp32", "fp8", "fp32", "fp8", "fp32"]
  assert names(policy, "head.logits")[-1] == "mxfp4"  # behind every layer that has a number
  assert names(Policy(layers=(LayerRule(recipe=recipes.FP8),)), "head.logits")[-1] == "fp8"


def test_a_rule_for_scores_reads_them_causally():
  policy = Policy(layers=(LayerRule(layers=(1,), recipe=recipes.FP8),))
  assert names(policy, "scores.qk")[:-1] == ["bf16", "fp8[q k^T]", "bf16", "bf16"]
  assert names(policy, "scores.av")[:-1] == ["bf16"] * 4
  with pytest.raises(ValueError, match=r"scores\.qk: recipe .* has one scale for the whole array"):
    tensor = recipes.FP8.replace({"fprop.lhs.format": formats.FP8_TENSOR})
    Policy(layers=(LayerRule(layers=(1,), recipe=tensor),)).segments(GEMMS, 2)


def test_what_no_model_has_is_refused():
  with pytest.raises(ValueError, match=r"layers=\(0, 4\); num_layers=4 has no layer 4"):
    Policy(layers=(LayerRule(layers=(0, 4), recipe=recipes.FP8),)).recipe("experts.w2", 1, 4)
  with pytest.raises(ValueError, match="no layer -5"):
    Policy(layers=(LayerRule(layers=(-5,), recipe=recipes.FP8),)).recipe("experts.w2", 1, 4)
  with pytest.raises(ValueError, match=r"'expert\.w2' is of none of the kinds experts, attention,"):
    Policy().recipe("expert.w2", 0, 1)
  with pytest.raises(TypeError, match="recipe"):
    LayerRule(recipe="bf16")
  x, w, ids = jnp.ones((4, 32)), jnp.ones((2, 32, 32)), jnp.zeros((4, 1), jnp.int32)
  policy = Policy(layers=(LayerRule(modules="experts.w2", recipe=recipes.FP8),))
  numerics = Numerics(policy, layer=1, num_layers=2)
  with pytest.raises(
    ValueError, match=r"w13 runs recipe 'bf16' and experts[.]w2 'fp8' in layer 1;"
  ):
    numerics.moe_ffn(("experts.w13", "experts.w2"), x, w, w[:, :16], ids, jnp.ones((4, 1)))


@pytest.mark.parametrize("first, last", [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_first_and_last_blocks_in_bf16(first, last):
  quantize = Quantize(router=True, head=True, first_bf16=first, last_bf16=last)
  policy = policy_of(recipes.MXFP4, Experiment(quantize=quantize))
  middle = 4 - first - last
  expected = ["bf16"] * first + ["mxfp4"] * middle + ["bf16"] * last
  assert names(policy, "experts.w13")[:-1] == names(policy, "attention.out")[:-1] == expected
  assert names(policy, "head.logits")[-1] == "mxfp4"
  expected = ["fp32"] * first + ["mxfp4"] * middle + ["fp32"] * last
  assert names(policy, "router.logits")[:-1] == expected
  assert names(policy, "scores.qk")[:-1] == ["bf16"] * 4
  parts = [(0, first), (first, 4 - last), (4 - last, 4)]
  assert policy.segments(GEMMS, 4) == [(a, b) for a, b in parts if a < b]


def test_a_rule_that_changes_nothing_leaves_one_segment():
  same = LayerRule(layers=(0,), modules="experts.*", recipe=recipes.FP8)
  assert Policy(recipes.FP8, layers=(same,)).segments(GEMMS, 4) == [(0, 4)]
  assert Policy(layers=(same,)).segments(("attention.qkv",), 4) == [(0, 4)]


def test_the_scan_runs_each_layer_under_its_own_recipes():
  """Blocks in a row, each under a policy of its own without rules, are the oracle."""
  rules = (
    LayerRule(layers=(1,), modules="attention.*", recipe=recipes.MXFP4),
    LayerRule(layers=(-1,), modules="experts.*", recipe=recipes.FP8),
  )
  own = [FP32, dataclasses.replace(FP32, attention=recipes.MXFP4)]
  own += [dataclasses.replace(FP32, experts=recipes.FP8)]
  model = LanguageModel(CONFIG, 50, nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 50)
  graph, params = nnx.split(model.blocks)

  @jax.jit
  def in_a_row():
    x, z_losses = model.embedding(tokens), []
    for layer, policy in enumerate(own):
      block = nnx.merge(graph, jax.tree.map(lambda p: p[layer], params))  # noqa: B023
      x, losses = block(x, Numerics(policy))
      z_losses.append(losses["router_z_loss"])
    return model.norm(x) @ model.w_head[...], z_losses

  expected, z_losses = in_a_row()
  logits, losses = jax.jit(lambda: model(tokens, dataclasses.replace(FP32, layers=rules)))()
  # A float32 sum in another order moves few values across a rounding: 1e-3 of the largest logit.
  # A recipe in the wrong layer moves all of them, by several percent.
  np.testing.assert_allclose(logits, expected, atol=1e-3 * np.abs(expected).max())
  np.testing.assert_allclose(losses["router_z_loss"], np.mean(z_losses), rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Twin(Composed):
  """Not equal to its operand, and reads alike."""

  operand: Operand

  def read(self, x, axis, ctx):
    return self.operand.read(x, axis, ctx)


@pytest.mark.slow
def test_segments_keep_the_keys_and_the_taps_of_their_layers():
  """Another recipe of the same numbers cuts the scan, and changes nothing."""
  graph, params = nnx.split(
    LanguageModel(dataclasses.replace(CONFIG, num_experts=0), 50, nnx.Rngs(0))
  )
  tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 50)
  taps = nnx.merge(graph, params).new_taps()

  def gradients(policy):
    def loss(params, taps):
      logits, _ = nnx.merge(graph, params)(tokens, policy, key=jax.random.key(2), taps=taps)
      return jnp.sum(logits**2)

    return jax.jit(jax.grad(loss, (0, 1)))(params, taps)

  policy = dataclasses.replace(FP32, experts=STOCHASTIC)
  twin = policy.experts.replace({"fprop.lhs": Twin(policy.experts.fprop.lhs)})
  rules = (LayerRule(layers=(1,), modules="experts.*", recipe=twin),)
  cut = dataclasses.replace(policy, layers=rules)
  assert len(cut.segments(GEMMS, 3)) == 3
  expected, found = gradients(policy), gradients(cut)
  jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_probes_have_rows_where_the_layer_quantizes():
  tap = np.zeros((3, len(operands.ROLES), len(SUMMARY_FIELDS)), np.float32)
  rules = (LayerRule(layers=(1,), recipe=recipes.FP32), LayerRule(layers=(2,), recipe=recipes.FP8))
  policy = Policy(experts=recipes.MXFP4, layers=rules)
  rows = probe_rows({"experts.w2": tap, "head.logits": tap[0]}, policy, 3)
  formats = {(r["layer"], r["format"]) for r in rows if r["operand"] == "lhs"}
  assert formats == {(0, "MXFP4"), (2, "FP8_BLOCK")}


def test_rows_of_every_format_are_written_as_json():
  """A scale rule may be a value rather than a name."""
  tap = np.zeros((len(operands.ROLES), len(SUMMARY_FIELDS)), np.float32)
  for fmt in formats.FORMATS.values():
    policy = Policy(head=recipes.MXFP4.replace({"fprop.lhs.format": fmt}))
    rows = json.loads(json.dumps(probe_rows({"head.logits": tap}, policy, 3)))
    assert rows[0]["format"] == fmt.name and isinstance(rows[0]["scale_rule"], str)
