"""A language model whose weights are packed as the forward pass of a policy reads them."""

from collections.abc import Iterator

import jax
from flax import nnx

from fp4jax.models.cross_entropy import HEAD
from fp4jax.models.language_model import LanguageModel
from fp4jax.models.matrix import Matrix
from fp4jax.models.policy import Policy
from fp4jax.packed_weights import pack_weights, why_not_packed
from fp4jax.recipe import Recipe


def pack_model(model: LanguageModel, policy: Policy) -> LanguageModel:
  """A copy for `generate` or a forward pass under `policy`, with the numbers of `model`: it has in
  codes and scales what the policy's recipes quantize. Other weights are shared with `model`, a head
  tied to the embedding among them.

  Raises:
    ValueError: a GEMM that has one recipe in one layer and another in another, or what
      `pack_weights` refuses.
  """
  copy = nnx.clone(model)
  for name, w, found in _matrices(copy, policy):
    recipe, *others = found
    if others:
      raise ValueError(
        f"{name!r} runs recipe {recipe.name!r} in one layer and {others[0].name!r} in another: its"
        " weights are packed in one format"
      )
    if recipe.operand("fprop.rhs").is_quantized:
      w.set_value(jax.jit(pack_weights, static_argnums=1)(w[...].astype(model.dtype), recipe))
  return copy


def can_pack(model: LanguageModel, policy: Policy) -> bool:
  """Whether `pack_model` takes them."""
  for _, w, (recipe, *others) in _matrices(model, policy):
    quantizes = recipe.operand("fprop.rhs").is_quantized
    if others or (quantizes and why_not_packed(recipe, w.shape)):
      return False
  return True


def _matrices(model: LanguageModel, policy: Policy) -> Iterator[tuple[str, Matrix, list[Recipe]]]:
  """Each by the name of its GEMM, with the recipes of its layers."""
  n = model.num_layers
  places = {name: (w, range(n)) for name, w in model.blocks.matrices.items()}
  places |= {} if model.w_head is None else {HEAD: (model.w_head, [n])}
  for name, (w, layers) in places.items():
    yield name, w, list({policy.recipe(name, layer, n): None for layer in layers})
