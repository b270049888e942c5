"""Quantizers with state, for tests of what carries it."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from fp4jax.quantizers import Composed, Operand
from fp4jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Clipped(Composed):
  """Clips to the largest value of the call before; that of this call is the next state."""

  operand: Operand

  def init(self, shape):
    return jnp.zeros((), jnp.float32)

  def read(self, x, axis, ctx):
    bound = jnp.where(ctx.state > 0, ctx.state, jnp.inf).astype(x.dtype)
    read = self.operand.read(jnp.clip(x, -bound, bound), axis, ctx)
    return read._replace(state=jnp.max(jnp.abs(x)).astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Shaped(Composed):
  """Has a state of its operand's shape, and wants to be called with that shape."""

  operand: Operand

  def init(self, shape):
    return jnp.zeros(shape, jnp.float32)

  def read(self, x, axis, ctx):
    assert x.shape == ctx.state.shape, (x.shape, ctx.state.shape)
    return self.operand.read(x, axis, ctx)._replace(state=ctx.state)


@dataclasses.dataclass(frozen=True)
class Scaled(Composed):
  """Times its state, which stays."""

  operand: Operand

  def init(self, shape):
    return jnp.ones((), jnp.float32)

  def read(self, x, axis, ctx):
    return self.operand.read(ctx.state.astype(x.dtype) * x, axis, ctx)._replace(state=ctx.state)


def with_state(recipe: Recipe, quantizer: type, *roles: str) -> Recipe:
  """`recipe` with `quantizer` around the operands of the roles."""
  return recipe.replace({role: quantizer(recipe.operand(role)) for role in roles})


def largest(w) -> float:
  """In bfloat16, as linear layers read a weight."""
  return np.abs(np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32)).max()
