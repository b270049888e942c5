"""The bf16 grouped wgrad: on Hopper against float32, elsewhere its lowering and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bf16_matmul

both_dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def operands(rows, k, n, sizes):
  """NaN in rows past the last group, which nothing may read."""
  keys = jax.random.split(jax.random.key(0))
  past = np.arange(rows)[:, None] >= sum(sizes)
  pair = (
    jnp.where(past, jnp.nan, jax.random.normal(key, (rows, width))).astype(jnp.bfloat16)
    for key, width in zip(keys, (k, n), strict=True)
  )
  return *pair, jnp.array(sizes, jnp.int32)


@pytest.mark.gpu
@both_dtypes
@pytest.mark.parametrize("sizes", [(128, 0, 64, 192), (0, 0), (0, 448), (64,) * 7])
def test_wgrad_is_the_product_of_each_group(sizes, dtype):
  k, n = 256, 384
  lhs, rhs, group_sizes = operands(640, k, n, sizes)
  wgrad = functools.partial(bf16_matmul.grouped_wgrad, out_dtype=dtype)
  out = np.float64(jax.jit(wgrad)(lhs, rhs, group_sizes))
  ends = np.cumsum(sizes)
  for g, (end, size) in enumerate(zip(ends, sizes, strict=True)):
    x, dy = (np.float64(v[end - size : end]) for v in (lhs, rhs))
    # float32 sums of `size` exact products in any order, wgmma's 13 bits below its largest addend,
    # and half a step of bfloat16.
    bound = (np.abs(x).T @ np.abs(dy)) * (size * 2.0**-24 + 2.0**-12) + 1e-30
    bound += np.abs(x.T @ dy) * (2.0**-8 if dtype == jnp.bfloat16 else 0)
    assert (np.abs(out[g] - x.T @ dy) <= bound).all()
  assert not out[np.array(sizes) == 0].any()
  if dtype == jnp.float32 and sum(sizes):
    assert (out != np.float64(jnp.bfloat16(out))).any()  # not rounded on its way


@both_dtypes
@pytest.mark.parametrize(("k", "n"), [(2048, 7168), (7168, 2048)])
def test_wgrad_lowers_for_cuda(k, n, dtype):
  s, rows = jax.ShapeDtypeStruct, 32768 + 8 * 128
  arguments = (s((rows, k), jnp.bfloat16), s((rows, n), jnp.bfloat16), s((8,), jnp.int32))
  wgrad = jax.jit(functools.partial(bf16_matmul.grouped_wgrad, out_dtype=dtype))
  assert wgrad.eval_shape(*arguments).dtype == dtype
  wgrad.trace(*arguments).lower(lowering_platforms=("cuda",))


def test_refusals():
  lhs, rhs, sizes = operands(256, 128, 128, (64, 128))
  call = bf16_matmul.grouped_wgrad
  with pytest.raises(TypeError, match="an operand is float32, not bfloat16"):
    call(lhs, rhs.astype(jnp.float32), sizes)
  with pytest.raises(TypeError, match="out_dtype is float16, not float32 or bfloat16"):
    call(lhs, rhs, sizes, out_dtype=jnp.float16)
  with pytest.raises(ValueError, match="lhs has m=256, rhs has m=128"):
    call(lhs, rhs[:128], sizes)
  with pytest.raises(ValueError, match="k=96 or n=128 is not a multiple of 128"):
    call(lhs[:, :96], rhs, sizes)
  for bad in ([-64, 128], [64, 100], [128, 192]):
    with pytest.raises(ValueError, match=r"are not multiples of 64 within 256 rows"):
      call(lhs, rhs, jnp.array(bad, jnp.int32))
