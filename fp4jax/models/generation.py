"""Text from a language model: one pass over the prompts, then one scan over the new tokens."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Int, Int32

from fp4jax.arguments import check_key, to_arrays
from fp4jax.models.language_model import LanguageModel, States
from fp4jax.models.policy import Policy
from fp4jax.models.sampling import sample

# For a program that makes one token after the other. On a GPU cuBLAS reads a layer's weights where
# they lie among those of all layers. XLA's own GEMMs, by Triton, read a copy of them that is made
# for each token anew: three times the bytes.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Generated(NamedTuple):
  """What followed each prompt."""

  tokens: Int32[Array, "b n"]  # pad_token past the end
  # log softmax(logits)[token] in nats, whatever temperature and top_p; 0 past the end.
  logprobs: Float32[Array, "b n"]
  entropy: Float32[Array, "b n"]  # of softmax(logits), in nats; 0 past the end
  lengths: Int32[Array, " b"]  # tokens, a stop token included
  # The experts of every token that was read, in the slots of the padded prompts and then of the new
  # tokens but the last, which was not read; None where it was not asked for.
  routing: Int32[Array, "layer b s k"] | None


_COLDEST = 1e-6  # logits of float32 that are divided by it stay finite


class _Settings(NamedTuple):
  max_new_tokens: int
  temperature: float
  top_p: float
  stop_tokens: tuple[int, ...]
  pad_token: int
  return_routing: bool


def generate(
  model: LanguageModel,
  prompts: Int[Array, "b p"],
  prompt_lengths: Int[Array, " b"],
  policy: Policy,
  *,
  key: jax.Array,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  stop_tokens: Sequence[int] = (),
  pad_token: int = 0,
  numerics_key: jax.Array | None = None,
  states: States | None = None,
  return_routing: bool = False,
) -> Generated:
  """Samples up to `max_new_tokens` after each prompt, token after token.

  A row does not depend on its padding, nor on other rows, up to the order of float32 sums, if the
  policy's recipes give no scale to several tokens (`FP8_TENSOR` does).

  Args:
    prompts: tokens, padded on the left with anything.
    prompt_lengths: how many tokens at the end of each row are the prompt.
    policy: the recipe of each GEMM. After the prompts `implementation=None` means "xla", for the
      kernels multiply tiles of 128 rows; but where weights are packed in MXFP4, or in FP8 with
      scales of 128 x 128, up to 128 or 64 prompts are multiplied by the kernel of few rows, which
      reads the codes as they lie in memory.
    key: row i draws its j-th token by `fold_in(fold_in(key, i), j)`.
    temperature: divides the logits, 1e-6 or more; 0 takes the likeliest token.
    top_p: of the probabilities at that temperature, see `sampling.nucleus`.
    stop_tokens: each ends its row, whose last token it is.
    pad_token: what follows the end.
    numerics_key: for policies that round stochastically.
    states: of the policy's quantizers that have one; every pass reads the same.
    return_routing: of a mixture of experts, for `LanguageModel.__call__(routing=...)`.
  Raises:
    ValueError: a setting out of its range, a token outside the vocabulary, a prompt that is empty
      or longer than its row. Under jit values of `prompts` and `prompt_lengths` are not checked.
    TypeError: something that is not integers, or not a key.
  """
  prompts, prompt_lengths = to_arrays(prompts=prompts, prompt_lengths=prompt_lengths)
  check_key(key=key)
  _check_prompts(prompts, prompt_lengths, model.embedding.num_embeddings)
  settings = _Settings(
    max_new_tokens,
    float(temperature),
    float(top_p),
    tuple(map(int, stop_tokens)),
    int(pad_token),
    return_routing,
  )
  _check_settings(settings, model)
  graph, params = nnx.split(model)
  arguments = params, prompts, prompt_lengths, key, numerics_key, states
  traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments))
  run = _part_of_a_program if traced else _program
  return run(graph, policy, settings, *arguments)


def _generate(graph, policy, settings, params, prompts, prompt_lengths, key, numerics_key, states):
  model = nnx.merge(graph, params)
  b, p = prompts.shape
  row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(b))
  stops = jnp.array(settings.stop_tokens, jnp.int32)

  def key_of_pass(i):
    return None if numerics_key is None else jax.random.fold_in(numerics_key, i)

  def next_token(i, logits, is_done):
    keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(row_keys)
    token = sample(logits, keys, settings.temperature, settings.top_p)
    # As `cross_entropy` forms it, so that equal logits say the same to the bit.
    normalizer = jax.nn.logsumexp(logits, axis=1)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - normalizer
    of_all = logits - normalizer[:, None]
    entropy = -jnp.sum(jnp.exp(of_all) * of_all, axis=1)
    token = jnp.where(is_done, settings.pad_token, token)
    said = token, jnp.where(is_done, 0, logprob), jnp.where(is_done, 0, entropy), ~is_done
    return token, is_done | jnp.isin(token, stops), said

  padding = (p - prompt_lengths).astype(jnp.int32)
  cache = model.new_cache(padding, p)
  is_token = jnp.arange(p) >= padding[:, None]
  prompts = jnp.where(is_token, prompts, settings.pad_token)  # NaN of no token would spread
  logits, cache, routing = model.decode(prompts, cache, policy, key=key_of_pass(0), states=states)
  token, is_done, first = next_token(0, logits, jnp.zeros(b, bool))
  of_step = dataclasses.replace(policy, few_rows=True)

  def step(carry, i):
    token, is_done, cache = carry
    how = {"key": key_of_pass(i), "states": states}
    logits, cache, routing = model.decode(token[:, None], cache, of_step, **how)
    token, is_done, said = next_token(i, logits, is_done)
    return (token, is_done, cache), (said, routing if settings.return_routing else None)

  cache = cache.grown(settings.max_new_tokens - 1)
  numbers = jnp.arange(1, settings.max_new_tokens)
  _, (others, routings) = lax.scan(step, (token, is_done, cache), numbers)
  tokens, logprobs, entropy, is_live = (
    jnp.concatenate([a[:, None], jnp.moveaxis(rest, 0, 1)], axis=1)
    for a, rest in zip(first, others, strict=True)
  )
  if settings.return_routing:
    later = jnp.moveaxis(routings[..., 0, :], 0, 2)  # (step, layer, b, t=1, k)
    routing = jnp.concatenate([routing, later], axis=2)
  lengths = jnp.sum(is_live, axis=1, dtype=jnp.int32)
  return Generated(tokens, logprobs, entropy, lengths, routing if settings.return_routing else None)


_part_of_a_program = jax.jit(_generate, static_argnums=(0, 1, 2))
_program = jax.jit(_generate, static_argnums=(0, 1, 2), compiler_options=COMPILER_OPTIONS)


def _check_prompts(prompts, lengths, vocab):
  for name, x in (("prompts", prompts), ("prompt_lengths", lengths)):
    if not jnp.issubdtype(x.dtype, jnp.integer):
      raise TypeError(f"{name} are {x.dtype}, not integers")
  if prompts.ndim != 2 or not prompts.size or lengths.shape != prompts.shape[:1]:
    raise ValueError(
      f"prompts {prompts.shape} and prompt_lengths {lengths.shape} are not (b, p) and (b,)"
    )
  if any(isinstance(x, jax.core.Tracer) for x in (prompts, lengths)):
    return
  prompts, lengths = np.asarray(prompts), np.asarray(lengths)
  width = prompts.shape[1]
  for row in np.flatnonzero((lengths < 1) | (lengths > width)):
    what = "an empty prompt" if lengths[row] < 1 else f"more than the {width} slots of prompts"
    raise ValueError(f"prompt_lengths[{row}]={lengths[row]}: {what}")
  is_token = np.arange(width) >= width - lengths[:, None]
  bad = prompts[is_token & ((prompts < 0) | (prompts >= vocab))]
  if bad.size:
    raise ValueError(f"prompts hold token {bad[0]}, which is not one of the vocabulary's {vocab}")


def _check_settings(settings, model):
  s, vocab = settings, model.embedding.num_embeddings
  if s.max_new_tokens < 1:
    raise ValueError(f"max_new_tokens={s.max_new_tokens} is not at least 1")
  if s.temperature != 0 and not _COLDEST <= s.temperature < math.inf:
    raise ValueError(f"temperature={s.temperature} is not 0 or at least {_COLDEST}")
  if not 0 < s.top_p <= 1:
    raise ValueError(f"top_p={s.top_p} is not above 0 and at most 1")
  for name, tokens in (("stop_tokens", s.stop_tokens), ("pad_token", (s.pad_token,))):
    for token in tokens:
      if not 0 <= token < vocab:
        raise ValueError(f"{name} has {token}, which is not one of the vocabulary's {vocab}")
  if s.return_routing and not model.is_mixture:
    raise ValueError("return_routing=True of a model whose num_experts is 0")
