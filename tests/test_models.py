import dataclasses
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax import dot_general, recipes
from fp4jax.models import LanguageModel, LayerRule, ModelConfig, MoE, Numerics, Policy, route
from fp4jax.models.attention import Attention, attend, rotate
from fp4jax.models.language_model import Block
from fp4jax.operands import new_tap

FP32 = Policy(*([recipes.FP32] * 5))
CONFIG = ModelConfig(
  num_layers=2,
  d_model=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  num_experts=4,
  top_k=2,
  d_ff=16,
  dtype="float32",
)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def silu(x):
  return x / (1 + np.exp(-x))


def test_route_weights_the_largest_probabilities():
  logits = normal(0, 50, 6) * 2
  routing = route(logits, 3)
  p = np.exp(np.float64(logits))
  p /= p.sum(1, keepdims=True)
  best = np.argsort(-p, axis=1)[:, :3]
  np.testing.assert_array_equal(routing.experts, best)
  chosen = np.take_along_axis(p, best, 1)
  # softmax in float32: a few ulp
  np.testing.assert_allclose(routing.weights, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)
  np.testing.assert_allclose(routing.load, np.bincount(best.ravel(), minlength=6) / 150, rtol=1e-6)
  np.testing.assert_allclose(routing.z_loss, np.mean(np.log(np.exp(logits).sum(1)) ** 2), rtol=1e-5)


def test_weights_are_the_probabilities_themselves_where_none_are_made_to_sum_to_1():
  logits = normal(0, 50, 6) * 2
  p = np.exp(np.float64(logits))
  p /= p.sum(1, keepdims=True)
  weights = route(logits, 3, norm_topk_prob=False).weights
  np.testing.assert_allclose(weights, -np.sort(-p, axis=1)[:, :3], rtol=1e-5)  # a few ulp


def test_load_balance_loss_is_one_when_balanced_and_experts_when_collapsed():
  balanced = 20.0 * jnp.eye(4)[jnp.arange(40) % 4]
  collapsed = 20.0 * jnp.eye(4)[jnp.zeros(40, int)]
  np.testing.assert_allclose(route(balanced, 1).load_balance_loss, 1, rtol=1e-5)
  np.testing.assert_allclose(route(collapsed, 1).load_balance_loss, 4, rtol=1e-5)


@pytest.mark.parametrize("d_ff_shared", [0, 24])
def test_moe_is_the_weighted_sum_of_each_tokens_experts(d_ff_shared):
  moe = MoE(32, 16, 4, 2, d_ff_shared, 1.0, nnx.Rngs(0))
  x = normal(1, 3, 7, 32)
  out, routing = moe(x, Numerics(FP32))

  def swiglu(tokens, w13, w2):
    gate, up = np.split(tokens @ np.float64(w13), 2, axis=-1)
    return (silu(gate) * up) @ np.float64(w2)

  tokens = np.float64(x).reshape(-1, 32)
  expected = np.zeros_like(tokens)
  for t, (experts, weights) in enumerate(zip(routing.experts, routing.weights, strict=True)):
    for e, weight in zip(experts, weights, strict=True):
      expected[t] += float(weight) * swiglu(tokens[t], moe.w13[e], moe.w2[e])
  if d_ff_shared:
    expected += swiglu(tokens, moe.shared.w13[...], moe.shared.w2[...])
  # float32 sums of 32 terms, twice: below 1e-5 of the largest output
  np.testing.assert_allclose(out.reshape(-1, 32), expected, atol=1e-5 * np.abs(expected).max())


def test_tokens_are_routed_in_float32_whatever_the_weights_are_kept_in():
  """As a rollout without a trainer keeps them."""
  moe = MoE(32, 16, 4, 2, 0, 1.0, nnx.Rngs(0))
  nnx.update(moe, jax.tree.map(lambda w: w.astype(jnp.bfloat16), nnx.state(moe)))
  x = normal(1, 3, 7, 32).astype(jnp.bfloat16)
  _, routing = moe(x, Numerics(Policy()))
  logits = np.float64(x).reshape(-1, 32) @ np.float64(moe.w_router[...])
  p = np.exp(np.take_along_axis(logits, np.asarray(routing.experts), 1))
  np.testing.assert_array_equal(routing.experts, np.argsort(-logits, axis=1)[:, :2])
  # bf16 logits would be off by up to 2^-9 of themselves
  np.testing.assert_allclose(routing.weights, p / p.sum(1, keepdims=True), rtol=1e-5)


def test_permuting_experts_changes_nothing():
  moe = MoE(32, 16, 4, 2, 0, 1.0, nnx.Rngs(0))
  x = normal(1, 3, 7, 32)
  before, _ = moe(x, Numerics(FP32))
  order = jnp.array([2, 0, 3, 1])
  moe.w_router[...] = moe.w_router[...][:, order]
  moe.w13[...], moe.w2[...] = moe.w13[...][order], moe.w2[...][order]
  after, _ = moe(x, Numerics(FP32))
  np.testing.assert_allclose(before, after, atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone():
  q, k = normal(0, 8), normal(1, 8)
  rotated = [rotate(jnp.broadcast_to(v, (1, 12, 1, 8)), 100.0)[0, :, 0] for v in (q, k)]
  scores = np.array(rotated[0] @ rotated[1].T)
  for distance in range(-5, 6):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
  assert np.ptp(scores[0]) > 0.1  # and they do depend on it
  np.testing.assert_allclose(rotated[0][0], q, atol=1e-7)


def test_grouped_query_attention_is_attention_with_repeated_keys():
  attention = Attention(32, 4, 2, 8, 100.0, 1.0, nnx.Rngs(0))
  x = normal(1, 2, 9, 32)
  qkv = np.float64(x) @ np.float64(attention.w_qkv[...])
  q, k, v = np.split(qkv.reshape(2, 9, 8, 8), [4, 6], axis=2)
  q, k = (np.float64(rotate(jnp.float32(a), 100.0)) for a in (q, k))
  k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
  scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
  scores[..., ~np.tril(np.ones((9, 9), bool))] = -np.inf
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  expected = np.einsum("bhqk,bkhd->bqhd", p, v).reshape(2, 9, 32)
  expected = expected @ np.float64(attention.w_out[...])
  np.testing.assert_allclose(attention(x, Numerics(FP32)), expected, atol=1e-5)


def test_heads_of_q_and_k_are_normed_before_they_turn():
  attention = Attention(32, 4, 2, 8, 100.0, 1.0, nnx.Rngs(0), qk_norm=True, norm_eps=0.1)
  attention.q_norm.scale[...], attention.k_norm.scale[...] = normal(2, 8), normal(3, 8)
  plain = Attention(32, 4, 2, 8, 100.0, 1.0, nnx.Rngs(0))
  x = normal(1, 2, 9, 32)
  q, k, v = np.split(np.float64(x @ plain.w_qkv[...]).reshape(2, 9, 8, 8), [4, 6], axis=2)

  def normed(heads, norm):
    rms = np.sqrt(np.mean(heads**2, axis=-1, keepdims=True) + 0.1)
    return heads / rms * np.float64(norm.scale[...])

  heads = [normed(q, attention.q_norm), normed(k, attention.k_norm), v]
  # The weights of no norm that make the heads of x the normed ones: x has fewer rows than columns.
  qkv = np.concatenate(heads, axis=2).reshape(18, 64)
  plain.w_qkv[...] = jnp.float32(np.linalg.pinv(np.float64(x).reshape(18, 32)) @ qkv)
  expected = plain(x, Numerics(FP32))
  np.testing.assert_allclose(attention(x, Numerics(FP32)), expected, atol=1e-4)


def test_a_block_adds_attention_and_feed_forward_of_the_normed_stream():
  block = Block(dataclasses.replace(CONFIG, num_experts=0), nnx.Rngs(0))
  numerics = Numerics(FP32)

  def rms_normed(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

  x = 3 * normal(0, 2, 5, 32)
  hidden = x + block.attention(rms_normed(x), numerics)
  expected = hidden + block.feed_forward(rms_normed(hidden), numerics)
  np.testing.assert_allclose(block(x, numerics)[0], expected, atol=1e-5)


@pytest.mark.parametrize("num_experts", [0, 4])
def test_model_is_causal_and_its_scan_is_its_blocks_in_a_row(num_experts):
  config = dataclasses.replace(CONFIG, num_experts=num_experts)
  model = LanguageModel(config, 50, nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 50)
  logits, routing = model(tokens, FP32)
  assert logits.shape == (2, 10, 50) and logits.dtype == jnp.float32
  found = {"load_balance_loss", "router_z_loss", "expert_load"}
  assert set(routing) == (found if num_experts else set())
  if num_experts:
    assert routing["expert_load"].shape == (CONFIG.num_layers, 4)

  changed, _ = model(tokens.at[:, 6].add(1), FP32)
  np.testing.assert_array_equal(logits[:, :6], changed[:, :6])
  assert (logits[:, 6:] != changed[:, 6:]).any(-1).all()

  x = model.embedding(tokens)
  graph, params = nnx.split(model.blocks)
  for layer in range(2):
    block = nnx.merge(graph, jax.tree.map(lambda p, i=layer: p[i], params))
    x, _ = block(x, Numerics(FP32))
  expected = model.norm(x) @ model.w_head[...]
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  layers = jax.tree.leaves(params)
  assert all((leaf[0] != leaf[1]).any() for leaf in layers if leaf.ndim > 2)  # not the same init


def test_a_tied_head_is_the_embedding_table():
  dense = dataclasses.replace(CONFIG, num_experts=0)
  tied = LanguageModel(dataclasses.replace(dense, tied_embedding=True), 50, nnx.Rngs(0))
  model = LanguageModel(dense, 50, nnx.Rngs(0))
  model.w_head[...] = model.embedding.embedding[...].T
  assert tied.w_head is None and tied.head_shape == model.head_shape == (32, 50)
  tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 50)
  np.testing.assert_array_equal(tied(tokens, FP32)[0], model(tokens, FP32)[0])
  loss = lambda model: jnp.sum(model.cross_entropy(tokens, tokens, FP32)[0])  # noqa: E731
  of_tied, of_both = nnx.grad(loss)(tied), nnx.grad(loss)(model)
  table = of_both["embedding"]["embedding"][...]
  np.testing.assert_allclose(
    of_tied["embedding"]["embedding"][...], table + of_both["w_head"][...].T, atol=1e-5
  )


def test_every_norm_has_the_epsilon_of_the_config():
  config = dataclasses.replace(CONFIG, norm_eps=0.25, qk_norm=True)
  model = LanguageModel(config, 50, nnx.Rngs(0))
  norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.RMSNorm)]
  assert [norm.epsilon for norm in norms] == [0.25] * 5


def test_weights_are_float32_and_blocks_keep_the_dtype_of_the_config():
  model = LanguageModel(
    dataclasses.replace(CONFIG, dtype="bfloat16", d_ff_shared=8), 50, nnx.Rngs(0)
  )
  graph, params = nnx.split(model.blocks)
  assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
  block = nnx.merge(graph, jax.tree.map(lambda p: p[0], params))
  out, _ = block(normal(0, 1, 4, 32).astype(jnp.bfloat16), Numerics(Policy()))
  assert out.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["experts", "attention", "scores", "router", "head"])
def test_policy_quantizes_the_kind_that_it_names_and_no_other(kind):
  model = LanguageModel(CONFIG, 50, nnx.Rngs(0))
  graph, params = nnx.split(model)
  tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 50)
  policy = dataclasses.replace(Policy(), **{kind: recipes.MXFP4})

  @jax.jit
  def rows(taps):
    return jax.grad(lambda t: jnp.sum(nnx.merge(graph, params)(tokens, policy, taps=t)[0] ** 2))(
      taps
    )

  for name, tap in rows(model.new_taps()).items():
    six = tap[..., :6, :]  # the six operands; MXFP4 keeps no packed residual
    quantized = name.startswith(kind) and name != "scores.av"  # which sums over tokens
    assert np.isfinite(six).all() and six.any() == quantized, name


def test_every_gemm_and_every_pass_rounds_with_its_own_draws():
  policy = Policy(experts=recipes.MXFP4_RHT_SR)
  x, w = normal(0, 64, 32), normal(1, 32, 32)

  def wgrad(name, key):
    return jax.grad(lambda w: jnp.sum(Numerics(policy, key).matmul(name, x, w) ** 2))(w)

  keys = jax.random.split(jax.random.key(0), 2)
  first = wgrad("experts.w13", keys[0])
  np.testing.assert_array_equal(first, wgrad("experts.w13", keys[0]))
  assert (first != wgrad("experts.w2", keys[0])).mean() > 0.5
  assert (first != wgrad("experts.w13", keys[1])).mean() > 0.5


def test_bad_shapes_are_refused_with_their_numbers():
  with pytest.raises(ValueError, match=r"num_heads=3 .* num_kv_heads=2"):
    Attention(32, 3, 2, 8, 100.0, 1.0, nnx.Rngs(0))
  with pytest.raises(ValueError, match="head_dim=7"):
    Attention(32, 4, 2, 7, 100.0, 1.0, nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"top_k=5 .*num_experts=4"):
    MoE(32, 16, 4, 5, 0, 1.0, nnx.Rngs(0))


STOCHASTIC = recipes.MXFP4.replace({"fprop.lhs.rounding": "stochastic", "name": "fprop_sr"})


def test_a_name_called_again_draws_its_own_numbers():
  policy, key = Policy(experts=STOCHASTIC), jax.random.key(0)
  numerics, (x, w) = Numerics(policy, key), (normal(0, 64, 32), normal(1, 32, 32))
  first, second, third = (numerics.matmul("experts.w2", x, w) for _ in range(3))
  own = jax.random.fold_in(key, zlib.crc32(b"experts.w2"))  # what a name called once draws
  expected = dot_general(STOCHASTIC, key=own)(x, w, (((1,), (0,)), ((), ())))
  np.testing.assert_array_equal(first, expected)
  assert (first != second).mean() > 0.5 and (second != third).mean() > 0.5
  np.testing.assert_array_equal(Numerics(policy, key).matmul("experts.w2", x, w), first)
  other = numerics.matmul("experts.w13", x, w)
  np.testing.assert_array_equal(Numerics(policy, key).matmul("experts.w13", x, w), other)


def test_calls_are_counted_across_a_checkpoint():
  """`attend` is one: its second trace would be the first, kept by JAX."""
  policy = Policy(layers=(LayerRule(modules="scores.qk", recipe=STOCHASTIC),))
  q, k = normal(0, 1, 32, 1, 2, 16), normal(1, 1, 32, 1, 16)

  def calls(numerics):
    return [attend(q, k, k, numerics) for _ in range(3)]

  eager = calls(Numerics(policy, jax.random.key(0)))
  assert all((a != b).mean() > 0.5 for a, b in itertools.combinations(eager, 2))
  again = calls(Numerics(policy, jax.random.key(0)))
  jax.tree.map(np.testing.assert_array_equal, eager, again)


def test_a_tap_of_a_name_called_twice_is_refused():
  x, w = normal(0, 64, 32), normal(1, 32, 32)
  numerics = Numerics(Policy(experts=recipes.MXFP4), taps={"experts.w2": new_tap()})
  numerics.matmul("experts.w2", x, w)
  numerics.matmul("experts.w13", x, w)
  numerics.matmul("experts.w13", x, w)  # has no tap
  with pytest.raises(ValueError, match=r"'experts\.w2' is called twice in one pass; its tap"):
    numerics.matmul("experts.w2", x, w)
