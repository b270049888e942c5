"""The decoder against a pass over the whole sequence, and how it samples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from stateful import Scaled

from fp4jax import recipes
from fp4jax.grouped import TILE
from fp4jax.models import LanguageModel, LayerRule, ModelConfig, Policy, generate, pack_model
from fp4jax.models import policy as policy_module
from fp4jax.models.kv_cache import align_left
from fp4jax.models.matrix import Matrix
from fp4jax.models.sampling import nucleus, sample
from fp4jax.quantizers import Operand

VOCAB, NEW, WIDTH = 50, 8, 6
LENGTHS = jnp.array([6, 1, 4, 3, 6, 2])
FP32 = Policy(*([recipes.FP32] * 5))
BASE = ModelConfig(
  d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, d_ff=32, dtype="float32"
)
DENSE = dataclasses.replace(BASE, num_experts=0)


def model_of(config, head_scale=3.0):
  """One whose next tokens are neither all alike nor sure."""
  model = LanguageModel(config, VOCAB, nnx.Rngs(0))
  model.w_head[...] = head_scale * model.w_head[...]
  return model


def prompts_of(lengths=LENGTHS):
  return jax.random.randint(jax.random.key(1), (len(lengths), WIDTH), 0, VOCAB)


def generated(model, policy, prompts=None, lengths=LENGTHS, **options):
  options = {"key": jax.random.key(2), "max_new_tokens": NEW} | options
  prompts = prompts_of(lengths) if prompts is None else prompts
  return generate(model, prompts, lengths, policy, **options)


@functools.partial(jax.jit, static_argnums=(0, 2))
def whole_pass(graph, params, policy, tokens):
  model = nnx.merge(graph, params)
  return model(tokens, policy, return_routing=model.is_mixture)


@dataclasses.dataclass
class FullPass:
  """What one pass over each row's tokens, without padding in front, says of the generated ones."""

  logits: np.ndarray  # (b, n, vocab)
  logprobs: np.ndarray  # (b, n)
  routing: np.ndarray | None  # (layer, b, t, k)

  @classmethod
  def of(cls, model, policy, found, prompts=None, lengths=LENGTHS):
    prompts = prompts_of(lengths) if prompts is None else prompts
    tokens = align_left(jnp.concatenate([prompts, found.tokens], 1), WIDTH - lengths, 1)
    logits, said = whole_pass(*nnx.split(model), policy, tokens[:, :-1])
    before = (lengths - 1)[:, None] + jnp.arange(NEW)
    logits = jnp.take_along_axis(logits, before[..., None], 1)
    # In the order in which `generate` subtracts: logits that are equal then say the same.
    logprobs = jnp.take_along_axis(logits, found.tokens[..., None], 2)[..., 0]
    logprobs -= jax.nn.logsumexp(logits, axis=-1)
    return cls(np.array(logits), np.array(logprobs), said.get("experts"))


def last_bits(full, model, found):
  """How far float32 lets the log-probabilities of `full` be from another pass over the same tokens.

  XLA's CPU sums products in an order that depends on how many rows there are, so that passes over
  one token and over all differ in last bits. A sum whose terms are each off by a last bit is off by
  about as much: so the bound is four times what three models say of which every weight is the next
  float32 above or below.
  """
  graph, params = nnx.split(model)

  def moved(key):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    up = [jax.random.bernoulli(k, shape=leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    near = [
      jnp.nextafter(x, jnp.where(u, jnp.inf, -jnp.inf)) for u, x in zip(up, leaves, strict=True)
    ]
    return FullPass.of(nnx.merge(graph, tree.unflatten(near)), FP32, found)

  others = [moved(jax.random.key(seed)) for seed in range(3)]
  return 4 * max(np.abs(other.logits - full.logits).max() for other in others)


@pytest.mark.parametrize("config", [DENSE, BASE], ids=["dense", "moe"])
def test_float32_logprobs_are_those_of_a_full_pass(config):
  model = model_of(config)
  found = generated(model, FP32, return_routing=model.is_mixture)
  full = FullPass.of(model, FP32, found)
  bound = last_bits(full, model, found)
  assert bound < 1e-4  # a wrong position or mask: above 0.2
  np.testing.assert_allclose(found.logprobs, full.logprobs, rtol=0, atol=bound)
  np.testing.assert_array_equal(found.lengths, NEW)
  if model.is_mixture:
    routing = align_left(found.routing, WIDTH - LENGTHS, 2)
    is_token = np.arange(WIDTH + NEW - 1) < (np.array(LENGTHS) + NEW - 1)[:, None]
    assert routing.shape == (2, len(LENGTHS), WIDTH + NEW - 1, 2)
    np.testing.assert_array_equal(
      np.array(routing)[:, is_token], np.array(full.routing)[:, is_token]
    )


def every(recipe):
  """All kinds run it, but the router."""
  return Policy(experts=recipe, attention=recipe, scores=recipe, head=recipe)


MIXED = dataclasses.replace(
  every(recipes.MXFP4), layers=(LayerRule(recipe=recipes.BF16, layers=(0,)),)
)


@pytest.mark.parametrize(
  ("config", "policy"),
  [
    pytest.param(DENSE, Policy(), id="dense-bf16"),
    pytest.param(BASE, Policy(), id="moe-bf16", marks=pytest.mark.slow),
    pytest.param(BASE, every(recipes.FP8), id="moe-fp8", marks=pytest.mark.slow),
    pytest.param(BASE, every(recipes.HOPPER_FP4), id="moe-hopper_fp4", marks=pytest.mark.slow),
    pytest.param(BASE, MIXED, id="moe-mxfp4-but-first", marks=pytest.mark.slow),
  ],
)
def test_bf16_logprobs_are_those_of_a_full_pass(config, policy):
  """To the bit in most rows: blocks end with a token, and a rounding hides in which order a sum was
  formed unless it lies within 2^-21 of itself at a tie of bf16, 2^-8 apart. That befalls 1 of 2^13
  values; a row has some 1600 that attention makes, so one in five rows would differ.

  Where one does, a value moves by one bf16 step, twice the largest error of its rounding: by no
  more than twice what all roundings together do to a log-probability.
  """
  model = model_of(dataclasses.replace(config, dtype="bfloat16"))
  found = generated(model, policy)
  full = FullPass.of(model, policy, found)
  error = np.abs(found.logprobs - full.logprobs)
  assert (error == 0).all(1).mean() >= 0.5
  exact = model_of(config)
  rounding = np.abs(full.logprobs - FullPass.of(exact, FP32, found).logprobs)
  assert rounding.any() and error.max() <= 2 * rounding.max()


def test_every_pass_reads_the_states():
  """Scales of activations: half of them, half of the first product of a block."""
  model, half = model_of(DENSE), Operand(jnp.float32)
  policy = dataclasses.replace(
    FP32, experts=recipes.FP32.replace({"fprop.lhs": Scaled(half), "name": "scaled"})
  )
  states = jax.tree.map(lambda s: s / 2, model.new_states(policy))
  found = generated(model, policy, states=states, temperature=0)
  halved = nnx.clone(model)
  for w in (halved.blocks.feed_forward.w13, halved.blocks.feed_forward.w2):
    w[...] = w[...] / 2
  expected = generated(halved, FP32, temperature=0)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
  assert (found.tokens != generated(model, FP32, temperature=0).tokens).any()


def test_greedy_tokens_are_the_likeliest_of_a_full_pass():
  model = model_of(dataclasses.replace(BASE, unroll=True, remat="everything"))
  found = generated(model, FP32, temperature=0)
  full = FullPass.of(model, FP32, found)
  best, second = np.sort(full.logits, -1)[..., [-1, -2]].transpose(2, 0, 1)
  assert (best - second).min() > last_bits(full, model, found)  # no tie that rounding would decide
  np.testing.assert_array_equal(found.tokens, full.logits.argmax(-1))
  again = generated(model, FP32, temperature=0, key=jax.random.key(7))
  np.testing.assert_array_equal(found.tokens, again.tokens)


@pytest.mark.slow
def test_a_row_depends_neither_on_its_padding_nor_on_other_rows():
  model = model_of(BASE)
  prompts = prompts_of()
  found = generated(model, FP32, prompts)
  is_padding = np.arange(WIDTH) < WIDTH - np.array(LENGTHS)[:, None]
  garbage = jnp.where(is_padding, VOCAB + 7, prompts)  # no token at all
  jax.tree.map(np.testing.assert_array_equal, found, generated(model, FP32, garbage))

  wider = jnp.pad(prompts[:3], ((0, 0), (5, 0)), constant_values=1)
  rows = generated(model, FP32, wider, LENGTHS[:3])
  np.testing.assert_array_equal(rows.tokens, found.tokens[:3])
  full = FullPass.of(model, FP32, found, prompts)
  bound = last_bits(full, model, found)
  np.testing.assert_allclose(rows.logprobs, found.logprobs[:3], rtol=0, atol=bound)


def test_a_key_says_which_tokens_come():
  model = model_of(DENSE)
  alike = jnp.broadcast_to(prompts_of()[:1], (6, WIDTH)), jnp.full(6, WIDTH)
  found = generated(model, FP32, *alike)
  np.testing.assert_array_equal(found.tokens, generated(model, FP32, *alike).tokens)
  other = generated(model, FP32, *alike, key=jax.random.key(3))
  assert (found.tokens != other.tokens).mean() > 0.5
  assert len({tuple(row) for row in np.array(found.tokens)}) == 6  # each row draws anew
  assert any(len(set(row)) > 1 for row in np.array(found.tokens))  # and so does each step


def test_a_stop_token_ends_its_row():
  model, stops, pad = model_of(DENSE, head_scale=1.0), tuple(range(8, 20)), 49
  free = generated(model, FP32)
  found = generated(model, FP32, stop_tokens=stops, pad_token=pad)
  lengths = []
  for row, (tokens, logprobs) in enumerate(zip(free.tokens, free.logprobs, strict=True)):
    ends = [i for i, token in enumerate(np.array(tokens)) if token in stops]
    n = ends[0] + 1 if ends else NEW
    lengths.append(n)
    np.testing.assert_array_equal(found.tokens[row], [*tokens[:n], *[pad] * (NEW - n)])
    np.testing.assert_array_equal(found.logprobs[row], [*logprobs[:n], *[0] * (NEW - n)])
  np.testing.assert_array_equal(found.lengths, lengths)
  assert min(lengths) < 6 and len(set(lengths)) > 2


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_tokens_come_as_often_as_their_probabilities_say(temperature, top_p):
  n, logits = 20_000, np.array([1.0, 0.0, 2.0, -1.0, 1.5], np.float32)
  p = np.exp(np.float64(logits) / temperature)
  p /= p.sum()
  p = np.where(naive_nucleus(p, top_p), p, 0)
  p /= p.sum()
  keys = jax.random.split(jax.random.key(0), n)
  drawn = jax.jit(lambda keys: sample(jnp.tile(logits, (n, 1)), keys, temperature, top_p))(keys)
  counts = np.bincount(drawn, minlength=5)
  assert not counts[p == 0].any()
  live = p > 0
  # chi-square of at most 4 degrees of freedom: above 40 once in 2e7 times
  assert np.sum((counts - n * p)[live] ** 2 / (n * p)[live]) < 40


def naive_nucleus(p, top_p):
  kept, total = np.zeros(len(p), bool), 0.0
  for token in sorted(range(len(p)), key=lambda token: (-p[token], token)):
    if total < top_p:
      kept[token] = True
    total += p[token]
  return kept


def test_a_nucleus_is_the_fewest_tokens_that_suffice():
  logits = np.array(2 * jax.random.normal(jax.random.key(0), (40, 30)))
  logits[:20, :10] = logits[:20, 10:20]  # equals
  p = np.exp(np.float64(logits))
  p /= p.sum(1, keepdims=True)
  for top_p in (1e-6, 0.1, 0.5, 0.9, 0.99):
    found = np.array(nucleus(jnp.array(logits), top_p))
    expected = np.array([naive_nucleus(row, top_p) for row in p])
    # No sum is so near top_p that its float32 decides, 30 * 2^-24 off.
    assert np.abs(np.cumsum(-np.sort(-p), 1) - top_p).min() > 30 * 2.0**-24
    np.testing.assert_array_equal(np.isfinite(found), expected)
    np.testing.assert_array_equal(found[expected], logits[expected])


def test_no_step_multiplies_tiles():
  def rows_of_products(jaxpr, steps):
    """Of batches of products: outside the scan over the new tokens, or within it."""
    for eqn in jaxpr.eqns:
      is_scan = eqn.primitive.name == "scan" and eqn.params["length"] == NEW - 1
      if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.ndim == 3 and not steps:
        yield eqn.outvars[0].aval.shape[1]
      for inner in jaxprs_in_params(eqn.params):
        yield from rows_of_products(inner, steps and not is_scan)

  model = model_of(BASE)
  program = jax.make_jaxpr(lambda p: generated(model, FP32, p).tokens)(prompts_of()).jaxpr
  everywhere, in_steps = (set(rows_of_products(program, steps)) for steps in (False, True))
  assert TILE in everywhere and in_steps == {len(LENGTHS)}  # all tokens, by each expert


def test_bad_input_is_refused_with_names_and_numbers():
  model, prompts = model_of(DENSE), prompts_of()

  def refused(match, prompts=prompts, lengths=LENGTHS, error=ValueError, **options):
    with pytest.raises(error, match=match):
      generated(model, FP32, prompts, lengths, **options)

  refused(r"prompt_lengths\[2\]=0: an empty prompt", lengths=LENGTHS.at[2].set(0))
  refused(r"prompt_lengths\[0\]=7: more than the 6 slots", lengths=LENGTHS.at[0].set(7))
  refused(r"prompts \(6, 6\) and prompt_lengths \(2,\)", lengths=LENGTHS[:2])
  refused(r"prompts hold token 50, .* vocabulary's 50", prompts.at[0, 0].set(50))
  refused("prompts are float32", prompts * 1.0, error=TypeError)
  refused("max_new_tokens=0 is not at least 1", max_new_tokens=0)
  refused("temperature=-1.0 is not 0 or", temperature=-1.0)
  refused("temperature=nan is not 0 or", temperature=float("nan"))
  refused("temperature=1e-39 is not 0 or at least 1e-06", temperature=1e-39)
  refused("top_p=0.0 is not above 0", top_p=0.0)
  refused("top_p=1.5 is not above 0", top_p=1.5)
  refused("stop_tokens has 50, .* vocabulary's 50", stop_tokens=(3, 50))
  refused("pad_token has -1, .* vocabulary's 50", pad_token=-1)
  refused("num_experts is 0", return_routing=True)
  refused("key has type int", key=3, error=TypeError)
  stochastic = recipes.MXFP4.replace({"fprop.lhs.rounding": "stochastic", "name": "sr"})
  with pytest.raises(ValueError, match="'sr' rounds stochastically and needs key="):
    generated(model, Policy(experts=stochastic))
  cache = model.new_cache(jnp.zeros(6, jnp.int32), 5)
  with pytest.raises(ValueError, match=r"tokens \(6, 6\) do not fit a cache of 6 rows of 5 slots"):
    model.decode(prompts, cache, FP32)


def test_stochastic_passes_draw_anew():
  stochastic = recipes.MXFP4.replace({"fprop.lhs.rounding": "stochastic", "name": "sr"})
  model, policy = model_of(DENSE), Policy(experts=stochastic)
  first, second = (
    generated(model, policy, temperature=0, numerics_key=jax.random.key(i)) for i in range(2)
  )
  assert (first.logprobs != second.logprobs).mean() > 0.5


@pytest.mark.slow
def test_a_packed_model_generates_what_the_model_does():
  config = dataclasses.replace(BASE, dtype="bfloat16", d_ff_shared=32)
  model, policy = model_of(config), every(recipes.MXFP4)
  model.w_head = type(model.w_head)(jnp.pad(model.w_head[...], ((0, 0), (0, 14))))
  packed = pack_model(model, policy)
  found = generated(packed, policy)
  jax.tree.map(np.testing.assert_array_equal, found, generated(model, policy))

  sizes = [sum(x.nbytes for x in jax.tree.leaves(nnx.state(m, Matrix))) for m in (model, packed)]
  router = model.blocks.feed_forward.w_router[...].nbytes
  assert sizes[1] - router == (sizes[0] - router) / 4 * (4 + 8 / 32) / 8
  with pytest.raises(
    ValueError, match=r"'attention.qkv' runs recipe 'bf16' in one layer and 'mxfp4'"
  ):
    pack_model(model, MIXED)
  with pytest.raises(ValueError, match=r"packed in MXFP4 .* recipe 'fp8' needs FP8_BLOCK_2D"):
    generated(packed, every(recipes.FP8))


def test_experts_have_no_kernel_of_few_rows(monkeypatch):
  asked = []
  over_mesh = policy_module.moe_ffn_over_mesh

  def recorded(*arguments, implementation, few_rows, **options):
    asked.append((few_rows, implementation))
    return over_mesh(*arguments, implementation=implementation, few_rows=few_rows, **options)

  monkeypatch.setattr(policy_module, "moe_ffn_over_mesh", recorded)
  config = dataclasses.replace(BASE, num_layers=1, d_ff=48)  # a program that no other test has
  generated(model_of(config), Policy(), max_new_tokens=3)
  assert set(asked) == {(False, None), (True, "xla")}
