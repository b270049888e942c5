"""Kernels are traced once for arguments alike, so that JAX lowers one for many layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import equations

from experiments import sanitize
from pallas_kernels import bf16_matmul, exchange, fp8, grouped_matmul


def kernels(program, arguments):
  """Those that `program` calls, in order, in a program of its own: JAX knows no trace of it."""
  traced = jax.make_jaxpr(lambda *a: program(*a))(*arguments).jaxpr
  calls = [eqn for eqn in equations(traced) if eqn.primitive.name == "mpmd_map"]
  return [kernel for eqn in calls for kernel in eqn.params["jaxprs"]]


def assert_traced_once(program, *arguments):
  first, second = (kernels(program, arguments) for _ in range(2))
  assert first and all(a is b for a, b in zip(first, second, strict=True))


def test_every_kernel_of_one_device():
  for _, kernel, arguments in sanitize.launches():
    assert_traced_once(kernel, *arguments)


def test_bf16_products():
  x, sizes = jnp.ones((256, 256), jnp.bfloat16), jnp.array([256], jnp.int32)
  assert_traced_once(bf16_matmul.grouped_matmul, x, x[None], sizes)
  assert_traced_once(bf16_matmul.grouped_wgrad, x, x, sizes)


def test_exchanges():
  mesh = jax.make_mesh((2,), ("all",), axis_types=(AxisType.Auto,))
  over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("all"), out_specs=P("all"))
  x, slots = jnp.ones((256, 1024), jnp.bfloat16), jnp.zeros((4, 128), jnp.int32)
  for program in (
    lambda x, slots: exchange.send([x], slots, 128, "all"),
    lambda x, slots: exchange.send_mxfp4(x, slots, 128, "all"),
    lambda x, slots: exchange.collect(jnp.concatenate([x, x]), slots, "all"),
  ):
    assert_traced_once(over(program), x, slots)


def test_arrays_of_64_bits_are_not_narrowed():
  with pytest.raises(TypeError, match="quantize_fp8_rows got an array of float64"):
    fp8.quantize_fp8_rows(np.ones((128, 128)))
  x, scales = jnp.ones((128, 128), jnp.float8_e4m3fn), jnp.ones((1, 128))
  with pytest.raises(TypeError, match="grouped_matmul got an array of int64"):
    grouped_matmul.grouped_matmul(x, scales, x[None], jnp.ones((1, 1, 1)), np.array([128]))
