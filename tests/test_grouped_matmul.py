"""The grouped FP8 kernels against float32, at ragged sizes, one body for GPU and emulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grouped_matmul as gm

IMPLEMENTATIONS = ["mosaic-interpret", pytest.param("mosaic", marks=pytest.mark.gpu)]
SIZES = [(130, 0, 1, 127), (0, 0, 300, 0), (0, 0, 0, 0), (64, 65, 63, 100)]


def interpret(implementation):
  match implementation:
    case "mosaic-interpret":
      return plgpu.InterpretGPUParams(detect_races=True)
    case "mosaic":
      return False


def run(kernel, implementation, *args):
  del implementation
  return np.asarray(jax.jit(kernel)(*args))


def elements(key, shape):
  return jax.random.normal(key, shape).astype(jnp.float8_e4m3fn)


def scales(key, shape):
  return jax.random.uniform(key, shape, minval=0.5, maxval=2.0)


def matmul_operands(m, k, n, e):
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    elements(keys[0], (m, k)),
    scales(keys[1], (k // 128, m)),
    elements(keys[2], (e, n, k)),
    scales(keys[3], (e, n // 128, k // 128)),
  )


def wgrad_operands(t, k, n, sizes):
  """Tokens in tiles of 128, the fill at the end of a group zeros; NaN past the last group."""
  keys = jax.random.split(jax.random.key(1), 4)
  owned = np.concatenate([np.arange(-(-s // 128) * 128) < s for s in sizes])
  used = owned.size
  owned = np.pad(owned, (0, t - used))
  unused = np.arange(t) >= used

  def side(key, rows):
    x = jnp.where(owned, jax.random.normal(key, (rows, t)), 0)
    return jnp.where(unused, jnp.nan, x).astype(jnp.float8_e4m3fn)

  return (
    side(keys[0], k),
    scales(keys[1], (t // 128, k)),
    side(keys[2], n),
    scales(keys[3], (t // 128, n)),
  )


def tolerance(reference_of_magnitudes, contraction):
  # float32 sums of `contraction` exact products, in any order, and two roundings for the scales;
  # wgmma keeps only about 13 bits below its largest addend: 2^-13 of the magnitudes, per 32.
  return reference_of_magnitudes * (contraction * 2.0**-24 + 2.0**-12) + 1e-30


def magnitudes(operands):
  return tuple(jnp.abs(x.astype(jnp.float32)).astype(x.dtype) for x in operands)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", gm.VARIANTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_matmul_equals_reference(implementation, variant, sizes):
  if implementation == "mosaic-interpret" and sizes != SIZES[0] and variant != "3 warpgroups":
    pytest.skip("emulation is slow: all sizes with one variant, all variants with one size")
  m, k, n = 301, 256, 256
  group_sizes = jnp.array(sizes, jnp.int32)
  operands = matmul_operands(m, k, n, len(sizes))
  kernel = functools.partial(
    gm.grouped_matmul,
    config=gm.VARIANTS[variant],
    out_dtype=jnp.float32,
    interpret=interpret(implementation),
  )
  used = sum(sizes)
  out = run(kernel, implementation, *operands, group_sizes)[:used]
  reference = gm.grouped_matmul_reference(*operands, group_sizes, out_dtype=jnp.float32)[:used]
  bound = gm.grouped_matmul_reference(*magnitudes(operands), group_sizes, out_dtype=jnp.float32)
  assert np.all(np.abs(out - reference) <= tolerance(np.asarray(bound)[:used], k))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", gm.VARIANTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_wgrad_equals_reference(implementation, variant, sizes):
  if implementation == "mosaic-interpret" and sizes != SIZES[0] and variant != "3 warpgroups":
    pytest.skip("emulation is slow: all sizes with one variant, all variants with one size")
  t, k, n = 128 * (301 // 128 + len(sizes)), 256, 128
  group_sizes = jnp.array(sizes, jnp.int32)
  operands = wgrad_operands(t, k, n, sizes)
  kernel = functools.partial(
    gm.grouped_wgrad, config=gm.VARIANTS[variant], interpret=interpret(implementation)
  )
  out = run(kernel, implementation, *operands, group_sizes)
  reference = gm.grouped_wgrad_reference(*operands, group_sizes)
  bound = np.asarray(gm.grouped_wgrad_reference(*magnitudes(operands), group_sizes))
  assert np.all(np.abs(out - reference) <= tolerance(bound, t))


def test_emulation_finds_no_race():
  kernel = functools.partial(
    gm.grouped_matmul, config=gm.VARIANTS["3 warpgroups"], interpret=interpret("mosaic-interpret")
  )
  jax.block_until_ready(
    jax.jit(kernel)(*matmul_operands(301, 256, 256, 4), jnp.array(SIZES[0], jnp.int32))
  )
  assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("tiles", [(3, 0, 1, 5), (0, 0), (7,)])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_schedule_visits_every_tile_once(tiles, width):
  n_tiles = 5
  *visits, count = gm._schedule(jnp.array(tiles, jnp.int32), n_tiles, sum(tiles) + 2, width)
  visits = [tuple(int(x) for x in visit) for visit in zip(*visits, strict=True)][: int(count[0])]
  every = [(g, i, j) for g, rows in enumerate(tiles) for i in range(rows) for j in range(n_tiles)]
  assert sorted(visits) == every


def test_reference_is_a_loop_over_rows():
  sizes = (2, 0, 3)
  lhs, lhs_scales, rhs, rhs_scales = matmul_operands(8, 256, 128, 3)
  out = gm.grouped_matmul_reference(
    lhs, lhs_scales, rhs, rhs_scales, jnp.array(sizes, jnp.int32), out_dtype=jnp.float32
  )
  x, w = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
  groups = np.repeat(np.arange(3), sizes)
  for i, g in enumerate(groups):
    row = sum(
      x[i, b : b + 128]
      @ w[g, :, b : b + 128].T
      * float(lhs_scales[b // 128, i])
      * float(rhs_scales[g, 0, b // 128])
      for b in (0, 128)
    )
    # float32 against float64 over 256 products: 256 * 2^-24 of the magnitudes, here below 1e3.
    np.testing.assert_allclose(out[i], row, atol=256 * 2.0**-24 * 1e3)
  assert not np.any(np.asarray(out[5:]))


@pytest.mark.parametrize("variant", gm.VARIANTS)
@pytest.mark.parametrize(("n", "k"), [(2048, 7168), (7168, 2048)])
def test_matmul_lowers_for_cuda(variant, n, k):
  m, e, f8, f32 = 32768, 8, jnp.float8_e4m3fn, jnp.float32
  s = jax.ShapeDtypeStruct
  args = (s((m, k), f8), s((k // 128, m), f32), s((e, n, k), f8), s((e, n // 128, k // 128), f32))
  kernel = functools.partial(gm.grouped_matmul, config=gm.VARIANTS[variant])
  jax.jit(kernel).trace(*args, s((e,), jnp.int32)).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("variant", gm.VARIANTS)
@pytest.mark.parametrize(("n", "k"), [(2048, 7168), (7168, 2048)])
def test_wgrad_lowers_for_cuda(variant, n, k):
  t, e, f8, f32 = 32768 + 8 * 128, 8, jnp.float8_e4m3fn, jnp.float32
  s = jax.ShapeDtypeStruct
  args = (s((k, t), f8), s((t // 128, k), f32), s((n, t), f8), s((t // 128, n), f32))
  kernel = functools.partial(gm.grouped_wgrad, config=gm.VARIANTS[variant])
  jax.jit(kernel).trace(*args, s((e,), jnp.int32)).lower(lowering_platforms=("cuda",))


def test_refuses_wrong_operands():
  lhs, lhs_scales, rhs, rhs_scales = matmul_operands(256, 256, 128, 2)
  sizes = jnp.array([100, 100], jnp.int32)
  with pytest.raises(TypeError, match="lhs is float32"):
    gm.grouped_matmul(lhs.astype(jnp.float32), lhs_scales, rhs, rhs_scales, sizes)
  with pytest.raises(ValueError, match="lhs_scales has shape"):
    gm.grouped_matmul(lhs, lhs_scales.T, rhs, rhs_scales, sizes)
  with pytest.raises(ValueError, match="k=200"):
    gm.grouped_matmul(lhs[:, :200], lhs_scales, rhs[:, :, :200], rhs_scales, sizes)
  with pytest.raises(TypeError, match="group_sizes is float32"):
    gm.grouped_matmul(lhs, lhs_scales, rhs, rhs_scales, sizes.astype(jnp.float32))
  for bad in ([-1, 5], [200, 57]):
    with pytest.raises(ValueError, match="group_sizes="):
      gm.grouped_matmul(lhs, lhs_scales, rhs, rhs_scales, jnp.array(bad, jnp.int32))
