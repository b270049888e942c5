"""Blocks one at a time are the model, and what their GEMMs read is what they multiply."""

import jax.numpy as jnp
import numpy as np
from qat_cases import small_model

from experiments.qat import blocks, policies
from fp4jax import MXFP4, recipes
from fp4jax.models import Policy

FP32 = Policy(*([recipes.FP32] * 5))
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 9)).astype(np.int32)


def test_block_after_block_is_the_model():
  model = small_model("float32")
  graph, params = blocks.split_blocks(model)
  x = model.embedding(TOKENS)
  for of_layer in params:
    x = blocks.run_batches(graph, FP32, of_layer, None, x, 2)
  # Float32 sums of at most 96 terms, in another order.
  expected, _ = model(TOKENS, FP32)
  found = model.norm(x) @ model.w_head[...]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_what_a_gemm_reads_gives_what_the_block_adds():
  """By NumPy in float64 from there on."""
  model = small_model("float32")
  graph, params = blocks.split_blocks(model)
  x = model.embedding(TOKENS)
  out, read = blocks.record_block(graph, FP32, params[0], x)
  assert {name: r.shape for name, r in read.items()} == {
    "attention.qkv": (4, 9, 64),
    "attention.out": (4, 9, 64),
    "experts.w13": (4, 9, 64),
    "experts.w2": (4, 9, 96),
  }
  w = {name: np.asarray(m[...][0], np.float64) for name, m in model.blocks.matrices.items()}
  read = {name: np.asarray(r, np.float64) for name, r in read.items()}
  normed = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
  x = np.asarray(x, np.float64)
  np.testing.assert_allclose(read["attention.qkv"], normed(x), rtol=1e-5, atol=1e-5)
  after = x + read["attention.out"] @ w["attention.out"]
  np.testing.assert_allclose(read["experts.w13"], normed(after), rtol=1e-4, atol=1e-5)
  gate, up = np.split(read["experts.w13"] @ w["experts.w13"], 2, -1)
  np.testing.assert_allclose(read["experts.w2"], gate / (1 + np.exp(-gate)) * up, atol=1e-5)
  np.testing.assert_allclose(out, after + read["experts.w2"] @ w["experts.w2"], atol=1e-5)


def test_other_parameters_leave_the_model_as_it_is():
  model = small_model()
  _, params = blocks.split_blocks(model)
  w = np.array(model.blocks.feed_forward.w2[...])
  changed = blocks.with_blocks(model, params[::-1])
  np.testing.assert_array_equal(changed.blocks.feed_forward.w2[...], w[::-1])
  np.testing.assert_array_equal(model.blocks.feed_forward.w2[...], w)
  assert changed.embedding.embedding[...] is model.embedding.embedding[...]


def test_states_are_stacked_as_the_model_has_them():
  model = small_model()
  policy = policies.policy_of(policies.learned(MXFP4, frozen=False))
  states = model.new_states(policy)
  (stacked,) = states.values()
  layers = [
    {g: {r: {k: v[i] for k, v in s.items()} for r, s in of.items()} for g, of in stacked.items()}
    for i in range(2)
  ]
  again = blocks.stacked_states(layers)
  assert again.keys() == states.keys()
  for name, of in stacked.items():
    np.testing.assert_array_equal(
      again["0:2"][name]["fprop.rhs"]["scale"], of["fprop.rhs"]["scale"]
    )
  assert jnp.shape(again["0:2"]["experts.w2"]["fprop.rhs"]["scale"]) == (2, 3, 64)
