"""Training of a quantized model to say what the same model says in bf16.

LLM-QAT (arXiv 2305.17888) lets that model write the text; QAD (arXiv 2601.20088) takes text as it
comes. Both minimize the divergence KL(teacher || student) of the next token, and nothing else.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from experiments.qat.blocks import Params
from experiments.qat.policies import TEACHER
from fp4jax.models import LanguageModel, Policy, generate
from fp4jax.models.kv_cache import align_left
from fp4jax.models.language_model import States

Loss = Literal["kl", "cross_entropy"]
_GREEDY = (3, 4, 5)  # likeliest tokens that a row of LLM-QAT's text begins with
MOST_GREEDY = max(_GREEDY)


class Trained(NamedTuple):
  params: Any
  tokens: int  # that the student read
  losses: list[float]  # of each step, nats per token


def kl_divergence(
  teacher: Float[Array, "*t vocab"], student: Float[Array, "*t vocab"]
) -> Float32[Array, "*t"]:
  """sum p_T (log p_T - log p_S) of each token, in nats, from logits."""
  of_teacher, of_student = (
    jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in (teacher, student)
  )
  return jnp.sum(jnp.exp(of_teacher) * (of_teacher - of_student), axis=-1)


@functools.cache
def make_optimizer(
  learning_rate: float, steps: int, final_fraction: float = 0.1
) -> optax.GradientTransformation:
  """Adam behind a clip of the global norm to 1; a warmup of a twentieth of the steps, then cosine
  decay. One for the same arguments, so that steps with it are compiled once."""
  warmup = math.ceil(steps / 20)
  rate = optax.warmup_cosine_decay_schedule(
    init_value=learning_rate / (warmup + 1),
    peak_value=learning_rate,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
    end_value=final_fraction * learning_rate,
  )
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95))


class Distillation:
  """The weights of a student in training, all of them; `model` is its teacher, and what it begins
  as. A batch is tokens (b, t + 1), of which the student reads all but the last of a row."""

  def __init__(
    self,
    model: LanguageModel,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    loss: Loss = "kl",
  ):
    graph, self._teacher = nnx.split(model)
    self._options = graph, policy, optimizer, loss
    params = jax.tree.map(jnp.copy, self._teacher)  # a step takes what it is given
    self._state = params, optimizer.init(params)
    self._losses, self._tokens = [], 0

  @property
  def params(self) -> Params:
    """Until the next step."""
    return self._state[0]

  def train(self, batches: Iterable[np.ndarray]) -> Trained:
    for batch in batches:
      self._state, loss = _step(*self._options, self._state, self._teacher, batch)
      self._losses.append(loss)
      self._tokens += batch[:, :-1].size
    return Trained(self.params, self._tokens, [float(x) for x in jax.device_get(self._losses)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def _step(graph, policy, optimizer, loss, state, teacher, tokens):
  params, opt_state = state
  value_of = lambda params: mean_loss(graph, policy, loss, params, None, teacher, tokens)  # noqa: E731
  value, grads = jax.value_and_grad(value_of)(params)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return (optax.apply_updates(params, updates), opt_state), value


def mean_loss(
  graph: nnx.GraphDef,
  policy: Policy,
  loss: Loss,
  params: Any,
  states: States | None,
  teacher: Any,
  tokens: Int32[Array, "b t1"],
) -> Float32[Array, ""]:
  """Of the tokens that follow, nats per token. `teacher` are weights, read under bf16 for "kl"."""
  student = nnx.merge(graph, params)
  match loss:
    case "kl":
      target, _ = nnx.merge(graph, teacher)(tokens[:, :-1], TEACHER)
      logits, _ = student(tokens[:, :-1], policy, states=states)
      return jnp.mean(kl_divergence(jax.lax.stop_gradient(target), logits))
    case "cross_entropy":
      found, _ = student.cross_entropy(tokens[:, :-1], tokens[:, 1:], policy, states=states)
      return jnp.mean(found)
    case _:
      raise ValueError(f"{loss=} is not 'kl' or 'cross_entropy'")


def own_text(
  model: LanguageModel, count: int, length: int, key: jax.Array, greedy: tuple[int, ...] = _GREEDY
) -> Int32[Array, "count length"]:
  """LLM-QAT's data: what the model says in bf16 after a token drawn evenly from its vocabulary.

  The next j tokens are the likeliest, j being one of `greedy` in turn; all others are sampled from
  the whole distribution. Nothing ends a row.
  """
  if length < max(greedy) + 2:
    raise ValueError(f"{length=} leaves no token to sample after {max(greedy)} likeliest ones")
  first_key, greedy_key, key = jax.random.split(key, 3)
  vocab = model.embedding.num_embeddings
  first = jax.random.randint(first_key, (count, 1), 0, vocab)
  go_on = functools.partial(generate, model, policy=TEACHER)
  likeliest = go_on(
    first, jnp.ones(count, jnp.int32), key=greedy_key, max_new_tokens=max(greedy), temperature=0
  )
  begun = jnp.concatenate([first, likeliest.tokens], axis=1)
  lengths = 1 + jnp.resize(jnp.array(greedy, jnp.int32), count)
  # To the right, where a prompt ends; what is behind a row's own tokens comes before them.
  padding = begun.shape[1] - lengths
  prompts = align_left(begun, lengths, axis=1)
  sampled = go_on(prompts, lengths, key=key, max_new_tokens=length - 1 - min(greedy))
  return align_left(jnp.concatenate([prompts, sampled.tokens], axis=1), padding, axis=1)[:, :length]
