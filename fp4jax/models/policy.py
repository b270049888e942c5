"""Which GEMM of which layer runs which recipe, and how keys and taps reach it."""

import dataclasses
import fnmatch
import itertools
import zlib
from collections.abc import Callable, Iterable

import jax
from jaxtyping import Array, Float, Float32, Int

from fp4jax import operands, recipes
from fp4jax.arguments import check_type
from fp4jax.dot import dot_general
from fp4jax.implementation import Implementation
from fp4jax.models.scores import causal_recipe
from fp4jax.moe_ffn import moe_ffn
from fp4jax.recipe import Recipe

KINDS = ("experts", "attention", "scores", "router", "head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRule:
  """`recipe` for the GEMMs whose names match `modules`, in the blocks that `layers` lists."""

  recipe: Recipe
  layers: tuple[int, ...] | None = None  # -1: the last block; None: every block, and the head
  modules: str = "*"  # a glob: "experts.*", "attention.qkv"

  def __post_init__(self):
    check_type("recipe", self.recipe, Recipe, " such as fp4jax.recipes.MXFP4")
    if self.layers is not None:
      object.__setattr__(self, "layers", tuple(self.layers))

  def matches(self, name: str, layer: int, num_layers: int) -> bool:
    for wanted in self.layers or ():
      if not -num_layers <= wanted < num_layers:
        raise ValueError(f"a rule has layers={self.layers}; {num_layers=} has no layer {wanted}")
    here = self.layers is None or layer in [wanted % num_layers for wanted in self.layers]
    return here and fnmatch.fnmatchcase(name, self.modules)


@dataclasses.dataclass(frozen=True)
class Policy:
  """A recipe for each kind of module, except where a rule in `layers` says otherwise.

  The first rule that matches wins. Embeddings and norms have no GEMM and stay as they are.

      Policy(attention=FP8, layers=(LayerRule(layers=(0, -1), recipe=BF16),))
  """

  experts: Recipe = recipes.BF16  # feed-forward blocks: experts, shared expert, dense
  attention: Recipe = recipes.BF16  # q, k, v and output projections
  scores: Recipe = recipes.BF16  # q k^T; see `fp4jax.models.scores`
  router: Recipe = recipes.FP32
  head: Recipe = recipes.BF16
  # Of `moe_ffn`; plain matmuls run the kernels where these serve, or with "xla" never.
  implementation: Implementation | None = None
  layers: tuple[LayerRule, ...] = ()

  def recipe(self, name: str, layer: int, num_layers: int) -> Recipe:
    """What the GEMM `name`, "experts.w13", runs in block `layer`; the head is layer num_layers.

    The products of attention run it as `fp4jax.models.scores` says.
    """
    kind = name.split(".")[0]
    if kind not in KINDS:
      raise ValueError(f"the GEMM {name!r} is of none of the kinds {', '.join(KINDS)}")
    rules = (rule.recipe for rule in self.layers if rule.matches(name, layer, num_layers))
    recipe = next(rules, getattr(self, kind))
    return causal_recipe(name, recipe) if kind == "scores" else recipe

  def segments(self, names: Iterable[str], num_layers: int) -> list[tuple[int, int]]:
    """Runs of blocks [first, stop) in which each of the GEMMs `names` has one recipe."""
    names = tuple(names)
    recipes_of = lambda layer: [self.recipe(name, layer, num_layers) for name in names]  # noqa: E731
    runs = [list(run) for _, run in itertools.groupby(range(num_layers), recipes_of)]
    return [(run[0], run[-1] + 1) for run in runs]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numerics:
  """A policy with the key and the taps of one pass; modules ask it for their GEMMs by name.

  `"experts.w13"` is GEMM w13 of the kind `experts`. Each name draws its own random numbers.
  """

  policy: Policy = dataclasses.field(metadata={"static": True})
  key: jax.Array | None = None
  taps: dict[str, operands.Tap] | None = None
  layer: int = dataclasses.field(default=0, metadata={"static": True})  # the head: num_layers
  num_layers: int = dataclasses.field(default=1, metadata={"static": True})

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
    """`names` are those of its two GEMMs, which run one recipe."""
    recipe, second = map(self._recipe, names)
    if recipe != second:
      raise ValueError(
        f"{names[0]} runs recipe {recipe.name!r} and {names[1]} {second.name!r} in layer"
        f" {self.layer}; moe_ffn runs one recipe"
      )
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
    return self.policy.recipe(name, self.layer, self.num_layers)

  def _key(self, name):
    return None if self.key is None else jax.random.fold_in(self.key, zlib.crc32(name.encode()))

  def _tap(self, name):
    return None if self.taps is None else self.taps.get(name)
