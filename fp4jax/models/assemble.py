"""A model from the named arrays of a checkpoint, put together as a table says."""

import itertools
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fp4jax.models.language_model import LanguageModel, ModelConfig
from fp4jax.models.matrix import Matrix

# Of each parameter by its path, "blocks.attention.w_qkv", the keys of its parts. A key with {layer}
# or {layer} and {expert} names an array for each index of the parameter's first axes.
Layout = dict[str, tuple[str, ...]]


@runtime_checkable
class Checkpoint(Protocol):
  """Named arrays, read one at a time."""

  name: str  # which errors say
  shapes: dict[str, tuple[int, ...]]  # of every array by key

  def read(self, key: str) -> np.ndarray: ...


def assemble(
  config: ModelConfig, vocab_size: int, layout: Layout, checkpoint: Checkpoint
) -> LanguageModel:
  """The model of this shape with the parameters that `layout` finds in `checkpoint`.

  A checkpoint keeps a matrix as (outputs, inputs), and a `Matrix` is (inputs, outputs): it is the
  transpose of its parts, which stand side by side along the outputs. Other parameters are taken as
  they are. All become float32, as the model's weights are.

  Raises:
    ValueError: a key that is missing or left over, or an array of another shape.
  """
  model = nnx.eval_shape(lambda: LanguageModel(config, vocab_size, nnx.Rngs(0)))
  graph, state = nnx.split(model)
  parameters = {".".join(map(str, path)): p for path, p in nnx.to_flat_state(state)}
  expected = {}
  for path, parameter in parameters.items():
    for keys, columns in _parts(config, path, parameter.shape, layout[path]):
      shape = list(parameter.shape[keys.ndim :])
      shape[-1] = columns.stop - columns.start
      shape = tuple(shape[::-1] if isinstance(parameter, Matrix) else shape)
      expected |= dict.fromkeys(keys.flat, shape)
  _check(expected, checkpoint)

  for path, parameter in parameters.items():
    value = np.empty(parameter.shape, np.float32)
    for keys, columns in _parts(config, path, parameter.shape, layout[path]):
      for index, key in np.ndenumerate(keys):
        array = checkpoint.read(key)
        value[index][..., columns] = array.T if isinstance(parameter, Matrix) else array
    parameter.set_value(jnp.asarray(value))
  return nnx.merge(graph, state)


def _parts(config, path, shape, templates):
  """Of each part of a parameter, the keys by index of its first axes, and its columns."""
  if path.endswith("w_qkv"):
    heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
    widths = [n * config.head_dim for n in heads]
  else:
    widths = [shape[-1] // len(templates)] * len(templates)
  for template, width, end in zip(templates, widths, itertools.accumulate(widths), strict=True):
    axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in template]
    keys = np.empty(shape[: len(axes)], object)
    for index in np.ndindex(keys.shape):
      keys[index] = template.format(**dict(zip(axes, index, strict=True)))
    yield keys, slice(end - width, end)


def _check(expected: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
  found = checkpoint.shapes
  if missing := sorted(expected.keys() - found.keys()):
    raise ValueError(f"{checkpoint.name}: {_some(missing)} is missing")
  if left := sorted(found.keys() - expected.keys()):
    why = "; the model has no biases" if any(key.endswith(".bias") for key in left) else ""
    raise ValueError(f"{checkpoint.name}: {_some(left)} has no place in the model{why}")
  for key, shape in expected.items():
    if found[key] != shape:
      raise ValueError(f"{checkpoint.name}: {key!r} is {found[key]}, the model takes {shape}")


def _some(keys: list[str]) -> str:
  return repr(keys[0]) + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "")
