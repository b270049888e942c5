"""The stand-ins of the kernels leave unwritten what the kernels do, and read no more than they."""

import jax.numpy as jnp
import numpy as np
import pytest
from fake_kernels import fake_kernels

from pallas_kernels import grouped_matmul as gm

FAKES = fake_kernels()
SIZES = jnp.array([128, 0, 256], jnp.int32)  # of 512 rows, the last 128 belong to nobody


def operands(columns, rows, seed=0):
  x = np.random.default_rng(seed).standard_normal((rows, columns))
  return jnp.asarray(x, jnp.float8_e4m3fn), jnp.ones((columns // 128, rows))


def weights(experts, n, k):
  w = np.random.default_rng(9).standard_normal((experts, n, k))
  return jnp.asarray(w, jnp.float8_e4m3fn), jnp.ones((experts, n // 128, k // 128))


def assert_close(actual, expected):
  # float32 sums of 256 products in two orders, then half a step of bfloat16.
  np.testing.assert_allclose(np.float32(actual), np.float32(expected), rtol=2.0**-7, atol=1e-3)


def test_rows_past_the_last_group_are_nan():
  x, w = operands(256, 512), weights(3, 128, 256)
  out = FAKES["grouped_matmul"].grouped_matmul(*x, *w, SIZES)
  expected = gm.grouped_matmul_reference(*x, *w, SIZES)
  assert_close(out[:384], expected[:384])
  assert np.isnan(np.float32(out[384:])).all()
  values, w = (v.astype(jnp.bfloat16) for v in (x[0], w[0]))
  fake = FAKES["bf16_matmul"].grouped_matmul
  for out in (fake(values, w, SIZES, transpose_rhs=True), fake(values, w.swapaxes(1, 2), SIZES)):
    assert_close(out[:384], expected[:384])
    assert np.isnan(np.float32(out[384:])).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_wgrad_reads_no_tile_past_the_last_group(dtype):
  (x, x_scales), (dy, dy_scales) = (
    operands(512, rows, seed) for seed, rows in ((1, 256), (2, 128))
  )
  expected = gm.grouped_wgrad_reference(x, x_scales, dy, dy_scales, SIZES)
  x, dy = (v.at[:, 384:].set(jnp.nan) for v in (x, dy))
  x_scales, dy_scales = (s.at[3:].set(jnp.nan) for s in (x_scales, dy_scales))
  fake = FAKES["grouped_matmul"].grouped_wgrad
  out = fake(x, x_scales, dy, dy_scales, SIZES, out_dtype=dtype)
  assert out.dtype == dtype
  assert_close(out, expected)
  values = (v.T.astype(jnp.bfloat16) for v in (x, dy))
  out = FAKES["bf16_matmul"].grouped_wgrad(*values, SIZES, out_dtype=dtype)
  assert out.dtype == dtype
  assert_close(out, expected)
