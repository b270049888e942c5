"""Rows of tokens, each times its factor, quantized as they are gathered.

The rows of a mixture of experts, several for each token, then never lie in memory in bf16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import blocks as bl
from pallas_kernels import e4m3
from pallas_kernels import packed as pk
from pallas_kernels import transpose as tr
from pallas_kernels.tracing import traced_once

TILE = tr.TILE
_EACH_ROW = tr.ROWS.reduce((1, 2, 3))


@traced_once("power_of_two")
def gather_fp8_both(x, rows, factors, *, power_of_two: bool = False):
  """`quantize_fp8_both` of factors * x[rows], which is rounded to bfloat16 first.

  Args:
    x: (t, k) bfloat16, k a multiple of 128.
    rows: (m,) int32, m a multiple of 128; zeros are read for a row of x that does not exist.
    factors: (m,) float32.

  Returns:
    float8_e4m3fn codes (m, k) and float32 scales (k / 128, m); codes (k, m), scales (m / 128, k).
  """
  m, k = _shape(x, rows, factors)
  tokens = len(x)

  def kernel(x_gmem, rows_gmem, factors_gmem, *refs):
    codes_gmem, scales_gmem, codes_t_gmem, scales_t_gmem, smem = refs
    i, j = lax.axis_index("row"), lax.axis_index("column")

    @pl.loop(0, TILE // 32)
    def _(block):
      runs = [pl.ds(i * TILE + block * 32 + run * 8, 8) for run in range(4)]
      # All loads before the first store, which might be to what they read: none waits for another.
      given = [(_load(rows_gmem.at[here]), _load(factors_gmem.at[here])) for here in runs]
      exist = [(row >= 0) & (row < tokens) for row, _ in given]
      read = [
        _gathered(x_gmem, jnp.where(there, row, 0), j)
        for there, (row, _) in zip(exist, given, strict=True)
      ]
      parts = []
      for here, there, (_, factor), values in zip(runs, exist, given, read, strict=True):
        whole = functools.partial(
          lax.broadcast_in_dim, shape=values.shape, broadcast_dimensions=(0,)
        )
        values = values.astype(jnp.float32) * whole(factor)
        values = jnp.where(whole(there), values, 0.0).astype(jnp.bfloat16)
        codes_gmem[here, j], scales_gmem[j, here] = e4m3.quantize(values, tr.ROWS, power_of_two)
        parts.append(values)
      tr.write(parts, smem.at[pl.ds(block * 32, 32)])

    plgpu.commit_smem()
    for start in range(0, TILE, 64):
      values = tr.read(smem.at[:, pl.ds(start, 64)])
      there = pl.ds(j * TILE + start, 64)
      codes, scales_t_gmem[i, there] = e4m3.quantize(values, tr.COLUMNS, power_of_two)
      codes_t_gmem[there, i] = codes

  codes, scales, codes_t, scales_t = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((m, k // TILE, *tr.BLOCKS), bl.E4M3),
      jax.ShapeDtypeStruct((k // TILE, m), jnp.float32),
      jax.ShapeDtypeStruct((k, m // TILE, *tr.BLOCKS), bl.E4M3),
      jax.ShapeDtypeStruct((m // TILE, k), jnp.float32),
    ),
    grid=(m // TILE, k // TILE),
    grid_names=("row", "column"),
    scratch_types=(tr.scratch(),),
    compiler_params=bl.WARPGROUP,
  )(x.reshape(tokens, k // TILE, *tr.BLOCKS), rows, factors)
  return codes.reshape(m, k), scales, codes_t.reshape(k, m), scales_t


def _load(ref):
  return plgpu.load(ref, layout=_EACH_ROW, optimized=False)


def eight_of(thread):
  """(block, lane) of the eight values that a thread has of its row, as `transpose.ROWS` says."""
  return (thread >> 2) & 3, thread & 3


def _gathered(x_gmem, rows, column):
  """Tiles x[row, column] of the `rows` (8,), as `transpose.ROWS` has them: 16 bytes a lane."""
  shape = (8, *tr.BLOCKS)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), _EACH_ROW, plgpu.Layout.WG_SPLAT),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=tr.ROWS),
  )
  def load(ctx, x, rows: fa.FragmentedArray, column: fa.FragmentedArray):
    del ctx
    ((row,),) = pk.registers(rows)
    block, lane = eight_of(pk.thread_of_cta())
    index = ir.IndexType.get()
    place = row.value, column.registers.item(), block.value, lane.value
    place = [*(arith.index_cast(index, i) for i in place), mgpu_utils.c(0, index)]
    values = vector.load(ir.VectorType.get((8,), ir.BF16Type.get()), x, place)
    layout = tr.ROWS.to_mgpu()
    registers = np.array([values], dtype=object).reshape(layout.registers_shape(shape))
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

  return load(x_gmem, rows, column)


def _shape(x, rows, factors):
  if x.dtype != jnp.bfloat16:
    raise TypeError(f"x is {x.dtype}; gather_fp8_both takes bfloat16")
  m = rows.size
  if x.ndim != 2 or x.shape[1] % TILE or not x.size or m % TILE or not m:
    raise ValueError(
      f"x of shape {x.shape} and {m} rows are not (t, k) and m % 128 == k % 128 == 0"
    )
  bl.check_array("rows", rows, (m,), jnp.int32)
  bl.check_array("factors", factors, (m,), jnp.float32)
  return m, x.shape[1]
