"""A tile transposed through SMEM, with eight consecutive values to a lane on either side.

Tiles are seen as (row, 4, 4, 8): a row of 128 values in blocks of 32, four lanes to a block. A
transposing load gives a lane two values of every eight. So rows are written in an order in which
those of four eights are neighbours in the tensor: with row 8 l + 2 g + i of a block of 32 in place
8 g + 2 l + i, lane l gets rows 8 l to 8 l + 7. Warp g holds exactly these rows of a run of eight,
so that this order costs nothing.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl

TILE = 128
BLOCKS = (4, 4, 8)  # how 128 values of a row are seen

# How rows come from memory: a run of eight to a warpgroup, 16 lanes to a row.
ROWS = bl.layout(((8, *BLOCKS), (2, *BLOCKS), (1, 1, 1, 8)), (-12,), (-8, -7, -6))
# How the transposed rows come from SMEM: those of `WGMMA`, 64 to a warpgroup, four lanes to a row.
COLUMNS = bl.layout(((64, *BLOCKS), (16, *BLOCKS), (8, *BLOCKS), (1, 1, 1, 8)), (-16,), (-8, -6))
PERMUTED = bl.layout(((32, TILE), (8, TILE), (2, TILE), (1, 8)), (-8,), (-4, -3))


def scratch(rows: int = TILE):
  """SMEM of a bf16 tile of `rows` x 128 to be transposed."""
  return plgpu.SMEM((rows, TILE), jnp.bfloat16, transforms=bl.swizzled(jnp.bfloat16))


def write(parts, smem):
  """Puts parts (a multiple of 8, 4, 4, 8) below one another into smem (a multiple of 32, 128)."""
  shape = smem.shape

  @plgpu.inline_mgpu(
    arg_types=(ROWS,) * len(parts),
    return_type=plgpu.ShapeDtypeStruct(shape, parts[0].dtype, layout=PERMUTED),
  )
  def permuted(ctx, *parts: fa.FragmentedArray):
    del ctx
    registers = np.concatenate([part.registers.ravel() for part in parts])
    return _array(registers, shape, PERMUTED)

  smem[...] = permuted(*parts)


def read(smem):
  """The columns of smem (128, a multiple of 64) as rows (column, 4, 4, 8), once all is written."""
  values = plgpu.load(smem.transpose((1, 0)), layout=plgpu.Layout.WGMMA)
  shape = (len(values), *BLOCKS)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,),
    return_type=plgpu.ShapeDtypeStruct(shape, values.dtype, layout=COLUMNS),
  )
  def joined(ctx, values: fa.FragmentedArray):
    del ctx
    parts = eights(values.registers)
    registers = np.empty(parts.shape[:-1], object)
    for place in np.ndindex(*registers.shape):
      registers[place] = mgpu_utils.vector_concat(list(parts[place]))
    return _array(registers, shape, COLUMNS)

  return joined(values)


def eights(pairs):
  """Registers of `WGMMA` in the order of `COLUMNS`: the four whose values are neighbours, last."""
  return pairs.reshape(-1, 4, 4, 2).transpose(0, 3, 1, 2)  # 64 rows, row + 8, block, eight values


def _array(registers, shape, layout):
  layout = layout.to_mgpu()
  registers = registers.reshape(layout.registers_shape(shape))
  return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
