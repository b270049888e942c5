"""Where a packed array lies on a mesh.

q = jax.device_put(q, fp4jax.shardings(q, mesh, PartitionSpec("data", "model")))
"""

import dataclasses
import functools
import math

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fp4jax.arguments import check_type
from fp4jax.formats.format import block_axes
from fp4jax.formats.packing import codes_per_group
from fp4jax.quantized_array import QuantizedArray


def shardings(q: QuantizedArray, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> QuantizedArray:
  """A QuantizedArray that holds a NamedSharding in place of each array; see the example above.

  `spec` says how the tensor that was quantized is divided. Codes and block scales are divided in
  the same way; along an axis with one scale for all of it, the scale is on every device.

  Raises:
    ValueError: a spec that makes shards of unequal length, or splits a block or a byte of codes.
  """
  check_type("q", q, QuantizedArray, " such as fp4jax.quantize returns")
  return jax.tree.map(functools.partial(NamedSharding, mesh), specs(q, mesh, spec))


def specs(q: QuantizedArray, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> QuantizedArray:
  """`shardings` before they are tied to the mesh."""
  if len(spec) > len(q.shape):
    raise ValueError(f"{spec} has more axes than shape {q.shape}")
  entries = [*spec, *[None] * (len(q.shape) - len(spec))]
  for axis, names in enumerate(entries):
    _check_axis(q, mesh, axis, (names,) if isinstance(names, str) else names or ())

  def place(x):
    """The axes of a scale are the first ones of q; any other array is on every device."""
    if x.ndim > len(q.shape):
      return PartitionSpec()
    axes = [names if n > 1 else None for names, n in zip(entries, x.shape, strict=False)]
    return PartitionSpec(*axes)

  parts = {"codes": q.codes, "scales": q.scales, "tensor_scale": q.tensor_scale}
  trace = None if q.trace is None else PartitionSpec()
  return dataclasses.replace(q, trace=trace, **jax.tree.map(place, parts))


def _check_axis(q, mesh, axis, names):
  shards, length = math.prod(mesh.shape[name] for name in names), q.shape[axis]
  if shards == 1:
    return
  whole = {"a value": 1}
  if axis - len(q.shape) == q.axis:
    group = codes_per_group(q.fmt.element_bits)
    whole[f"{group} codes that share their bytes"] = group
  blocks = {block_axes(q.fmt, q.axis).get(axis - len(q.shape), 1)}
  for scale in jax.tree.leaves((q.scales, q.tensor_scale)):
    if axis < scale.ndim <= len(q.shape) and scale.shape[axis] > 1:
      if scale.shape[axis] > length:
        raise ValueError(
          f"axis {axis} of shape {q.shape} over the {shards} devices of {names}: {q.fmt.name} has"
          f" {scale.shape[axis]} scales there, those of its terms one behind the other"
        )
      blocks.add(length // scale.shape[axis])
  whole |= {f"a block of {block} of {q.fmt.name}": block for block in blocks}
  for what, size in whole.items():
    if length % (shards * size):
      raise ValueError(
        f"axis {axis} of shape {q.shape} over the {shards} devices of {names}: shards of"
        f" {length / shards:g} values split {what}"
      )
