"""Packed arrays on a mesh of four devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharding_table as table
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp4jax

KINDS = (AxisType.Auto, AxisType.Explicit)


def normal(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


quantize, dequantize = jax.jit(fp4jax.quantize, static_argnames="fmt"), jax.jit(fp4jax.dequantize)
FORMATS = (fp4jax.MXFP4, fp4jax.NVFP4, fp4jax.FP8_BLOCK_2D, fp4jax.FP8_TENSOR)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_packed_array_goes_to_a_mesh_with_its_scales(fmt, kind):
  x, mesh, spec = normal(256, 256), table.make_mesh(kind), P("data", "model")
  q = quantize(x, fmt)
  with jax.set_mesh(mesh):
    placed = jax.device_put(q, fp4jax.shardings(q, mesh, spec))
    made = quantize(jax.device_put(x, NamedSharding(mesh, spec)), fmt)
    values = dequantize(placed)
  assert placed.codes.sharding.spec == spec
  assert placed.codes.addressable_shards[0].data.size * 4 == q.codes.size
  if fmt.block_shape:
    assert placed.scales.sharding.spec == spec
    assert placed.scales.addressable_shards[0].data.size * 4 == q.scales.size
  if fmt.has_tensor_scale:
    assert placed.tensor_scale.sharding.is_fully_replicated
  for other in (placed, made):
    jax.tree.map(np.testing.assert_array_equal, other, q)
  assert np.array_equal(values, dequantize(q))


def test_stack_of_packed_arrays_goes_to_a_mesh():
  q = jax.jit(jax.vmap(lambda x: fp4jax.quantize(x, fp4jax.NVFP4)))(normal(4, 64, 64))
  mesh = table.make_mesh(AxisType.Auto)
  placed = jax.device_put(q, fp4jax.shardings(q, mesh, P("data", None, "model")))
  assert placed.tensor_scale.sharding.spec == P("data")
  assert np.array_equal(dequantize(placed), dequantize(q))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_whose_last_block_is_not_full_go_to_a_mesh(kind):
  w, mesh = normal(250, 64), table.make_mesh(kind)
  packed = fp4jax.pack_weights(w, fp4jax.recipes.MXFP4)
  with jax.set_mesh(mesh):
    placed = jax.device_put(packed, fp4jax.shardings(packed, mesh, P(None, "data")))
    values = dequantize(placed)
  assert values.sharding.spec[1:] == ("data",) and values.shape == w.shape
  assert np.array_equal(values, fp4jax.dequantize(packed))
  with pytest.raises(ValueError, match="shards of 125 values split"):
    fp4jax.shardings(packed, mesh, P("data"))


def test_scales_of_two_terms_are_not_divided():
  mesh = table.make_mesh(AxisType.Auto)
  second = fp4jax.quantizers.OutlierFallback(fp4jax.Operand(fp4jax.MXFP4))
  read = fp4jax.Operand(jnp.bfloat16, source="fprop")
  recipe = fp4jax.recipes.MXFP4.replace({"fprop.rhs": second, "dgrad.rhs": read, "name": "of"})
  packed = fp4jax.pack_weights(normal(64, 128), recipe)
  placed = jax.device_put(packed, fp4jax.shardings(packed, mesh, P("data")))
  assert np.array_equal(dequantize(placed), dequantize(packed))
  with pytest.raises(ValueError, match="has 256 scales there, those of its terms one behind"):
    fp4jax.shardings(packed, mesh, P(None, "data"))


def test_shards_that_split_a_block_are_refused():
  mesh = table.make_mesh(AxisType.Auto)
  one_scale = dataclasses.replace(fp4jax.MXFP4, block_shape=None)
  cases = (
    ((64, 64), fp4jax.MXFP4, P(None, ("data", "model")), "shards of 16 values split a block of 32"),
    ((64, 96), fp4jax.NVFP4, P(None, ("data", "model")), "shards of 24 values split a block of 16"),
    ((128, 256), fp4jax.FP8_BLOCK_2D, P("data"), "shards of 64 values split a block of 128"),
    ((6, 64), fp4jax.MXFP4, P(("data", "model")), "shards of 1.5 values split a value"),
    ((2, 6), one_scale, P(None, "data"), "shards of 3 values split 2 codes that share their bytes"),
    ((64, 64), fp4jax.MXFP4, P(None, None, "data"), r"has more axes than shape \(64, 64\)"),
  )
  for shape, fmt, spec, message in cases:
    q = jax.eval_shape(lambda x, fmt=fmt: fp4jax.quantize(x, fmt), normal(*shape))
    with pytest.raises(ValueError, match=message):
      fp4jax.shardings(q, mesh, spec)
