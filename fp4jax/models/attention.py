"""Causal grouped-query attention with rotary positions."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fp4jax.implementation import default_device
from fp4jax.models.kv_cache import KVCache
from fp4jax.models.matrix import Matrix
from fp4jax.models.norm import apply_norm
from fp4jax.models.policy import Numerics, Weights


class Attention(nnx.Module):
  """Every key and value head serves num_heads / num_kv_heads query heads.

  With qk_norm each head of q and k is normed before it turns (Qwen3, arXiv 2505.09388).
  """

  def __init__(
    self,
    d_model: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    out_scale: float,
    rngs: nnx.Rngs,
    qk_norm: bool = False,
    norm_eps: float = 1e-6,
  ):
    if num_heads % num_kv_heads:
      raise ValueError(f"{num_heads=} is not a multiple of {num_kv_heads=}")
    if head_dim % 2:
      raise ValueError(f"{head_dim=} is odd; rotary positions turn pairs")
    self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
    self.rope_theta = rope_theta
    fan_in = nnx.initializers.lecun_normal()
    qkv = (num_heads + 2 * num_kv_heads) * head_dim
    self.w_qkv = Matrix(fan_in(rngs.params(), (d_model, qkv), jnp.float32))
    self.w_out = Matrix(
      out_scale * fan_in(rngs.params(), (num_heads * head_dim, d_model), jnp.float32)
    )
    new_norm = lambda: nnx.RMSNorm(head_dim, epsilon=norm_eps, rngs=rngs)  # noqa: E731
    self.q_norm, self.k_norm = (new_norm(), new_norm()) if qk_norm else (None, None)

  @property
  def matrices(self) -> dict[str, Matrix]:
    return {"attention.qkv": self.w_qkv, "attention.out": self.w_out}

  @property
  def gemms(self) -> Weights:
    return {
      "attention.qkv": self.w_qkv.shape,
      "scores.qk": (self.head_dim, 1),
      "scores.av": (1, self.head_dim),
      "attention.out": self.w_out.shape,
    }

  def __call__(self, x: Float[Array, "b t d"], numerics: Numerics) -> Float[Array, "b t d"]:
    q, k, v = self._heads(x, numerics)
    return self._output(attend(q, k, v, numerics), numerics)

  def decode(
    self, x: Float[Array, "b t d"], cache: KVCache, numerics: Numerics
  ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h e"], Float[Array, "b t h e"]]:
    """Of the next t tokens of each row, which attend to those in `cache`; their keys and values."""
    t = x.shape[1]
    q, k, v = self._heads(x, numerics, cache.positions(t))
    cache = cache.write(k, v)
    values = attend(q, cache.k, cache.v, numerics, cache.visible(t))
    return self._output(values, numerics), k, v

  def _heads(self, x, numerics, positions=None):
    """q of each group of heads, k and v."""
    b, t, _ = x.shape
    groups = self.num_heads // self.num_kv_heads
    qkv = numerics.matmul("attention.qkv", x, self.w_qkv.get_value())
    q, k, v = jnp.split(
      qkv.reshape(b, t, -1, self.head_dim),
      [self.num_heads, self.num_heads + self.num_kv_heads],
      axis=2,
    )
    if self.q_norm is not None:
      q, k = apply_norm(self.q_norm, q), apply_norm(self.k_norm, k)
    q, k = (rotate(x, self.rope_theta, positions) for x in (q, k))
    return q.reshape(b, t, self.num_kv_heads, groups, self.head_dim), k, v

  def _output(self, values, numerics):
    return numerics.matmul(
      "attention.out", values.reshape(*values.shape[:2], -1), self.w_out.get_value()
    )


def attend(
  q: Float[Array, "b t h g d"],
  k: Float[Array, "b s h d"],
  v: Float[Array, "b s h d"],
  numerics: Numerics,
  visible: Bool[Array, "b t s"] | None = None,
) -> Float[Array, "b t h g d"]:
  """Softmax attention of g query heads to each of h key heads; the softmax in float32. Each token
  attends to those that are `visible` to it, one at least; None: to itself and those before it.

  What is kept for the backward pass grows with t, not with t x t. Products whose recipes only cast,
  to the dtype that q, k and v have, are `jax.nn.dot_product_attention`.
  """
  plain = {numerics.recipe(name).plain_dtype for name in ("scores.qk", "scores.av")}
  if plain != {q.dtype}:
    return _attend_as_recipes_say(q, k, v, numerics, visible)
  if visible is not None:
    return _fused(q, k, v, "xla", visible)
  match fused_implementation(q.dtype, q.shape[-1], q.shape[1]):
    case "cudnn":
      return _fused(q, k, v, "cudnn")  # keeps its result and the log-sum-exp of each row
    case "xla":
      return jax.checkpoint(_fused, static_argnums=3)(q, k, v, "xla")


def fused_implementation(dtype: jnp.dtype, head_dim: int, tokens: int) -> Literal["cudnn", "xla"]:
  """Of `jax.nn.dot_product_attention`: cuDNN's, which makes no t x t array, on a GPU in bfloat16
  with 8 to 128 features a head, a multiple of 8; else XLA's, so too for an odd number of tokens,
  whose backward pass cuDNN's refuses.

  cuDNN's backward pass adds into dq in any order, unless XLA's flag
  `xla_gpu_exclude_nondeterministic_ops` (or `xla_gpu_deterministic_ops`) is set: JAX hands cuDNN a
  fixed algorithm and no choice of its own (jax/_src/cudnn/fused_attention_stablehlo.py), XLA asks
  cuDNN for its deterministic one under either flag.
  """
  served = dtype == jnp.bfloat16 and head_dim <= 128 and head_dim % 8 == 0 and tokens % 2 == 0
  return "cudnn" if served and default_device().platform == "gpu" else "xla"


def _fused(q, k, v, implementation, visible=None):
  b, t, h, g, d = q.shape
  with jax.default_matmul_precision("highest"):  # a GPU would round float32 to TF32
    out = jax.nn.dot_product_attention(
      q.reshape(b, t, h * g, d),
      k,
      v,
      mask=None if visible is None else visible[:, None],
      is_causal=visible is None,
      implementation=implementation,
    )
  return out.reshape(q.shape)


@jax.checkpoint  # keeps q, k and v for the backward pass, not the t x t probabilities
def _attend_as_recipes_say(q, k, v, numerics, visible=None):
  """In both products einsum makes k or v the lhs: "fprop.lhs" of a tap is theirs."""
  t, d = q.shape[1], q.shape[-1]
  scores = jnp.einsum(
    "bqhgd,bkhd->bhgqk",
    q,
    k,
    preferred_element_type=jnp.float32,
    _dot_general=numerics.dot_general("scores.qk"),
  )
  mask = jnp.tril(jnp.ones((t, t), bool)) if visible is None else visible[:, None, None]
  scores = jnp.where(mask, scores * d**-0.5, -jnp.inf)
  weights = nnx.softmax(scores, axis=-1).astype(q.dtype)
  return jnp.einsum("bhgqk,bkhd->bqhgd", weights, v, _dot_general=numerics.dot_general("scores.av"))


def rotate(
  x: Float[Array, "b t h d"], theta: float, positions: Int[Array, "b t"] | None = None
) -> Float[Array, "b t h d"]:
  """Rotary position embedding: pair (i, i + d/2) of position t turns by t * theta^(-2i/d).

  Without `positions` they are 0, 1, 2, ... in every row.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  positions = jnp.arange(x.shape[1], dtype=jnp.float32) if positions is None else positions
  angle = positions.astype(jnp.float32)[..., None, None] * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
