"""SwiGLU feed-forward blocks: dense, and a dropless mixture of experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from fp4jax.models.matrix import Matrix
from fp4jax.models.policy import Numerics, Weights
from fp4jax.swiglu import swiglu


class Routing(NamedTuple):
  """Which experts each token goes to, with what weight, and what that costs."""

  experts: Int[Array, "token k"]
  weights: Float32[Array, "token k"]  # of one token sum to 1, or its probabilities as they are
  load: Float32[Array, " e"]  # share of the choices that fall on each expert
  load_balance_loss: Float32[Array, ""]
  z_loss: Float32[Array, ""]
  dropped: Float32[Array, ""] | None = None  # share of the choices, where experts have a capacity


def route(
  logits: Float32[Array, "token e"],
  top_k: int,
  norm_topk_prob: bool = True,
  experts: Int[Array, "token k"] | None = None,
) -> Routing:
  """Top-k softmax routing, with `experts` to those; with norm_topk_prob the weights of a token are
  made to sum to 1.

  The load-balancing loss is that of arXiv 2101.03961, e * sum_i load_i * (mean probability of i),
  1 when balanced; the z loss that of arXiv 2202.08906.
  """
  num_experts = logits.shape[-1]
  probabilities = jax.nn.softmax(logits, axis=-1)
  if experts is None:
    weights, experts = jax.lax.top_k(probabilities, top_k)
  else:
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
  if norm_topk_prob:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  load = jnp.bincount(experts.ravel(), length=num_experts) / experts.size
  return Routing(
    experts,
    weights,
    load,
    num_experts * jnp.sum(load * jnp.mean(probabilities, axis=0)),
    jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
  )


class FeedForward(nnx.Module):
  """A dense SwiGLU block."""

  def __init__(
    self, d_model: int, d_ff: int, out_scale: float, rngs: nnx.Rngs, prefix: str = "experts."
  ):
    fan_in = nnx.initializers.lecun_normal()
    self.names = (prefix + "w13", prefix + "w2")
    self.w13 = Matrix(fan_in(rngs.params(), (d_model, 2 * d_ff), jnp.float32))
    self.w2 = Matrix(out_scale * fan_in(rngs.params(), (d_ff, d_model), jnp.float32))

  @property
  def matrices(self) -> dict[str, Matrix]:
    return dict(zip(self.names, (self.w13, self.w2), strict=True))

  @property
  def gemms(self) -> Weights:
    return {name: w.shape for name, w in self.matrices.items()}

  def __call__(self, x: Float[Array, "*t d"], numerics: Numerics) -> Float[Array, "*t d"]:
    w13, w2 = self.names
    h = checkpoint_name(numerics.matmul(w13, x, self.w13.get_value()), "feed_forward.h")
    return numerics.matmul(w2, swiglu(h), self.w2.get_value())


class MoE(nnx.Module):
  """Each token goes to its top-k experts, none is dropped."""

  def __init__(
    self,
    d_model: int,
    d_ff: int,
    num_experts: int,
    top_k: int,
    d_ff_shared: int,
    out_scale: float,
    rngs: nnx.Rngs,
    norm_topk_prob: bool = True,
  ):
    if not 1 <= top_k <= num_experts:
      raise ValueError(f"{top_k=} is not in 1..{num_experts=}")
    self.top_k, self.norm_topk_prob = top_k, norm_topk_prob
    fan_in = nnx.initializers.lecun_normal(batch_axis=0)
    self.w_router = Matrix(
      nnx.initializers.lecun_normal()(rngs.params(), (d_model, num_experts), jnp.float32)
    )
    self.w13 = Matrix(fan_in(rngs.params(), (num_experts, d_model, 2 * d_ff), jnp.float32))
    self.w2 = Matrix(out_scale * fan_in(rngs.params(), (num_experts, d_ff, d_model), jnp.float32))
    self.shared = (
      FeedForward(d_model, d_ff_shared, out_scale, rngs, "experts.shared_") if d_ff_shared else None
    )

  @property
  def matrices(self) -> dict[str, Matrix]:
    own = {"router.logits": self.w_router, "experts.w13": self.w13, "experts.w2": self.w2}
    return own if self.shared is None else own | self.shared.matrices

  @property
  def gemms(self) -> Weights:
    return {name: w.shape for name, w in self.matrices.items()}

  def __call__(
    self,
    x: Float[Array, "b t d"],
    numerics: Numerics,
    experts: Int[Array, "b t k"] | None = None,
  ) -> tuple[Float[Array, "b t d"], Routing]:
    """With `experts` tokens go to those, whatever the router would choose."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = numerics.dot_general("router.logits")(
      tokens, self.w_router[...].astype(jnp.float32), (((1,), (0,)), ((), ()))
    )  # float32, whatever the weights are kept in
    logits = checkpoint_name(logits, "router.logits")
    experts = None if experts is None else experts.reshape(-1, self.top_k)
    routing = route(logits, self.top_k, self.norm_topk_prob, experts)
    out, dropped = numerics.moe_ffn(
      ("experts.w13", "experts.w2"),
      tokens,
      self.w13.get_value(),
      self.w2.get_value(),
      routing.experts,
      routing.weights,
    )
    out = out.reshape(x.shape)
    if dropped is not None:
      routing = routing._replace(dropped=dropped / routing.experts.size)
    if self.shared is not None:
      out = out + self.shared(x, numerics)
    return out, routing
