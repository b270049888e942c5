"""LLM-FP4 (arXiv 2310.16836): exponent bits and exponent biases found on calibration data.

`search` tries every bias of a list for each of the formats E1M2, E2M1 and E3M0, and takes what errs
least. Biases count from that which puts the largest magnitude on the largest element: a bias b
higher by delta clips what is above 2^-delta of it. The paper's code multiplies the bias itself by
0.01 to 1.2, which tries nothing else where the bias is 0.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from fp4jax.formats.llm_fp4 import LLM_FP4
from fp4jax.quantizers.quantizer import Composed, Operand, Read


class Found(NamedTuple):
  """Of one tensor."""

  format: Int32[Array, ""]  # in `LLM_FP4`
  scale: Float32[Array, "*s"]  # 2^-bias of each group
  error: Float32[Array, ""]  # the sum of squared errors


def first_scales(amax: Float32[Array, "*s"]) -> Float32[Array, " format *s"]:
  """Of each format, that which puts amax on its largest element; 1 for zeros."""
  largest = jnp.array([fmt.q_max for fmt in LLM_FP4]).reshape(-1, *[1] * amax.ndim)
  return jnp.where(amax > 0, amax, 1) / largest


def rounded(
  x: Float[Array, "*s"], scale: Float32[Array, "*#s"], fmt: int | Int32[Array, ""]
) -> Float32[Array, "*s"]:
  """The elements nearest to x / scale in the format of that number in `LLM_FP4`, in float32."""
  scaled = x.astype(jnp.float32) / scale
  each = [lambda u, grid=f.grid: grid.round(u, None) for f in LLM_FP4]
  return jnp.copysign(lax.switch(fmt, each, jnp.abs(scaled)), scaled)


def search(
  first: Float32[Array, " format *s"],
  deltas: Float32[Array, " c"],
  error_of: Callable[[int, Float32[Array, "*s"]], Float32[Array, "*s"]],
  formats: tuple[int, ...] = (0, 1, 2),
) -> Found:
  """The best bias of each group in each format, then the format whose groups err least in sum.

  Args:
    first: `first_scales`.
    deltas: by how much a bias is higher than that of `first`; with a 0 among them nothing errs
      more than the format's rounding to nearest. Of equals the first is taken.
    error_of: the squared error of each group, from a format's number and the scales.
    formats: the numbers of those to try.
  """
  best = []
  for fmt in formats:
    candidates = jnp.exp2(-deltas).reshape(-1, *[1] * (first.ndim - 1)) * first[fmt]
    errors = lax.map(functools.partial(error_of, fmt), candidates)
    chosen = jnp.argmin(errors, axis=0, keepdims=True)
    pick = lambda x, at=chosen: jnp.take_along_axis(x, at, axis=0)[0]  # noqa: E731
    best.append((pick(candidates), jnp.sum(pick(errors))))
  scales, errors = (jnp.stack(of_each) for of_each in zip(*best, strict=True))
  least = jnp.argmin(errors)
  return Found(jnp.array(formats, jnp.int32)[least], scales[least], errors[least])


def search_tensor(x: Float[Array, "k n"], deltas: Float32[Array, " c"]) -> Found:
  """Least squared error of x itself, a bias for each column; without calibration data."""
  x = x.astype(jnp.float32)

  def error_of(fmt, scale):
    return jnp.sum((rounded(x, scale, fmt) * scale - x) ** 2, axis=0)

  return search(first_scales(jnp.max(jnp.abs(x), axis=0)), deltas, error_of)


def shifts(amax: Float32[Array, " k"]) -> Int32[Array, "format k"]:
  """The pre-shifted exponent biases of the columns of an activation: their scales are
  tensor_scale * 2^-shift, and a shift can move from the activation to the weights it meets.

  Each is as near to the bias of its own column as a whole number from 0 to 2^e - 1 comes, e being
  the exponent bits.
  """
  ratio = jnp.log2(jnp.max(amax) / jnp.where(amax > 0, amax, 2.0**-126))
  whole = jnp.nan_to_num(jnp.round(ratio), posinf=0, neginf=0)
  highest = jnp.array([2**e - 1 for e in (1, 2, 3)])[:, None]
  return jnp.clip(whole, 0, highest).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class PreShifted(Composed):
  """Activations in one FP4 format and with scales of their columns, both found before: for
  fprop.lhs. The state, which stays, is `scale` (k,) and `format`, its number in `LLM_FP4`."""

  operand: Operand = Operand(LLM_FP4[1])  # noqa: RUF009

  def init(self, shape):
    return {"scale": jnp.ones(shape[-1:], jnp.float32), "format": jnp.float32(1)}

  def read(self, x, axis, ctx):
    if axis != -1:
      raise ValueError(f"PreShifted reads activations, along axis -1, not {axis}")
    scale = ctx.state["scale"]
    each = jnp.pad(scale, (0, x.shape[-1] - len(scale)), constant_values=1)
    each = lax.broadcast_in_dim(each, x.shape, (x.ndim - 1,))
    values = rounded(x, each, ctx.state["format"].astype(jnp.int32)) * each
    summary = self.operand.summary(x, axis, ctx, values)
    return Read((values,), original=x, state=ctx.state, summary=summary)
