"""SwiGLU fused with the quantization of its output: the activation never lies in memory in bf16."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl

TILE = 128
ROW_RUNS = 2  # runs of 8 rows a CTA takes


def swiglu_fp8_rows(h, *, power_of_two: bool = False):
  """`quantize_fp8_rows(silu(gate) * up)`; gate and up are the halves of h's last axis.

  SwiGLU is computed in float32 and rounded to bfloat16 before it is quantized.

  Args:
    h: (m, 2 f) bfloat16; m >= 8, f a multiple of 128.

  Returns:
    float8_e4m3fn codes (m, f) and float32 scales (f / 128, m).
  """
  if h.dtype != jnp.bfloat16:
    raise TypeError(f"h is {h.dtype}; swiglu_fp8_rows takes bfloat16")
  if h.ndim != 2 or h.shape[0] < 8 or h.shape[1] % (2 * TILE) or not h.size:
    raise ValueError(f"{h.shape=} is not (m, 2 f) with m >= 8 and f % 128 == 0")
  m, f = h.shape[0], h.shape[1] // 2
  rows = 8 * ROW_RUNS
  while rows > m:
    rows //= 2
  layout = bl.block_layout(16, 8)

  def kernel(h_gmem, codes_gmem, scales_gmem):
    start = jnp.minimum(lax.axis_index("rows") * rows, m - rows)  # the last may overlap
    here, block = pl.ds(start, rows), lax.axis_index("block")
    gate, up = (
      plgpu.load(h_gmem.at[here, half, block], layout=layout, optimized=False).astype(jnp.float32)
      for half in (0, 1)
    )
    activation = (gate / (1.0 + jnp.exp(-gate)) * up).astype(jnp.bfloat16)
    amax = jnp.max(jnp.max(jnp.abs(activation), axis=2), axis=1).astype(jnp.float32)
    scale, inverse = bl.e4m3_scale(amax, power_of_two)
    inverse = lax.broadcast_in_dim(inverse, activation.shape, (0,))
    codes_gmem[here, block] = bl.to_e4m3(activation, inverse)
    scales_gmem[block, here] = scale

  codes, scales = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((m, f // TILE, 16, 8), bl.E4M3),
      jax.ShapeDtypeStruct((f // TILE, m), jnp.float32),
    ),
    grid=(-(-m // rows), f // TILE),
    grid_names=("rows", "block"),
    compiler_params=bl.WARPGROUP,
  )(h.reshape(m, 2, f // TILE, 16, 8))
  return codes.reshape(m, f), scales
