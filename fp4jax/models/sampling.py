"""How the next token is drawn from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32


def sample(
  logits: Float32[Array, "b vocab"],
  keys: jax.Array,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> Int32[Array, " b"]:
  """A token of each row from softmax(logits / temperature), cut to its nucleus.

  Temperature 0 takes the largest logit, the first of equals. Each row draws by its own of `keys`.
  """
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = nucleus(logits / temperature, top_p)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: Float32[Array, "b vocab"], top_p: float) -> Float32[Array, "b vocab"]:
  """Logits with -inf for all but the nucleus: the fewest tokens, likeliest first, whose
  probabilities sum to top_p or more (arXiv 1904.09751). Of equals the first is the likelier."""
  if top_p == 1:
    return logits
  order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
  p = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
  is_kept = jnp.cumsum(p, axis=-1) - p < top_p  # what comes before a token does not suffice
  rank = jnp.argsort(order, axis=-1)
  return jnp.where(jnp.take_along_axis(is_kept, rank, axis=-1), logits, -jnp.inf)
