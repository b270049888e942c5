"""Which GEMM of which layer runs which recipe, and how its key, tap and state reach it."""

import dataclasses
import fnmatch
import itertools
import zlib
from collections.abc import Callable, Iterable

import jax
from jaxtyping import Array, Float, Float32, Int, Int32

from fp4jax import operands, recipes
from fp4jax.arguments import check_type
from fp4jax.dot import dot_general
from fp4jax.implementation import Implementation
from fp4jax.models.over_mesh import matmul_over_mesh, moe_ffn_over_mesh
from fp4jax.models.scores import causal_recipe
from fp4jax.quantized_array import QuantizedArray
from fp4jax.recipe import Recipe

# Of the weights of each GEMM, (*experts, k, n); 1 where tokens are instead.
Weights = dict[str, tuple[int, ...]]
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
  # Of `moe_ffn`, and of the matmuls whose recipes quantize.
  implementation: Implementation | None = None
  # Of `moe_ffn`: in how many parts the tokens come, how many choices a device has room for, and how
  # rows travel between devices.
  token_parts: int = 1
  capacity_factor: float | None = None
  exchange: Implementation | None = None
  # Of `moe_ffn`: whether the weights are read once for both passes.
  weights_once: bool = False
  # Whether tokens are as few as in a decoding step. An implementation of None then means "xla" but
  # for packed weights, those of experts too: the other kernels multiply tiles of 128 rows.
  few_rows: bool = False
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


class _Calls:
  """How often each GEMM was called in a pass so far.

  What JAX traces on its own, such as a checkpointed function, counts on from a copy, which tells
  its `parent`: two traces of it count alike, and the pass still knows of its calls.
  """

  def __init__(self, counts: Iterable[tuple[str, int]] = (), parent: "_Calls | None" = None):
    self.counts, self._parent = dict(counts), parent

  def add(self, name: str) -> int:
    """Calls before this one."""
    before = self.counts.get(name, 0)
    self._raise_to(name, before + 1)
    return before

  def _raise_to(self, name, count):
    self.counts[name] = max(count, self.counts.get(name, 0))
    if self._parent is not None:
      self._parent._raise_to(name, count)


@dataclasses.dataclass(frozen=True)
class Numerics:
  """A policy with key, taps and states of one pass; modules ask it for their GEMMs by name.

  `"experts.w13"` is GEMM w13 of the kind `experts`. Each name draws its own random numbers, and so
  does each call of a name within the pass; calls are counted as they are traced.
  """

  policy: Policy
  key: jax.Array | None = None
  taps: dict[str, operands.Tap] | None = None
  states: dict[str, operands.State] | None = None  # of the GEMMs whose quantizers have one
  layer: int = 0  # the head: num_layers
  num_layers: int = 1
  _calls: _Calls = dataclasses.field(default_factory=_Calls, repr=False, compare=False)

  def recipe(self, name: str) -> Recipe:
    """What the GEMM `name` runs here."""
    return self.policy.recipe(name, self.layer, self.num_layers)

  def dot_general(self, name: str, *, is_packed: bool = False) -> Callable[..., Array]:
    """For one call. A recipe that quantizes runs on the policy's implementation, or raises.

    One of plain dtypes is XLA's own matmul by definition, whatever the policy says.
    """
    recipe, key, tap, state = self._gemm(name)
    quantizes = bool(operands.quantized_roles(recipe))
    implementation = self._implementation(is_packed) if quantizes else "xla"
    return dot_general(recipe, key=key, tap=tap, state=state, implementation=implementation)

  def moe_ffn(
    self,
    names: tuple[str, str],
    x: Float[Array, "token d"],
    w13: Float[Array, "e d f2"] | QuantizedArray,
    w2: Float[Array, "e f d"] | QuantizedArray,
    experts: Int[Array, "token k"],
    weights: Float32[Array, "token k"],
  ) -> tuple[Float[Array, "token d"], Int32[Array, ""] | None]:
    """Over the mesh around the call, with the number of choices dropped where there is a
    capacity_factor. `names` are those of its two GEMMs, which run one recipe."""
    (recipe, *first), (second, *then) = map(self._gemm, names)
    if recipe != second:
      raise ValueError(
        f"{names[0]} runs recipe {recipe.name!r} and {names[1]} {second.name!r} in layer"
        f" {self.layer}; moe_ffn runs one recipe"
      )
    keys, taps, states = zip(first, then, strict=True)
    bounded = self.policy.capacity_factor is not None
    out = moe_ffn_over_mesh(
      x,
      w13,
      w2,
      experts,
      weights,
      recipe,
      keys=keys,
      taps=taps,
      states=states,
      token_parts=self.policy.token_parts,
      capacity_factor=self.policy.capacity_factor,
      implementation=self._implementation(isinstance(w13, QuantizedArray)),
      exchange=self.policy.exchange,
      few_rows=self.policy.few_rows,
      weights_once=self.policy.weights_once,
    )
    return out if bounded else (out, None)

  def matmul(
    self, name: str, x: Float[Array, "b *t k"], w: Float[Array, "k n"] | QuantizedArray
  ) -> Array:
    """x @ w, with w cast to x's dtype, or packed; over a mesh where the tokens are."""
    dot = self.dot_general(name, is_packed=isinstance(w, QuantizedArray))
    return matmul_over_mesh(dot, x, w)

  def _implementation(self, is_packed):
    named = self.policy.implementation
    return "xla" if named is None and self.policy.few_rows and not is_packed else named

  def _gemm(self, name):
    """Recipe, key, tap and state of the next call of a GEMM."""
    recipe = self.recipe(name)
    before = self._calls.add(name)
    key = self.key
    if key is not None:
      key = jax.random.fold_in(key, zlib.crc32(name.encode()))
      key = jax.random.fold_in(key, before) if before else key
    tap, state = (None if of is None else of.get(name) for of in (self.taps, self.states))
    if before and (tap is not None or state):
      what = "tap" if tap is not None else "state"
      raise ValueError(f"{name!r} is called twice in one pass; its {what} would be the sum of two")
    return recipe, key, tap, state


def _flatten(numerics):
  calls = numerics._calls
  counts = tuple(sorted(calls.counts.items()))
  static = (numerics.policy, numerics.layer, numerics.num_layers, calls, counts)
  return (numerics.key, numerics.taps, numerics.states), static


def _unflatten(static, children):
  policy, layer, num_layers, calls, counts = static
  return Numerics(policy, *children, layer, num_layers, _Calls(counts, calls))


jax.tree_util.register_pytree_node(Numerics, _flatten, _unflatten)
