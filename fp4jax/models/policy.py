"""Which module runs which recipe, and how keys and taps reach its GEMMs."""

import dataclasses
import zlib
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Float32, Int

from fp4jax import operands, recipes
from fp4jax.dot import dot_general
from fp4jax.implementation import Implementation
from fp4jax.moe_ffn import moe_ffn
from fp4jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Policy:
  """A recipe for each kind of module. Embeddings and norms have no GEMM and stay as they are."""

  experts: Recipe = recipes.BF16  # feed-forward blocks: experts, shared expert, dense
  attention: Recipe = recipes.BF16  # q, k, v and output projections
  scores: Recipe = recipes.BF16  # q k^T, and probabilities times v
  router: Recipe = recipes.FP32
  head: Recipe = recipes.BF16
  # Of `moe_ffn`; plain matmuls run the kernels where these serve, or with "xla" never.
  implementation: Implementation | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numerics:
  """A policy with the key and the taps of one pass; modules ask it for their GEMMs by name.

  `"experts.w13"` is GEMM w13 of the kind `experts`. Each name draws its own random numbers.
  """

  policy: Policy = dataclasses.field(metadata={"static": True})
  key: jax.Array | None = None
  taps: dict[str, operands.Tap] | None = None

  def dot_general(self, name: str) -> Callable[..., Array]:
    implementation = "xla" if self.policy.implementation == "xla" else None
    return dot_general(
      self._recipe(name), key=self._key(name), tap=self._tap(name), implementation=implementation
    )

  def moe_ffn(
    self,
    names: tuple[str, str],
    x: Float[Array, "token d"],
    w13: Float[Array, "e d f2"],
    w2: Float[Array, "e f d"],
    experts: Int[Array, "token k"],
    weights: Float32[Array, "token k"],
  ) -> Float[Array, "token d"]:
    """`names` are those of its two GEMMs, which are of one kind."""
    recipe = self._recipe(names[0])
    keys, taps = tuple(map(self._key, names)), tuple(map(self._tap, names))
    implementation = self.policy.implementation
    return moe_ffn(
      x, w13, w2, experts, weights, recipe, keys=keys, taps=taps, implementation=implementation
    )

  def matmul(self, name: str, x: Float[Array, "*t k"], w: Float[Array, "k n"]) -> Array:
    """x @ w, with w cast to x's dtype."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    return self.dot_general(name)(x, w.astype(x.dtype), dims)

  def _recipe(self, name):
    return getattr(self.policy, name.split(".")[0])

  def _key(self, name):
    return None if self.key is None else jax.random.fold_in(self.key, zlib.crc32(name.encode()))

  def _tap(self, name):
    return None if self.taps is None else self.taps.get(name)
