"""MXFP4 quantizer: bf16 or float32 to packed E2M1 codes and E8M0 scales in blocks of 32.

    scale = 2^e by the rule, from the largest magnitude of the block; code = E2M1(x / scale)

A lane holds 8 values. Rounding costs three integer instructions: x / scale is multiplied by 2^-126,
which lays E2M1's exponents over float32's smallest ones, subnormals over subnormals, so that the
bits from 22 up are the code and those below it the fraction to be rounded. bf16 values that are
rounded to nearest fit float16, where `e2m1` does the same to two at a time.
"""

from typing import Literal, get_args

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
from pallas_kernels import e2m1
from pallas_kernels import transpose as tr
from pallas_kernels.tracing import traced_once

ScaleRule = Literal["floor", "even", "rceil", "oas"]

# What is added to the bits of amax so that its exponent field becomes that of the rule.
_CARRY = {"floor": 0, "even": 1 << 21, "rceil": 0x3FFFFF, "oas": 0x1FFFFF}

# Runs of 32 blocks that a CTA takes; columns of a tile that a warpgroup holds at once, 64 or 128.
TUNING = {
  "nearest": {"runs": 8},
  "stochastic": {"runs": 4},
  "hadamard": {"runs": 4},
  "both": {"columns": 64},
}


def quantize_blocks(x, rule, layout, *, signs=None, seed=None, index=None):
  """x (..., 4, 8) in `layout` -> packed codes (..., 4) of 8 nibbles, scale codes (...)."""
  pairs = x.dtype == jnp.bfloat16 and signs is None and seed is None
  if signs is not None:
    x = _hadamard(x.astype(jnp.float32) * lax.broadcast_in_dim(signs, x.shape, (1, 2)), layout)
  lane, value = x.ndim - 2, x.ndim - 1
  each_block = tuple(range(lane))
  if pairs:
    amax = jnp.max(bl.largest(x, layout), axis=lane)
  else:
    amax = bl.bits(jnp.max(jnp.max(jnp.abs(x), axis=value), axis=lane).astype(jnp.float32))
  scale = jnp.maximum(((amax + _CARRY[rule]) >> 23) - 2, 0)
  finite = amax < bl.INFINITY
  inverse = jnp.where(finite, bl.floats((254 - scale) << 23), 0.0)
  if pairs:
    packed = e2m1.rounded(x, inverse, layout, clips=rule in ("floor", "oas"))
  else:
    scaled = x.astype(jnp.float32) * lax.broadcast_in_dim(inverse, x.shape, each_block)
    packed = _rounded(x, scaled, seed, index, clips=rule != "rceil" or seed is not None)
  packed = jnp.where(lax.broadcast_in_dim(finite, packed.shape, each_block), packed, 0)
  return packed, jnp.where(finite, scale, 255).astype(jnp.uint8)


def _rounded(x, scaled, seed, index, clips):
  """A word of E2M1 nibbles for the eight values of a lane: x over its scale."""
  j = lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1)
  if seed is None:
    # Round here, where float32 has its full precision, and not at 2^-149.
    step = jnp.maximum(bl.bits(scaled) & bl.INFINITY, 127 << 23) + (22 << 23)
    scaled = (jnp.abs(scaled) + bl.floats(step)) - bl.floats(step)
    sign = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    rounded = lax.bitcast_convert_type(scaled * 2.0**-126, jnp.uint32)
  else:
    sign = lax.bitcast_convert_type(scaled * 2.0**-126, jnp.uint32)
    rounded = sign + _uniform(seed, index, j)
  magnitude = (rounded >> 22) & 15
  if clips:
    magnitude = jnp.minimum(magnitude, 7)
  return jnp.sum((magnitude | ((sign >> 28) & 8)) << (4 * j), axis=x.ndim - 1)


def _uniform(seed, index, j):
  """22 random bits for value j of the lanes `index`: 16 of the hash, and a half below them.

  pcg4d of Jarzynski and Olano, Hash Functions for GPU Rendering, JCGT 2020: four words hashed to
  four words, which are the draws of eight values.
  """
  v = [index, jnp.full_like(index, 0x9E3779B9), *(jnp.full_like(index, 0) + s for s in seed)]
  v = [w * jnp.uint32(1664525) + jnp.uint32(1013904223) for w in v]
  for mixing in (True, False):
    for a, b, c in ((0, 1, 3), (1, 2, 0), (2, 0, 1), (3, 1, 2)):
      v[a] = v[a] + v[b] * v[c]
    if mixing:
      v = [w ^ (w >> 16) for w in v]
  words = [lax.broadcast_in_dim(w, j.shape, (0, 1)) for w in v]
  word = words[3]
  for i in (2, 1, 0):
    word = jnp.where(j < 2 * (i + 1), words[i], word)
  return ((word >> (16 * (j & 1))) & 0xFFFF) * 64 + 32


def _hadamard(x, layout):
  """Butterflies over the 32 values of each block: 8 in a lane, then over its 4 lanes."""

  @plgpu.inline_mgpu(
    arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)
  )
  def butterflies(ctx, x: fa.FragmentedArray):
    del ctx
    f32 = ir.F32Type.get()
    lane = arith.remui(mgpu_utils.thread_idx(), mgpu_utils.c(32, ir.IntegerType.get_signless(32)))
    registers = x.registers.copy()
    for place, register in np.ndenumerate(registers):
      values = [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(8)
      ]
      for distance in (1, 2, 4):
        values = [
          fa.subf(values[i ^ distance], v) if i & distance else fa.addf(v, values[i ^ distance])
          for i, v in enumerate(values)
        ]
      for distance in (1, 2):
        upper = arith.cmpi(
          arith.CmpIPredicate.ne,
          arith.andi(lane, mgpu_utils.c(distance, lane.type)),
          mgpu_utils.c(0, lane.type),
        )
        own = arith.select(upper, mgpu_utils.c(-1.0, f32), mgpu_utils.c(1.0, f32))
        values = [fa.addf(fa.mulf(v, own), mgpu_utils.shfl_bfly(v, distance)) for v in values]
      norm = mgpu_utils.c(float(np.float32(32**-0.5)), f32)
      registers[place] = vector.from_elements(
        ir.VectorType.get((8,), f32), [fa.mulf(v, norm) for v in values]
      )
    return fa.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

  return butterflies(x)


def quantize_mxfp4(
  x,
  *,
  scale_rule: ScaleRule = "floor",
  seed=None,
  signs=None,
):
  """Quantizes x in blocks of 32 along its last axis.

  Args:
    x: (m, k) bfloat16 or float32; k a multiple of 32, m * k at least 1024.
    scale_rule: see `fp4jax.formats.BlockFormat`.
    seed: two uint32 words for stochastic rounding, which draws 16 bits a value, a function of the
      seed and of the value's place alone; None rounds to nearest, ties to even.
    signs: (32,) of +1 and -1: transforms each block by H diag(signs) first; None does not.

  Returns:
    uint8 codes (m, k / 2), the first of a pair in the low nibble, and uint8 scales (m, k / 32).
    A block with a NaN or an infinity has the scale 255 and codes 0.
  """
  _check(x, scale_rule, seed, signs)
  seed = None if seed is None else jnp.asarray(seed, jnp.uint32)
  signs = None if signs is None else jnp.asarray(signs, jnp.float32)
  return _quantize(x, seed, signs, scale_rule=scale_rule)


@traced_once("scale_rule")
def _quantize(x, seed, signs, *, scale_rule):
  m, k = x.shape
  count = m * k // 32
  kind = "hadamard" if signs is not None else "nearest" if seed is None else "stochastic"
  runs = TUNING[kind]["runs"]
  while 32 * runs > count:
    runs //= 2
  span = 32 * runs
  layout = bl.block_layout(4, 8)

  def kernel(x_gmem, *refs):
    *extra, codes_gmem, scales_gmem = refs
    start = jnp.minimum(lax.axis_index("span") * span, count - span)  # the last may overlap
    here = pl.ds(start, span)
    values = plgpu.load(x_gmem.at[here], layout=layout, optimized=False)
    sign = words = index = None
    if signs is not None:
      sign = plgpu.load(extra.pop(0), optimized=False)
    if seed is not None:
      (seed_gmem,) = extra
      words = seed_gmem[0], seed_gmem[1]
      index = start * 4 + (
        lax.broadcasted_iota(jnp.int32, (span, 4), 0) * 4
        + lax.broadcasted_iota(jnp.int32, (span, 4), 1)
      )
      index = lax.bitcast_convert_type(index, jnp.uint32)
    codes_gmem[here], scales_gmem[here] = quantize_blocks(
      values, scale_rule, layout, signs=sign, seed=words, index=index
    )

  codes, scales = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((count, 4), jnp.uint32),
      jax.ShapeDtypeStruct((count,), jnp.uint8),
    ),
    grid=(-(-count // span),),
    grid_names=("span",),
    compiler_params=bl.WARPGROUP,
  )(
    x.reshape(count, 4, 8),
    *(() if signs is None else (signs.reshape(4, 8),)),
    *(() if seed is None else (seed,)),
  )
  codes = lax.bitcast_convert_type(codes, jnp.uint8)  # four bytes a word: no data moves
  return codes.reshape(m, k // 2), scales.reshape(m, k // 32)


@traced_once("scale_rule")
def quantize_mxfp4_both(x, *, scale_rule: ScaleRule = "floor"):
  """`quantize_mxfp4` of x and of its transpose in one read of x, rounding to nearest.

  Args:
    x: (m, k) bfloat16, both multiples of 128.

  Returns:
    uint8 codes (m, k / 2), scales (m, k / 32), codes (k, m / 2) and scales (k, m / 32).
  """
  if x.dtype != jnp.bfloat16:
    raise TypeError(f"x is {x.dtype}; quantize_mxfp4_both takes bfloat16")
  if x.ndim != 2 or x.shape[0] % tr.TILE or x.shape[1] % tr.TILE or not x.size:
    raise ValueError(f"{x.shape=} is not (m, k) with m % 128 == k % 128 == 0")
  _check(x, scale_rule, None, None)
  (m, k), width = x.shape, TUNING["both"]["columns"]

  def kernel(x_gmem, codes_gmem, scales_gmem, codes_t_gmem, scales_t_gmem, smem):
    i, j = lax.axis_index("row"), lax.axis_index("column")
    here = pl.ds(i * tr.TILE, tr.TILE)
    values = plgpu.load(x_gmem.at[here, j], layout=tr.ROWS, optimized=False)
    tr.write([values], smem)
    codes_gmem[here, j], scales_gmem[here, j] = quantize_blocks(values, scale_rule, tr.ROWS)
    plgpu.commit_smem()
    for start in range(0, tr.TILE, width):
      values = tr.read(smem.at[:, pl.ds(start, width)])
      own = pl.ds(j * tr.TILE + start, width)
      codes_t_gmem[own, i], scales_t_gmem[own, i] = quantize_blocks(values, scale_rule, tr.COLUMNS)

  def out_type(m, k):
    shape = (m, k // tr.TILE, 4)
    return jax.ShapeDtypeStruct((*shape, 4), jnp.uint32), jax.ShapeDtypeStruct(shape, jnp.uint8)

  codes, scales, codes_t, scales_t = plgpu.kernel(
    kernel,
    out_type=(*out_type(m, k), *out_type(k, m)),
    grid=(m // tr.TILE, k // tr.TILE),
    grid_names=("row", "column"),
    scratch_types=(tr.scratch(),),
    compiler_params=bl.WARPGROUP,
  )(x.reshape(m, k // tr.TILE, *tr.BLOCKS))
  codes, codes_t = (lax.bitcast_convert_type(c, jnp.uint8) for c in (codes, codes_t))
  return (
    codes.reshape(m, k // 2),
    scales.reshape(m, k // 32),
    codes_t.reshape(k, m // 2),
    scales_t.reshape(k, m // 32),
  )


def _check(x, scale_rule, seed, signs):
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise TypeError(f"x is {x.dtype}; quantize_mxfp4 takes bfloat16 or float32")
  if x.ndim != 2 or x.shape[1] % 32 or x.size < 1024:
    raise ValueError(f"{x.shape=} is not (m, k) with k % 32 == 0 and m * k >= 1024")
  if x.size >= 2**34:
    raise ValueError(f"{x.shape=} has {x.size} values; indices are 32 bits, for below 2^34")
  if scale_rule not in get_args(ScaleRule):
    raise ValueError(f"{scale_rule=} is not one of {get_args(ScaleRule)}")
  if seed is not None and np.shape(seed) != (2,):
    raise ValueError(f"seed has the shape {np.shape(seed)}, not (2,)")
  if signs is not None and np.shape(signs) != (32,):
    raise ValueError(f"signs have the shape {np.shape(signs)}, not (32,)")
