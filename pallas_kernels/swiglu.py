"""SwiGLU fused with the quantization of its output, and its backward pass with that of gradients.

The activation never lies in memory in bf16, nor do the gradients of gate and up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks as bl
from pallas_kernels import transpose as tr

TILE = tr.TILE
ROW_RUNS = 2  # runs of 8 rows a CTA takes
WARPGROUPS = 2  # that share a tile of the backward pass, 96 KiB of SMEM


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
    activation = (gate * _sigmoid(gate) * up).astype(jnp.bfloat16)
    codes_gmem[here, block], scales_gmem[block, here] = bl.quantize_e4m3(activation, power_of_two)

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


def swiglu_backward_fp8(h, g, after, *, power_of_two: bool = False):
  """What the backward pass needs of a = silu(gate) * up, given the gradient g of its result.

  As in `swiglu_fp8_rows`, a is rounded to bfloat16; so is the gradient da = after * g, and that of
  h, which are then quantized.

  Args:
    h: (m, 2 f) bfloat16, gate and up the halves of the last axis, m and f multiples of 128; or the
      same in MXFP4, uint8 codes (m, f) and scales (m, f / 16).
    g: (m, f) bfloat16.
    after: (m,) float32, by which a and g are multiplied, row by row.

  Returns:
    four pairs and an array: of dh, `quantize_fp8_rows` and `quantize_fp8_columns`; the latter of
    after * a; float32 sums (m,) of a * g along f.
  """
  packed = isinstance(h, tuple)
  m, f = _check_backward(h, g, after)
  blocks = f // TILE
  rows = TILE // WARPGROUPS

  def load(ref, *place, layout=tr.ROWS):
    return plgpu.load(ref.at[place], layout=layout, optimized=False)

  def half_of_h(refs, *place):
    if not packed:
      return load(*refs, *place)
    words = load(refs[0], *place, layout=tr.ROWS.reduce(3))
    return bl.mxfp4_values(words, load(refs[1], *place, layout=tr.ROWS.reduce((2, 3))), tr.ROWS)

  def kernel(*refs):
    h_gmem, refs = refs[: 1 + packed], refs[1 + packed :]
    g_gmem, after_gmem, rows_gmem, row_scales_gmem, columns_gmem, column_scales_gmem = refs[:6]
    a_gmem, a_scales_gmem, sums_gmem, *smem, barrier = refs[6:]
    i, j, warpgroup = (lax.axis_index(name) for name in ("row", "column", "warpgroup"))

    @pl.loop(0, rows // 32)
    def _(block):
      top = warpgroup * rows + block * 32
      runs = []
      for run in range(4):
        here = pl.ds(i * TILE + top + run * 8, 8)
        gate, up = (half_of_h(h_gmem, here, half, j) for half in (0, 1))
        factor = load(after_gmem, here, layout=tr.ROWS.reduce((1, 2, 3)))
        *dh, a, product = _backward(gate, up, load(g_gmem, here, j), factor)
        for half, values in enumerate(dh):
          codes, scales = bl.quantize_e4m3(values, power_of_two)
          rows_gmem[here, half, j], row_scales_gmem[half, j, here] = codes, scales
        sums_gmem[j, here] = jnp.sum(jnp.sum(jnp.sum(product, axis=3), axis=2), axis=1)
        runs.append((*dh, a))
      for tile, parts in zip(smem, zip(*runs, strict=True), strict=True):
        tr.write(parts, tile.at[pl.ds(top, 32)])

    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
    for part in range(rows // 64):
      own = warpgroup * rows + part * 64
      there = pl.ds(j * TILE + own, 64)
      for tile, codes_gmem, scales_gmem in (
        (smem[0], columns_gmem.at[0], column_scales_gmem.at[:, 0]),
        (smem[1], columns_gmem.at[1], column_scales_gmem.at[:, 1]),
        (smem[2], a_gmem, a_scales_gmem),
      ):
        values = tr.read(tile.at[:, pl.ds(own, 64)])
        codes_gmem[there, i], scales_gmem[i, there] = bl.quantize_e4m3(values, power_of_two)

  of_rows, of_columns = (m, 2, blocks, *tr.BLOCKS), (f, m // TILE, *tr.BLOCKS)
  out = {
    "rows": (of_rows, bl.E4M3),
    "row_scales": ((2, blocks, m), jnp.float32),
    "columns": ((2, *of_columns), bl.E4M3),
    "column_scales": ((m // TILE, 2, f), jnp.float32),
    "a": (of_columns, bl.E4M3),
    "a_scales": ((m // TILE, f), jnp.float32),
    "sums": ((blocks, m), jnp.float32),
  }
  if packed:
    words = lax.bitcast_convert_type(h[0].reshape(m, 2, blocks, 4, 4, 4), jnp.uint32)
    h = words, h[1].reshape(m, 2, blocks, 4)
  else:
    h = (h.reshape(of_rows),)
  codes, scales, codes_t, scales_t, a, a_scales, sums = plgpu.kernel(
    kernel,
    out_type=tuple(jax.ShapeDtypeStruct(*spec) for spec in out.values()),
    grid=(m // TILE, blocks),
    grid_names=("row", "column"),
    num_threads=WARPGROUPS,
    thread_name="warpgroup",
    scratch_types=(*[tr.scratch()] * 3, plgpu.Barrier(num_arrivals=WARPGROUPS)),
    compiler_params=bl.WARPGROUP,
  )(*h, g.reshape(m, blocks, *tr.BLOCKS), after)
  return (
    (codes.reshape(m, 2 * f), scales.reshape(2 * blocks, m)),
    (codes_t.reshape(2 * f, m), scales_t.reshape(m // TILE, 2 * f)),
    (a.reshape(f, m), a_scales),
    jnp.sum(sums, axis=0),
  )


def _backward(gate, up, g, after):
  """Gradients of gate and up, after * a, all in bfloat16, and a * g."""
  gate, up, g = (x.astype(jnp.float32) for x in (gate, up, g))
  after = lax.broadcast_in_dim(after, g.shape, (0,))
  sigmoid = _sigmoid(gate)
  silu = gate * sigmoid
  a, da = _rounded(silu * up), _rounded(g * after)
  dsilu = da * up
  dgate = dsilu * sigmoid + dsilu * gate * (sigmoid * (1.0 - sigmoid))
  return *(x.astype(jnp.bfloat16) for x in (dgate, da * silu, a * after)), a * g


def _sigmoid(x):
  return 1.0 / (1.0 + jnp.exp(-x))


def _rounded(x):
  return x.astype(jnp.bfloat16).astype(jnp.float32)


def _check_backward(h, g, after):
  if g.ndim != 2 or g.shape[0] % TILE or g.shape[1] % TILE or not g.size:
    raise ValueError(f"{g.shape=} is not (m, f) with m % 128 == f % 128 == 0")
  m, f = g.shape
  expected = {"g": (g, (m, f), jnp.bfloat16), "after": (after, (m,), jnp.float32)}
  if isinstance(h, tuple):
    expected["the codes of h"] = h[0], (m, f), jnp.uint8
    expected["the scales of h"] = h[1], (m, f // 16), jnp.uint8
  else:
    expected["h"] = h, (m, 2 * f), jnp.bfloat16
  for name, (x, shape, dtype) in expected.items():
    if x.dtype != dtype or x.shape != shape:
      error = TypeError if x.dtype != dtype else ValueError
      raise error(f"{name}: {x.dtype} {x.shape}, not {jnp.dtype(dtype).name} {shape}")
  return m, f
