"""Keys and values of the tokens that a language model has read."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32


class KVCache(NamedTuple):
  """Of sequences that are padded on the left: token i of a row lies in its slot padding + i."""

  k: Float[Array, "*layer b s h d"]  # rotated
  v: Float[Array, "*layer b s h d"]
  padding: Int32[Array, " b"]  # slots in front that hold no token
  filled: Int32[Array, ""]  # slots that were written, of every row

  @property
  def length(self) -> int:
    """Slots of a row."""
    return self.k.shape[-3]

  def positions(self, t: int) -> Int32[Array, "b t"]:
    """Of the next t tokens, counted from the first real one; negative where there is padding."""
    return self.filled + jnp.arange(t, dtype=jnp.int32) - self.padding[:, None]

  def visible(self, t: int) -> Bool[Array, "b t s"]:
    """The slots that each of the next t tokens attends to: its own and the tokens before it."""
    slot = jnp.arange(self.length, dtype=jnp.int32)
    own = self.filled + jnp.arange(t, dtype=jnp.int32)[:, None]
    is_token = slot >= self.padding[:, None, None]
    # Padding sees itself: a softmax over nothing would be NaN.
    return (is_token & (slot <= own)) | (slot == own)

  def write(
    self, k: Float[Array, "*layer b t h d"], v: Float[Array, "*layer b t h d"]
  ) -> "KVCache":
    """With the keys and values of the next t tokens; `filled` is left as it is."""
    start = (*[0] * (k.ndim - 3), self.filled, 0, 0)
    return self._replace(
      k=lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), start),
      v=lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), start),
    )

  def grown(self, slots: int) -> "KVCache":
    """With so many more slots at the end."""
    grow = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, slots), (0, 0), (0, 0)])  # noqa: E731
    return self._replace(k=grow(self.k), v=grow(self.v))


def align_left(x: Array, padding: Int32[Array, " b"], axis: int) -> Array:
  """x (..., b, s, ...), s being `axis`, with each row moved to its start by its padding.

  What was padding comes last, where no causal model sees it from the tokens.
  """
  slots = jnp.arange(x.shape[axis], dtype=jnp.int32)
  of_row = (slots + padding[:, None]) % x.shape[axis]
  shape = [1] * x.ndim
  shape[axis - 1], shape[axis] = of_row.shape
  return jnp.take_along_axis(x, of_row.reshape(shape), axis=axis)
