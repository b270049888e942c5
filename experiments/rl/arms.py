"""Arms by name: in which numbers a policy is rolled out and trained.

    bf16                        the reference
    mxfp4                       both operands of every forward GEMM in MXFP4 (W4A4)
    mxfp4+mbs+of+aqn            with macro-block scaling, outlier fallback, quantization noise
    nvfp4@rollout               in the rollout alone; the trainer runs bf16
    mxfp4.deadzone@backward     this part of the error alone, on this path alone
    recipe=hopper_fp4           a recipe of fp4jax.recipes, in rollout and trainer

A path is `rollout`, `forward` or `backward`, the last two the trainer's. Without one an arm has
the numerics in the rollout and in the trainer's forward pass, whose gradient goes straight through:
the backward GEMMs read in bf16 what the forward GEMMs read, and gradients are not quantized.
`@forward` reads the originals there instead, `@backward` quantizes both operands of both backward
GEMMs and none of the forward pass. A base is a format of `fp4jax.FORMATS` in small letters; MXFP4's
scales are rounded up, as in arXiv 2605.20402, from which the corrections and the parts are.
"""

import dataclasses
import difflib

import jax.numpy as jnp

from fp4jax import formats, recipes
from fp4jax.formats import Format
from fp4jax.formats.macro_block import MacroBlockFormat
from fp4jax.quantizers import ErrorParts, Operand, OutlierFallback, Quantizer
from fp4jax.recipe import Gemm, Recipe

PATHS = ("rollout", "forward", "backward")
PARTS = ("scale_bias", "deadzone", "grid_noise")
CORRECTIONS = ("mbs", "of", "aqn")

_SOURCE = "arXiv 2605.20402"
_RCEIL = dataclasses.replace(formats.MXFP4, scale_rule="rceil")
_BF16 = Operand(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Arm:
  """How one policy is sampled and trained."""

  name: str
  rollout: Recipe
  trainer: Recipe
  has_noise: bool = False  # adaptive quantization noise in the rollout


def arm_of(name: str, alpha: float = 0.5) -> Arm:
  """The arm of that name; `alpha` is the outlier fallback's.

  Raises:
    ValueError: a name that says nothing, or something that can't be.
  """
  if name == "bf16":
    return Arm(name, recipes.BF16, recipes.BF16)
  if name.startswith("recipe="):
    recipe = recipes.by_name(name.removeprefix("recipe="))
    return Arm(name, recipe, recipe)
  if name != name.lower():
    raise ValueError(f"arm {name!r} has capitals; did you mean {name.lower()!r}?")
  numerics, _, path = name.partition("@")
  base, *corrections = numerics.split("+")
  base, *parts = base.split(".")
  _check(name, "base", [base], [*_bases(), "bf16"])
  _check(name, "part of the error", parts, PARTS)
  _check(name, "correction", corrections, CORRECTIONS)
  _check(name, "path", [path] if "@" in name else [], PATHS)
  if base == "bf16":
    if parts or path or corrections != ["aqn"]:
      raise ValueError(
        f"arm {name!r}: bf16 has no error to choose from or to correct; its one variant is bf16+aqn"
      )
    return Arm(name, recipes.BF16, recipes.BF16, has_noise=True)
  if parts and "of" in corrections:
    raise ValueError(f"arm {name!r}: the parts of an error that a fallback mends are not defined")
  if "aqn" in corrections and path not in ("", "rollout"):
    raise ValueError(f"arm {name!r}: the noise of aqn is the rollout's, there is none @{path}")
  lhs, rhs = (
    _quantizer(fmt, tuple(parts), alpha if "of" in corrections else None)
    for fmt in _formats(name, base, "mbs" in corrections)
  )
  numerics = f"{numerics}(alpha={alpha})" if "of" in corrections else numerics
  through = _recipe(numerics, lhs, rhs, "fprop")
  forward = _recipe(f"{numerics}@forward", lhs, rhs, "original")
  backward = _backward(f"{numerics}@backward", lhs, rhs)
  rollout = through if path in ("", "rollout") else recipes.BF16
  trainer = {"": through, "rollout": recipes.BF16, "forward": forward, "backward": backward}[path]
  return Arm(name, rollout, trainer, "aqn" in corrections)


def arm_of_any_parts(base: str) -> Arm:
  """An arm of no certain part or path: the states of its quantizers say how much of each part every
  operand of every GEMM gets. Without any of it an operand is read as it is."""
  name = f"{base}.parts"
  _check(name, "base", [base], _bases())
  any_parts = ErrorParts(Operand(_bases()[base]), None)
  forward = _recipe(name, any_parts, any_parts, "original")
  backward = _backward(name, any_parts, any_parts)
  return Arm(name, forward, dataclasses.replace(backward, fprop=forward.fprop))


def _bases() -> dict[str, Format]:
  """By their names in arms: as they are now, for a format of one's own may have been added."""
  return {name.lower(): fmt for name, fmt in formats.FORMATS.items()} | {"mxfp4": _RCEIL}


def _formats(name: str, base: str, macro: bool) -> tuple[Format, Format]:
  """Of activations and weights. Macro blocks are those of the paper's hybrid (arXiv 2603.08713):
  a searched factor for weights, the maximum's own for activations."""
  fmt = _bases()[base]
  if not macro:
    return fmt, fmt
  if getattr(fmt, "scale_dtype", None) != formats.E8M0:
    raise ValueError(f"arm {name!r}: mbs refines scales of plain E8M0, which {base} does not have")
  lhs, rhs = (
    MacroBlockFormat(name=f"{fmt.name}_MBS_{factor[0].upper()}", base=fmt, factor=factor)
    for factor in ("static", "dynamic")
  )
  return lhs, rhs


def _quantizer(fmt: Format, parts: tuple[str, ...], alpha: float | None) -> Quantizer:
  if parts:
    return ErrorParts(Operand(fmt), parts)
  return Operand(fmt) if alpha is None else OutlierFallback(Operand(fmt), alpha)


def _recipe(name: str, lhs: Quantizer, rhs: Quantizer, source: str) -> Recipe:
  """Quantized forward; the backward GEMMs read bf16 of `source`."""
  read = Operand(jnp.bfloat16, source=source)
  return Recipe(
    name=name,
    fprop=Gemm(lhs, rhs),
    dgrad=Gemm(_BF16, read),
    wgrad=Gemm(read, _BF16),
    citation=f"W4A4 as in {_SOURCE}, gradients straight through",
  )


def _backward(name: str, lhs: Quantizer, rhs: Quantizer) -> Recipe:
  """Quantized dgrad and wgrad; gradients are read as activations are."""
  return Recipe(
    name=name,
    fprop=Gemm(_BF16, _BF16),
    dgrad=Gemm(lhs, rhs),
    wgrad=Gemm(lhs, lhs),
    citation=f"the backward pass alone, to tell what breaks it as {_SOURCE} claims",
  )


def _check(name: str, what: str, given: list[str], allowed) -> None:
  for item in given:
    if item not in allowed:
      near = difflib.get_close_matches(item, allowed, cutoff=0.5) or list(allowed)
      if what == "base" and item in recipes.RECIPES:
        near = [f"recipe={item}"]
      raise ValueError(f"arm {name!r}: no {what} {item!r}; did you mean {' or '.join(near)}?")
  if repeated := sorted({item for item in given if given.count(item) > 1}):
    raise ValueError(f"arm {name!r} names {repeated[0]!r} twice")
