"""Decoder-only language model: attention and mixture-of-experts blocks, pre-norm."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int, Int32

from fp4jax import operands
from fp4jax.models import attention, moe
from fp4jax.models.cross_entropy import HEAD, cross_entropy
from fp4jax.models.kv_cache import KVCache
from fp4jax.models.matrix import Matrix
from fp4jax.models.norm import apply_norm
from fp4jax.models.policy import Numerics, Policy, Weights
from fp4jax.models.remat import rematerialize
from fp4jax.quantized_array import QuantizedArray
from fp4jax.recipe import Residual


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
  norm_topk_prob: bool = True  # a token's weights of its experts sum to 1
  rope_theta: float = 10_000.0
  qk_norm: bool = False  # each head of q and k is normed before it turns
  norm_eps: float = 1e-6  # of every RMS norm, added to the mean square
  tied_embedding: bool = False  # the head is the embedding table, which weight decay leaves alone
  dtype: str = "bfloat16"  # of activations; master weights are float32
  remat: str = "none"  # what the backward pass computes again, see `fp4jax.models.remat`
  vocab_chunk: int = 0  # logits of a token that the loss holds at once; 0: all of them
  unroll: bool = False  # no loop over the layers: smaller and faster steps, slower to compile


# What is said of each layer; the mean over layers is said of the rest.
_BY_LAYER = ("expert_load", "experts", "k", "v")

# Of quantizers: by segment of the layers, "0:2", and "head"; then by GEMM, then by role.
States = dict[str, dict[str, operands.State]]


class Block(nnx.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x))."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config
    out_scale = (2 * c.num_layers) ** -0.5  # keeps the residual stream's variance at depth
    self.attention_norm = nnx.RMSNorm(c.d_model, epsilon=c.norm_eps, rngs=rngs)
    self.attention = attention.Attention(
      c.d_model,
      c.num_heads,
      c.num_kv_heads,
      c.head_dim,
      c.rope_theta,
      out_scale,
      rngs,
      c.qk_norm,
      c.norm_eps,
    )
    self.feed_forward_norm = nnx.RMSNorm(c.d_model, epsilon=c.norm_eps, rngs=rngs)
    if c.num_experts:
      self.feed_forward = moe.MoE(
        c.d_model,
        c.d_ff,
        c.num_experts,
        c.top_k,
        c.d_ff_shared,
        out_scale,
        rngs,
        c.norm_topk_prob,
      )
    else:
      self.feed_forward = moe.FeedForward(c.d_model, c.d_ff, out_scale, rngs)

  @property
  def matrices(self) -> dict[str, Matrix]:
    """The weights of each GEMM that has some."""
    return self.attention.matrices | self.feed_forward.matrices

  @property
  def gemms(self) -> Weights:
    return self.attention.gemms | self.feed_forward.gemms

  def __call__(
    self,
    x: Float[Array, "b t d"],
    numerics: Numerics,
    cache: KVCache | None = None,
    experts: Int[Array, "b t k"] | None = None,
  ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
    """What follows the tokens, and what is said of them: with a `cache` their "k" and "v", and of a
    mixture of experts the routing, which `experts` prescribe where they are given."""
    said = {}
    with jax.named_scope("attention"):
      normed = apply_norm(self.attention_norm, x)
      if cache is None:
        x = x + self.attention(normed, numerics)
      else:
        out, said["k"], said["v"] = self.attention.decode(normed, cache, numerics)
        x = x + out
    with jax.named_scope("feed_forward"):
      normed = checkpoint_name(apply_norm(self.feed_forward_norm, x), "feed_forward.x")
      if not isinstance(self.feed_forward, moe.MoE):
        return x + self.feed_forward(normed, numerics), said
      out, routing = self.feed_forward(normed, numerics, experts)
      x = x + out
    said |= {
      "load_balance_loss": routing.load_balance_loss,
      "router_z_loss": routing.z_loss,
      "expert_load": routing.load,
      "experts": routing.experts.reshape(*x.shape[:2], -1),
    }
    return x, said if routing.dropped is None else said | {"dropped": routing.dropped}


class LanguageModel(nnx.Module):
  """Tokens to logits. Its blocks are one `Block` with a leading layer axis, run by a scan over
  each segment of the layers in which the policy is one, or with `unroll` one after the other.

  The model does not know recipes: the policy is an argument of each call, so the same weights
  run under any of them.
  """

  def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
    self.dtype = jnp.dtype(config.dtype)
    self.num_layers = config.num_layers
    self.remat, self.vocab_chunk, self.unroll = config.remat, config.vocab_chunk, config.unroll
    self.is_mixture, self.top_k = config.num_experts > 0, config.top_k
    self.embedding = nnx.Embed(vocab_size, config.d_model, rngs=rngs)
    make_blocks = nnx.vmap(lambda rngs: Block(config, rngs), in_axes=0, out_axes=0)
    self.blocks = make_blocks(rngs.split(config.num_layers))
    self.norm = nnx.RMSNorm(config.d_model, epsilon=config.norm_eps, rngs=rngs)
    if config.tied_embedding:
      self.w_head = None
    else:
      self.w_head = Matrix(
        nnx.initializers.lecun_normal()(rngs.params(), (config.d_model, vocab_size), jnp.float32)
      )

  @property
  def head_weights(self) -> Float[Array, "d vocab"] | QuantizedArray:
    """Of the GEMM "head.logits"; packed in what `pack_model` returns."""
    return self.embedding.embedding[...].T if self.w_head is None else self.w_head.get_value()

  @property
  def head_shape(self) -> tuple[int, int]:
    """Of `head_weights`."""
    vocab, d = self.embedding.embedding.shape
    return d, vocab

  def __call__(
    self,
    tokens: Int[Array, "b t"],
    policy: Policy,
    *,
    key: jax.Array | None = None,
    taps: dict[str, Float32[Array, "... role field"]] | None = None,
    states: States | None = None,
    routing: Int[Array, "layer b t k"] | None = None,
    return_routing: bool = False,
  ) -> tuple[Float32[Array, "b t vocab"], dict[str, Array]]:
    """Logits, and of the routing (nothing without experts) the losses, averaged over layers, the
    share of the choices by layer and expert, and the share that was dropped, if any can be.

    Args:
      tokens: ids below the vocabulary's size.
      policy: the recipe of each GEMM of each layer.
      key: for policies that round stochastically.
      taps: from `new_taps`; their gradient holds the error summary of every operand.
      states: from `new_states`, for policies with state; their gradient is the next states.
      routing: the experts that each token goes to, such as those of an earlier call; how they are
        weighted is computed here. None: those that the router chooses.
      return_routing: also say which they are, (layer, b, t, k) as "experts".
    Raises:
      ValueError: a routing of another shape, or one for a model without experts.
    """
    x, head, said = self._hidden(
      tokens, policy, key, taps, states, routing=routing, return_routing=return_routing
    )
    with jax.named_scope("head"):
      return head.matmul(HEAD, x, self.head_weights).astype(jnp.float32), said

  def cross_entropy(
    self,
    tokens: Int[Array, "b t"],
    targets: Int[Array, "b t"],
    policy: Policy,
    *,
    key: jax.Array | None = None,
    taps: dict[str, Float32[Array, "... role field"]] | None = None,
    states: States | None = None,
    routing: Int[Array, "layer b t k"] | None = None,
    return_routing: bool = False,
  ) -> tuple[Float32[Array, "b t"], dict[str, Array]]:
    """Of each token in nats, and what a call says of the routing, whose other arguments it takes.

    The logits are computed `vocab_chunk` at a time, see `fp4jax.models.cross_entropy`.
    """
    x, head, said = self._hidden(
      tokens, policy, key, taps, states, routing=routing, return_routing=return_routing
    )
    with jax.named_scope("head"):
      return cross_entropy(x, self.head_weights, targets, head, self.vocab_chunk), said

  def new_cache(self, padding: Int32[Array, " b"], length: int) -> KVCache:
    """An empty one for `length` slots of each row, of which the first `padding` hold no token."""
    of = self.blocks.attention
    shape = (self.num_layers, len(padding), length, of.num_kv_heads, of.head_dim)
    return KVCache(
      jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype), padding, jnp.int32(0)
    )

  def decode(
    self,
    tokens: Int[Array, "b t"],
    cache: KVCache,
    policy: Policy,
    *,
    key: jax.Array | None = None,
    states: States | None = None,
  ) -> tuple[Float32[Array, "b vocab"], KVCache, Int32[Array, "layer b t k"] | None]:
    """Logits after the last of the next t tokens, which attend to those in the cache; the cache
    with them; and the experts that they went to, None without experts. `states` stay as they are.

    The cache must have room left for t tokens; of its length this is checked, of what is filled it
    can't be under jit.

    Raises:
      ValueError: a batch that is not the cache's, or more tokens than it has slots.
    """
    b, t = tokens.shape
    if b != len(cache.padding) or t > cache.length:
      raise ValueError(
        f"tokens {tokens.shape} do not fit a cache of {len(cache.padding)} rows of {cache.length}"
        " slots"
      )
    x, head, said = self._hidden(
      tokens, policy, key, None, states, cache=cache, return_routing=self.is_mixture
    )
    with jax.named_scope("head"):
      logits = head.matmul(HEAD, x[:, -1], self.head_weights).astype(jnp.float32)
    # Of all layers at once: a scan that took and returned the cache would copy it for each token.
    cache = cache.write(said["k"], said["v"])
    return logits, cache._replace(filled=cache.filled + t), said.get("experts")

  def _hidden(
    self, tokens, policy, key, taps, states, routing=None, return_routing=False, cache=None
  ):
    """What the head reads, its numerics, and what is said of the routing and the cache."""
    self._check_routing(tokens, routing, return_routing)
    x = self.embedding(tokens).astype(self.dtype)
    graph, blocks = nnx.split(self.blocks)
    keys = None if key is None else jax.random.split(key, self.num_layers + 1)
    block_taps = None if taps is None else {k: v for k, v in taps.items() if v.ndim == 3}
    kv = None if cache is None else (cache.k, cache.v)
    inputs = (blocks, None if keys is None else keys[:-1], block_taps, kv, routing)
    n, said, states = self.num_layers, [], states or {}
    for first, stop in policy.segments(self.block_gemms, n):

      def block(x, inputs, layer=first):
        (params, key, taps, kv, experts), states = inputs
        numerics = Numerics(policy, key, taps, states, layer, n)
        own = None if cache is None else cache._replace(k=kv[0], v=kv[1])
        x, said = nnx.merge(graph, params)(x, numerics, own, experts)
        return x, {name: v for name, v in said.items() if return_routing or name != "experts"}

      segment = inputs
      if stop - first < n:  # a slice of everything would be a copy
        segment = jax.tree.map(operator.itemgetter(slice(first, stop)), inputs)
      recipe = policy.recipe("experts.w13", first, n)
      packed = recipe.residual if self.is_mixture else Residual()
      block = rematerialize(block, self.remat, packed, looped=not self.unroll)
      run = _one_after_the_other if self.unroll else lax.scan
      x, of_blocks = run(block, x, (segment, states.get(_layers(first, stop), {})))
      said.append(of_blocks)
    head = Numerics(policy, None if keys is None else keys[-1], taps, states.get("head"), n, n)
    with jax.named_scope("head"):
      x = apply_norm(self.norm, x)
    said = jax.tree.map(lambda *parts: jnp.concatenate(parts), *said)
    said = {
      name: of_layers if name in _BY_LAYER else jnp.mean(of_layers)
      for name, of_layers in said.items()
    }
    return x, head, said

  def _check_routing(self, tokens, routing, return_routing):
    if (routing is not None or return_routing) and not self.is_mixture:
      raise ValueError("routing of a model whose num_experts is 0")
    expected = (self.num_layers, *tokens.shape, self.top_k)
    if routing is not None and routing.shape != expected:
      raise ValueError(f"routing {routing.shape} is not (layer, b, t, k), here {expected}")

  def new_taps(self) -> dict[str, Float32[Array, "... role field"]]:
    """A tap for each GEMM by name; those of the blocks have a leading layer axis."""
    tap = operands.new_tap()
    layers = jnp.broadcast_to(tap, (self.num_layers, *tap.shape))
    return dict.fromkeys(self.block_gemms, layers) | {HEAD: tap}

  def new_states(self, policy: Policy) -> States:
    """The first states of the quantizers that have one; none may depend on how many tokens come.

    By segment of equal policy, then by GEMM, with a leading layer axis; {} when none has a state.
    """
    n, states = self.num_layers, {}
    for first, stop in policy.segments(self.block_gemms, n):
      own = _new_states(policy, self.block_gemms, first, n)
      stack = lambda x, layers=stop - first: jnp.broadcast_to(x, (layers, *x.shape))  # noqa: E731
      states[_layers(first, stop)] = jax.tree.map(stack, own)
    states["head"] = _new_states(policy, {HEAD: self.head_shape}, n, n)
    return {part: own for part, own in states.items() if own}

  @property
  def block_gemms(self) -> Weights:
    """Shapes of the weights of each GEMM of one block."""
    graph, params = nnx.split(self.blocks)
    one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
    return nnx.merge(graph, one).gemms


def _one_after_the_other(block, x, layers):
  """What `lax.scan` returns. A scan copies what its backward pass reads into arrays of all layers
  and out of them again, and has room for all layers' gradients through all of the backward pass.

  Its own `unroll` concatenates the gradients, which cuts the optimizer's one pass in three.
  """
  said = []
  for i in range(len(jax.tree.leaves(layers)[0])):
    x, own = block(x, jax.tree.map(operator.itemgetter(i), layers))
    said.append(own)
  return x, jax.tree.map(lambda *own: jnp.stack(own), *said)


def _layers(first: int, stop: int) -> str:
  return f"{first}:{stop}"


def _new_states(policy, gemms, layer, num_layers):
  """Of one layer, by GEMM."""
  states = {
    name: operands.init_state(policy.recipe(name, layer, num_layers), (1, shape[-2]), shape)
    for name, shape in gemms.items()
  }
  return {name: state for name, state in states.items() if state}
