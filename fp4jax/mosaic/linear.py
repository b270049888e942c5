"""`dot_general` and `grouped_dot` on Hopper: one custom_vjp around the three GEMMs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int

from fp4jax import operands as ops
from fp4jax.linear import take_rows
from fp4jax.mosaic.gemms import BLOCK, gemms
from fp4jax.recipe import Recipe


class Slots(NamedTuple):
  """Where the kernels have the rows of x: each group's slots are filled up to a multiple of BLOCK.

  An index one past the end is a slot without a row, or a row without a slot, which reads zeros.
  """

  row_of_slot: Int[Array, " slot"] | None  # None: as they are
  slot_of_row: Int[Array, " m"] | None
  group_sizes: Int[Array, " e"]  # in slots

  @classmethod
  def of_one_matrix(cls, rows: int) -> "Slots":
    """All rows in one group."""
    slots = -(-rows // BLOCK) * BLOCK
    sizes = jnp.array([slots], jnp.int32)
    if slots == rows:
      return cls(None, None, sizes)
    return cls(jnp.minimum(jnp.arange(slots), rows), jnp.arange(rows), sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(
  recipe: Recipe, slots: Slots, lhs: BFloat16[Array, "m k"], rhs: BFloat16[Array, "e k n"]
) -> BFloat16[Array, "m n"]:
  """Each group's rows of lhs times its rhs, for a call that `gemms.obstacle` let pass."""
  return _fwd(recipe, slots, lhs, rhs)[0]


def _fwd(recipe, slots, lhs, rhs):
  products = gemms(recipe, slots.group_sizes, rhs.dtype)
  x, w = products.keep(lhs, recipe.residual.lhs), ops.Tensor.of(rhs)
  y, _ = products.fprop(x, w, slots.row_of_slot)
  return take_rows(y, slots.slot_of_row), (slots, x.kept_for(recipe.wgrad.lhs.source), w)


def _bwd(recipe, saved, dy):
  slots, x, w = saved
  products = gemms(recipe, slots.group_sizes, w.original.dtype)
  dy = products.gradient(take_rows(dy, slots.row_of_slot))
  dx, _ = products.dgrad(dy, w)
  dw, _ = products.wgrad(x, dy, slots.row_of_slot)
  return None, take_rows(dx, slots.slot_of_row), dw


linear.defvjp(_fwd, _bwd)
