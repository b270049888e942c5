"""Recipes are the published ones, change one field at a time, and refuse what makes no sense."""

import dataclasses

import jax.numpy as jnp
import pytest

import fp4jax
from fp4jax import Gemm, Hadamard, Operand, Recipe, Residual, recipes

OPERANDS = [f"{gemm}.{side}" for gemm in ("fprop", "dgrad", "wgrad") for side in ("lhs", "rhs")]


def described(recipe):
  """One line an operand: format, scale rule, rounding, transform, source."""
  lines = []
  for role in OPERANDS:
    o = recipe.operand(role)
    fmt = (
      f"{o.format.name.split('[')[0]} {o.format.scale_rule}"
      if o.is_quantized
      else jnp.dtype(o.format).name
    )
    transform = f" H{o.transform.block}" if o.transform else ""
    lines.append(f"{fmt} {o.rounding}{transform} {o.source}")
  return lines


def test_recipes_are_those_of_their_sources():
  plain = "MXFP4 floor nearest original"
  rceil, rceil_sr = "MXFP4 rceil nearest original", "MXFP4 rceil stochastic original"
  row, tile = "FP8_BLOCK nearest nearest original", "FP8_BLOCK_2D nearest nearest original"
  row2, tile2 = "FP8_BLOCK_POW2 rceil nearest", "FP8_BLOCK_POW2_2D rceil nearest original"
  expected = {
    "fp32": ["float32 nearest original"] * 6,
    "bf16": ["bfloat16 nearest original"] * 6,
    "fp8": [row, tile, row, tile, row, row],
    "fp8_pow2": [
      *(f"{row2} original", tile2) * 2,
      *(f"{row2} original", f"{row2} original"),
    ],
    "mxfp4": [plain] * 6,
    "mxfp4_rht_sr": [
      *(rceil, rceil),
      *(rceil_sr, rceil),
      *("MXFP4 rceil nearest H32 original", "MXFP4 rceil stochastic H32 original"),
    ],
    "hopper_fp4": [
      *(f"{row2} residual", tile2),
      *(f"{row2} original", tile2),
      *(f"{row2} residual", f"{row2} original"),
    ],
  }
  # Any other has a test of its own.
  for name, lines in expected.items():
    recipe = recipes.RECIPES[name]
    assert described(recipe) == lines
    assert recipe.is_stochastic == (name == "mxfp4_rht_sr")
    kept = fp4jax.MXFP4 if name == "hopper_fp4" else None
    assert recipe.residual == Residual(kept, None, kept)


def test_every_recipe_has_its_name_and_its_source():
  for name, recipe in recipes.RECIPES.items():
    assert recipe.name == name and recipe.citation
    assert recipes.by_name(name) is recipe and getattr(recipes, name.upper()) is recipe
    assert hash(recipe) == hash(dataclasses.replace(recipe))


def test_replace_changes_one_field():
  changed = recipes.MXFP4.replace(
    {"wgrad.lhs.rounding": "stochastic", "dgrad.rhs.format": jnp.float16}
  )
  before, after = described(recipes.MXFP4), described(changed)
  assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 3 + [False] * 2 + [True]
  assert after[3:5] == ["float16 nearest original", "MXFP4 floor stochastic original"]
  deep = recipes.MXFP4.replace({"fprop.lhs.format.scale_rule": "even"})
  assert deep.fprop.lhs.format == dataclasses.replace(fp4jax.MXFP4, scale_rule="even")
  assert recipes.MXFP4.replace({}) == recipes.MXFP4
  # A whole GEMM and a field of it: first the GEMM.
  both = recipes.MXFP4.replace({"wgrad.rhs.format": fp4jax.MXFP8, "wgrad": recipes.BF16.fprop})
  assert both.wgrad == Gemm(Operand(jnp.bfloat16), Operand(fp4jax.MXFP8))


def test_changes_that_need_each_other():
  without = recipes.MXFP4_RHT_SR.replace({"wgrad.lhs.transform": None, "wgrad.rhs.transform": None})
  assert without.wgrad == Gemm(recipes.MXFP4_RHT_SR.fprop.lhs, recipes.MXFP4_RHT_SR.dgrad.lhs)
  kept = {"residual.lhs": fp4jax.MXFP8, "wgrad.lhs.source": "residual"}
  for changes in (kept, dict(reversed(kept.items()))):
    recipe = recipes.MXFP4.replace(changes)
    assert recipe.residual.lhs is fp4jax.MXFP8 and recipe.wgrad.lhs.source == "residual"
  unkept = {f"{gemm}.lhs.source": "original" for gemm in ("fprop", "wgrad")}
  unkept |= {"residual.lhs": None, "residual.hidden": None}
  assert recipes.HOPPER_FP4.replace(unkept).residual == Residual()


@pytest.mark.parametrize(
  "name, near, far",
  [("mxpf4", "mxfp4", "bf16"), ("bf_16", "bf16", "hopper_fp4"), ("BF_16", "bf16", "hopper_fp4")],
)
def test_unknown_recipe_names_the_near_ones(name, near, far):
  with pytest.raises(ValueError, match=f"unknown recipe '{name}'; did you mean '") as raised:
    recipes.by_name(name)
  assert repr(near) in str(raised.value) and repr(far) not in str(raised.value)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_unknown_recipe_in_capitals_names_the_one(name):
  with pytest.raises(ValueError, match=f"unknown recipe '.*'; did you mean '{name}'\\?$"):
    recipes.by_name(name.upper())


def test_unknown_recipe_like_none_names_all():
  with pytest.raises(
    ValueError, match="'fp32', 'bf16', 'fp8', 'fp8_pow2', 'mxfp4', 'mxfp4_rht_sr', 'hopper_fp4'"
  ):
    recipes.by_name("zzz")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"wgrd.lhs.rounding": "nearest"}, "Recipe has no field 'wgrd'; it has .*'wgrad'"),
    ({"wgrad.left": 1}, "Gemm has no field 'left'; it has .*'lhs'"),
    ({"wgrad.lhs.roundin": 1}, "Operand has no field 'roundin'; it has .*'rounding'"),
    ({"wgrad.lhs.transform.block": 16}, "NoneType has no field 'block'"),
    ({"wgrad.lhs.rounding.mode": 16}, "str has no field 'mode'"),
    ({"wgrad.lhs.rounding": "even"}, r"rounding='even' is not one of \('nearest', 'stochastic'\)"),
    (
      {"wgrad.lhs.source": "kept"},
      r"source='kept' is not one of \('original', 'residual', 'fprop'\)",
    ),
    ({"wgrad.lhs.format": jnp.int8}, "format=.*int8.* is neither a BlockFormat nor a float dtype"),
    ({"wgrad.lhs.format": "MXFP4"}, "format='MXFP4' is neither a BlockFormat nor a float dtype"),
    ({"wgrad.lhs.format": None}, "format=None is neither a BlockFormat nor a float dtype"),
    ({"wgrad.lhs.transform": 32}, "transform=32 is neither a Hadamard nor None"),
    ({"residual.lhs": jnp.bfloat16}, "residual.lhs=.*bfloat16.* is neither a BlockFormat nor None"),
    ({"residual.rhs": "MXFP4"}, "residual.rhs='MXFP4' is neither a BlockFormat nor None"),
    ({"residual.hidden": 4}, "residual.hidden=4 is neither a BlockFormat nor None"),
    ({"wgrad.lhs.format.scale_rule": "flor"}, "scale_rule='flor' is not one of .*'floor'"),
    (
      {"wgrad.lhs.transform": Hadamard()},
      r"transforms Hadamard\(block=32, seed=0\) and None do not cancel",
    ),
    (
      {"wgrad.lhs.transform": Hadamard(seed=0), "wgrad.rhs.transform": Hadamard(seed=1)},
      r"transforms .*seed=0\) and .*seed=1\) do not cancel",
    ),
    ({"wgrad.lhs.source": "residual"}, r'source="residual" needs a format in residual.lhs'),
    ({"fprop.rhs.source": "residual"}, r'source="residual" needs a format in residual.rhs'),
    ({"dgrad.lhs.source": "residual"}, r'dgrad.lhs is a gradient; its source is "original"'),
    ({"wgrad.rhs.source": "residual"}, r'wgrad.rhs is a gradient; its source is "original"'),
    ({"residual.lhs": fp4jax.MXFP8}, r"residual.lhs=MXFP8 is kept but never read"),
    ({"residual.rhs": fp4jax.NVFP4}, r"residual.rhs=NVFP4 is kept but never read"),
    ({"residual.hidden": fp4jax.MXFP8}, r"residual.hidden=MXFP8 leaves no original for wgrad.lhs"),
  ],
)
def test_bad_changes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    recipes.MXFP4.replace(changes)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"wgrad.lhs": fp4jax.MXFP4},
      '^wgrad.lhs has type BlockFormat, not Operand; did you mean "wgrad.lhs.format"',
    ),
    (
      {"dgrad.rhs": jnp.bfloat16, "dgrad.rhs.rounding": "stochastic"},
      'dgrad.rhs has type _ScalarMeta, not Operand; did you mean "dgrad.rhs.format"',
    ),
    ({"wgrad": fp4jax.MXFP4}, "^wgrad has type BlockFormat, not Gemm$"),
    ({"residual": fp4jax.MXFP4}, "^residual has type BlockFormat, not Residual$"),
  ],
)
def test_changes_of_the_wrong_kind_are_refused(changes, message):
  with pytest.raises(TypeError, match=message):
    recipes.MXFP4.replace(changes)


@pytest.mark.parametrize("side", ["lhs", "rhs"])
def test_a_gemm_has_operands(side):
  operands = {"lhs": Operand(fp4jax.MXFP4), "rhs": Operand(fp4jax.MXFP4)}
  with pytest.raises(TypeError, match=f"^{side} has type BlockFormat, not Operand such as Operand"):
    Gemm(**operands | {side: fp4jax.MXFP4})


@pytest.mark.parametrize("block", [33, 0, -32, 32.0, "32", None])
def test_hadamard_blocks_are_powers_of_two(block):
  with pytest.raises(ValueError, match=f"block={block!r} is not a power of two"):
    Hadamard(block=block)


def test_equal_operands_hash_alike():
  for dtype in ("bfloat16", jnp.bfloat16, jnp.dtype(jnp.bfloat16)):
    operand = Operand(dtype)
    assert operand == recipes.BF16.fprop.lhs and hash(operand) == hash(recipes.BF16.fprop.lhs)


def test_stochastic_rounding_needs_a_block_format():
  with pytest.raises(ValueError, match=r"stochastic rounding needs a block format, not .*bfloat16"):
    Operand(jnp.bfloat16, rounding="stochastic")


def test_a_recipe_needs_all_its_parts():
  gemm = recipes.BF16.fprop
  with pytest.raises(TypeError, match="citation"):
    Recipe(name="mine", fprop=gemm, dgrad=gemm, wgrad=gemm)


HOPPER_LINES = """Recipe hopper_fp4
  fprop.lhs  Operand(format=FP8_BLOCK_POW2, source='residual')
  fprop.rhs  Operand(format=FP8_BLOCK_POW2_2D)
  dgrad.lhs  Operand(format=FP8_BLOCK_POW2)
  dgrad.rhs  Operand(format=FP8_BLOCK_POW2_2D)
  wgrad.lhs  Operand(format=FP8_BLOCK_POW2, source='residual')
  wgrad.rhs  Operand(format=FP8_BLOCK_POW2)
  residual   Residual(lhs=MXFP4, hidden=MXFP4)"""


def test_a_recipe_is_printed_on_a_few_lines():
  assert repr(recipes.HOPPER_FP4) == HOPPER_LINES
  rounded = "Operand(format=MXFP4[rceil], rounding='stochastic', transform=Hadamard())"
  assert repr(recipes.MXFP4_RHT_SR).splitlines()[6] == f"  wgrad.rhs  {rounded}"
  for recipe in recipes.RECIPES.values():
    lines = repr(recipe).splitlines()
    assert len(lines) <= 9 and max(map(len, lines)) <= 100
