"""`moe_ffn` of the few rows that a decoding step has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from fp4jax import moe_ffn, recipes


def operands_of_experts(tokens, experts, d=32, f=32, k=2):
  keys = jax.random.split(jax.random.key(0), 5)
  x = jax.random.normal(keys[0], (tokens, d))
  w13 = jax.random.normal(keys[1], (experts, d, 2 * f)) * d**-0.5
  w2 = jax.random.normal(keys[2], (experts, f, d)) * f**-0.5
  chosen = jax.random.randint(keys[3], (tokens, k), 0, experts)
  return x, w13, w2, chosen, jax.random.uniform(keys[4], (tokens, k))


def products(jaxpr):
  """Shapes of the results of all products."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      yield eqn.outvars[0].aval.shape
    for inner in jaxprs_in_params(eqn.params):
      yield from products(inner)


@pytest.mark.parametrize("recipe", [recipes.FP32, recipes.MXFP4], ids=lambda r: r.name)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (8, 16), (8, 4), (300, 4)])
def test_few_rows_have_the_numbers_of_whole_tiles(recipe, tokens, experts):
  args = operands_of_experts(tokens, experts)
  expected = moe_ffn(*args, recipe, implementation="xla")
  found = moe_ffn(*args, recipe, few_rows=True, implementation="xla")
  # Two sums of 32 terms of up to 5 standard deviations, in another order.
  np.testing.assert_allclose(found, expected, rtol=0, atol=2 * 32 * 2.0**-24 * 32)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (8, 16), (8, 4), (33, 4)])
def test_few_rows_are_multiplied_less_than_three_times(tokens, experts):
  args = operands_of_experts(tokens, experts)
  d, f2, rows = *args[1].shape[1:], 2 * tokens
  program = jax.make_jaxpr(lambda *a: moe_ffn(*a, recipes.FP32, few_rows=True))(*args)
  shapes = list(products(program.jaxpr))
  assert [n for *_, n in shapes] == [f2, d]
  for tiles, rows_of_tile, _ in shapes:
    assert tiles * rows_of_tile < 3 * rows and tiles <= 2 * experts


def test_few_rows_have_no_gradient():
  args = operands_of_experts(8, 4)
  with pytest.raises(ValueError, match="few_rows=True has no backward pass"):
    jax.grad(lambda x: jnp.sum(moe_ffn(x, *args[1:], recipes.FP32, few_rows=True)))(args[0])
