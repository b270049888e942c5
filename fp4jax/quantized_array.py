"""A packed tensor: codes with their scales, as one value."""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from fp4jax.formats.format import Format
from fp4jax.formats.scales import StoredScale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  """A tensor in a block format: for most, value = element * block_scale * tensor_scale.

  `codes` has the tensor's shape; codes of less than 8 bits are packed along `axis`, the first in
  the low bits. `scales` has one entry per block: every blocked axis divided by the block,
  `(1, ..., 1)` for one block; uint8 codes, or float32 where the format stores float32.
  `tensor_scale` is the scale of the outer level where the format has one, with as many axes.

  A stack of arrays, `jax.vmap(quantize)(x)`, is a QuantizedArray too, with its axes in front.

  `pack_weights` fills up the last block with zeros, which have codes and scales too; `length` is
  that of the axis without them, None where there are none.
  """

  codes: UInt8[Array, "*packed"]
  scales: StoredScale
  tensor_scale: Any
  fmt: Format = dataclasses.field(metadata={"static": True})
  axis: int = dataclasses.field(metadata={"static": True})  # negative
  # Holds nothing, and is differentiated where x was: `dequantize` refuses a gradient by it.
  trace: Float32[Array, "*t 0"] | None = None
  length: int | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor that was quantized."""
    shape = list(self.codes.shape)
    shape[self.axis] = self.length or shape[self.axis] * 8 // self.fmt.element_bits
    return tuple(shape)

  def unfilled(self, values: Float[Array, "*t"]) -> Float[Array, "*s"]:
    """What all codes stand for, without the zeros of the last block."""
    axis = self.axis % values.ndim
    return values if self.length is None else lax.slice_in_dim(values, 0, self.length, axis=axis)

  @property
  def nbytes(self) -> int:
    """Bytes of codes and scales."""
    parts = jax.tree.leaves((self.codes, self.scales, self.tensor_scale))
    return sum(math.prod(p.shape) * p.dtype.itemsize for p in parts)
