"""Weights whose block scales are learned: the quantizers of EfficientQAT (arXiv 2407.11062)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from fp4jax import float_bits as fb
from fp4jax import quantization as qz
from fp4jax.formats import BlockFormat, Slices
from fp4jax.formats.scales import Nearest, PowerOfTwo
from fp4jax.quantizers.quantizer import Composed, Operand, Read, pad_to_blocks

_SMALLEST = 2.0**-100  # of a scale: a step may lead one below zero
State = dict[str, Float32[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class LearnedScale(Composed):
  """round(w / s) * s, with s a state that is learned; for fprop.rhs, in blocks along k.

      scale   (*b, k / block, n)   s before it is stored; (*b, 1, n) where block_shape is None
      unit    (*b,)                the tensor scale of a format that has one; it stays

  What multiplies is s as the format's codec stores it, to nearest, its gradient straight through:
  float32 scales as they are, E8M0's as powers of two. `dataclasses.replace(MXFP4,
  scale_dtype=FP32, scale_rule="nearest")` has the real-valued scales of the paper. With u = w / s
  and q its element, the gradient of s is that of LSQ (arXiv 1902.08153),

      dv/ds = q - u   where |u| <= q_max, else q;   dv/dw = 1 there, else 0

  `frozen`: w holds the elements, so that training moves scales alone; dv/ds = q, dv/dw = s.
  EfficientQAT has integers with zero points, formats here are symmetric.
  """

  operand: Operand
  frozen: bool = False

  learns_state = True

  def __post_init__(self):
    fmt, operand = self.operand.format, self.operand
    if not isinstance(fmt, BlockFormat) or len(fmt.block_shape or (1,)) != 1:
      raise ValueError(f"LearnedScale({fmt}): scales are learned of a BlockFormat of 1-D blocks")
    if operand != Operand(fmt, source=operand.source):
      raise ValueError(f"LearnedScale({operand}) rounds to nearest, without a transform")

  def init(self, shape):
    *b, k, n = shape
    block = self.format.block_size or k
    scale = jnp.ones((*b, -(-k // block), n), jnp.float32)
    return {"scale": scale} | ({"unit": jnp.ones(b)} if self.format.has_tensor_scale else {})

  def first_state(self, w: Float[Array, "*b k n"]) -> State:
    """The scales that the format itself gives w."""
    w = w.astype(jnp.float32)
    if self.format.block_shape is None:
      return {"scale": jnp.max(jnp.abs(w), axis=-2, keepdims=True) / self.format.q_max}
    w = pad_to_blocks(w, self.format, -2)
    r = qz.round_blocks(w, self.format, -2, "nearest", None, Slices(w.ndim - 2))
    _, scales, unit = self.format.store(r)
    scales = _read(self.format, scales)
    if unit is None:
      return {"scale": scales}
    unit = unit.reshape(w.shape[:-2])
    return {"scale": scales * unit[..., None, None], "unit": unit}

  def elements(self, w: Float[Array, "*b k n"], state: State) -> Float32[Array, "*b k n"]:
    """What `frozen` reads in the place of w."""
    scaled = w.astype(jnp.float32) * self._each(self._inverse(state), w.shape[-2])
    return jnp.copysign(self.format.grid.round(jnp.abs(scaled), None), scaled)

  def stored(self, state: State) -> Float32[Array, "*b blocks n"]:
    """The scales as the format holds them."""
    fmt, unit = self.format, state.get("unit")
    unit = None if unit is None else unit[..., None, None]
    rule = _NearestPower() if isinstance(fmt.codec, PowerOfTwo) else Nearest(1.0)
    bits = fb.to_bits(jnp.maximum(state["scale"], _SMALLEST))
    scales = _read(fmt, fmt.codec.store(rule, fmt.grid, bits, unit))
    return scales if unit is None else scales * unit

  def read(self, x, axis, ctx):
    if axis != -2:
      raise ValueError(f"LearnedScale reads weights, along axis -2, not {axis}")
    fmt, k = self.format, x.shape[-2]
    scale, w = self._each(self.stored(ctx.state), k), x.astype(jnp.float32)
    q = w if self.frozen else self.elements(w, ctx.state)
    values = q * scale
    if self.frozen:
      saved = (q, scale)
    else:
      scaled = w * self._each(self._inverse(ctx.state), k)
      inside = jnp.abs(scaled) <= fmt.q_max
      saved = (jnp.where(inside, q - scaled, q), inside)
    original = values if self.frozen else w
    summary = self.operand.summary(original, axis, ctx, values)
    dtype = jnp.bfloat16 if isinstance(fmt.codec, PowerOfTwo) else jnp.float32
    like = {name: jnp.zeros_like(x) for name, x in ctx.state.items()}
    return Read(
      (values.astype(dtype),),
      original=original,
      saved=(*saved, like),
      state=ctx.state,
      summary=summary,
    )

  def pull(self, saved, g):
    _, of_w, _ = saved
    return g * of_w if self.frozen else jnp.where(of_w, g, 0)

  def pull_state(self, saved, g) -> State:
    of_scale, _, like = saved
    (*b, k, n), blocks = g.shape, like["scale"].shape[-2]
    block = self.format.block_size or k
    sums = jnp.sum((g * of_scale).reshape(*b, k // block, block, n), axis=-2)
    return like | {"scale": sums[..., :blocks, :]}

  def _inverse(self, state: State) -> Float32[Array, "*b blocks n"]:
    scale = self.stored(state)
    return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)

  def _each(self, scale: Float32[Array, "*b blocks n"], k: int) -> Float32[Array, "*b k n"]:
    """The scale of every weight, with those of padding that the other operand asked for."""
    each = jnp.repeat(scale, self.format.block_size or k, axis=-2)[..., :k, :]
    padding = [(0, 0)] * each.ndim
    padding[-2] = (0, k - each.shape[-2])
    return jnp.pad(each, padding)


def _read(fmt: BlockFormat, stored: Array) -> Float32[Array, "*s"]:
  return fmt.codec.apply(jnp.ones(stored.shape, jnp.float32), stored)


@dataclasses.dataclass(frozen=True)
class _NearestPower:
  """2^e with e the nearest integer to log2 of the scale."""

  def exponent(self, amax: Any, grid: Any):
    below_root_of_2 = 0x800000 - 0x3504F3  # carries where the mantissa is that of sqrt(2) or more
    return (amax + below_root_of_2 >> 23) - 127
