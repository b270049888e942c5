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

  Where `parts` is None the state says how much of each: {"scale_bias": 1.0, ...}, at first all of
  each, and unchanged by a step. So one compiled program serves every choice.
  """

  operand: Operand
  parts: tuple[Part, ...] | None

  def __post_init__(self):
    chosen = () if self.parts is None else self.parts
    if not isinstance(chosen, tuple) or not set(chosen) <= set(get_args(Part)):
      raise ValueError(f"parts={self.parts!r} is neither a tuple of {get_args(Part)} nor None")

  def init(self, shape):
    return () if self.parts is not None else dict.fromkeys(get_args(Part), jnp.float32(1))

  def read(self, x, axis, ctx):
    x = self.operand.transformed(x, axis, ctx).astype(jnp.float32)
    whole = lambda: self.operand.rounded(x, axis, ctx).astype(jnp.float32)  # noqa: E731
    if self.parts is None:
      is_whole = jnp.stack([share == 1 for share in ctx.state.values()]).all()
      values = jnp.where(is_whole, whole(), x + self._error(x, axis, ctx, ctx.state))
    elif set(self.parts) == set(get_args(Part)):
      values = whole()
    else:
      values = x + self._error(x, axis, ctx, dict.fromkeys(self.parts, 1))
    summary = self.operand.summary(x, axis, ctx, values)
    return Read((values,), original=x, state=ctx.state, summary=summary)

  def _error(self, x, axis, ctx, shares):
    padded = pad_to_blocks(x, self.format, axis)
    d = decompose_slices(padded, self.format, axis, self.rounding, ctx.key, ctx.slices)
    total = sum(
      (share * getattr(d, part) for part, share in shares.items()), jnp.zeros_like(padded)
    )
    return total[tuple(slice(n) for n in x.shape)]
