"""Block-scaled formats as values.

Every format here represents a tensor as

    value = element * block_scale * tensor_scale,

one `block_scale` for each block, and a `tensor_scale` only where the format has one. Code takes a
format as an argument and never asks for its name; a variant is `dataclasses.replace(MXFP4, ...)`.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

PowerOfTwoRule = Literal["floor", "even", "rceil", "oas"]
ScaleRule = Literal[PowerOfTwoRule, "nearest"]
Rounding = Literal["nearest", "stochastic"]

E2M1 = jnp.dtype(ml_dtypes.float4_e2m1fn)
E4M3 = jnp.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = jnp.dtype(ml_dtypes.float8_e5m2)
E8M0 = jnp.dtype(ml_dtypes.float8_e8m0fnu)
FP32 = jnp.dtype(np.float32)

_ELEMENT_DTYPES = (E2M1, E4M3, E5M2)
_SCALE_DTYPES = (E8M0, E4M3, FP32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFormat:
  """A block-scaled format.

  `block_shape` is `(32,)` for 1x32 blocks along the quantized axis, `(128, 128)` for tiles of the
  last two axes (its last entry lies along the quantized axis), None for one scale a tensor.

  `scale_rule` turns the largest magnitude of a block, amax, into its scale; q_max is the largest
  element (6 for E2M1, 448 for E4M3), emax its exponent (2, 8):

  | rule    | scale before it is stored                 | block maximum / scale, E2M1 | clips |
  |---------|-------------------------------------------|-----------------------------|-------|
  | floor   | 2^(floor(log2 amax) - emax); OCP MX v1.0  | [4, 8)                      | yes   |
  | even    | floor, of amax rounded to element precision | [3.5, 7)                  | yes   |
  | rceil   | 2^ceil(log2(amax / q_max)); truncation-free | (3, 6]                    | no    |
  | oas     | 2^ceil(log2(amax / 7)), E2M1 only; arXiv 2603.08713 | (3.5, 7]          | yes   |
  | nearest | amax / q_max, rounded to `scale_dtype`    | about 6                     | a bit |

  Exponents are clamped to what `scale_dtype` holds, so a block of zeros has the smallest scale
  (E8M0 code 0) and codes 0. A block with a NaN or an infinity is NaN as a whole: its scale is NaN
  (E8M0 code 255, E4M3 code 127, float32 NaN) and its codes are 0; other blocks are untouched, and
  the tensor scale is taken over finite values.
  """

  name: str
  element_dtype: DTypeLike
  block_shape: tuple[int, ...] | None
  scale_dtype: DTypeLike
  scale_rule: ScaleRule
  has_tensor_scale: bool = False

  def __post_init__(self):
    for field, allowed in (("element_dtype", _ELEMENT_DTYPES), ("scale_dtype", _SCALE_DTYPES)):
      dtype = jnp.dtype(getattr(self, field))
      _check(field, dtype, allowed)
      object.__setattr__(self, field, dtype)  # A name equals its dtype, but has another hash.
    power_of_two_rules = get_args(PowerOfTwoRule)
    match self.scale_dtype:
      case dtype if dtype == E8M0:
        _check("scale_rule", self.scale_rule, power_of_two_rules)
      case dtype if dtype == E4M3:
        _check("scale_rule", self.scale_rule, ("nearest",))
      case _:
        _check("scale_rule", self.scale_rule, (*power_of_two_rules, "nearest"))
    if self.scale_rule == "oas" and self.element_dtype != E2M1:
      raise ValueError(f'scale_rule "oas" is defined for E2M1 elements, not {self.element_dtype}')
    if self.has_tensor_scale and self.scale_dtype != E4M3:
      raise ValueError(f"a tensor scale goes with E4M3 block scales, not {self.scale_dtype}")
    if not (self.block_shape is None or _is_block_shape(self.block_shape)):
      raise ValueError(f"{self.block_shape=} is not a tuple (even,) or (rows, even), nor None")

  @property
  def block_size(self) -> int | None:
    """Elements of a block along the quantized axis; None for one block a tensor."""
    return None if self.block_shape is None else self.block_shape[-1]

  @property
  def element_bits(self) -> int:
    return ml_dtypes.finfo(self.element_dtype).bits

  @property
  def q_max(self) -> float:
    """Largest element."""
    return float(ml_dtypes.finfo(self.element_dtype).max)

  @property
  def q_min(self) -> float:
    """Smallest positive element."""
    return float(ml_dtypes.finfo(self.element_dtype).smallest_subnormal)

  @property
  def bits_per_value(self) -> float:
    """Storage of one value, its share of the block scale included: 4.25 for MXFP4."""
    if self.block_shape is None:
      return float(self.element_bits)
    scale_bits = 8 * self.scale_dtype.itemsize
    return self.element_bits + scale_bits / math.prod(self.block_shape)

  @property
  def has_power_of_two_scales(self) -> bool:
    return self.scale_rule != "nearest"

  @property
  def dequantized_dtype(self) -> jnp.dtype:
    """Narrowest dtype that holds every normal dequantized value exactly: bf16 or float32."""
    return jnp.dtype(jnp.bfloat16) if self.has_power_of_two_scales else FP32


def _is_block_shape(shape):
  if not isinstance(shape, tuple) or len(shape) not in (1, 2):
    return False
  return all(isinstance(n, int | np.integer) and n > 0 for n in shape) and shape[-1] % 2 == 0


def _check(field, value, allowed):
  if value not in allowed:
    raise ValueError(f"{field}={str(value)!r} is not one of {[str(a) for a in allowed]}")


MXFP4 = BlockFormat(
  name="MXFP4", element_dtype=E2M1, block_shape=(32,), scale_dtype=E8M0, scale_rule="floor"
)
MXFP8 = BlockFormat(
  name="MXFP8", element_dtype=E4M3, block_shape=(32,), scale_dtype=E8M0, scale_rule="floor"
)
# arXiv 2509.25149: the tensor scale maps the tensor's amax to 6 * 448.
NVFP4 = BlockFormat(
  name="NVFP4",
  element_dtype=E2M1,
  block_shape=(16,),
  scale_dtype=E4M3,
  scale_rule="nearest",
  has_tensor_scale=True,
)
# DeepSeek-V3 (arXiv 2412.19437): 1x128 for activations and gradients, 128x128 for weights.
FP8_BLOCK = BlockFormat(
  name="FP8_BLOCK",
  element_dtype=E4M3,
  block_shape=(128,),
  scale_dtype=FP32,
  scale_rule="nearest",
)
FP8_BLOCK_2D = dataclasses.replace(FP8_BLOCK, name="FP8_BLOCK_2D", block_shape=(128, 128))
# TransformerEngine's blockwise recipe: the same blocks, scales rounded up to a power of two.
FP8_BLOCK_POW2 = dataclasses.replace(FP8_BLOCK, name="FP8_BLOCK_POW2", scale_rule="rceil")
FP8_BLOCK_POW2_2D = dataclasses.replace(FP8_BLOCK_2D, name="FP8_BLOCK_POW2_2D", scale_rule="rceil")
# Current scaling: one scale from this tensor's own amax.
FP8_TENSOR = dataclasses.replace(FP8_BLOCK, name="FP8_TENSOR", block_shape=None)

FORMATS = {
  f.name: f
  for f in (
    MXFP4,
    MXFP8,
    NVFP4,
    FP8_BLOCK,
    FP8_BLOCK_2D,
    FP8_BLOCK_POW2,
    FP8_BLOCK_POW2_2D,
    FP8_TENSOR,
  )
}
