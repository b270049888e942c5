"""Cross-entropy of a language model: all logits at once, or a chunk of the vocabulary at a time."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from fp4jax import operands
from fp4jax.formats import is_format
from fp4jax.formats.format import block_axes
from fp4jax.models.policy import Numerics
from fp4jax.recipe import Recipe

HEAD = "head.logits"


def cross_entropy(
  x: Float[Array, "*t d"],
  w: Float[Array, "d vocab"],
  targets: Int[Array, "*t"],
  numerics: Numerics,
  vocab_chunk: int = 0,
) -> Float32[Array, "*t"]:
  """-log softmax(x @ w)[target] in nats; the product is the GEMM "head.logits".

  With 0 < vocab_chunk < vocab no more than that many logits of a token exist at once, in the
  backward pass neither, which computes them again. The numbers are those of all at once, up to the
  order of float32 sums, but for two: a stochastic recipe draws anew in each chunk, and a product in
  chunks is XLA's, for its operand x is float32, in which dx is summed over the chunks. A tap of a
  head that is quantized asks for whole operands, and so for all logits at once.

  Raises:
    ValueError: a vocab_chunk that cuts blocks of the head's recipe, or a recipe that reads w or the
      gradient of the logits as a whole.
  """
  vocab, recipe = w.shape[1], numerics.recipe(HEAD)
  tapped = numerics.taps is not None and bool(operands.quantized_roles(recipe))
  if tapped or not 0 < vocab_chunk < vocab:
    logits = numerics.matmul(HEAD, x, w).astype(jnp.float32)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - own

  _check_chunk(recipe, vocab_chunk)
  chunks = -(-vocab // vocab_chunk)
  columns = jnp.pad(w.astype(x.dtype), ((0, 0), (0, chunks * vocab_chunk - vocab)))
  columns = jnp.moveaxis(columns.reshape(-1, chunks, vocab_chunk), 1, 0)

  @functools.partial(jax.checkpoint, prevent_cse=False)  # no scan shares a body with its backward
  def of_chunk(x32, i, w):
    key = None if numerics.key is None else jax.random.fold_in(numerics.key, i)
    dot = Numerics(numerics.policy, key, None, None, numerics.layer, numerics.num_layers)
    dims = (((x32.ndim - 1,), (0,)), ((), ()))
    logits = dot.dot_general(HEAD)(x32, w, dims, preferred_element_type=x.dtype)
    place = jnp.arange(vocab_chunk) + i * vocab_chunk
    logits = jnp.where(place < vocab, logits.astype(jnp.float32), -jnp.inf)
    is_own = targets[..., None] == place
    return jax.nn.logsumexp(logits, axis=-1), jnp.sum(logits, axis=-1, where=is_own)

  x32 = x.astype(jnp.float32)
  of_chunks = lambda _, part: (None, of_chunk(x32, *part))  # noqa: E731
  _, (normalizers, own) = lax.scan(of_chunks, None, (jnp.arange(chunks), columns))
  return jax.nn.logsumexp(normalizers, axis=0) - jnp.sum(own, axis=0)


def _check_chunk(recipe: Recipe, vocab_chunk: int) -> None:
  """Refuses chunks in which blocks, and what else values share, would not be those of all."""
  if state := operands.init_state(recipe, (1, 1), (1, 1)):
    raise ValueError(
      f"{vocab_chunk=}: recipe {recipe.name!r} keeps state of the head in {[*state]}"
    )
  # What has columns, and the axis along which its blocks lie.
  axes = {"fprop.rhs": -2, "dgrad.lhs": -1, "dgrad.rhs": -1, "wgrad.rhs": -2}
  formats = {role: (recipe.operand(role).format, axis) for role, axis in axes.items()}
  formats["residual.rhs"] = recipe.residual.rhs, -2
  multiple = operands.contraction_multiple(recipe.dgrad)
  for role, (fmt, axis) in formats.items():
    whole = axis == -1 and recipe.operand(role).reads_whole_rows
    if is_format(fmt):
      whole |= fmt.block_shape is None or fmt.has_tensor_scale
      multiple = math.lcm(multiple, block_axes(fmt, axis).get(-1, 1))
    if whole:
      raise ValueError(
        f"{vocab_chunk=}: recipe {recipe.name!r} reads {role} over the whole vocabulary at once"
      )
  if vocab_chunk % multiple:
    raise ValueError(
      f"{vocab_chunk=} is not a multiple of {multiple}, the block that recipe {recipe.name!r} has"
      " along the vocabulary"
    )
