"""The grouped FP8 kernels against float32, at ragged sizes, one body for GPU and emulation."""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wgmma_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments.kernel_checks import (
  error_bound,
  magnitudes_of,
  runs_that_differ,
  sampled_error,
)
from pallas_kernels import grouped_matmul as gm

EXPERTS_256 = tuple(int(s) for s in np.random.default_rng(0).integers(-20, 40, 256).clip(0))
# (rows, sizes): groups that end inside a wave, none, one row; all in one; no rows at all; no
# multiples of 8; one expert; fewer rows than TMA's unit of 8.
MATMULS = [
  (301, (130, 0, 1, 127)),
  (301, (0, 0, 301, 0)),
  (301, (0, 0, 0, 0)),
  (301, (64, 65, 63, 100)),
  (203, (200,)),
  (5, (2, 0, 3)),
]
# (rows of the output, sizes): 128 of them are less than a tile, 256 no multiple of one.
WGRADS = [
  (256, (130, 0, 1, 127)),
  (256, (0, 0, 385, 0)),
  (256, (0, 0, 0, 0)),
  (128, (300,)),
]


TUNED = "as tuned"  # what a call without a config runs


def runs(cases, many):
  """(implementation, variant, case, dtype of the result).

  Emulation is slow: every case with one variant, and the first one with the others and with a
  bfloat16 result, which is staged in another way. It knows no clusters.
  """
  first, *others = [name for name, config in gm.VARIANTS.items() if config.cluster == 1]
  emulated = [(first, case, jnp.float32) for case in cases]
  emulated += [(variant, cases[0], jnp.float32) for variant in others]
  emulated += [(first, cases[0], jnp.bfloat16)]
  ways = [(variant, jnp.float32) for variant in (*gm.VARIANTS, TUNED)] + [(TUNED, jnp.bfloat16)]
  on_gpu = [(variant, case, dtype) for variant, dtype in ways for case in [*cases, many]]
  return [
    *(pytest.param("mosaic-interpret", *run) for run in emulated),
    *(pytest.param("mosaic", *run, marks=pytest.mark.gpu) for run in on_gpu),
  ]


def run(kernel, implementation, variant, *args, **options):
  config, emulated = gm.VARIANTS.get(variant), implementation == "mosaic-interpret"
  if emulated:
    # The smallest ring is reused most often.
    config = dataclasses.replace(config, stages=2)
    options["interpret"] = wgmma_races.PARAMS
  kernel = functools.partial(kernel, config=config, **options)
  with wgmma_races.checked() if emulated else contextlib.nullcontext():
    return np.asarray(jax.jit(kernel)(*args))


def elements(key, shape):
  return jax.random.normal(key, shape).astype(jnp.float8_e4m3fn)


def scales(key, shape):
  return jax.random.uniform(key, shape, minval=0.5, maxval=2.0)


def matmul_operands(m, k, n, sizes):
  """NaN in rows past the last group and in weights without rows: what must not be used."""
  keys = jax.random.split(jax.random.key(0), 4)
  unused, idle = np.arange(m) >= sum(sizes), np.array(sizes) == 0
  return (
    jnp.where(unused[:, None], jnp.nan, elements(keys[0], (m, k))).astype(jnp.float8_e4m3fn),
    jnp.where(unused, jnp.nan, scales(keys[1], (k // 128, m))),
    jnp.where(idle[:, None, None], jnp.nan, elements(keys[2], (len(sizes), n, k))).astype(
      jnp.float8_e4m3fn
    ),
    jnp.where(idle[:, None, None], jnp.nan, scales(keys[3], (len(sizes), n // 128, k // 128))),
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
    x = jnp.where(unused, jnp.nan, x).astype(jnp.float8_e4m3fn)
    return x, jnp.where(unused[::128, None], jnp.nan, scales(key, (t // 128, rows)))

  return *side(keys[0], k), *side(keys[2], n)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("implementation", "variant", "case", "dtype"),
  runs(MATMULS, (sum(EXPERTS_256) + 9, EXPERTS_256)),
)
def test_matmul_equals_reference(implementation, variant, case, dtype):
  m, sizes = case
  k = 384  # three steps: no multiple of the ring
  n = 256 if implementation == "mosaic-interpret" else 1408  # 11 tiles: more than a strip
  group_sizes = jnp.array(sizes, jnp.int32)
  operands = matmul_operands(m, k, n, sizes)
  out = run(gm.grouped_matmul, implementation, variant, *operands, group_sizes, out_dtype=dtype)
  used = sum(sizes)
  reference = gm.grouped_matmul_reference(*operands, group_sizes, out_dtype=jnp.float32)
  magnitudes = gm.grouped_matmul_reference(
    *magnitudes_of(operands), group_sizes, out_dtype=jnp.float32
  )
  bound = np.asarray(error_bound(reference, magnitudes, k, out.dtype))
  assert out.dtype == dtype
  assert np.all(np.abs(out.astype(np.float32) - reference)[:used] <= bound[:used])
  if implementation == "mosaic-interpret":
    # The emulator hands out memory full of NaN: these rows were not written.
    assert np.all(np.isnan(out[used:]))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("implementation", "variant", "case", "dtype"), runs(WGRADS, (256, EXPERTS_256))
)
def test_wgrad_equals_reference(implementation, variant, case, dtype):
  k, sizes = case
  n = 128 if implementation == "mosaic-interpret" else 1408  # 11 tiles: more than a strip
  t = 128 * (2 + sum(-(-s // 128) for s in sizes))
  group_sizes = jnp.array(sizes, jnp.int32)
  operands = wgrad_operands(t, k, n, sizes)
  out = run(gm.grouped_wgrad, implementation, variant, *operands, group_sizes, out_dtype=dtype)
  reference = gm.grouped_wgrad_reference(*operands, group_sizes)
  magnitudes = gm.grouped_wgrad_reference(*magnitudes_of(operands), group_sizes)
  bound = error_bound(reference, magnitudes, t, out.dtype)
  assert out.dtype == dtype
  assert np.all(np.abs(out.astype(np.float32) - reference) <= bound)


@pytest.mark.gpu
def test_the_same_bits_every_time():
  """At the shapes of a layer of configs/moe_1b.py, with groups as uneven as before balancing."""
  sizes = tuple(int(s) for s in np.random.default_rng(2).dirichlet(np.full(40, 0.3)) * 16384)
  padded = jnp.array([-(-s // 128) * 128 for s in sizes], jnp.int32)
  total = int(padded.sum())
  matmul = (*matmul_operands(total, 1024, 2048, tuple(map(int, padded))), padded)
  wgrad = (*wgrad_operands(total, 1024, 2048, sizes), padded)
  assert runs_that_differ(gm.grouped_matmul, matmul) == 0
  assert runs_that_differ(gm.grouped_wgrad, wgrad) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("gemm", ["fprop", "wgrad"])
def test_the_check_of_the_benchmark(gemm, dtype):
  """Passes the reference, and not one wave of one column tile that is wrong by a scale's fifth."""
  sizes = (130, 0, 1, 127)
  group_sizes = jnp.array(sizes, jnp.int32)
  if gemm == "wgrad":
    operands, reference = wgrad_operands(640, 256, 256, sizes), gm.grouped_wgrad_reference
  else:
    operands, reference = matmul_operands(301, 384, 256, sizes), gm.grouped_matmul_reference
  arguments = *operands, group_sizes
  out = jax.jit(functools.partial(reference, out_dtype=dtype))(*arguments)
  assert sampled_error(gemm, out, arguments) <= 1
  wrong = out.at[..., 64:128, 128:].multiply(1.2)
  assert sampled_error(gemm, wrong, arguments) > 1
  assert sampled_error(gemm, out.at[..., 64:128, 130].set(jnp.nan), arguments) == np.inf


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["matmul", "wgrad"])
@pytest.mark.parametrize("forgotten", ["wgmma_wait", "commit_smem"])
def test_emulation_finds_planted_races(kernel, forgotten):
  """A slot handed back while wgmma reads it, and memory that changes proxies without a fence."""
  sizes = (385,)
  if kernel == "matmul":
    operands = matmul_operands(385, 384, 128, sizes)
  else:
    operands = wgrad_operands(512, 256, 128, sizes)
  jax.clear_caches()  # of kernels that are traced already
  with (
    mock.patch.object(plgpu, forgotten, return_value=None) as left_out,
    pytest.raises(AssertionError, match="RACE DETECTED"),
  ):
    run(
      getattr(gm, f"grouped_{kernel}"),
      "mosaic-interpret",
      next(iter(gm.VARIANTS)),
      *operands,
      jnp.array(sizes, jnp.int32),
    )
  jax.clear_caches()
  assert left_out.called


@pytest.mark.parametrize("rows", [(30, 0, 9, 50), (0, 0), (70,), (10, 20), EXPERTS_256])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_schedule_visits_every_tile_once(rows, width):
  """And the tiles with the most work first: a tile's rows inside its group, times its steps."""
  tile_m, n_tiles = 10, 5
  steps = np.random.default_rng(1).integers(0, 4, len(rows), np.int32)
  most = sum(rows) // tile_m + len(rows)
  *visits, count = gm._schedule(
    jnp.array(rows, jnp.int32), jnp.array(steps), tile_m, n_tiles, most, width
  )
  visits = [tuple(int(x) for x in visit) for visit in zip(*visits, strict=True)][: int(count[0])]
  tiles = [-(-r // tile_m) for r in rows]
  assert sorted(visits) == [
    (g, i, j) for g, n in enumerate(tiles) for i in range(n) for j in range(n_tiles)
  ]
  work = [steps[g] * min(rows[g] - i * tile_m, tile_m) for g, i, _ in visits]
  assert work == sorted(work, reverse=True)


def test_reference_is_a_loop_over_rows():
  sizes = (2, 0, 3)
  lhs, lhs_scales, rhs, rhs_scales = matmul_operands(8, 256, 128, sizes)
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
  lhs, lhs_scales, rhs, rhs_scales = matmul_operands(256, 256, 128, (100, 100))
  sizes = jnp.array([100, 100], jnp.int32)
  with pytest.raises(TypeError, match="lhs is float32"):
    gm.grouped_matmul(lhs.astype(jnp.float32), lhs_scales, rhs, rhs_scales, sizes)
  with pytest.raises(ValueError, match="lhs_scales has shape"):
    gm.grouped_matmul(lhs, lhs_scales.T, rhs, rhs_scales, sizes)
  with pytest.raises(ValueError, match="k=200"):
    gm.grouped_matmul(lhs[:, :200], lhs_scales, rhs[:, :, :200], rhs_scales, sizes)
  with pytest.raises(TypeError, match="group_sizes is float32"):
    gm.grouped_matmul(lhs, lhs_scales, rhs, rhs_scales, sizes.astype(jnp.float32))
  with pytest.raises(TypeError, match="out_dtype is float16, not float32 or bfloat16"):
    gm.grouped_matmul(lhs, lhs_scales, rhs, rhs_scales, sizes, out_dtype=jnp.float16)
  for bad in ([-1, 5], [200, 57]):
    with pytest.raises(ValueError, match="group_sizes="):
      gm.grouped_matmul(lhs, lhs_scales, rhs, rhs_scales, jnp.array(bad, jnp.int32))
  with pytest.raises(ValueError, match=r"lhs.shape=\(0, 256\)"):
    gm.grouped_matmul(lhs[:0], lhs_scales[:, :0], rhs, rhs_scales, sizes)
  with pytest.raises(ValueError, match=r"group_sizes.shape=\(0,\)"):
    gm.grouped_matmul(lhs, lhs_scales, rhs[:0], rhs_scales[:0], sizes[:0])


def test_wgrad_refuses_wrong_operands():
  lhs, lhs_scales, rhs, rhs_scales = wgrad_operands(256, 128, 128, (100, 100))
  with pytest.raises(ValueError, match="rhs_scales has shape"):
    gm.grouped_wgrad(lhs, lhs_scales, rhs, rhs_scales.T, jnp.array([100, 100], jnp.int32))
  with pytest.raises(TypeError, match="rhs_scales is float16, not float32"):
    half = rhs_scales.astype(jnp.float16)
    gm.grouped_wgrad(lhs, lhs_scales, rhs, half, jnp.array([100, 100], jnp.int32))
  with pytest.raises(TypeError, match="out_dtype is int8"):
    sizes = jnp.array([100, 100], jnp.int32)
    gm.grouped_wgrad(lhs, lhs_scales, rhs, rhs_scales, sizes, out_dtype=jnp.int8)
  # 129 tokens take two tiles of 128: three tiles are 384 rows of the 256.
  for bad in ([-1, 5], [129, 1], [257]):
    with pytest.raises(ValueError, match="need more than 256"):
      gm.grouped_wgrad(lhs, lhs_scales, rhs, rhs_scales, jnp.array(bad, jnp.int32))
