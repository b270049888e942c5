"""The three GEMMs of a linear layer on Hopper: which kernel computes what.

Two classes with the methods of `linear.XlaGemms`: FP8 with block scales, and bf16. Their operands
are plain arrays, codes with scales; the kernels are imported when they are called.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Int

from fp4jax import operands as ops
from fp4jax import recipes
from fp4jax.formats import BlockFormat
from fp4jax.implementation import device_obstacle, dtype_obstacle
from fp4jax.linear import take_rows
from fp4jax.mosaic.quantize import MIN_ROWS
from fp4jax.quantization import QuantizedArray
from fp4jax.recipe import Recipe, Source
from fp4jax.swiglu import swiglu, swiglu_backward

BLOCK = 128  # rows and columns that share a scale; the widths of the operands are multiples of it
_SERVED = (
  recipes.BF16,
  recipes.FP8,
  recipes.FP8_POW2,
  recipes.HOPPER_FP4,
  recipes.HOPPER_FP4.replace({"fprop.lhs.source": "original"}),
)


def obstacle(
  recipe: Recipe, taps: tuple[ops.Tap | None, ...], rows: int, widths: dict[str, int], **operands
) -> str | None:
  """Why the kernels can't compute GEMMs of `operands`; None if they can."""
  if why := device_obstacle():
    return why
  if _numerics(recipe) not in [_numerics(r) for r in _SERVED]:
    return f"the kernels serve {[r.name for r in _SERVED[:4]]}, not recipe {recipe.name!r}"
  if why := dtype_obstacle(**operands):
    return why
  for name, size in widths.items():
    if size % BLOCK or not size:
      return f"{name}={size} is not a multiple of {BLOCK}"
  if rows < MIN_ROWS:
    return f"{rows} rows are fewer than {MIN_ROWS}"
  return None if all(tap is None for tap in taps) else 'taps are read by implementation="xla"'


def _numerics(recipe):
  return dataclasses.replace(recipe, name="", citation="")


def gemms(
  recipe: Recipe, group_sizes: Int[Array, " e"], weight_dtype: DTypeLike
) -> "Fp8Gemms | Bf16Gemms":
  """For a recipe that `obstacle` let pass; group sizes are multiples of BLOCK."""
  if not recipe.fprop.lhs.is_quantized:
    return Bf16Gemms(recipe, group_sizes)
  return Fp8Gemms(recipe, group_sizes, jnp.dtype(weight_dtype))


class Scaled(NamedTuple):
  """E4M3 codes with float32 scales: 1x128 along the contracted axis, or 128x128."""

  codes: Float[Array, "*s"]
  scales: Float32[Array, "*u"]


class Gradient(NamedTuple):
  """dy along n for dgrad, and along m, K-major, for wgrad."""

  rows: Scaled
  columns: Scaled


@dataclasses.dataclass(frozen=True)
class Fp8Gemms:
  """E4M3 operands with float32 scales, FP32 promotion each 128 of the contracted axis."""

  recipe: Recipe
  group_sizes: Int[Array, " e"]
  weight_dtype: jnp.dtype  # of dw: bf16 is written as such, anything else as float32

  @property
  def power_of_two(self) -> bool:
    return self.recipe.fprop.lhs.format.has_power_of_two_scales

  def keep(self, x: BFloat16[Array, "t k"], fmt: BlockFormat | None) -> ops.Tensor:
    if fmt is None:
      return ops.Tensor.of(x)
    from pallas_kernels import mxfp4

    codes, scales = mxfp4.quantize_mxfp4(x, scale_rule=fmt.scale_rule)
    return ops.Tensor(x, QuantizedArray(codes, scales, None, fmt, -1), x.shape)

  def activation(self, h: ops.Tensor, source: Source) -> Scaled:
    from pallas_kernels import swiglu

    return Scaled(*swiglu.swiglu_fp8_rows(_hidden(h, source), power_of_two=self.power_of_two))

  def fprop(self, x: ops.Tensor | Scaled, w: ops.Tensor, rows: Int[Array, " m"] | None = None):
    """Permutes codes, not values: a row is quantized once however often it is chosen."""
    if isinstance(x, Scaled):
      lhs = x
    elif self.recipe.fprop.lhs.source == "residual":
      from pallas_kernels import convert

      lhs = Scaled(*convert.mxfp4_to_fp8_rows(*_packed_rows(x, rows)))
    else:
      from pallas_kernels import fp8

      lhs = Scaled(*fp8.quantize_fp8_rows(x.original, power_of_two=self.power_of_two))
      if rows is not None:
        lhs = Scaled(take_rows(lhs.codes, rows), take_rows(lhs.scales.T, rows).T)
    _, codes_t, scales = self._weights(w)
    return self._product(lhs, Scaled(codes_t, scales.swapaxes(1, 2))), {}

  def gradient(self, dy: BFloat16[Array, "m n"]) -> Gradient:
    from pallas_kernels import fp8

    rows_and_columns = fp8.quantize_fp8_both(dy, power_of_two=self.power_of_two)
    return Gradient(Scaled(*rows_and_columns[:2]), Scaled(*rows_and_columns[2:]))

  def dgrad(self, dy: Gradient, w: ops.Tensor):
    codes, _, scales = self._weights(w)
    return self._product(dy.rows, Scaled(codes, scales)), {}

  def swiglu_backward(
    self, h: ops.Tensor, g: BFloat16[Array, "m f"], after: Float32[Array, "m 1"]
  ) -> tuple[Scaled, Gradient, Float32[Array, " m"]]:
    """In one read of h and g, whether h is kept as it is or in MXFP4."""
    from pallas_kernels import swiglu

    rows, columns, a, products = swiglu.swiglu_backward_fp8(
      _hidden(h, "residual"), g, after[:, 0], power_of_two=self.power_of_two
    )
    return Scaled(*a), Gradient(Scaled(*rows), Scaled(*columns)), products

  def wgrad(self, x: ops.Tensor | Scaled, dy: Gradient, rows: Int[Array, " m"] | None = None):
    from pallas_kernels import grouped_matmul

    lhs = x if isinstance(x, Scaled) else self._columns(x, rows)
    out_dtype = jnp.bfloat16 if self.weight_dtype == jnp.bfloat16 else jnp.float32
    dw = grouped_matmul.grouped_wgrad(*lhs, *dy.columns, self.group_sizes, out_dtype=out_dtype)
    return dw, {}

  def _columns(self, x, rows):
    if self.recipe.wgrad.lhs.source == "residual":
      from pallas_kernels import convert

      return Scaled(*convert.mxfp4_to_fp8_columns(*_packed_rows(x, rows)))
    from pallas_kernels import fp8

    values = take_rows(x.original, rows)
    return Scaled(*fp8.quantize_fp8_columns(values, power_of_two=self.power_of_two))

  def _weights(self, w):
    from pallas_kernels import fp8

    return fp8.quantize_fp8_weights(w.original, power_of_two=self.power_of_two)

  def _product(self, lhs, rhs):
    from pallas_kernels import grouped_matmul

    return grouped_matmul.grouped_matmul(*lhs, *rhs, self.group_sizes)


def _hidden(h, source):
  """h as SwiGLU's kernels read it: in bf16, or the MXFP4 codes and scales that are kept."""
  if h.packed is None or source == "original":
    return h.original
  return h.packed.codes, h.packed.scales


def _packed_rows(x, rows):
  parts = x.packed.codes, x.packed.scales
  return tuple(take_rows(p, rows) for p in parts)


@dataclasses.dataclass(frozen=True)
class Bf16Gemms:
  """bf16 operands, float32 accumulation."""

  recipe: Recipe
  group_sizes: Int[Array, " e"]

  def keep(self, x: BFloat16[Array, "t k"], fmt: None) -> ops.Tensor:
    return ops.Tensor.of(x, fmt)

  def activation(self, h: ops.Tensor, source: Source) -> ops.Tensor:
    del source  # h is kept as it is
    return ops.Tensor.of(swiglu(h.original))

  def fprop(self, x: ops.Tensor, w: ops.Tensor, rows: Int[Array, " m"] | None = None):
    from pallas_kernels import bf16_matmul

    return bf16_matmul.grouped_matmul(take_rows(x.original, rows), w.original, self.group_sizes), {}

  def gradient(self, dy: BFloat16[Array, "m n"]) -> BFloat16[Array, "m n"]:
    return dy

  def dgrad(self, dy: BFloat16[Array, "m n"], w: ops.Tensor):
    from pallas_kernels import bf16_matmul

    product = bf16_matmul.grouped_matmul(dy, w.original, self.group_sizes, transpose_rhs=True)
    return product, {}

  def swiglu_backward(
    self, h: ops.Tensor, g: BFloat16[Array, "m f"], after: Float32[Array, "m 1"]
  ) -> tuple[ops.Tensor, BFloat16[Array, "m f2"], Float32[Array, " m"]]:
    a, dh, products = swiglu_backward(h.original, g, after)
    return ops.Tensor.of(a), dh, products

  def wgrad(self, x: ops.Tensor, dy: BFloat16[Array, "m n"], rows: Int[Array, " m"] | None = None):
    from pallas_kernels import bf16_matmul

    return bf16_matmul.grouped_wgrad(take_rows(x.original, rows), dy, self.group_sizes), {}
