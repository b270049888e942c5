"""Causal grouped-query attention with rotary positions.

A token's output may depend on nothing after the token. A scale that tokens share would break that:
a large value to come would move it, and with it the codes of values before. So the two products of
attention do not run a policy's recipe `scores` as linear layers run theirs:

- q k^T, "scores.qk", reads both operands as activations, with scales along the head's features.
  What would share a scale even so is refused: 2-D blocks, one scale for a whole array.
- Probabilities times v, "scores.av", sums over tokens, and so blocks would lie along them. It never
  quantizes: it is bf16 where the recipe quantizes anything, else it runs the recipe.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fp4jax import recipes
from fp4jax.formats import BlockFormat
from fp4jax.models.policy import Numerics
from fp4jax.recipe import Recipe, Residual

_LOOKS_AHEAD = "the output of a causal model would depend on tokens to come"


class Attention(nnx.Module):
  """Every key and value head serves num_heads / num_kv_heads query heads."""

  gemms = ("attention.qkv", "scores.qk", "scores.av", "attention.out")

  def __init__(
    self,
    d_model: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    out_scale: float,
    rngs: nnx.Rngs,
  ):
    if num_heads % num_kv_heads:
      raise ValueError(f"{num_heads=} is no multiple of {num_kv_heads=}")
    if head_dim % 2:
      raise ValueError(f"{head_dim=} is odd; rotary positions turn pairs")
    self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
    self.rope_theta = rope_theta
    fan_in = nnx.initializers.lecun_normal()
    qkv = (num_heads + 2 * num_kv_heads) * head_dim
    self.w_qkv = nnx.Param(fan_in(rngs.params(), (d_model, qkv), jnp.float32))
    self.w_out = nnx.Param(
      out_scale * fan_in(rngs.params(), (num_heads * head_dim, d_model), jnp.float32)
    )

  def __call__(self, x: Float[Array, "b t d"], numerics: Numerics) -> Float[Array, "b t d"]:
    b, t, _ = x.shape
    groups = self.num_heads // self.num_kv_heads
    qkv = numerics.matmul("attention.qkv", x, self.w_qkv[...])
    q, k, v = jnp.split(
      qkv.reshape(b, t, -1, self.head_dim),
      [self.num_heads, self.num_heads + self.num_kv_heads],
      axis=2,
    )
    q, k = rotate(q, self.rope_theta), rotate(k, self.rope_theta)
    q = q.reshape(b, t, self.num_kv_heads, groups, self.head_dim)
    values = attend(q, k, v, numerics)
    return numerics.matmul("attention.out", values.reshape(b, t, -1), self.w_out[...])


@jax.checkpoint  # keeps q, k and v for the backward pass, not the t x t probabilities
def attend(
  q: Float[Array, "b t h g d"],
  k: Float[Array, "b t h d"],
  v: Float[Array, "b t h d"],
  numerics: Numerics,
) -> Float[Array, "b t h g d"]:
  """Causal softmax attention of g query heads to each of h key heads; the softmax in float32.

  In both products einsum makes k or v the lhs: "fprop.lhs" of a tap is theirs.
  """
  t, d = q.shape[1], q.shape[-1]
  recipe = numerics.policy.scores
  scores = jnp.einsum(
    "bqhgd,bkhd->bhgqk",
    q,
    k,
    preferred_element_type=jnp.float32,
    _dot_general=_causal_dot_general(numerics, "scores.qk", recipe_of_qk(recipe)),
  )
  causal = jnp.tril(jnp.ones((t, t), bool))
  scores = jnp.where(causal, scores * d**-0.5, -jnp.inf)
  weights = nnx.softmax(scores, axis=-1).astype(q.dtype)
  return jnp.einsum(
    "bhgqk,bkhd->bqhgd",
    weights,
    v,
    _dot_general=_causal_dot_general(numerics, "scores.av", recipe_of_av(recipe)),
  )


def recipe_of_qk(recipe: Recipe) -> Recipe:
  """`recipe` with rhs read and kept as its activation, lhs, is: k is not a weight.

  What dgrad contracts are tokens, which only gradients feel.
  """
  lhs = recipe.fprop.lhs
  backward = {"source": recipe.wgrad.lhs.source, "transform": recipe.dgrad.lhs.transform}
  both = dataclasses.replace(
    recipe,
    fprop=dataclasses.replace(recipe.fprop, rhs=lhs),
    dgrad=dataclasses.replace(recipe.dgrad, rhs=dataclasses.replace(lhs, **backward)),
    residual=Residual(lhs=recipe.residual.lhs, rhs=recipe.residual.lhs),
  )
  return both if both == recipe else dataclasses.replace(both, name=f"{recipe.name}[q k^T]")


def recipe_of_av(recipe: Recipe) -> Recipe:
  """`recipe` where it quantizes nothing, else BF16."""
  gemms = (recipe.fprop, recipe.dgrad, recipe.wgrad)
  quantizes = any(gemm.lhs.is_quantized or gemm.rhs.is_quantized for gemm in gemms)
  return recipes.BF16 if quantizes else recipe


def check_causal(name: str, recipe: Recipe) -> None:
  """Refuses a recipe under which the product `name` of causal attention would look ahead."""
  for side in ("lhs", "rhs"):
    spec = getattr(recipe.fprop, side)
    if not spec.is_quantized:
      continue
    if name == "scores.av":
      raise ValueError(
        f"{name} sums over tokens, along which recipe {recipe.name!r} has blocks of"
        f" {spec.format.name}: {_LOOKS_AHEAD}"
      )
    kept = (getattr(recipe.residual, side),) if spec.source == "residual" else ()
    for fmt in (spec.format, *kept):
      if shared := _shared_by_tokens(fmt):
        raise ValueError(
          f"{name}: recipe {recipe.name!r} reads fprop.{side} in {fmt.name}, which has {shared}:"
          f" {_LOOKS_AHEAD}"
        )


def _shared_by_tokens(fmt: BlockFormat) -> str | None:
  if fmt.block_shape is None or fmt.has_tensor_scale:
    return "one scale for the whole array"
  return "blocks of more than one token" if len(fmt.block_shape) == 2 else None


def _causal_dot_general(numerics: Numerics, name: str, recipe: Recipe) -> Callable[..., Array]:
  check_causal(name, recipe)
  policy = dataclasses.replace(numerics.policy, scores=recipe)
  return dataclasses.replace(numerics, policy=policy).dot_general(name)


def rotate(x: Float[Array, "b t h d"], theta: float) -> Float[Array, "b t h d"]:
  """Rotary position embedding: pair (i, i + d/2) of position t turns by t * theta^(-2i/d)."""
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
