"""Cross-entropy in chunks of the vocabulary against that of all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.checks import validate
from experiments.config import Experiment
from fp4jax import formats, recipes
from fp4jax.models import LanguageModel, ModelConfig, Numerics, Policy
from fp4jax.models.cross_entropy import HEAD, cross_entropy
from fp4jax.operands import new_tap
from fp4jax.quantizers import DelayedScaling, OutlierClamp

VOCAB = 500  # of which the last chunk of 128 has 116, the last block of 32 has 20


def problem(tokens=96, vocab=VOCAB, d=64, dtype=jnp.bfloat16):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, tokens // 2, d)).astype(dtype)
  targets = jax.random.randint(keys[2], (2, tokens // 2), 0, vocab)
  return x, 0.1 * jax.random.normal(keys[1], (d, vocab)), targets


@functools.partial(jax.jit, static_argnames=("recipe", "vocab_chunk"))
def loss_and_gradients(x, w, targets, recipe, vocab_chunk, key=None):
  numerics = Numerics(Policy(head=recipe), key)
  loss = lambda x, w: jnp.mean(cross_entropy(x, w, targets, numerics, vocab_chunk))  # noqa: E731
  return jax.value_and_grad(loss, argnums=(0, 1))(x, w)


@pytest.mark.parametrize("vocab_chunk", [0, VOCAB])
def test_one_chunk_is_optax_of_all_logits(vocab_chunk):
  x, w, targets = problem()

  @jax.jit
  def expected(x, w):
    logits = Numerics(Policy()).matmul(HEAD, x, w).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

  found = loss_and_gradients(x, w, targets, recipes.BF16, vocab_chunk)
  jax.tree.map(
    np.testing.assert_array_equal, found, jax.value_and_grad(expected, argnums=(0, 1))(x, w)
  )


@pytest.mark.parametrize(
  "name", ["fp32", "bf16", "mxfp4", "fp8", "hopper_fp4", "fp8_mxfp4_weights"]
)
def test_chunks_change_the_order_of_sums_alone(name):
  """Quantized or not: blocks of w lie along d, those of the gradient along the vocabulary too.

  A sum of four parts: the loss is off by a few 2^-24, and so is the gradient of a logit. Of 48,000
  such, each in bf16 with an edge every 2^-8 of it, a few so come to lie on the other side, a format
  of fewer bits sees fewer. The sums of them are off by 2^-20 at most, and one in 2^10 is rounded to
  its other neighbor in bf16: by 2^-8 of itself, all of them together by 2^-13. A sum over chunks in
  bf16 would be off by 2^-9 of each of its parts.
  """
  x, w, targets = problem(dtype=jnp.float32 if name == "fp32" else jnp.bfloat16)
  recipe = recipes.by_name(name)
  loss, (dx, dw) = loss_and_gradients(x, w, targets, recipe, 0)
  own_loss, (own_dx, own_dw) = loss_and_gradients(x, w, targets, recipe, 128)
  assert float(own_loss) == pytest.approx(float(loss), rel=8 * 2.0**-24)
  share = 2.0**-20 if name == "fp32" else 2.0**-11
  for own, other in ((own_dx, dx), (own_dw, dw)):
    assert own.dtype == other.dtype
    error = np.linalg.norm(np.float64(own) - np.float64(other))
    assert error < share * np.linalg.norm(np.float64(other))
  assert recipe is recipes.BF16 or name == "fp32" or loss != loss_of_bf16(x, w, targets)


def loss_of_bf16(x, w, targets):
  return loss_and_gradients(x, w, targets, recipes.BF16, 0)[0]


def test_each_chunk_draws_its_own_numbers():
  """Of equal columns in two chunks the gradients differ."""
  x, w, _ = problem(vocab=256)
  w = jnp.concatenate([w[:, :128], w[:, :128]], axis=1)
  targets = jnp.full(x.shape[:2], 300)  # nobody's, so that both halves have the same gradient
  recipe = recipes.MXFP4.replace({"wgrad.rhs.rounding": "stochastic", "name": "sr"})
  _, (_, dw) = loss_and_gradients(x, w, targets, recipe, 128, jax.random.key(1))
  assert (dw[:, :128] != dw[:, 128:]).mean() > 0.5
  _, (_, dw) = loss_and_gradients(x, w, targets, recipes.MXFP4, 128)
  np.testing.assert_array_equal(dw[:, :128], dw[:, 128:])


def test_chunks_halve_the_memory_at_least():
  """Of 1024 tokens and 8192 columns: 32 MiB for the logits alone."""
  args = problem(tokens=1024, vocab=8192)

  def temporary(vocab_chunk):
    compiled = loss_and_gradients.lower(*args, recipes.BF16, vocab_chunk).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(512) < temporary(0) / 2


@pytest.mark.parametrize("name", ["bf16", "mxfp4"])
def test_a_tap_is_of_whole_operands(name):
  x, w, targets = problem()
  policy = Policy(head=recipes.by_name(name))

  @functools.partial(jax.jit, static_argnums=1)
  def rows(tap, vocab_chunk):
    loss = lambda t: jnp.mean(  # noqa: E731
      cross_entropy(x, w, targets, Numerics(policy, taps={HEAD: t}), vocab_chunk)
    )
    return jax.grad(loss)(tap)

  found = rows(new_tap(), 128)
  np.testing.assert_array_equal(found, rows(new_tap(), 0))
  assert found.any() == (name == "mxfp4")


HALF = {"fprop.rhs.format": formats.FP8_BLOCK_2D, "name": "half"}


@pytest.mark.parametrize(
  ("recipe", "vocab_chunk", "message"),
  [
    (recipes.MXFP4, 100, r"vocab_chunk=100 is not a multiple of 32, .* 'mxfp4'"),
    (recipes.FP8, 64, r"vocab_chunk=64 is not a multiple of 128, .* 'fp8'"),
    (recipes.BF16.replace(HALF), 64, r"vocab_chunk=64 is not a multiple of 128, .* 'half'"),
    (
      recipes.MXFP4.replace({"fprop.rhs.format": formats.NVFP4, "name": "nv"}),
      128,
      r"vocab_chunk=128: recipe 'nv' reads fprop\.rhs over the whole vocabulary",
    ),
    (
      recipes.MXFP4.replace({"dgrad.lhs": OutlierClamp(recipes.MXFP4.dgrad.lhs), "name": "occ"}),
      128,
      r"vocab_chunk=128: recipe 'occ' reads dgrad\.lhs over the whole vocabulary",
    ),
    (
      recipes.FP8.replace({"fprop.lhs": DelayedScaling(history=4), "name": "delayed"}),
      128,
      r"vocab_chunk=128: recipe 'delayed' keeps state of the head in \['fprop\.lhs'\]",
    ),
  ],
)
def test_chunks_that_would_change_numbers_are_refused(recipe, vocab_chunk, message):
  x, w, targets = problem()
  with pytest.raises(ValueError, match=message):
    cross_entropy(x, w, targets, Numerics(Policy(head=recipe)), vocab_chunk)


def test_the_model_computes_its_chunks():
  tokens = jax.random.randint(jax.random.key(1), (2, 33), 0, 300)

  def losses(vocab_chunk):
    model = LanguageModel(ModelConfig(d_model=32, vocab_chunk=vocab_chunk), 300, nnx.Rngs(0))
    graph, params = nnx.split(model)
    run = lambda p: nnx.merge(graph, p).cross_entropy(tokens[:, :-1], tokens[:, 1:], Policy())[0]  # noqa: E731
    shapes = {x.aval.shape for e in jax.make_jaxpr(run)(params).jaxpr.eqns for x in e.outvars}
    return jax.jit(run)(params), (2, 32, 300) in shapes

  (whole, all_at_once), (chunked, still) = losses(0), losses(64)
  assert all_at_once and not still
  np.testing.assert_allclose(chunked, whole, rtol=8 * 2.0**-24)


def test_settings_of_which_no_run_comes():
  config = Experiment()
  config.model.vocab_chunk = -1
  with pytest.raises(ValueError, match=r"model\.vocab_chunk=-1 is not at least 0"):
    validate(config)
  config.model.vocab_chunk, config.implementation, config.probe_every = 64, "mosaic", 0
  validate(config)
  config.quantize.head = True
  with pytest.raises(ValueError, match=r"model\.vocab_chunk=64: a head in chunks is XLA's"):
    validate(config)
