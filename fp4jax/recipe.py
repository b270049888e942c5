"""A recipe: which numbers the three GEMMs of a linear layer multiply.

    fprop   y  = x  @ w     contracts k
    dgrad   dx = dy @ w.T   contracts n
    wgrad   dw = x.T @ dy   contracts m, the tokens

`recipe.dgrad.lhs.rounding` is how dy is rounded for dgrad. Every operand is quantized along the
axis that its GEMM contracts.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from fp4jax import names
from fp4jax.arguments import check_type
from fp4jax.formats import Format, is_format
from fp4jax.quantizers import Operand, Quantizer

# In the order of the table of a tap. A role's number seeds its draws: it never changes.
ROLES = {
  "fprop.lhs": 0,
  "fprop.rhs": 1,
  "dgrad.lhs": 2,
  "dgrad.rhs": 3,
  "wgrad.lhs": 4,
  "wgrad.rhs": 5,
}


@dataclasses.dataclass(frozen=True)
class Gemm:
  """The two operands of a GEMM."""

  lhs: Quantizer
  rhs: Quantizer

  def __post_init__(self):
    for side in ("lhs", "rhs"):
      _check_quantizer(side, getattr(self, side), " such as Operand(fp4jax.MXFP4)")
    if self.lhs.transform != self.rhs.transform:
      raise ValueError(
        f"the transforms {self.lhs.transform} and {self.rhs.transform} do not cancel in the GEMM"
      )


def _check_quantizer(name, value, hint):
  if isinstance(value, type) or not isinstance(value, Quantizer):
    raise TypeError(f"{name} has type {type(value).__name__}, not Operand{hint}")


@dataclasses.dataclass(frozen=True)
class Residual:
  """How x (lhs) and w (rhs) are kept for the backward pass: packed, or None for as they are.

  `hidden` is for `moe_ffn` alone: how it keeps h, the output of its first GEMM. With a format
  there, the second GEMM's lhs of `source="residual"` is SwiGLU of the kept h; `lhs` is for x.
  """

  lhs: Format | None = None
  rhs: Format | None = None
  hidden: Format | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      fmt = getattr(self, field.name)
      if fmt is not None and not is_format(fmt):
        raise ValueError(f"residual.{field.name}={fmt!r} is neither a BlockFormat nor None")


@dataclasses.dataclass(frozen=True)
class Payload:
  """For `moe_ffn`: in what rows travel to their experts, and so are rounded to, on one device too.

  `forward` is of x, `backward` of the gradient of the result; both arrive in x's dtype. None: as
  they are, or for x as it is kept where nothing else is read of it.

  What returns are a device's sums over its experts, of the result and of dx, in the dtype `sums`.
  Below float32 they are the one number that depends on which experts share a device.
  """

  forward: Format | None = None
  backward: Format | None = None
  sums: DTypeLike = jnp.float32

  def __post_init__(self):
    for name in ("forward", "backward"):
      fmt = getattr(self, name)
      if fmt is not None and not (is_format(fmt) and moves_by_rows(fmt)):
        raise ValueError(f"payload.{name}={fmt!r} is no format whose rows stand alone")
    object.__setattr__(self, "sums", jnp.dtype(self.sums))
    if self.sums not in (jnp.float32, jnp.bfloat16):
      raise ValueError(f"payload.sums={self.sums.name} is neither float32 nor bfloat16")


def moves_by_rows(fmt: Format) -> bool:
  """Whether no two rows share a scale."""
  return fmt.block_shape is not None and len(fmt.block_shape) == 1 and not fmt.has_tensor_scale


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Recipe:
  """The numerics of a linear layer, with the source that they are taken from.

  Equality asks what is computed: `name` and `citation` have no part in it. The name of a changed
  recipe tells the changes, unless it is given one (`fp4jax.names`).
  """

  name: str = dataclasses.field(compare=False)
  fprop: Gemm
  dgrad: Gemm
  wgrad: Gemm
  residual: Residual = Residual()
  payload: Payload = Payload()
  citation: str = dataclasses.field(compare=False)

  def __post_init__(self):
    for gemm in ("fprop", "dgrad", "wgrad"):
      check_type(gemm, getattr(self, gemm), Gemm)
    check_type("residual", self.residual, Residual)
    check_type("payload", self.payload, Payload)
    names.settle(self)
    for role in ("dgrad.lhs", "wgrad.rhs"):
      if self.operand(role).source != "original":
        raise ValueError(f'{self.name}: {role} is a gradient; its source is "original"')
    for role in ("fprop.lhs", "fprop.rhs"):
      if self.operand(role).source == "fprop":
        raise ValueError(f'{self.name}: {role} is what source="fprop" reads; it can\'t be its own')
    for kept, forward, backward in (
      ("lhs", self.fprop.lhs, self.wgrad.lhs),
      ("rhs", self.fprop.rhs, self.dgrad.rhs),
    ):
      fmt = getattr(self.residual, kept)
      if fmt is None and "residual" in (forward.source, backward.source):
        raise ValueError(f'{self.name}: source="residual" needs a format in residual.{kept}')
      if fmt is not None and "residual" not in (forward.source, backward.source):
        raise ValueError(f"{self.name}: residual.{kept}={fmt.name} is kept but never read")
      if fmt is not None and backward.source == "original":
        raise ValueError(f"{self.name}: residual.{kept}={fmt.name} is kept but never read")
    if self.residual.hidden is not None and self.wgrad.lhs.source == "original":
      raise ValueError(
        f"{self.name}: residual.hidden={self.residual.hidden.name} leaves no original for"
        ' wgrad.lhs; its source is "residual"'
      )
    self._check_space("fprop.lhs", "dgrad.rhs")  # dx = dy @ w.T lies where dgrad read w
    self._check_space("fprop.rhs", "wgrad.lhs")

  def __repr__(self):
    """A line per operand, and one for what is kept."""
    lines = [f"{role}  {names.brief(quantizer)}" for role, quantizer in self.operands()]
    if self.residual != Residual():
      lines.append(f"residual   {names.brief(self.residual)}")
    if self.payload != Payload():
      lines.append(f"payload    {names.brief(self.payload)}")
    return "\n  ".join([f"Recipe {self.name}", *lines])

  def _check_space(self, forward: str, backward: str) -> None:
    """What maps its gradient in the space of its transform needs a gradient of that space."""
    quantizer, source = self.operand(forward), self.operand(backward).source
    if getattr(quantizer, "pulls_transformed", False) and source != "fprop":
      raise ValueError(
        f"{self.name}: {type(quantizer).__name__} in {forward} maps the gradient of what fprop"
        f' read; {backward}.source={source!r} must be "fprop"'
      )

  def operand(self, role: str) -> Quantizer:
    """`"dgrad.lhs"`."""
    gemm, operand = role.split(".")
    return getattr(getattr(self, gemm), operand)

  def operands(self) -> Iterator[tuple[str, Quantizer]]:
    return ((role, self.operand(role)) for role in ROLES)

  @property
  def is_stochastic(self) -> bool:
    return any(quantizer.needs_key for _, quantizer in self.operands())

  @property
  def plain_dtype(self) -> jnp.dtype | None:
    """The one dtype to which all operands are cast; None where a recipe does anything else."""
    first, *others = (quantizer for _, quantizer in self.operands())
    plain = not is_format(first.format) and first == Operand(first.format)
    return first.format if plain and all(other == first for other in others) else None

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
    if isinstance(before, Quantizer):
      _check_quantizer(path, value, f'; did you mean "{path}.format"?')
    fields[name] = _replace(value, deeper, f"{path}.") if deeper else value
  return dataclasses.replace(node, **fields)
