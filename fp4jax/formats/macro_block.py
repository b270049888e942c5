"""Macro-block scaling of MXFP4 (arXiv 2603.08713): a factor per 128 values refines their scales.

    value = MXFP4(factor * x) / factor,    factor = 1 + m8 / 256

MXFP4's powers of two miss a block's ideal scale by up to two. The factor, eight bits of mantissa
for four blocks, makes that up for the block with the largest value of the four and draws the others
nearer. MXFP4 is taken under the overflow-aware rule, "oas". The paper's hybrid (MBS-H) is a recipe
with the dynamic format for weights and the static one for activations.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8

from fp4jax import float_bits as fb
from fp4jax import names
from fp4jax.formats.based import Based
from fp4jax.formats.block_format import BlockFormat
from fp4jax.formats.format import WHOLE, Rounded, block_view, view_shape
from fp4jax.formats.mx import MXFP4
from fp4jax.formats.search import squared_error

_CANDIDATES = 16
_NAN_BITS = 0x7FC00000
_LARGEST_BITS = fb.EXPONENT_MASK - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MacroBlockFormat(Based):
  """Blocks of `base`, a format with power-of-two scales, under a factor per `macro_block` values.

  `factor` says how m8 is found. "static" takes the leading mantissa bits of 6 / amax, which puts
  the largest value on 6 times a power of two, or up to 2^-8 below; it takes 0 where factor * amax
  would be beyond float32. "dynamic" tries 0, 16, ..., 240 and takes the one with the least squared
  error to nearest, the first of equals. Stochastic rounding rounds under the factor so chosen, and
  is unbiased where nothing is clipped.

  A NaN or an infinity makes its whole macro block NaN, with a factor code of 0. factor * x is
  rounded to float32 and saturates there. Values are products with float32(1 / factor), so twice
  rounded; one below 2^-126 is zero where the backend flushes subnormals. The ideal scale is that of
  `base` for x: amax / 6 per block of 32.
  """

  name: str = dataclasses.field(compare=False)
  base: BlockFormat
  factor: Literal["static", "dynamic"]
  macro_block: int = 128

  def __post_init__(self):
    if self.factor not in ("static", "dynamic"):
      raise ValueError(f"{self.factor=} is not 'static' or 'dynamic'")
    shape = self.base.block_shape
    if shape is None or len(shape) != 1 or self.base.has_tensor_scale:
      raise ValueError(f"{self.base.name} has no blocks of one row, or a scale of the slice")
    if self.macro_block % shape[0]:
      raise ValueError(f"{self.macro_block=} is not a multiple of {self.base.name}'s {shape[0]}")
    names.settle(self)

  has_tensor_scale = False

  @property
  def block_shape(self) -> tuple[int]:
    return (self.macro_block,)

  @property
  def bits_per_value(self) -> float:
    return self.base.bits_per_value + 8 / self.macro_block

  @property
  def scale_rule(self) -> str:
    return f"{self.base.scale_rule}, {self.factor}"

  @property
  def dequantized_dtype(self) -> jnp.dtype:
    return jnp.dtype(jnp.float32)

  def round(self, x, axis, random_bits=None, slices=WHOLE) -> Rounded:
    view = view_shape(block_view(x.shape, self, axis, slices))
    within = 2 * (axis % x.ndim) + 1
    bits = fb.to_bits(x.reshape(view))
    amax = jnp.max(bits & fb.ABS_MASK, axis=within, keepdims=True, initial=0)
    finite = amax < fb.EXPONENT_MASK
    bits = jnp.where(finite, bits, _NAN_BITS)
    amax = jnp.where(finite, amax, 0)

    def round_by(m8, random_bits=None) -> Rounded:
      y = fb.from_bits(_times_factor(bits, m8)).reshape(x.shape)
      return self.base.round(y, axis, random_bits, slices)

    def error_of(m8):
      values = _divide(self.base.values(round_by(m8)).reshape(view), _factor(m8))
      return squared_error(values - fb.from_bits(bits), amax, (within,))

    def better(j, best):
      m8 = jnp.where(finite, j * 256 // _CANDIDATES, 0)
      error = error_of(m8)
      return jnp.minimum(error, best[0]), jnp.where(error < best[0], m8, best[1])

    if self.factor == "static":
      quotient = self.base.q_max / fb.from_bits(amax)  # infinite for zeros: a mantissa of 0 too
      m8 = (fb.to_bits(quotient) & fb.MANTISSA_MASK) >> 15
      m8 = jnp.where(_factor(m8) * fb.from_bits(amax) < np.inf, m8, 0)
    else:
      m8 = jnp.zeros_like(amax)
      m8 = lax.fori_loop(1, _CANDIDATES, better, (error_of(m8), m8))[1]
    r = round_by(m8, random_bits)
    magnitude = (bits & fb.ABS_MASK).reshape(x.shape).reshape(r.magnitude.shape)
    amax = jnp.max(magnitude, axis=within, keepdims=True, initial=0)
    magnitude = jnp.where(amax < fb.EXPONENT_MASK, magnitude, 0)
    m8 = m8.astype(jnp.uint8).reshape(m8.shape[::2])
    return r._replace(magnitude=magnitude, amax=amax, slice_scale=m8)

  def values(self, r: Rounded):
    return _unscale(self.base.values(r._replace(slice_scale=None)), r.slice_scale)

  def store(self, r: Rounded):
    codes, scales, _ = self.base.store(r._replace(slice_scale=None))
    return codes, scales, r.slice_scale

  def load(self, codes, scales, slice_scale):
    return _unscale(self.base.load(codes, scales, None), slice_scale)


def _factor(m8: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
  return (256 + m8).astype(jnp.float32) * 2.0**-8


def _times_factor(bits: Int32[Array, "*v"], m8: Int32[Array, "*u"]) -> Int32[Array, "*v"]:
  """Bits of x (1 + m8 / 256) rounded to float32, saturated; NaN stays."""
  magnitude = bits & fb.ABS_MASK
  normal = fb.to_bits(fb.from_bits(magnitude) * _factor(m8))
  normal = jnp.where(magnitude < fb.EXPONENT_MASK, jnp.minimum(normal, _LARGEST_BITS), magnitude)
  # The bits of a subnormal, and of a product below 2^-125, are the number in units of 2^-149.
  product = jnp.minimum(magnitude, fb.SMALLEST_NORMAL) * (256 + m8)
  product = lax.shift_right_logical(product + 127 + (lax.shift_right_logical(product, 8) & 1), 8)
  return jnp.where(magnitude < fb.SMALLEST_NORMAL, product, normal) | (bits & ~fb.ABS_MASK)


def _divide(values: Float32[Array, "*v"], factor: Float32[Array, "*u"]) -> Float32[Array, "*v"]:
  """Not by a division, of which XLA makes this product in some programs and not in others."""
  return fb.saturate(values * (1.0 / factor), jnp.float32)


def _unscale(values: Float32[Array, "*s"], m8: UInt8[Array, "*b"]) -> Float32[Array, "*s"]:
  """Values over the factors of their macro blocks, which are as long as values per factor."""
  view = [(b, n // b if b else 1) for n, b in zip(values.shape, m8.shape, strict=True)]
  factor = _factor(m8.astype(jnp.int32)).reshape([n for b, _ in view for n in (b, 1)])
  return _divide(values.reshape(view_shape(view)), factor).reshape(values.shape)


_OAS = dataclasses.replace(MXFP4, scale_rule="oas")
MXFP4_MBS_S = MacroBlockFormat(name="MXFP4_MBS_S", base=_OAS, factor="static")
MXFP4_MBS_D = MacroBlockFormat(name="MXFP4_MBS_D", base=_OAS, factor="dynamic")
