"""HiFloat4 (arXiv 2602.11287): 64 values share 32 bits of scales in three levels, 4.5 bits a value.

    value = e6m2 * 2^(e1_8 + e1_16) * element,    element: 0, 0.25, ..., 1.75 and a sign

e6m2 scales the block of 64; e1_8 is one bit per 8 values, e1_16 one per 4. The three lie in a
uint32, e6m2 | e1_8 << 8 | e1_16 << 16, where bit i of a field belongs to the i-th group.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt32

from fp4jax import float_bits as fb
from fp4jax import names
from fp4jax.formats.format import WHOLE, Ideal, Rounded, block_view, view_shape

_BLOCK = 64
_LARGEST_ELEMENT = 1.75
_SEVENTH = 73 / 512  # 1 / 7 in bfloat16
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-48, 1.5 * 2.0**15
_BIAS = (127 - 48) << 2  # between the leading bits of a float32 and a code of E6M2
_NAN = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiFloat4:
  """The encoder of the paper and of its public simulator, bit for bit; a tie rounds away from zero.

  The paper reads bfloat16. Given float32, the simulator rounds amax / 7 to bfloat16 but not amax,
  and so does this. What the sources leave open: a block with a NaN or an infinity has the scale
  code 255, which is NaN in E6M2, and no other bit; -0 keeps its sign. A block of zeros has the
  smallest scale, 2^-48, as in the simulator. Magnitudes beyond 7 * 49152 saturate there.

  To nearest, values are multiplied by 1 / e6m2 in bfloat16, as hardware does; stochastically, by
  1 / e6m2 in float32, so that the mean is x wherever nothing is clipped. Much is: a group whose
  largest value lies in (1.75, 2) units saturates.

  The ideal scale s* is amax / 7, unrounded, with the bits of the groups that follow from it.
  """

  name: str = dataclasses.field(compare=False)

  def __post_init__(self):
    names.settle(self)

  block_shape = (_BLOCK,)
  element_bits = 4
  bits_per_value = 4.5
  scale_rule = "hif4"
  has_tensor_scale = False
  dequantized_dtype = jnp.dtype(jnp.bfloat16)

  def round(self, x, axis, random_bits=None, slices=WHOLE) -> Rounded:
    view = view_shape(block_view(x.shape, self, axis, slices))
    inner = 2 * (axis % x.ndim) + 1
    bits = jnp.moveaxis(fb.to_bits(x.reshape(view)), inner, -1)
    magnitude = bits & fb.ABS_MASK
    amax = jnp.max(magnitude, axis=-1, keepdims=True, initial=0)
    finite = amax < fb.EXPONENT_MASK
    magnitude, sign = (jnp.where(finite, b, 0) for b in (magnitude, bits & ~fb.ABS_MASK))
    absolute = fb.from_bits(magnitude)
    code = _to_e6m2(fb.from_bits(jnp.where(finite, amax, 0)))
    reciprocal = 1.0 / _from_e6m2(code)
    rounded_reciprocal = lax.reduce_precision(reciprocal, exponent_bits=8, mantissa_bits=7)
    e8, e16 = _group_bits(absolute, rounded_reciprocal)
    if random_bits is None:
      reciprocal = rounded_reciprocal
    else:
      random_bits = jnp.moveaxis(random_bits.reshape(view), inner, -1)
    scaled = absolute * reciprocal * fb.exp2(-_spread(e8, e16))
    elements = fb.from_bits(fb.to_bits(_to_quarters(scaled, random_bits)) | sign)
    scales = jnp.where(finite, _join(code, e8, e16), jnp.uint32(_NAN))
    back = lambda a: None if a is None else jnp.moveaxis(a, -1, inner)  # noqa: E731
    elements, scales, scaled, magnitude, amax, random_bits = map(
      back, (elements, scales, scaled, magnitude, amax, random_bits)
    )
    return Rounded(x.shape, elements, scales, None, scaled, magnitude, amax, random_bits)

  def values(self, r: Rounded):
    return _apply(r.elements, r.scales).reshape(r.shape)

  def ideal(self, r: Rounded) -> Ideal:
    inner = _inner(r.elements.shape, r.scales.shape)
    magnitude, elements, amax = (
      jnp.moveaxis(a, inner, -1) for a in (r.magnitude, r.elements, r.amax)
    )
    random_bits = None if r.random_bits is None else jnp.moveaxis(r.random_bits, inner, -1)
    scale = fb.multiply(amax, jnp.full_like(amax, 1 / 7, jnp.float32))
    scale = jnp.maximum(scale, 2.0**-126)
    relative = fb.multiply(magnitude, jnp.broadcast_to(1.0 / scale, magnitude.shape))
    exponent = _spread(*_group_bits(relative, jnp.ones_like(scale)))
    scaled = relative * fb.exp2(-exponent)
    values = _to_quarters(scaled, random_bits) * fb.exp2(exponent) * scale
    values, in_deadzone = jnp.copysign(values, elements), scaled < 0.125
    return Ideal(*(jnp.moveaxis(a, -1, inner).reshape(r.shape) for a in (values, in_deadzone)))

  def clipped(self, r: Rounded):
    return (r.scaled > _LARGEST_ELEMENT).reshape(r.shape)

  def store(self, r: Rounded):
    quarters = (jnp.abs(r.elements) * 4).astype(jnp.uint8)
    codes = quarters | jnp.signbit(r.elements).astype(jnp.uint8) << 3
    return codes.reshape(r.shape), r.scales.reshape(r.scales.shape[::2]), None

  def load(self, codes, scales, slice_scale):
    view = [(s, n // s if s else 1) for n, s in zip(codes.shape, scales.shape, strict=True)]
    codes = codes.reshape(view_shape(view))
    quarters = (codes & 7).astype(jnp.float32)
    elements = jnp.where(codes > 7, -quarters, quarters) / 4
    scales = scales.reshape([n for size in scales.shape for n in (size, 1)])
    return _apply(elements, scales).reshape([s * n for s, n in view])


def _to_e6m2(amax: Float32[Array, "*s 1"]) -> Int32[Array, "*s 1"]:
  scale = lax.reduce_precision(amax * _SEVENTH, exponent_bits=8, mantissa_bits=7)
  bits = fb.to_bits(jnp.clip(scale, _SMALLEST_SCALE, _LARGEST_SCALE))
  return (bits + 0xFFFFF + (bits >> 21 & 1) >> 21) - _BIAS  # two bits of mantissa, ties to even


def _from_e6m2(code: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
  return fb.from_bits(code + _BIAS << 21)


def _group_bits(
  absolute: Float32[Array, "*s 64"], reciprocal: Float32[Array, "*s 1"]
) -> tuple[Int32[Array, "*s 8"], Int32[Array, "*s 16"]]:
  """e1_8 where 8 values reach 4 units, e1_16 where 4 reach 2 units of what is then left."""
  v16 = jnp.max(absolute.reshape(*absolute.shape[:-1], 16, 4), axis=-1)
  v8 = jnp.max(v16.reshape(*absolute.shape[:-1], 8, 2), axis=-1)
  e8 = (v8 * reciprocal >= 4).astype(jnp.int32)
  left = v16 * reciprocal * fb.exp2(-jnp.repeat(e8, 2, axis=-1))
  return e8, (left >= 2).astype(jnp.int32)


def _spread(e8: Int32[Array, "*s 8"], e16: Int32[Array, "*s 16"]) -> Int32[Array, "*s 64"]:
  return jnp.repeat(e8, 8, axis=-1) + jnp.repeat(e16, 4, axis=-1)


def _join(
  code: Int32[Array, "*s 1"], e8: Int32[Array, "*s 8"], e16: Int32[Array, "*s 16"]
) -> UInt32[Array, "*s 1"]:
  flags = jnp.concatenate([e8, e16], axis=-1).astype(jnp.uint32)
  place = jnp.arange(8, 32, dtype=jnp.uint32).reshape([1] * (flags.ndim - 1) + [24])
  fields = jnp.sum(flags << place, axis=-1, keepdims=True, dtype=jnp.uint32)
  return code.astype(jnp.uint32) | fields


def _to_quarters(
  scaled: Float32[Array, "*s"], random_bits: UInt32[Array, "*s"] | None
) -> Float32[Array, "*s"]:
  scaled = jnp.minimum(scaled, _LARGEST_ELEMENT)
  if random_bits is None:
    # In integers: a sum with one half would round, or not where it is fused with a product.
    quarters = ((scaled * 8).astype(jnp.int32) + 1 >> 1).astype(jnp.float32)
  else:
    quarters = jnp.floor(scaled * 4 + fb.uniform(random_bits))
  return jnp.minimum(quarters, 7) / 4


def _apply(elements: Float32[Array, "*v"], scales: UInt32[Array, "*u"]) -> Float32[Array, "*v"]:
  """Values in block view."""
  if elements.size == 0:
    return elements
  inner = _inner(elements.shape, scales.shape)
  index = jnp.arange(_BLOCK, dtype=jnp.uint32)
  index = index.reshape([_BLOCK if i == inner else 1 for i in range(elements.ndim)])
  exponent = (scales >> (8 + index // 8) & 1) + (scales >> (16 + index // 4) & 1)
  code = (scales & 255).astype(jnp.int32)
  lost = code == _NAN
  scale = _from_e6m2(jnp.where(lost, 0, code))
  return fb.nan_where(lost, elements * (scale * fb.exp2(exponent.astype(jnp.int32))))


def _inner(view: tuple[int, ...], scales: tuple[int, ...]) -> int:
  """The axis of a block view that runs within blocks."""
  return next(i for i in range(1, len(view), 2) if view[i] != scales[i])


HIF4 = HiFloat4(name="HIF4")
