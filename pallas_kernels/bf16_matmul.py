"""bf16 grouped matmuls, the baseline of the FP8 ones.

out[rows of g] = lhs[rows of g] @ rhs[g]              `grouped_matmul`, JAX's own kernel, configured
out[g] = lhs[rows of g].T @ rhs[rows of g]            `grouped_wgrad`
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

from pallas_kernels.ring import count_sms
from pallas_kernels.tracing import traced_once

TUNING = {
  "matmul": dict(block_m=128, block_n=192, block_k=64, max_concurrent_steps=4, grid_block_n=8),
  "wgrad": dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=8),
}
_SWIZZLE = 128  # bytes


@traced_once("transpose_rhs")
def grouped_matmul(lhs, rhs, group_sizes, *, transpose_rhs=False):
  """Rows of lhs in consecutive groups, each times its rhs; what lies past them is unspecified.

  Args:
    lhs: (m, k) bfloat16.
    rhs: (e, k, n) bfloat16, or (e, n, k) with `transpose_rhs`; k a multiple of 64, n of 128.
    group_sizes: (e,) int32, summing to at most m.

  Returns:
    (m, n) bfloat16, accumulated in float32.
  """
  _check(lhs, rhs)
  return ragged_dot_mgpu.ragged_dot(
    lhs, rhs, group_sizes=group_sizes, transpose_rhs=transpose_rhs, **TUNING["matmul"]
  )


def grouped_wgrad(lhs, rhs, group_sizes, *, out_dtype=jnp.bfloat16):
  """(e, k, n) of lhs (m, k) and rhs (m, n), accumulated in float32; zeros for a group of size 0.

  Args:
    lhs, rhs: bfloat16; k and n multiples of 128.
    group_sizes: (e,) int32, multiples of 64 that sum to at most m; traced ones can't be checked.
    out_dtype: float32 or bfloat16.
  """
  _check(lhs, rhs)
  _check_sizes(group_sizes, len(lhs), TUNING["wgrad"]["block_k"])
  return _grouped_wgrad(lhs, rhs, group_sizes, out_dtype=out_dtype)


@traced_once("out_dtype")
def _grouped_wgrad(lhs, rhs, group_sizes, *, out_dtype):
  if jnp.dtype(out_dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
    raise TypeError(f"out_dtype is {jnp.dtype(out_dtype)}, not float32 or bfloat16")
  tuning = TUNING["wgrad"]
  tile_m, tile_n, tile_k = (tuning[f"block_{axis}"] for axis in "mnk")
  (m, k), (rhs_m, n), (e,) = lhs.shape, rhs.shape, group_sizes.shape
  if m != rhs_m:
    raise ValueError(f"lhs has {m=}, rhs has m={rhs_m}")
  if k % tile_m or n % tile_n:
    raise ValueError(f"{k=} or {n=} is not a multiple of {tile_m} or {tile_n}")
  tiles = k // tile_m, n // tile_n

  def kernel(lhs, rhs, first, steps, out, staging):
    @plgpu.nd_loop((e, tiles[0] * tiles[1]), collective_axes="sm")
    def _(loop):
      group, tile = loop.index
      row, column = plgpu.planar_snake(tile, tiles, 1, tuning["grid_block_n"])
      count = steps[group]
      # A slice of a fixed size that may reach past the end, where no step reads.
      tokens = pl.ds(pl.multiple_of(first[group], tile_k), m)

      def multiply(sums):
        @pl.when(count > 0)
        def _():
          pipeline = plgpu.emit_pipeline(
            lambda _, x, dy: plgpu.wgmma(sums, x.transpose((1, 0)), dy),
            grid=(count,),
            in_specs=[_columns(tile_k, tile_m, row), _columns(tile_k, tile_n, column)],
            max_concurrent_steps=tuning["max_concurrent_steps"],
          )
          pipeline(lhs.at[tokens, :], rhs.at[tokens, :])

        return sums[...]

      sums = pl.run_scoped(multiply, plgpu.ACC((tile_m, tile_n)))
      # An accumulator that nothing was added to holds anything.
      sums = jnp.where(jnp.full(sums.shape, count > 0), sums, jnp.zeros_like(sums))
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      staging[...] = sums.astype(out.dtype)
      plgpu.commit_smem()
      own = pl.ds(row * tile_m, tile_m), pl.ds(column * tile_n, tile_n)
      plgpu.copy_smem_to_gmem(staging, out.at[(group, *own)])

    plgpu.wait_smem_to_gmem(0)

  call = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((e, k, n), out_dtype),
    grid=(count_sms(interpret=False),),
    grid_names=("sm",),
    scratch_types=[
      plgpu.SMEM((tile_m, tile_n), out_dtype, transforms=_transforms(jnp.dtype(out_dtype)))
    ],
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
  )
  first = jnp.cumsum(group_sizes) - group_sizes
  return call(lhs, rhs, first.astype(jnp.int32), lax.div(group_sizes, jnp.int32(tile_k)))


def _columns(rows, width, index):
  """Blocks of `rows` tokens one after the other, of the block `index` of columns."""
  return plgpu.BlockSpec(
    (rows, width),
    lambda i: (i, index),
    delay_release=1,  # wgmma still reads the block before
    transforms=_transforms(jnp.dtype(jnp.bfloat16)),
  )


def _transforms(dtype):
  return (
    plgpu.TilingTransform((8, _SWIZZLE // dtype.itemsize)),
    plgpu.SwizzleTransform(_SWIZZLE),
  )


def _check(*operands):
  for x in operands:
    if x.dtype != jnp.bfloat16:
      raise TypeError(f"an operand is {x.dtype}, not bfloat16")


def _check_sizes(group_sizes, limit, tile):
  if isinstance(group_sizes, jax.core.Tracer):
    return
  sizes = np.asarray(group_sizes)
  if (sizes < 0).any() or (sizes % tile).any() or sizes.sum() > limit:
    raise ValueError(
      f"group_sizes={sizes.tolist()} are not multiples of {tile} within {limit} rows"
    )
