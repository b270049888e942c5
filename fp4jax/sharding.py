"""How a call spreads over the devices of a mesh, and what each shard may share with the others.

jit with Auto axes: XLA divides the work; the numbers are those of one device, stochastic draws
included. jit with Explicit axes: `spread` hands the body to XLA in the same way and gives the
result the sharding that `lax.dot_general` would give it.

Inside `jax.shard_map` each shard makes a call of its own on its own slice. A scale of a whole
slice (FP8_TENSOR, the tensor scale of NVFP4) is that of the shard: each takes the maximum of what
it holds, as each expert and each entry of a batch does, and none waits for another. Blocks begin
anew on each shard, so that the numbers are those of one device where shards are multiples of the
blocks. What `jax.typeof` says varies over mesh axes decides the rest:

- Operands are cast to vary over the same axes before they meet (`vary`): autodiff then adds the
  gradient of a replicated weight over the shards.
- An operand that varies draws its own random numbers on each shard, one that is replicated draws
  the same on all (`fold_in_axes`).
- What receives a value instead of a gradient (a tap, a state) must not be shared (`refuse_shared`).

With `check_vma=False` JAX does not say what varies. Gradients are then summed as `jax.shard_map`
sums them for any function, taps and states are refused, and draws repeat on every shard unless the
key is one that `fold_in_axes` made.
"""

import functools
from collections.abc import Callable, Hashable

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

Axes = tuple[str, ...]  # of a mesh, in its order


def varying_axes(*operands: PyTree) -> Axes:
  """The mesh axes over which any of the arrays differs from shard to shard, in `shard_map`."""
  types = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(operands)]
  found = frozenset().union(*(t.varying for t in types))
  return tuple(a for a in jax.sharding.get_abstract_mesh().axis_names if a in found)


def fold_in_axes(key: jax.Array, axes: Axes) -> jax.Array:
  """A key of its own for each place along the mesh axes `axes`, inside `jax.shard_map`."""
  return jax.random.fold_in(key, lax.axis_index(axes)) if axes else key


def vary(tree: PyTree, axes: Axes) -> PyTree:
  """The arrays, each varying over `axes` at least; the transpose adds over what was added here."""

  def cast(x):
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, tree)


def gather_columns(parts: PyTree, axis: str) -> PyTree:
  """Inside `jax.shard_map`: arrays whose last axis is divided along a mesh axis, whole."""
  return jax.tree.map(lambda x: lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True), parts)


def own_columns(dw: Array, axis: str | None) -> Array:
  """Of a weight whose columns are divided along a mesh axis the gradient of this device's, summed
  over the axis; dw where there is none."""
  if axis is None:
    return dw
  return lax.psum_scatter(dw, axis, scatter_dimension=dw.ndim - 1, tiled=True)


def spread(
  body: Callable[..., PyTree[Array]],
  options: tuple[Hashable, ...],
  operands: tuple[PyTree, ...],
  states: tuple[PyTree, ...] = (),
  spec: PyTree[PartitionSpec] | None = None,
) -> PyTree[Array]:
  """`body(*options, *operands, *states)` on the mesh where the operands lie.

  Inside `shard_map` operands are cast to vary over the same axes; Explicit axes are Auto for the
  body. Call it outside the custom_vjp, so that autodiff transposes the casts. A call that nothing
  traces runs as one compiled program, kept for the next call with equal options.

  Args:
    body: a function of a module, so that the next call finds the program.
    states: taps and states, which are not cast; see `refuse_shared`.
    spec: how Explicit axes divide the result, one for all its arrays or for each; None: not at all.
  """
  operands = (*vary(operands, varying_axes(operands)), *states)
  mesh = explicit_mesh(operands)
  if mesh is None:
    return one_program(len(options))(body)(*options, *operands)
  spec = PartitionSpec() if spec is None else spec
  abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
  auto = jax.sharding.auto_axes(
    functools.partial(body, *options),
    axes=abstract.explicit_axes,
    out_sharding=jax.tree.map(functools.partial(_named, mesh), spec),
  )
  if abstract.manual_axes:
    # `shard_map` can't keep arrays of Auto axes for its backward pass; what was passed it can.
    auto = jax.checkpoint(auto)
  return auto(*operands)


def one_program(options: int) -> Callable[[Callable], Callable]:
  """A function's decorator: a call that nothing traces runs as one compiled program.

  The program is kept for the next call with equal options, the first `options` arguments. The rules
  of a custom_vjp are functions of their own: `jax.grad` outside `jax.jit` does not trace them.
  """

  def decorate(function):
    @functools.wraps(function)
    def call(*args):
      static, operands = args[:options], args[options:]
      if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
        return function(*args)
      names = tuple(getattr(option, "name", None) for option in static)  # no part of equality
      return compiled(function, static, names)(*operands)

    return call

  return decorate


@functools.lru_cache(1024)
def compiled(body, options, names):
  """`body` with its options, as one program per shapes of its operands."""
  return jax.jit(functools.partial(body, *options))


def _named(mesh, spec):
  if spec.unreduced or spec.reduced:
    raise ValueError(f"a recipe has no result of {spec}: it sums in float32 and rounds the sum")
  return NamedSharding(mesh, spec)


def spec_of(x: Array) -> PartitionSpec:
  """How Explicit axes divide x; of Auto axes `jax.typeof` knows nothing."""
  return jax.typeof(x).sharding.spec


def explicit_mesh(operands: PyTree) -> Mesh | jax.sharding.AbstractMesh | None:
  """The mesh of Explicit axes where an operand lies: that of an array, else of a tracer."""
  found = None
  for x in jax.tree.leaves(operands):
    sharding = jax.typeof(x).sharding
    if sharding.spec.unreduced or sharding.spec.reduced:
      raise ValueError(f"an operand is {jax.typeof(x)}; recipes take no unreduced or reduced axes")
    if sharding.mesh.explicit_axes:
      is_concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
      found = x.sharding.mesh if is_concrete else found or sharding.mesh
  return found


def on_mesh(*operands: PyTree) -> bool:
  """Whether XLA may divide the operands among devices: not within a shard of `shard_map`.

  Known of what was put on a mesh, and under `jax.set_mesh`.
  """
  arrays = [x for x in jax.tree.leaves(operands) if isinstance(x, jax.Array)]
  meshes = [jax.typeof(x).sharding.mesh for x in arrays]
  return any(
    mesh.shape[axis] > 1
    for mesh in (*meshes, jax.sharding.get_abstract_mesh())
    for axis in mesh.auto_axes + mesh.explicit_axes
  )


def mesh_obstacle(*operands: PyTree) -> str | None:
  """Why a kernel can't compute these operands: XLA divides no kernel, and would gather them."""
  if on_mesh(*operands):
    return "a mesh divides the operands, and XLA divides no kernel: call it inside jax.shard_map"
  return None


def refuse_shared(name: str, value: PyTree, *operands: PyTree) -> PyTree:
  """`value`, whose cotangent is a value and not a sum, refused where calls share it.

  Under `jax.vmap` calls on batched operands share a value that is not batched, inside
  `jax.shard_map` calls on varying operands share one that does not vary: autodiff would add what
  each call returns. Call it within the custom_vjp's forward pass.

  Raises:
    ValueError: a value that is shared.
  """
  if not jax.tree.leaves(value):
    return value
  manual = jax.sharding.get_abstract_mesh().manual_axes
  if any(not varying_axes(lax.axis_index(axis)) for axis in manual):
    raise ValueError(
      f"{name} inside shard_map(check_vma=False): JAX does not say whether the shards share it, and"
      " would add what they return; use check_vma=True"
    )
  axes = varying_axes(operands)
  for leaf in jax.tree.leaves(value):
    if varying_axes(leaf) != axes:
      raise ValueError(
        f"{name} varies over mesh axes {varying_axes(leaf)}, the operands over {axes}: give each"
        " shard its own, along an axis that in_specs divides; autodiff would add what they return"
      )
  return _alone(name)(value, operands)


@functools.cache
def _alone(name):
  @jax.custom_batching.custom_vmap
  def alone(value, operands):
    return value

  @alone.def_vmap
  def rule(axis_size, in_batched, value, operands):
    of_value, of_operands = (jax.tree.leaves(b) for b in in_batched)
    if any(of_operands) and not all(of_value):
      raise ValueError(
        f"{name} is shared by {axis_size} calls under vmap, which would add what each returns: give"
        " each its own along a batch axis (in_axes=0)"
      )
    return alone(value, operands), in_batched[0]

  return alone
