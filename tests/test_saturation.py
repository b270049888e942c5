"""Every octave of every format: no finite value becomes infinite or NaN, in no dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax import dequantize, fake_quantize, quantize

RULES = ("floor", "even", "rceil", "oas")
E5M2 = ml_dtypes.float8_e5m2
VARIANTS = [
  *(fp4jax.FORMATS[name] for name in oracles.FORMATS),
  *(dataclasses.replace(fp4jax.MXFP4, scale_rule=rule) for rule in RULES[1:]),
  *(dataclasses.replace(fp4jax.MXFP8, scale_rule=rule) for rule in RULES[1:3]),
  dataclasses.replace(fp4jax.MXFP8, element_dtype=E5M2),
  dataclasses.replace(fp4jax.NVFP4, has_tensor_scale=False),
  *(  # larger elements under E4M3 scales
    dataclasses.replace(fp4jax.NVFP4, has_tensor_scale=False, element_dtype=element)
    for element in (fp4jax.formats.E4M3, E5M2)
  ),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("fmt", VARIANTS, ids=lambda f: f.name)
def test_no_finite_value_becomes_infinite_or_nan(fmt, dtype):
  """One block for each octave of float32, its largest value over its smallest mantissas and one."""
  info = ml_dtypes.finfo(dtype)
  octaves = np.arange(-149, 128)
  fractions = np.array([1, 1.25, 1.5, 1.75, 1.99, 0.5, 0.04, -1.99])
  with np.errstate(over="ignore", under="ignore"):
    x = np.resize(fractions, 128) * 2.0 ** octaves[:, None]
  x = np.clip(x, float(info.min), float(info.max)).astype(dtype)
  x = np.tile(x, (128, 1, 1)).swapaxes(0, 1) if fmt.block_shape == (128, 128) else x[:, None]
  values = jax.jit(jax.vmap(lambda x: fake_quantize(x, fmt)))(x)
  assert values.dtype == dtype and np.isfinite(np.asarray(values, np.float64)).all()
  unpacked = jax.jit(jax.vmap(lambda x: dequantize(quantize(x, fmt), dtype)))(x)
  np.testing.assert_array_equal(np.asarray(values, np.float64), np.asarray(unpacked, np.float64))
  # What a format holds it does not lose: within a quarter of the largest value of its block, or of
  # what the format saturates at.
  largest = float(info.max)
  if fmt.codec.max < 2.0**100 and not fmt.has_tensor_scale:
    largest = fmt.q_max * fmt.codec.max
  top = np.abs(x.astype(np.float64)).max((1, 2))
  normal = (top > 2.0**-120) & (top > 2.0**-7 * fmt.q_max if fmt.codec.bits == 8 else True)
  error = np.abs(np.asarray(values, np.float64) - np.clip(x.astype(np.float64), -largest, largest))
  assert (error.max((1, 2)) <= 0.25 * np.minimum(top, largest))[normal].all()


def test_a_block_beyond_its_scale_saturates():
  fmt = dataclasses.replace(fp4jax.NVFP4, has_tensor_scale=False)
  for size in (3e34, 4e34, 3.4e38):
    x = jnp.full(16, size)
    np.testing.assert_array_equal(fake_quantize(x, fmt), np.float32(6 * 448))
    np.testing.assert_array_equal(dequantize(quantize(x, fmt)), np.float32(6 * 448))


@pytest.mark.parametrize("rule", RULES)
def test_values_saturate_in_the_dtype_of_the_caller(rule):
  fmt = dataclasses.replace(fp4jax.MXFP4, scale_rule=rule)
  for dtype, size in ((np.float32, 3.3e38), (ml_dtypes.bfloat16, 3.3e38), (np.float16, 65000)):
    x = np.full(32, size, dtype)
    expected = np.asarray(fake_quantize(x, fmt), np.float64)
    assert np.isfinite(expected).all() and (expected >= 0.74 * size).all()
    np.testing.assert_array_equal(np.asarray(dequantize(quantize(x, fmt), dtype)), expected)
