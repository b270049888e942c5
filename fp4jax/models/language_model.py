"""Decoder-only language model: attention and mixture-of-experts blocks, pre-norm."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from fp4jax import operands
from fp4jax.models import attention, moe
from fp4jax.models.policy import Numerics, Policy


@dataclasses.dataclass
class ModelConfig:
  """Shape of a language model; widths in features."""

  num_layers: int = 2
  d_model: int = 128
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 32
  num_experts: int = 8  # 0: one dense feed-forward block a layer
  top_k: int = 2
  d_ff: int = 128  # of one expert, or of the dense block
  d_ff_shared: int = 0  # of the shared expert; 0: none
  rope_theta: float = 10_000.0
  dtype: str = "bfloat16"  # of activations; master weights are float32


class Block(nnx.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x))."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config
    out_scale = (2 * c.num_layers) ** -0.5  # keeps the residual stream's variance at depth
    self.attention_norm = nnx.RMSNorm(c.d_model, rngs=rngs)
    self.attention = attention.Attention(
      c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.rope_theta, out_scale, rngs
    )
    self.feed_forward_norm = nnx.RMSNorm(c.d_model, rngs=rngs)
    if c.num_experts:
      self.feed_forward = moe.MoE(
        c.d_model, c.d_ff, c.num_experts, c.top_k, c.d_ff_shared, out_scale, rngs
      )
    else:
      self.feed_forward = moe.FeedForward(c.d_model, c.d_ff, out_scale, rngs)

  def __call__(
    self, x: Float[Array, "b t d"], numerics: Numerics
  ) -> tuple[Float[Array, "b t d"], dict[str, Float32[Array, ""]]]:
    x = x + self.attention(_norm(self.attention_norm, x), numerics)
    normed = _norm(self.feed_forward_norm, x)
    if not isinstance(self.feed_forward, moe.MoE):
      return x + self.feed_forward(normed, numerics), {}
    out, routing = self.feed_forward(normed, numerics)
    return x + out, {
      "load_balance_loss": routing.load_balance_loss,
      "router_z_loss": routing.z_loss,
    }


def _norm(norm: nnx.RMSNorm, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
  """norm(x) in x's dtype; keeps x for the backward pass, not its float32 copies."""
  graph, params = nnx.split(norm)
  return jax.checkpoint(lambda p, x: nnx.merge(graph, p)(x).astype(x.dtype))(params, x)


class LanguageModel(nnx.Module):
  """Tokens to logits. Its blocks are one `Block` with a leading layer axis, run by a scan over
  each segment of the layers in which the policy is one.

  The model does not know recipes: the policy is an argument of each call, so the same weights
  run under any of them.
  """

  def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
    self.dtype = jnp.dtype(config.dtype)
    self.num_layers = config.num_layers
    self.embedding = nnx.Embed(vocab_size, config.d_model, rngs=rngs)
    make_blocks = nnx.vmap(lambda rngs: Block(config, rngs), in_axes=0, out_axes=0)
    self.blocks = make_blocks(rngs.split(config.num_layers))
    self.norm = nnx.RMSNorm(config.d_model, rngs=rngs)
    self.w_head = nnx.Param(
      nnx.initializers.lecun_normal()(rngs.params(), (config.d_model, vocab_size), jnp.float32)
    )

  def __call__(
    self,
    tokens: Int[Array, "b t"],
    policy: Policy,
    *,
    key: jax.Array | None = None,
    taps: dict[str, operands.Tap] | None = None,
  ) -> tuple[Float32[Array, "b t vocab"], dict[str, Float32[Array, ""]]]:
    """Logits, and the routing losses averaged over layers (none without experts).

    Args:
      tokens: ids below the vocabulary's size.
      policy: the recipe of each GEMM of each layer.
      key: for policies that round stochastically.
      taps: from `new_taps`; their gradient holds the error summary of every operand.
    """
    x = self.embedding(tokens).astype(self.dtype)
    graph, blocks = nnx.split(self.blocks)
    keys = None if key is None else jax.random.split(key, self.num_layers + 1)
    block_taps = None if taps is None else {k: v for k, v in taps.items() if v.ndim == 3}
    inputs = (blocks, None if keys is None else keys[:-1], block_taps)
    n, losses = self.num_layers, []
    for first, stop in policy.segments(self._block_gemms(), n):

      def block(x, inputs, layer=first):
        params, key, taps = inputs
        return nnx.merge(graph, params)(x, Numerics(policy, key, taps, layer, n))

      segment = inputs
      if stop - first < n:  # a slice of everything would be a copy
        segment = jax.tree.map(operator.itemgetter(slice(first, stop)), inputs)
      x, of_blocks = lax.scan(block, x, segment)
      losses.append(of_blocks)
    x = _norm(self.norm, x)
    head = Numerics(policy, None if keys is None else keys[-1], taps, n, n)
    logits = head.matmul("head.logits", x, self.w_head[...]).astype(jnp.float32)
    losses = jax.tree.map(lambda *parts: jnp.concatenate(parts), *losses)
    return logits, {name: jnp.mean(loss) for name, loss in losses.items()}

  def new_taps(self) -> dict[str, operands.Tap]:
    """A tap for each GEMM by name; those of the blocks have a leading layer axis."""
    tap = operands.new_tap()
    layers = jnp.broadcast_to(tap, (self.num_layers, *tap.shape))
    return dict.fromkeys(self._block_gemms(), layers) | {"head.logits": tap}

  def _block_gemms(self) -> tuple[str, ...]:
    return (*self.blocks.attention.gemms, *self.blocks.feed_forward.gemms)
