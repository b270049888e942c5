"""MXFP4 to bf16: exact, for no E2M1 value needs more than bf16's bits."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl
from pallas_kernels import e2m1
from pallas_kernels.tracing import traced_once

# Runs of 32 blocks that a CTA takes.
TUNING = {
  "rows": {"runs": 4},
}


@traced_once()
def dequantize_mxfp4(codes, scales):
  """The values of an MXFP4 tensor; NaN in blocks whose scale is 255.

  Args:
    codes: (m, k / 2) uint8, the first of a pair in the low nibble; m * k at least 1024.
    scales: (m, k / 32) uint8, E8M0.

  Returns:
    (m, k) bfloat16.
  """
  if codes.dtype != jnp.uint8 or scales.dtype != jnp.uint8:
    raise TypeError(f"codes are {codes.dtype} and scales {scales.dtype}, not uint8")
  if codes.ndim != 2 or codes.shape[1] % 16 or codes.size < 512:
    raise ValueError(f"{codes.shape=} is not (m, k / 2) with k % 32 == 0 and m * k >= 1024")
  if scales.shape != (codes.shape[0], codes.shape[1] // 16):
    raise ValueError(f"{scales.shape=} does not fit {codes.shape=}: a scale for 16 bytes")
  m, k = codes.shape[0], 2 * codes.shape[1]
  count = m * k // 32
  span = 32 * TUNING["rows"]["runs"]
  while span > count:
    span //= 2
  layout = bl.block_layout(4, 8)

  def kernel(words_gmem, scales_gmem, out_gmem):
    start = jnp.minimum(lax.axis_index("span") * span, count - span)  # the last may overlap
    here = pl.ds(start, span)
    words = plgpu.load(words_gmem.at[here], layout=layout.reduce(2), optimized=False)
    code = plgpu.load(scales_gmem.at[here], optimized=False)
    out_gmem[here] = e2m1.values(words, code, layout)

  words = lax.bitcast_convert_type(codes.reshape(count, 4, 4), jnp.uint32)
  (out,) = plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct((count, 4, 8), jnp.bfloat16),),
    grid=(-(-count // span),),
    grid_names=("span",),
    compiler_params=bl.WARPGROUP,
  )(words, scales.reshape(count))
  return out.reshape(m, k)
