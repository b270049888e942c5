"""Quantization with a chosen subset of the three parts of its error (arXiv 2605.20402)."""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp

from fp4jax.decomposition import decompose_slices
from fp4jax.quantizers.quantizer import Composed, Operand, Read, pad_to_blocks

Part = Literal["scale_bias", "deadzone", "grid_noise"]


@dataclasses.dataclass(frozen=True)
class ErrorParts(Composed):
  """x plus the chosen parts of Q(x) - x, as `decompose` splits it: Q(x) with all three of them.

  So that a run can tell which part of the error costs it what. Values are float32.
  """

  operand: Operand
  parts: tuple[Part, ...]

  def __post_init__(self):
    if not isinstance(self.parts, tuple) or not set(self.parts) <= set(get_args(Part)):
      raise ValueError(f"parts={self.parts!r} is not a tuple of {get_args(Part)}")

  def read(self, x, axis, ctx):
    x = self.operand.transformed(x, axis, ctx).astype(jnp.float32)
    if set(self.parts) == set(get_args(Part)):
      values = self.operand.rounded(x, axis, ctx).astype(jnp.float32)
    else:
      values = x + self._error(x, axis, ctx)
    return Read((values,), original=x, summary=self.operand.summary(x, axis, ctx, values))

  def _error(self, x, axis, ctx):
    padded = pad_to_blocks(x, self.format, axis)
    d = decompose_slices(padded, self.format, axis, self.rounding, ctx.key, ctx.slices)
    total = sum((getattr(d, part) for part in self.parts), jnp.zeros_like(padded))
    return total[tuple(slice(n) for n in x.shape)]
