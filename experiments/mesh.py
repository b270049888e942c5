"""The mesh of a training run, and where its state lies on it: one table by path.

Axes are those of `fp4jax.models.over_mesh`: all divide the batch, `fsdp` also each matrix, `expert`
also the experts. A GEMM computes where its tokens are, after the matrix has been gathered there: of
the experts in codes and scales, as `fp4jax.models.over_mesh` says of others.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import Experiment
from fp4jax.models.over_mesh import AXES

BATCH = P(AXES)
# Of parameters, and of what an optimizer keeps in their shape, by the end of their path; the first
# match wins. Blocks have an axis of layers in front. What is in no line is on every device.
TABLE = (
  ("*/experts.*/ema", P(None, "expert", None, "fsdp")),  # of Q-EMA's state
  ("*/ema", P(None, None, "fsdp")),
  ("*feed_forward/w13", P(None, "expert", None, "fsdp")),  # (layer, e, d, 2 f)
  ("*feed_forward/w2", P(None, "expert", None, "fsdp")),  # (layer, e, f, d)
  ("*/w13", P(None, None, "fsdp")),  # dense and shared: (layer, d, 2 f)
  ("*/w2", P(None, None, "fsdp")),  # (layer, f, d)
  ("*/w_qkv", P(None, None, "fsdp")),  # (layer, d, heads)
  ("*/w_out", P(None, None, "fsdp")),  # (layer, heads, d)
  ("*embedding/embedding", P(None, "fsdp")),  # (vocabulary, d)
  ("*w_head", P(None, "fsdp")),  # (d, vocabulary)
)


@dataclasses.dataclass(frozen=True)
class OnMesh:
  """A compiled function that runs with its mesh set, of whose devices the kernels ask."""

  function: Any
  mesh: Mesh

  def __call__(self, *args):
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
    abstract = jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
    with abstract if traced else jax.set_mesh(self.mesh):
      return self.function(*args)

  def eval_shape(self, *args):
    """With shardings, which `jax.eval_shape` of a call would lose."""
    with jax.set_mesh(self.mesh):
      return self.function.eval_shape(*args)

  def trace(self, *args):
    with jax.set_mesh(self.mesh):
      return self.function.trace(*args)

  def lower(self, *args):
    with jax.set_mesh(self.mesh):
      return self.function.lower(*args)


def make_mesh(config: Experiment, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
  """The mesh that `config.mesh` asks for, over all devices by default; None for one device.

  Raises:
    ValueError: a mesh that is not of as many devices, or that divides batch or experts unequally.
  """
  devices = all_devices() if devices is None else devices
  sizes = mesh_sizes(config, len(devices))
  if len(devices) == 1:
    return None
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def all_devices() -> Sequence[jax.Device]:
  return jax.devices()


def first_devices(count: int | None = None) -> Sequence[jax.Device]:
  """As many of the devices, or all of them."""
  devices = all_devices()
  if count is not None and count > len(devices):
    raise ValueError(f"--devices={count}, but there are {len(devices)}")
  return devices[:count]


def mesh_sizes(config: Experiment, devices: int) -> dict[str, int]:
  """Devices along each axis."""
  asked = config.mesh
  rest = asked.fsdp * asked.expert
  data = max(devices // rest, 1) if asked.data is None else asked.data
  sizes = dict(zip(AXES, (data, asked.fsdp, asked.expert), strict=True))
  if math.prod(sizes.values()) != devices:
    text = " ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    raise ValueError(f"{text} are {math.prod(sizes.values())} devices; there are {devices}")
  sequences = config.data.batch_size // config.data.microbatches
  if sequences % devices:
    raise ValueError(
      f"data.batch_size={config.data.batch_size} in data.microbatches={config.data.microbatches}"
      f" gives {sequences} sequences, which {devices} devices do not divide"
    )
  experts = config.model.num_experts
  if experts % asked.expert:
    raise ValueError(f"mesh.expert={asked.expert} does not divide model.num_experts={experts}")
  if not experts and asked.expert > 1:
    raise ValueError(f"mesh.expert={asked.expert}, but model.num_experts=0: there are no experts")
  parts = asked.token_parts
  if parts is not None and (parts % devices or sequences * config.data.sequence_length % parts):
    raise ValueError(
      f"mesh.token_parts={parts} is no multiple of {devices} devices that divides the"
      f" {sequences * config.data.sequence_length} tokens of a microbatch"
    )
  return sizes


def shardings(state: Any, mesh: Mesh) -> Any:
  """A NamedSharding for each leaf of a state, or of its shapes.

  Raises:
    ValueError: an axis of a leaf that the mesh does not divide.
  """

  def of(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, spec in TABLE:
      if fnmatch.fnmatchcase(name, pattern) and len(spec) == leaf.ndim:
        # An optimizer may keep one number for a matrix, (layer, 1, 1).
        spec = P(*(None if n == 1 else along for n, along in zip(leaf.shape, spec, strict=True)))
        _check(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)
    return NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(of, state)


def _check(name, shape, spec, mesh):
  for axis, (length, along) in enumerate(zip(shape, spec, strict=True)):
    if along is not None and length % mesh.shape[along]:
      raise ValueError(
        f"mesh.{along}={mesh.shape[along]} does not divide axis {axis} of {name} {shape}"
      )
