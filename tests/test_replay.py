"""Routing that is given to a model instead of chosen by it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax import recipes
from fp4jax.models import LanguageModel, ModelConfig, Policy

FP32 = Policy(*([recipes.FP32] * 5))
MOE = ModelConfig(
  d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, d_ff=32, dtype="float32"
)
MODEL = LanguageModel(MOE, 50, nnx.Rngs(0))
TOKENS = jax.random.randint(jax.random.key(1), (3, 6), 0, 50)


def test_a_replayed_routing_is_the_one_that_is_used():
  graph, params = nnx.split(MODEL)

  @jax.jit
  def run(params, routing):
    return nnx.merge(graph, params)(TOKENS, FP32, routing=routing, return_routing=True)

  logits, said = run(params, None)
  again, replayed = run(params, said["experts"])
  np.testing.assert_array_equal(logits, again)
  np.testing.assert_array_equal(said["experts"], replayed["experts"])
  others = (said["experts"] + 1) % 4
  changed, replayed = run(params, others)
  assert (np.abs(changed - logits).max(-1) > 1e-2).all()
  np.testing.assert_array_equal(replayed["experts"], others)
  with pytest.raises(ValueError, match=r"routing \(2, 3, 5, 2\) is not .* \(2, 3, 6, 2\)"):
    MODEL(TOKENS, FP32, routing=others[:, :, 1:])
  with pytest.raises(ValueError, match="num_experts is 0"):
    LanguageModel(dataclasses.replace(MOE, num_experts=0), 50, nnx.Rngs(0))(
      TOKENS, FP32, routing=others
    )


@pytest.mark.slow
def test_the_router_learns_from_a_replayed_routing():
  graph, params = nnx.split(MODEL)
  others = jnp.broadcast_to(jnp.array([3, 1]), (2, *TOKENS.shape, 2))

  @jax.jit
  def gradient(params):
    def loss(params):
      model = nnx.merge(graph, params)
      return jnp.mean(model.cross_entropy(TOKENS, TOKENS, FP32, routing=others)[0])

    return nnx.merge(graph, jax.grad(loss)(params)).blocks.feed_forward

  of = gradient(params)
  assert np.array(of.w_router[...]).any()
  assert [bool(np.array(of.w2[:, e]).any()) for e in range(4)] == [False, True, False, True]
