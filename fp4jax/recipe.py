"""A recipe: which numbers the three GEMMs of a linear layer multiply.

    fprop   y  = x  @ w     contracts k
    dgrad   dx = dy @ w.T   contracts n
    wgrad   dw = x.T @ dy   contracts m, the tokens

`recipe.dgrad.lhs.rounding` is how dy is rounded for dgrad. Every operand is quantized along the
axis that its GEMM contracts.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fp4jax.arguments import check_type
from fp4jax.formats import BlockFormat, Rounding
from fp4jax.transforms import check_block

Source = Literal["original", "residual"]


@dataclasses.dataclass(frozen=True)
class Hadamard:
  """Randomized block Hadamard transform along the contracted axis; see `fp4jax.transforms`."""

  block: int = 32
  seed: int | None = 0  # of one sign vector, shared by all layers and steps; None: no signs

  def __post_init__(self):
    check_block(self.block)

  def signs(self) -> np.ndarray | None:
    if self.seed is None:
      return None
    return np.random.default_rng(self.seed).choice(np.float32([-1, 1]), self.block)


@dataclasses.dataclass(frozen=True)
class Operand:
  """One operand of one GEMM: first transformed, then rounded to `format`.

  `format` is a block format, or a float dtype to which the operand is cast. `source="residual"`
  reads the tensor as the recipe keeps it between forward and backward pass, dequantized.
  """

  format: BlockFormat | DTypeLike
  rounding: Rounding = "nearest"
  transform: Hadamard | None = None
  source: Source = "original"

  def __post_init__(self):
    if not self.is_quantized:
      if not _is_float_dtype(self.format):
        raise ValueError(f"format={self.format!r} is neither a BlockFormat nor a float dtype")
      # A name equals its dtype, but has another hash.
      object.__setattr__(self, "format", jnp.dtype(self.format))
    if not isinstance(self.transform, Hadamard | None):
      raise ValueError(f"transform={self.transform!r} is neither a Hadamard nor None")
    if self.rounding not in get_args(Rounding):
      raise ValueError(f"rounding={self.rounding!r} is not one of {get_args(Rounding)}")
    if self.source not in get_args(Source):
      raise ValueError(f"source={self.source!r} is not one of {get_args(Source)}")
    if self.rounding == "stochastic" and not self.is_quantized:
      raise ValueError(f"stochastic rounding needs a block format, not {self.format}")

  @property
  def is_quantized(self) -> bool:
    return isinstance(self.format, BlockFormat)


def _is_float_dtype(dtype) -> bool:
  try:
    return dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:  # no dtype at all, such as the name of a format
    return False


@dataclasses.dataclass(frozen=True)
class Gemm:
  """The two operands of a GEMM."""

  lhs: Operand
  rhs: Operand

  def __post_init__(self):
    for side in ("lhs", "rhs"):
      check_type(side, getattr(self, side), Operand, " such as Operand(fp4jax.MXFP4)")
    if self.lhs.transform != self.rhs.transform:
      raise ValueError(
        f"the transforms {self.lhs.transform} and {self.rhs.transform} do not cancel in the GEMM"
      )


@dataclasses.dataclass(frozen=True)
class Residual:
  """How x (lhs) and w (rhs) are kept for the backward pass: packed, or None for as they are.

  `hidden` is for `moe_ffn` alone: how it keeps h, the output of its first GEMM. With a format
  there, the second GEMM's lhs of `source="residual"` is SwiGLU of the kept h; `lhs` is for x.
  """

  lhs: BlockFormat | None = None
  rhs: BlockFormat | None = None
  hidden: BlockFormat | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      fmt = getattr(self, field.name)
      if not isinstance(fmt, BlockFormat | None):
        raise ValueError(f"residual.{field.name}={fmt!r} is neither a BlockFormat nor None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """The numerics of a linear layer, with the source that they are taken from."""

  name: str
  fprop: Gemm
  dgrad: Gemm
  wgrad: Gemm
  residual: Residual = Residual()
  citation: str

  def __post_init__(self):
    for gemm in ("fprop", "dgrad", "wgrad"):
      check_type(gemm, getattr(self, gemm), Gemm)
    check_type("residual", self.residual, Residual)
    for gemm, operand in (("dgrad", "lhs"), ("wgrad", "rhs")):
      if getattr(getattr(self, gemm), operand).source != "original":
        raise ValueError(f'{self.name}: {gemm}.{operand} is a gradient; its source is "original"')
    for kept, forward, backward in (
      ("lhs", self.fprop.lhs, self.wgrad.lhs),
      ("rhs", self.fprop.rhs, self.dgrad.rhs),
    ):
      fmt = getattr(self.residual, kept)
      if fmt is None and "residual" in (forward.source, backward.source):
        raise ValueError(f'{self.name}: source="residual" needs a format in residual.{kept}')
      if fmt is not None and backward.source == "original":
        raise ValueError(f"{self.name}: residual.{kept}={fmt.name} is kept but never read")
    if self.residual.hidden is not None and self.wgrad.lhs.source == "original":
      raise ValueError(
        f"{self.name}: residual.hidden={self.residual.hidden.name} leaves no original for"
        ' wgrad.lhs; its source is "residual"'
      )

  def operand(self, role: str) -> Operand:
    """`"dgrad.lhs"`."""
    gemm, operand = role.split(".")
    return getattr(getattr(self, gemm), operand)

  @property
  def is_stochastic(self) -> bool:
    gemms = (self.fprop, self.dgrad, self.wgrad)
    return any("stochastic" in (g.lhs.rounding, g.rhs.rounding) for g in gemms)

  def replace(self, changes: dict[str, Any]) -> "Recipe":
    """The recipe with single fields changed: `{"wgrad.lhs.rounding": "stochastic"}`.

    Only the result has to be a valid recipe: the transforms of both operands change in one call.
    """
    return _replace(self, {tuple(path.split(".")): value for path, value in changes.items()})


def _replace(node, changes, prefix=""):
  names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
  below = {}
  for (name, *rest), value in changes.items():
    if name not in names:
      raise ValueError(f"{type(node).__name__} has no field {name!r}; it has {names}")
    below.setdefault(name, {})[tuple(rest)] = value
  fields = {}
  for name, deeper in below.items():
    path, before = prefix + name, getattr(node, name)
    value = deeper.pop((), before)
    if isinstance(before, Operand):
      check_type(path, value, Operand, f'; did you mean "{path}.format"?')
    fields[name] = _replace(value, deeper, f"{path}.") if deeper else value
  return dataclasses.replace(node, **fields)
