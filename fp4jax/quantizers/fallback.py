"""Outlier fallback (arXiv 2605.20402): a second pass quantizes what the first one lost."""

import dataclasses
import math

import jax.numpy as jnp

from fp4jax.formats.roundings import fold_in
from fp4jax.quantizers.quantizer import Composed, Operand, Read


@dataclasses.dataclass(frozen=True)
class OutlierFallback(Composed):
  """x1 + alpha * Q(x - x1) with x1 = Q(x), for all blocks.

  The two are terms of their own, each in the format: a GEMM of two such operands is four. The paper
  takes alpha = 1/2, which did better than the full correction of 1.
  """

  operand: Operand
  alpha: float = 0.5

  def read(self, x, axis, ctx):
    x = self.operand.transformed(x, axis, ctx)
    first = self.operand.rounded(x, axis, ctx)
    rest = x.astype(jnp.float32) - first.astype(jnp.float32)
    key = None if ctx.key is None else fold_in(ctx.key, 1)
    second = self.operand.rounded(rest, axis, ctx._replace(key=key))
    scaled = self.alpha * second.astype(jnp.float32)
    values = first.astype(jnp.float32) + scaled
    if math.frexp(self.alpha)[0] == 0.5:  # a power of two needs no more bits
      scaled = scaled.astype(second.dtype)
    summary = self.operand.summary(x, axis, ctx, values)
    return Read((first, scaled), original=x, summary=summary)
