"""The layer below waits for the gradients of a layer's weights, too.

Nothing but the optimizer needs them, so XLA for a GPU would put them off and hold what they read:
of moe_10b without a loop over its layers 11 GB of 131, and of 125 that compute all again 28.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import equations

import fp4jax
from fp4jax import moe_ffn, recipes

T, D, F, E, K = 64, 128, 64, 4, 2


def dense(recipe):
  x, w = jnp.ones((T, D), jnp.bfloat16), jnp.ones((D, F))
  contract = ((1,), (0,)), ((), ())
  return lambda x, w: fp4jax.dot_general(recipe)(x, w, contract), (x, w), ((T, D), (D, F))


def experts(recipe, devices):
  options, rows = {}, T * K
  if devices > 1:
    options, rows = {"expert_axis": "expert"}, T // devices  # as they are back

  def layer(x, w13, w2, experts, weights):
    return moe_ffn(x, w13, w2, experts, weights, recipe, **options)

  chosen, shares = jnp.zeros((T, K), jnp.int32), jnp.ones((T, K))
  if devices > 1:
    axes = dict(axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    mesh, spec = jax.make_mesh((devices,), ("expert",), **axes), P("expert")
    layer = jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec)
  arguments = jnp.ones((T, D), jnp.bfloat16), jnp.ones((E, D, 2 * F)), jnp.ones((E, F, D))
  of_weights = lambda x, *ws: layer(x, *ws, chosen, shares)  # noqa: E731
  return of_weights, arguments, ((rows, D), (E // devices, D, 2 * F))


def read(jaxpr):
  """What the program reads or returns, and all programs within it."""
  yield from jaxpr.outvars
  for eqn in jaxpr.eqns:
    yield from eqn.invars
    for inner in jaxprs_in_params(eqn.params):
      yield from read(inner)


CASES = {
  "dot_general": dense,
  "moe_ffn": functools.partial(experts, devices=1),
  "moe_ffn over two devices": functools.partial(experts, devices=2),
}


@pytest.mark.parametrize("name", ["bf16", "fp8", "hopper_fp4"])
@pytest.mark.parametrize("case", CASES)
def test_the_gradients_of_x_and_of_the_weights_come_together(case, name):
  layer, arguments, together = CASES[case](recipes.by_name(name))

  def gradients(*arguments):
    y, pull = jax.vjp(layer, *arguments)
    return pull(y)

  program = jax.make_jaxpr(gradients)(*arguments).jaxpr
  barriers = [eqn for eqn in equations(program) if eqn.primitive.name == "optimization_barrier"]
  used = {id(v) for v in read(program)}
  passed = [eqn for eqn in barriers if all(id(v) in used for v in eqn.outvars)]
  assert together in [tuple(v.aval.shape for v in eqn.outvars) for eqn in passed]


@pytest.mark.parametrize("case", ["dot_general", "moe_ffn"])
def test_a_gradient_that_nobody_asks_for_is_not_computed(case):
  layer, arguments, _ = CASES[case](recipes.FP8)

  def products(*asked):
    loss = lambda *arguments: jnp.sum(layer(*arguments).astype(jnp.float32))  # noqa: E731
    program = jax.jit(jax.grad(loss, asked)).lower(*arguments).compile()
    return program.cost_analysis()["flops"]

  each = 2 * T * D * F if case == "dot_general" else 2 * T * K * D * 2 * F
  assert products(0, 1) - products(0) >= each
