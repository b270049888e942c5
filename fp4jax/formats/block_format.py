"""The common format: value = element * block_scale * tensor_scale, one block scale per block.

Code takes a format as an argument and never asks for its name; a variant is
`dataclasses.replace(MXFP4, scale_rule="rceil")`.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fp4jax import float_bits as fb
from fp4jax import names
from fp4jax.formats.format import WHOLE, Ideal, Rounded, Slices, block_view, view_shape
from fp4jax.formats.grids import E2M1, ELEMENT_DTYPES, Grid, as_grid
from fp4jax.formats.scales import (
  CODECS,
  RULES,
  Limit,
  PowerOfTwo,
  PowerOfTwoRule,
  Rule,
  ScaleCodec,
  slice_scale,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFormat:
  """A block-scaled format.

  `block_shape` is `(32,)` for 1x32 blocks along the quantized axis, `(128, 128)` for tiles of the
  last two axes (its last entry lies along the quantized axis), None for one scale per slice.

  `element_dtype` is a small float of ml_dtypes or a `Grid`, `scale_dtype` E8M0, E4M3, float32 or a
  `ScaleCodec`.

  `scale_rule` turns the largest magnitude of a block, amax, into its scale; it is a name below or
  a rule of `fp4jax.formats.scales`. q_max is the largest element (6 for E2M1, 448 for E4M3), emax
  its exponent (2, 8):

  | rule    | scale before it is stored                 | block maximum / scale, E2M1 | clips |
  |---------|-------------------------------------------|-----------------------------|-------|
  | floor   | 2^(floor(log2 amax) - emax); OCP MX v1.0  | [4, 8)                      | yes   |
  | even    | floor, of amax rounded to element precision | [3.5, 7)                  | yes   |
  | rceil   | 2^ceil(log2(amax / q_max)); truncation-free | (3, 6]                    | no    |
  | oas     | 2^ceil(log2(amax / 7)), E2M1 only; arXiv 2603.08713 | (3.5, 7]          | yes   |
  | nearest | amax / q_max, rounded to `scale_dtype`    | about 6                     | a bit |

  `has_tensor_scale` gives each slice a float32 scale that the block scales multiply. A slice is
  what one GEMM reads: an expert, an entry of a batch, inside shard_map a device's own part.

  Scales are clamped to what `scale_dtype` holds: a block of zeros has the smallest scale (E8M0 code
  0) and codes 0, and a block too large for its scale saturates. A block with a NaN or an infinity
  is NaN as a whole: its scale is NaN (E8M0 code 255, E4M3 code 127, float32 NaN) and its codes are
  0; other blocks are untouched, and the tensor scale is taken over finite values.

  Products with E8M0 scales are exact, subnormal ones too. With other scales a product is rounded
  once to float32, with a tensor scale twice, and one below 2^-126 is zero where the backend flushes
  subnormals, as XLA does on a CPU. A product beyond float32, such as 4 * 2^126, saturates.

  Equality asks what is computed: `name` has no part in it, and it follows a change of the fields
  (`fp4jax.names`).
  """

  name: str = dataclasses.field(compare=False)
  element_dtype: DTypeLike | Grid
  block_shape: tuple[int, ...] | None
  scale_dtype: DTypeLike | ScaleCodec
  scale_rule: str | Rule
  has_tensor_scale: bool = False

  def __post_init__(self):
    for field, kind, allowed in (
      ("element_dtype", Grid, ELEMENT_DTYPES),
      ("scale_dtype", ScaleCodec, tuple(CODECS)),
    ):
      value = getattr(self, field)
      if not isinstance(value, kind):
        dtype = _as_dtype(field, value, kind, allowed)
        _check(field, dtype, allowed)
        object.__setattr__(self, field, dtype)  # A name equals its dtype, but has another hash.
    if type(self.codec) is PowerOfTwo and self.grid.max < 2:
      raise ValueError(
        f"E8M0 scales reach 2^127 where the largest element is {self.grid.max}, below 2, and such a"
        " scale has no float32 reciprocal; use a codec that ends at 2^126"
      )
    taken = [name for name, rule in RULES.items() if self.codec.takes(rule)]
    if isinstance(self.scale_rule, str):
      _check("scale_rule", self.scale_rule, taken)
    elif not self.codec.takes(self.scale_rule):
      raise ValueError(f"{self.codec.name} scales can't hold those of {self.scale_rule!r}")
    if self.scale_rule == "oas" and self.element_dtype != E2M1:
      raise ValueError(f'scale_rule "oas" is defined for E2M1 elements, not {self.grid.name}')
    if isinstance(self.rule, Limit) and self.rule.limit is not None:
      low = 2.0 ** math.floor(math.log2(self.grid.max))
      if not low <= self.rule.limit < 2 * low:
        raise ValueError(
          f"{self.rule} is not in [{low}, {2 * low}), the binade of the largest element"
        )
    if self.has_tensor_scale and self.codec.takes(Limit()):
      raise ValueError(f"a tensor scale goes with E4M3 block scales, not {self.codec.name}")
    if not (self.block_shape is None or _is_block_shape(self.block_shape)):
      raise ValueError(f"{self.block_shape=} is not a tuple (even,) or (rows, even), nor None")
    names.settle(self)

  @property
  def grid(self) -> Grid:
    return as_grid(self.element_dtype)

  @property
  def codec(self) -> ScaleCodec:
    return (
      self.scale_dtype if isinstance(self.scale_dtype, ScaleCodec) else CODECS[self.scale_dtype]
    )

  @property
  def rule(self) -> Rule:
    return RULES[self.scale_rule] if isinstance(self.scale_rule, str) else self.scale_rule

  @property
  def block_size(self) -> int | None:
    """Elements of a block along the quantized axis; None for one block per slice."""
    return None if self.block_shape is None else self.block_shape[-1]

  @property
  def element_bits(self) -> int:
    return self.grid.bits

  @property
  def q_max(self) -> float:
    """Largest element."""
    return self.grid.max

  @property
  def q_min(self) -> float:
    """Smallest positive element."""
    return self.grid.smallest

  @property
  def bits_per_value(self) -> float:
    """Storage of one value, its share of the block scale included: 4.25 for MXFP4."""
    if self.block_shape is None:
      return float(self.element_bits)
    return self.element_bits + self.codec.bits / math.prod(self.block_shape)

  @property
  def has_power_of_two_scales(self) -> bool:
    return isinstance(self.rule, PowerOfTwoRule)

  @property
  def dequantized_dtype(self) -> jnp.dtype:
    """Narrowest dtype that holds every normal dequantized value exactly: bf16 or float32."""
    return jnp.dtype(jnp.bfloat16 if self.has_power_of_two_scales else jnp.float32)

  def round(self, x, axis, random_bits=None, slices: Slices = WHOLE) -> Rounded:
    view = view_shape(block_view(x.shape, self, axis, slices))
    bits = fb.to_bits(x.reshape(view))
    magnitude = bits & fb.ABS_MASK
    amax = jnp.max(magnitude, axis=tuple(range(1, bits.ndim, 2)), keepdims=True, initial=0)
    if self.block_shape is None and slices.owner is not None:
      amax = slices.amax(amax)
    finite = amax < fb.EXPONENT_MASK
    magnitude, sign = (jnp.where(finite, b, 0) for b in (magnitude, bits & ~fb.ABS_MASK))
    unit = None
    if self.has_tensor_scale:
      largest = self.grid.max * self.codec.max
      unit = slice_scale(slices.amax(jnp.where(finite, amax, 0)), largest)
    scales = self.codec.store(self.rule, self.grid, amax, unit)
    reciprocal = self.codec.reciprocal(scales)
    if unit is None:
      scaled = fb.multiply(magnitude, reciprocal)
    else:
      scaled = fb.multiply(magnitude, 1.0 / unit) * reciprocal
    if random_bits is not None:
      random_bits = random_bits.reshape(view)
    rounded = self.grid.round(scaled, random_bits)
    elements = fb.from_bits(fb.to_bits(rounded) | sign)
    return Rounded(x.shape, elements, scales, unit, scaled, magnitude, amax, random_bits)

  def values(self, r: Rounded):
    return self._values(r.elements, r.scales, r.slice_scale).reshape(r.shape)

  def _values(self, elements, scales, unit):
    values = self.codec.apply(elements, scales)
    values = values if unit is None else values * unit
    return fb.saturate(values, jnp.float32)

  def ideal(self, r: Rounded) -> Ideal:
    scale = fb.multiply(r.amax, jnp.full_like(r.amax, 1 / self.q_max, jnp.float32))
    scale = jnp.maximum(scale, 2.0**-126)
    scaled = fb.multiply(r.magnitude, 1.0 / scale)
    values = jnp.copysign(self.grid.round(scaled, r.random_bits) * scale, r.elements)
    in_deadzone = scaled < self.grid.first_midpoint
    return Ideal(values.reshape(r.shape), in_deadzone.reshape(r.shape))

  def clipped(self, r: Rounded):
    return (r.scaled > self.q_max).reshape(r.shape)

  def store(self, r: Rounded):
    unit = r.slice_scale
    if unit is not None:  # a scalar where there is but one
      unit = unit.reshape(() if unit.size == 1 else unit.shape[::2])
    return (
      self.grid.encode(r.elements).reshape(r.shape),
      r.scales.reshape(r.scales.shape[::2]),
      unit,
    )

  def load(self, codes, scales, slice_scale):
    # Blocks are as long as codes per scale, so that a stack of arrays, as vmap makes it, loads too.
    if scales.ndim != codes.ndim or any(
      n % max(s, 1) for n, s in zip(codes.shape, scales.shape, strict=True)
    ):
      raise ValueError(f"scales {scales.shape} do not divide codes {codes.shape} into blocks")
    view = [(s, n // s if s else 1) for n, s in zip(codes.shape, scales.shape, strict=True)]

    def spread(a):
      return a.reshape([n for size in a.shape for n in (size, 1)])

    unit = slice_scale
    if unit is not None and unit.ndim:  # its axes are those in front
      unit = spread(unit.reshape(*unit.shape, *(1,) * (codes.ndim - unit.ndim)))
    elements = self.grid.decode(codes).reshape(view_shape(view))
    return self._values(elements, spread(scales), unit).reshape(codes.shape)


def _is_block_shape(shape):
  if not isinstance(shape, tuple) or len(shape) not in (1, 2):
    return False
  return all(isinstance(n, int | np.integer) and n > 0 for n in shape) and shape[-1] % 2 == 0


def _as_dtype(field, value, kind, allowed):
  try:
    return jnp.dtype(value)
  except TypeError:
    if isinstance(value, str):
      names = ", ".join(str(dtype) for dtype in allowed)
      raise TypeError(f"{field}={value!r} is none of {names}, nor a {kind.__name__}") from None
    asked = [*kind.__annotations__, *(name for name in vars(kind) if name[0] != "_")]
    missing = sorted({name for name in asked if not hasattr(value, name)})
    raise TypeError(
      f"{field}={value!r} is neither a dtype nor a {kind.__name__}, for it lacks {missing}"
    ) from None


def _check(field, value, allowed):
  if value not in allowed:
    raise ValueError(f"{field}={str(value)!r} is not one of {[str(a) for a in allowed]}")
