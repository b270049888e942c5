"""RMS norms that keep little for the backward pass."""

import jax
from flax import nnx
from jaxtyping import Array, Float


def apply_norm(norm: nnx.RMSNorm, x: Float[Array, "*t d"]) -> Float[Array, "*t d"]:
  """norm(x) in x's dtype; keeps x for the backward pass, not its float32 copies."""
  graph, params = nnx.split(norm)
  return jax.checkpoint(lambda p, x: nnx.merge(graph, p)(x).astype(x.dtype))(params, x)
