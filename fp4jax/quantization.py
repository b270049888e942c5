"""Quantize to a block format, dequantize, and the two in one with a straight-through gradient.

q = quantize(x, MXFP4)            # codes and scales, 4.25 bits a value
y = dequantize(q)                 # float32
y == fake_quantize(x, MXFP4)      # the same values; its gradient is that of the identity
"""

import dataclasses
import functools
import math
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, UInt8, UInt32

from fp4jax import float_bits as fb
from fp4jax import scales as scale_codec
from fp4jax.arguments import check_arrays, check_type
from fp4jax.formats import E8M0, BlockFormat, Rounding
from fp4jax.implementation import Implementation, choose
from fp4jax.mosaic import quantize as mosaic

_INPUT_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  """A tensor in a block format: value = element * block_scale * tensor_scale.

  `codes` has the tensor's shape; 4-bit codes lie two to a uint8 along `axis`, the first in the low
  nibble. `scales` has one entry a block: every blocked axis divided by the block, `(1, ..., 1)` for
  one block a tensor; uint8 codes, or float32 where the format stores float32.
  """

  codes: UInt8[Array, "*packed"]
  scales: scale_codec.StoredScale
  tensor_scale: Float32[Array, ""] | None
  fmt: BlockFormat = dataclasses.field(metadata={"static": True})
  axis: int = dataclasses.field(metadata={"static": True})  # negative

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor that was quantized."""
    shape = list(self.codes.shape)
    shape[self.axis] *= 8 // self.fmt.element_bits
    return tuple(shape)

  @property
  def nbytes(self) -> int:
    """Bytes of codes and scales."""
    parts = (self.codes, self.scales, self.tensor_scale)
    return sum(math.prod(p.shape) * p.dtype.itemsize for p in parts if p is not None)


def quantize(
  x: Float[Array, "*s"],
  fmt: BlockFormat,
  axis: int = -1,
  *,
  rounding: Rounding = "nearest",
  key: jax.Array | None = None,
  implementation: Implementation | None = None,
) -> QuantizedArray:
  """Quantizes x in blocks along `axis` (and, for a 2-D block, the other one of the last two axes).

  "nearest" ties to even. "stochastic" rounds up with the probability of the distance to the element
  below, so that its mean is x wherever the scale does not clip; the same key gives the same draws.

  Args:
    implementation: see `fp4jax.implementation`. "mosaic" serves MXFP4 of any scale rule, FP8_BLOCK
      and FP8_BLOCK_POW2 along the last axis. Its stochastic rounding makes draws of its own, so
      that None leaves that to "xla".
  Raises:
    ValueError: an axis out of range, one that the block does not divide, an unknown rounding,
      stochastic rounding without a key, or what makes `implementation` impossible.
    TypeError: x is no array of float32, bfloat16 or float16, or fmt is no BlockFormat.
  """
  axis = check_arguments(x, fmt, axis, rounding, key)
  stochastic = rounding == "stochastic"
  if implementation is None and stochastic:
    implementation = "xla"
  if choose(implementation, mosaic.obstacle(x, fmt, axis, rounding)) == "mosaic":
    codes, scales = mosaic.quantize(x, fmt, key if stochastic else None)
    return QuantizedArray(codes, scales, None, fmt, axis)
  r = round_blocks(x, fmt, axis, rounding, key)
  codes = lax.bitcast_convert_type(r.elements.astype(fmt.element_dtype), _code_dtype(fmt))
  codes = codes.astype(jnp.uint8).reshape(x.shape)
  if fmt.element_bits == 4:
    codes = _pack_nibbles(codes, axis)
  stored_shape = tuple(n for n, _ in block_view(x.shape, fmt, axis))
  return QuantizedArray(codes, r.scales.reshape(stored_shape), r.tensor_scale, fmt, axis)


def dequantize(
  q: QuantizedArray,
  dtype: DTypeLike = jnp.float32,
  *,
  implementation: Implementation | None = None,
) -> Float[Array, "*s"]:
  """The values of q: exact in float32 but for overflow and, with a tensor scale, one rounding.

  `implementation`: see `fp4jax.implementation`. "mosaic" makes bfloat16 of MXFP4, along the last
  axis.
  """
  check_type("q", q, QuantizedArray)
  obstacle = mosaic.dequantize_obstacle(q.codes, q.fmt, q.axis, dtype)
  if choose(implementation, obstacle) == "mosaic":
    return mosaic.dequantize(q.codes, q.scales)
  codes = _unpack_nibbles(q.codes, q.axis) if q.fmt.element_bits == 4 else q.codes
  codes = codes.astype(_code_dtype(q.fmt))
  view = block_view(q.shape, q.fmt, q.axis)
  elements = lax.bitcast_convert_type(codes, q.fmt.element_dtype).astype(jnp.float32)
  elements = elements.reshape([n for pair in view for n in pair])
  scales = q.scales.reshape([n for blocks, _ in view for n in (blocks, 1)])
  return values(elements, scales, q.tensor_scale, q.fmt).reshape(q.shape).astype(dtype)


def fake_quantize(
  x: Float[Array, "*s"],
  fmt: BlockFormat,
  axis: int = -1,
  *,
  rounding: Rounding = "nearest",
  key: jax.Array | None = None,
) -> Float[Array, "*s"]:
  """`dequantize(quantize(...))` in x's dtype; its gradient is passed straight through."""
  axis = check_arguments(x, fmt, axis, rounding, key)
  return _straight_through(x, fmt, axis, rounding, key)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _straight_through(x, fmt, axis, rounding, key):
  r = round_blocks(x, fmt, axis, rounding, key)
  return values(r.elements, r.scales, r.tensor_scale, fmt).reshape(x.shape).astype(x.dtype)


@_straight_through.defjvp
def _straight_through_jvp(fmt, axis, rounding, key, primals, tangents):
  return _straight_through(*primals, fmt, axis, rounding, key), tangents[0]


def check_arguments(x, fmt, axis, rounding, key) -> int:
  """Refuses what `quantize` can't do; returns the axis counted from the end."""
  check_type("fmt", fmt, BlockFormat, " such as fp4jax.MXFP4")
  check_arrays(x=x)
  if x.dtype not in _INPUT_DTYPES:
    raise TypeError(f"x is {x.dtype}; quantize takes float32, bfloat16 or float16")
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f"{axis=} is out of range for x of shape {x.shape}")
  axis = axis % x.ndim - x.ndim
  if fmt.block_shape is not None and len(fmt.block_shape) == 2 and (axis < -2 or x.ndim < 2):
    raise ValueError(
      f"{axis=} of shape {x.shape}: the 2-D blocks of {fmt.name} tile the last two axes"
    )
  for a, block in block_axes(fmt, axis).items():
    if x.shape[a] % block:
      raise ValueError(
        f"axis {a} of shape {x.shape} is no multiple of the block of {block} of {fmt.name}"
      )
  if fmt.element_bits == 4 and x.shape[axis] % 2:
    raise ValueError(f"axis {axis} of shape {x.shape} is odd; 4-bit codes are packed in pairs")
  if rounding not in get_args(Rounding):
    raise ValueError(f"{rounding=} is not one of {get_args(Rounding)}")
  if rounding == "stochastic" and key is None:
    raise ValueError('rounding="stochastic" needs a key, such as key=jax.random.key(0)')
  return axis


def block_axes(fmt: BlockFormat, axis: int) -> dict[int, int]:
  """Block length of every blocked axis, axes counted from the end: {-1: 32} for MXFP4."""
  if fmt.block_shape is None:
    return {}
  if len(fmt.block_shape) == 1:
    return {axis: fmt.block_shape[0]}
  return {axis: fmt.block_shape[1], -3 - axis: fmt.block_shape[0]}


def block_view(shape: tuple[int, ...], fmt: BlockFormat, axis: int) -> list[tuple[int, int]]:
  """(number of blocks, block length) of every axis; flattened, the shape in which blocks show."""
  if fmt.block_shape is None:
    return [(1, n) for n in shape]
  blocks = block_axes(fmt, axis)
  return [
    (n // blocks.get(i - len(shape), 1), blocks.get(i - len(shape), 1)) for i, n in enumerate(shape)
  ]


class Rounded(NamedTuple):
  """x rounded to a format, in block view: axis i of x is axes 2i (blocks) and 2i + 1 (within)."""

  elements: Float32[Array, "*v"]  # on the element grid, with x's signs
  scales: scale_codec.StoredScale  # within-axes of length 1
  tensor_scale: Float32[Array, ""] | None
  scaled: Float32[Array, "*v"]  # |x| / scale before rounding
  magnitude: Int32[Array, "*v"]  # bits of |x|
  amax: Int32[Array, "*u"]  # bits of each block's largest magnitude
  random_bits: UInt32[Array, "*v"] | None


def round_blocks(
  x: Float[Array, "*s"], fmt: BlockFormat, axis: int, rounding: Rounding, key: jax.Array | None
) -> Rounded:
  """The one place where values are rounded. Arguments as `check_arguments` passes them."""
  view = block_view(x.shape, fmt, axis)
  bits = fb.to_bits(x.astype(jnp.float32).reshape([n for pair in view for n in pair]))
  magnitude = bits & fb.ABS_MASK
  amax = jnp.max(magnitude, axis=tuple(range(1, bits.ndim, 2)), keepdims=True, initial=0)
  finite = amax < fb.EXPONENT_MASK
  magnitude, sign = (jnp.where(finite, b, 0) for b in (magnitude, bits & ~fb.ABS_MASK))
  tensor_scale = None
  if fmt.has_tensor_scale:
    tensor_scale = scale_codec.tensor_scale(jnp.max(jnp.where(finite, amax, 0), initial=0), fmt)
  scales = scale_codec.encode(amax, fmt, tensor_scale)
  reciprocal = scale_codec.reciprocal(scales, fmt)
  if tensor_scale is None:
    scaled = fb.multiply(magnitude, reciprocal)
  else:
    scaled = fb.multiply(magnitude, 1.0 / tensor_scale) * reciprocal
  random_bits = None
  if rounding == "stochastic":
    random_bits = jax.random.bits(key, x.shape, jnp.uint32).reshape(bits.shape)
  rounded = fb.round_to_grid(scaled, fmt.element_dtype, random_bits)
  elements = fb.from_bits(fb.to_bits(rounded) | sign)
  return Rounded(elements, scales, tensor_scale, scaled, magnitude, amax, random_bits)


def values(
  elements: Float32[Array, "*v"],
  scales: scale_codec.StoredScale,
  tensor_scale: Float32[Array, ""] | None,
  fmt: BlockFormat,
) -> Float32[Array, "*v"]:
  """element * block_scale * tensor_scale."""
  if fmt.scale_dtype == E8M0:
    exact = fb.ldexp(elements, scale_codec.exponent(scales))
    return jnp.where(scales == scale_codec.NAN_CODE_E8M0, jnp.nan, exact)
  scaled = elements * scale_codec.decode(scales, fmt)
  return scaled if tensor_scale is None else scaled * tensor_scale


def _code_dtype(fmt):
  return jnp.uint4 if fmt.element_bits == 4 else jnp.uint8


def _pack_nibbles(codes: UInt8[Array, "*s"], axis: int) -> UInt8[Array, "*packed"]:
  axis %= codes.ndim
  before, n, after = codes.shape[:axis], codes.shape[axis], codes.shape[axis + 1 :]
  pairs = codes.reshape(*before, n // 2, 2, *after)  # not -1, which an empty tensor leaves open
  shifts = jnp.array([0, 4], jnp.uint8).reshape(
    [2 if i == axis + 1 else 1 for i in range(pairs.ndim)]
  )
  # A reduction rather than two strided slices, with which XLA's CPU loop is 7 times slower.
  return lax.reduce(pairs << shifts, jnp.uint8(0), lax.bitwise_or, (axis + 1,))


def _unpack_nibbles(packed: UInt8[Array, "*packed"], axis: int) -> UInt8[Array, "*s"]:
  axis %= packed.ndim
  pairs = jnp.stack([packed & 15, packed >> 4], axis + 1)
  return pairs.reshape(*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :])
