"""The three GEMMs of a linear layer on Hopper: which kernel computes what.

`MosaicGemms` has the methods of `linear.XlaGemms`. It serves operand by operand: what reads as E4M3
with float32 scales meets its like in FP8, what is cast to bf16 meets its like in bf16. Operands are
plain arrays, codes with scales; the kernels are imported when they are called.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int

from fp4jax import formats
from fp4jax import operands as ops
from fp4jax.formats import Format
from fp4jax.implementation import device_obstacle, dtype_obstacle
from fp4jax.mosaic.quantize import MIN_ROWS, MXFP4
from fp4jax.operands import Forward, scaled_rows, take_rows
from fp4jax.quantized_array import QuantizedArray
from fp4jax.quantizers import Operand
from fp4jax.recipe import Recipe
from fp4jax.sharding import gather_columns
from fp4jax.swiglu import swiglu, swiglu_backward

BLOCK = 128  # rows and columns that share a scale; the widths of the operands are multiples of it
_BF16 = jnp.dtype(jnp.bfloat16)
_ROWS = (formats.FP8_BLOCK, formats.FP8_BLOCK_POW2)
_WEIGHTS = (formats.FP8_BLOCK_2D, formats.FP8_BLOCK_POW2_2D)
# What the kernels read in each role.
_SERVED = {
  "fprop.lhs": _ROWS,
  "fprop.rhs": _WEIGHTS,
  "dgrad.lhs": _ROWS,
  "dgrad.rhs": _WEIGHTS,
  "wgrad.lhs": _ROWS,
  "wgrad.rhs": _ROWS,
}


def obstacle(
  recipe: Recipe, watched: tuple, rows: int, widths: dict[str, int], **operands
) -> str | None:
  """Why the kernels can't compute GEMMs of `operands`, whole on one device; None if they can.

  `watched` are taps and states, which only XLA reads.
  """
  why = device_obstacle() or _recipe_obstacle(recipe)
  if why := why or dtype_obstacle(**operands):
    return why
  for name, size in widths.items():
    if size % BLOCK or not size:
      return f"{name}={size} is not a multiple of {BLOCK}"
  if rows < MIN_ROWS:
    return f"{rows} rows are fewer than {MIN_ROWS}"
  if any(w is not None for w in watched):
    return 'taps are read by implementation="xla", and so is state'
  return None


def _recipe_obstacle(recipe):
  """The first operand that the kernels can't read."""
  name = f"not recipe {recipe.name!r}"
  for role, operand in recipe.operands():
    plain = isinstance(operand, Operand) and operand.transform is None
    if not plain or operand.needs_key or operand.source == "fprop":
      return f"the kernels serve plain operands rounded to nearest, {name}: {role} is {operand}"
    if operand.format != _BF16 and operand.format not in _SERVED[role]:
      names = [fmt.name for fmt in _SERVED[role]]
      return f"the kernels read {role} in {names} or bf16, {name}"
  for gemm in ("fprop", "dgrad", "wgrad"):
    pair = getattr(recipe, gemm)
    if (pair.lhs.format == _BF16) != (pair.rhs.format == _BF16):
      return f"the kernels multiply FP8 with FP8 and bf16 with bf16, {name} in {gemm}"
    kept = pair.lhs.source == "residual"
    if kept and pair.lhs.format != formats.FP8_BLOCK_POW2:
      return f"the kernels make FP8_BLOCK_POW2 of what is kept in MXFP4, {name} in {gemm}.lhs"
  kept = recipe.residual
  for field, fmt in (("lhs", kept.lhs), ("hidden", kept.hidden)):
    if fmt is not None and fmt not in MXFP4:
      return f"the kernels keep {field} in MXFP4, {name}"
  if (
    kept.hidden is not None
    and recipe.fprop.lhs.source != recipe.wgrad.lhs.source
    and (recipe.fprop.lhs.format == _BF16)
  ):
    return f"the kernels keep the hidden values in MXFP4 for FP8 alone, {name}"
  return None


def multiplied_dtype(recipe: Recipe, gemm: str) -> jnp.dtype:
  """Of both operands of "fprop", "dgrad" or "wgrad", where the kernels serve `recipe`."""
  return jnp.dtype(jnp.float8_e4m3fn) if _reads_fp8(recipe, f"{gemm}.lhs") else _BF16


def _reads_fp8(recipe, role):
  return recipe.operand(role).format != _BF16


class Slots(NamedTuple):
  """Where the kernels have the rows of x: each group's slots are filled up to a multiple of BLOCK.

  A `Layout` of `linear`. An index one past the end is a slot without a row, or a row without a
  slot, which reads zeros.
  """

  rows_in: Int[Array, " slot"] | None  # None: as they are
  rows_out: Int[Array, " m"] | None
  group_sizes: Int[Array, " e"]  # in slots
  valid: Bool[Array, ""] | None = None

  @classmethod
  def of_one_matrix(cls, rows: int) -> "Slots":
    """All rows in one group."""
    slots = -(-rows // BLOCK) * BLOCK
    sizes = jnp.array([slots], jnp.int32)
    if slots == rows:
      return cls(None, None, sizes)
    return cls(jnp.minimum(jnp.arange(slots), rows), jnp.arange(rows), sizes)

  def rows(self, x):
    return x


class Scaled(NamedTuple):
  """E4M3 codes with float32 scales: 1x128 along the contracted axis, or 128x128."""

  codes: Float[Array, "*s"]
  scales: Float32[Array, "*u"]


class Gradient(NamedTuple):
  """dy as dgrad reads it along n, and wgrad along m, K-major: in FP8, or as it is for bf16."""

  rows: Scaled | BFloat16[Array, "m n"]
  columns: Scaled | BFloat16[Array, "m n"]


@dataclasses.dataclass(frozen=True)
class MosaicGemms:
  """E4M3 operands with float32 scales, FP32 promotion each 128 of the contracted axis; or bf16."""

  recipe: Recipe
  group_sizes: Int[Array, " e"]
  weight_dtype: jnp.dtype  # of dw: bf16 is written as such, anything else as float32
  weight_axis: str | None = None  # see `moe_ffn`
  weights_once: bool = False  # see `moe_ffn`

  def _fp8(self, role: str) -> bool:
    return _reads_fp8(self.recipe, role)

  def _pow2(self, role: str) -> dict[str, bool]:
    return {"power_of_two": self.recipe.operand(role).format.has_power_of_two_scales}

  def keep(self, x: BFloat16[Array, "t k"], fmt: Format | None) -> ops.Tensor:
    if fmt is None:
      return ops.Tensor.of(x)
    from pallas_kernels import mxfp4

    return _packed(x, _made_once(mxfp4.quantize_mxfp4(x, scale_rule=fmt.scale_rule)), fmt)

  def keep_weights(self, w: Float[Array, "e k n"]) -> ops.Tensor:
    kept = self.recipe.residual.rhs
    return ops.Tensor.of(w if kept is None else w.astype(jnp.bfloat16), kept, -2)

  def hidden(self, h: BFloat16[Array, "m f2"]) -> tuple[ops.Tensor, Scaled | ops.Tensor]:
    fmt, source = self.recipe.residual.hidden, self.recipe.fprop.lhs.source
    if not self._fp8("fprop.lhs"):
      kept = self.keep(h, fmt)
      return kept, ops.Tensor.of(swiglu(_hidden_values(kept, source)))
    from pallas_kernels import swiglu as kernels

    if fmt is not None and source == "residual":
      both = kernels.keep_swiglu_fp8_rows(h, scale_rule=fmt.scale_rule, **self._pow2("fprop.lhs"))
      *packed, codes, scales = _made_once(both)
      return _packed(h, packed, fmt), Scaled(codes, scales)
    rows = kernels.swiglu_fp8_rows(h, **self._pow2("fprop.lhs"))
    return self.keep(h, fmt), Scaled(*rows)

  def fprop(self, x: ops.Tensor | Scaled, w: ops.Tensor, rows: Int[Array, " m"] | None = None):
    """Permutes codes, not values: a row is quantized once however often it is chosen."""
    if not self._fp8("fprop.lhs"):
      product = self._bf16_product(take_rows(x.original, rows), w, "fprop", False)
      return _made_once(product), Forward()
    if isinstance(x, Scaled):
      lhs = x
    elif self.recipe.fprop.lhs.source == "residual":
      from pallas_kernels import convert

      lhs = Scaled(*convert.mxfp4_to_fp8_rows(*_packed_rows(x, rows)))
    else:
      from pallas_kernels import fp8

      lhs = Scaled(*fp8.quantize_fp8_rows(x.original, **self._pow2("fprop.lhs")))
      if rows is not None:
        lhs = Scaled(take_rows(lhs.codes, rows), take_rows(lhs.scales.T, rows).T)
    of_dgrad, own = self._weights(w, "fprop.rhs", rows=self._reads_alike(), columns=True)
    codes, scales = self._gathered(own, 1)
    product = self._product(lhs, Scaled(codes, scales.swapaxes(1, 2)))
    return _made_once(product), Forward(weights=of_dgrad)

  def gradient(self, dy: BFloat16[Array, "m n"]) -> Gradient:
    dgrad, wgrad = self._fp8("dgrad.lhs"), self._fp8("wgrad.rhs")
    if not (dgrad or wgrad):
      return Gradient(dy, dy)
    from pallas_kernels import fp8

    if self._reads_gradient_alike():
      both = fp8.quantize_fp8_both(dy, **self._pow2("dgrad.lhs"))
      return Gradient(Scaled(*both[:2]), Scaled(*both[2:]))
    rows = Scaled(*fp8.quantize_fp8_rows(dy, **self._pow2("dgrad.lhs"))) if dgrad else dy
    columns = Scaled(*fp8.quantize_fp8_columns(dy, **self._pow2("wgrad.rhs"))) if wgrad else dy
    return Gradient(rows, columns)

  def gradient_of_rows(
    self, dy: BFloat16[Array, "t n"], rows: Int[Array, " m"], factors: Float32[Array, "m 1"]
  ) -> Gradient:
    if not self._reads_gradient_alike():
      return self.gradient(scaled_rows(dy, rows, factors))
    from pallas_kernels import gather

    both = gather.gather_fp8_both(dy, rows, factors[:, 0], **self._pow2("dgrad.lhs"))
    return Gradient(Scaled(*both[:2]), Scaled(*both[2:]))

  def _reads_gradient_alike(self) -> bool:
    fp8 = self._fp8("dgrad.lhs") and self._fp8("wgrad.rhs")
    return fp8 and self._pow2("dgrad.lhs") == self._pow2("wgrad.rhs")

  def dgrad(self, dy: Gradient, w: ops.Tensor, forward: Forward):
    if not self._fp8("dgrad.rhs"):
      return self._bf16_product(dy.rows, w, "dgrad", True), {}, {}
    own = w.as_read or self._weights(w, "dgrad.rhs", rows=True, columns=False)[0]
    return self._product(dy.rows, self._gathered(own, 2)), {}, {}

  def swiglu_backward(
    self, h: ops.Tensor, g: BFloat16[Array, "m f"], after: Float32[Array, "m 1"]
  ) -> tuple[Scaled | ops.Tensor, Gradient, Float32[Array, " m"]]:
    """In one read of h and g, whether h is kept as it is or in MXFP4."""
    roles = ("dgrad.lhs", "wgrad.lhs", "wgrad.rhs")
    in_fp8 = {self._fp8(role) for role in roles}
    if in_fp8 == {True} and len({self._pow2(role)["power_of_two"] for role in roles}) == 1:
      from pallas_kernels import swiglu as kernels

      rows, columns, a, products = kernels.swiglu_backward_fp8(
        _kept_hidden(h), g, after[:, 0], **self._pow2("dgrad.lhs")
      )
      return Scaled(*a), Gradient(Scaled(*rows), Scaled(*columns)), products
    a, dh, products = swiglu_backward(_hidden_values(h, "residual"), g, after)
    return self._as_columns(a), self.gradient(dh), products

  def wgrad(
    self,
    x: ops.Tensor | Scaled,
    dy: Gradient,
    forward: Forward,
    rows: Int[Array, " m"] | None = None,
  ):
    out_dtype = jnp.bfloat16 if self.weight_dtype == jnp.bfloat16 else jnp.float32
    if not self._fp8("wgrad.lhs"):
      from pallas_kernels import bf16_matmul

      lhs = take_rows(x.original, rows)
      dw = bf16_matmul.grouped_wgrad(lhs, dy.columns, self.group_sizes, out_dtype=out_dtype)
      return dw, {}, {}
    from pallas_kernels import grouped_matmul

    if isinstance(x, Scaled):
      lhs = x
    else:  # after dy: in a step without a loop XLA makes it in the forward pass, and keeps it
      x, dy = lax.optimization_barrier((x, dy))
      lhs = self._columns(x, rows)
    dw = grouped_matmul.grouped_wgrad(*lhs, *dy.columns, self.group_sizes, out_dtype=out_dtype)
    return dw, {}, {}

  def _columns(self, x, rows):
    if self.recipe.wgrad.lhs.source == "residual":
      from pallas_kernels import convert

      return Scaled(*convert.mxfp4_to_fp8_columns(*_packed_rows(x, rows)))
    from pallas_kernels import fp8

    return Scaled(*fp8.quantize_fp8_columns(take_rows(x.original, rows), **self._pow2("wgrad.lhs")))

  def _as_columns(self, a: BFloat16[Array, "m f"]) -> Scaled | ops.Tensor:
    """SwiGLU's result as wgrad reads it: the recipe's residual is that of h, not of a."""
    if not self._fp8("wgrad.lhs"):
      return ops.Tensor.of(a)
    from pallas_kernels import fp8

    return Scaled(*fp8.quantize_fp8_columns(a, **self._pow2("wgrad.lhs")))

  def _reads_alike(self) -> bool:
    """Whether what dgrad reads of the weights is made in one read with what fprop does."""
    return self.weights_once and self.recipe.fprop.rhs == self.recipe.dgrad.rhs

  def _weights(self, w, role, *, rows, columns):
    """Codes (e, k, n) and (e, n, k), those that are wanted, with scales (e, k / 128, n / 128), of w
    in bf16, to which the kernel rounds."""
    from pallas_kernels import fp8

    values = w.read(self.recipe.operand(role).source)
    values = values if values.dtype == jnp.float32 else values.astype(jnp.bfloat16)
    wanted = {"rows": rows, "columns": columns}
    parts = fp8.quantize_fp8_weights(values, **wanted, **self._pow2(role))
    *codes, scales = _made_once(parts) if rows and columns else parts
    codes = iter(codes)
    return tuple(Scaled(next(codes), scales) if kind else None for kind in (rows, columns))

  def _gathered(self, w: Scaled, axis: int) -> Scaled:
    """Codes whose `axis` is n, and scales, of all of n."""
    if self.weight_axis is None:
      return w
    codes = lax.all_gather(w.codes, self.weight_axis, axis=axis, tiled=True)
    return Scaled(codes, gather_columns(w.scales, self.weight_axis))

  def _bf16_product(self, lhs, w, gemm, transpose_rhs):
    from pallas_kernels import bf16_matmul

    rhs = w.read(getattr(self.recipe, gemm).rhs.source).astype(jnp.bfloat16)
    rhs = rhs if self.weight_axis is None else gather_columns(rhs, self.weight_axis)
    return bf16_matmul.grouped_matmul(lhs, rhs, self.group_sizes, transpose_rhs=transpose_rhs)

  def _product(self, lhs, rhs):
    from pallas_kernels import grouped_matmul

    return grouped_matmul.grouped_matmul(*lhs, *rhs, self.group_sizes)


def _made_once(results):
  """What a kernel made, of which a part may be kept for the backward pass. In a loop over layers
  XLA otherwise runs the kernel twice, into the array that is kept and for what reads its results
  (`xla_gpu_enable_dynamic_slice_fusion`)."""
  return lax.optimization_barrier(results)


def _packed(x, parts, fmt):
  return ops.Tensor(x, QuantizedArray(*parts, None, fmt, -1), x.shape)


def _kept_hidden(h):
  """h as the kernel of SwiGLU's backward pass reads it: in bf16, or in MXFP4 as it is kept."""
  return h.original if h.packed is None else (h.packed.codes, h.packed.scales)


def _hidden_values(h, source):
  return h.read("original" if h.packed is None else source).astype(jnp.bfloat16)


def _packed_rows(x, rows):
  parts = x.packed.codes, x.packed.scales
  return tuple(take_rows(p, rows) for p in parts)
