"""The element-wise kernels against fp4jax, bit for bit: emulated where possible, and on Hopper."""

import itertools

import jax
import jax.numpy as jnp
import lane_stand_ins
import numpy as np
import pytest
import wgmma_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments import kernel_cases as cases
from experiments.kernel_checks import near, runs_that_differ
from fp4jax import dequantize, formats, hadamard
from fp4jax.quantized_array import QuantizedArray
from pallas_kernels import convert, fp8, gather, mxfp4, swiglu, transpose
from pallas_kernels import dequantize as dequantizer

gpu = pytest.mark.gpu
# The others are little but arithmetic of a lane, which `test_eights` and `test_packed` have.
EMULATED = [
  *(case for case in cases.CASES if case.name.startswith(("quantize_fp8", "gather_fp8"))),
  *(case for case in cases.SWIGLU if "power of two" not in case.name),
]


def tensor(m=256, k=512, seed=0):
  """Blocks of every kind: zeros, NaN, infinity, tiny and large, ties of every step."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((m, k)) * np.exp2(2 * rng.standard_normal((m, k // 32))).repeat(32, 1)
  x[0, :32] = 0
  x[1, :128] = 0
  x[2, 5], x[3, 40], x[4, 70] = np.nan, np.inf, -np.inf
  x[5, 64:96], x[6, :32], x[7, :32] = 1e-40, x[6, :32] * 1e30, x[7, :32] * 1e-36
  x[8, :64] = -0.0
  ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 0.251, 0.749, 6, 7, 7.9]
  x[16:48] = rng.choice(ties, (32, k)) * rng.choice([-1, 1], (32, k))
  return jnp.asarray(x, jnp.bfloat16)


def assert_same(actual, expected, zeros_have_signs=True):
  for a, e in zip(actual, expected, strict=True):
    assert a.dtype == e.dtype and a.shape == e.shape
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(e, np.float32))
    if a.dtype != jnp.uint8 and zeros_have_signs:
      np.testing.assert_array_equal(np.signbit(a), np.signbit(e))


@pytest.mark.parametrize("case", EMULATED, ids=lambda c: c.name)
def test_emulated(case):
  x = tensor(256, 256)
  if not case.exact:
    x = jnp.where(jnp.isfinite(x), jnp.clip(x, -100, 100), 1)
  x = case.prepare(x)
  with (
    lane_stand_ins.in_place(),
    wgmma_races.checked(),
    plgpu.force_gpu_interpret_mode(wgmma_races.PARAMS),
  ):
    actual = case.kernel(x)
  if case.exact:
    assert_same(actual, case.definition(x))
  else:
    assert near(actual, case.definition(x))


@gpu
@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_on_hopper(case):
  for shape in ((256, 512), (128, 128), (384, 1152)):
    x = jax.jit(case.prepare)(tensor(*shape))
    # In a block without a scale the codes of a widened tensor are zeros of either sign.
    signs = not case.name.startswith("mxfp4_to_fp8")
    assert_same(jax.jit(case.kernel)(x), jax.jit(case.definition)(x), signs)


def held(layout, shape):
  """Places (warp, lane, register, value) of an array, its values numbered."""
  layout, x = layout.to_mgpu(), np.arange(np.prod(shape)).reshape(shape)
  for tile in layout.tiling.tiles:
    first = x.ndim - len(tile)
    split = [
      n for size, step in zip(x.shape[first:], tile, strict=True) for n in (size // step, step)
    ]
    inner = range(first, first + len(split))
    x = x.reshape(*x.shape[:first], *split).transpose(*range(first), *inner[::2], *inner[1::2])
  threads = [d % x.ndim for d in (*layout.warp_dims, *layout.lane_dims)]
  registers = [d for d in range(x.ndim - 1) if d not in threads]
  return x.transpose(*threads, *registers, -1).reshape(4, 32, -1, x.shape[-1])


def test_transposed_tiles_hold_what_their_layouts_say():
  rows = held(transpose.ROWS, (128, 4, 4, 8))
  smem = np.empty((128, 128), int)
  smem.flat[held(transpose.PERMUTED, (128, 128))] = rows
  pairs = smem.T.ravel()[held(plgpu.Layout.WGMMA, (128, 128))]
  columns = pairs[:, :, transpose.eights(np.arange(pairs.shape[2]))]
  expected = held(transpose.COLUMNS, (128, 4, 4, 8))  # of the transpose, numbered by rows
  expected = np.arange(128 * 128).reshape(128, 128).T.ravel()[expected]
  np.testing.assert_array_equal(columns.reshape(expected.shape), expected)


def test_a_lane_gathers_what_its_layout_says():
  """Its thread has 16 others beside it in its row."""
  warp, lane, _, value = np.indices((4, 32, 1, 8))
  thread = 32 * warp + lane
  place = thread // 16, *gather.eight_of(thread), value  # of (8, 4, 4, 8)
  np.testing.assert_array_equal(
    held(transpose.ROWS, (8, 4, 4, 8)), np.ravel_multi_index(place, (8, 4, 4, 8))
  )


def test_butterflies_are_the_hadamard_transform():
  x = jax.random.normal(jax.random.key(0), (64, 96))
  expected = hadamard(x, -1, 32, jnp.asarray(cases.SIGNS))
  # Five roundings of sums of up to 32 values, each below 5 or so.
  np.testing.assert_allclose(cases.butterflies(x), expected, atol=1e-5)


@gpu
@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "oas"])
def test_float32_input(rule):
  x = tensor().astype(jnp.float32) * (1 + 2.0**-20)
  fmt = cases.mxfp4_format(rule)
  q = jax.jit(lambda x: cases.quantize(x, fmt))(x)
  actual = jax.jit(lambda x: mxfp4.quantize_mxfp4(x, scale_rule=rule))(x)
  assert_same(actual, (q.codes, q.scales))


@gpu
def test_more_rows_than_a_grid_has_beside_its_first_axis():
  """The other axes end at 65,535 CTAs: 2^22 rows, 32 a CTA, are twice as many."""
  for name in ("quantize_fp8_rows float32", "mxfp4_to_fp8_rows", "fp8_to_mxfp4 floor"):
    case = cases.BY_NAME[name]
    x = jax.jit(case.prepare)(jnp.tile(tensor(1024, 128), (4096, 1)))
    assert_same(jax.jit(case.kernel)(x), jax.jit(case.definition)(x), "to_fp8" not in name)


@gpu
@pytest.mark.parametrize("case", cases.BY_NAME.values(), ids=lambda c: c.name)
def test_the_same_bits_every_time(case):
  x = jax.jit(case.prepare)(jnp.tile(tensor(1024, 1024), (16, 1)))
  assert runs_that_differ(case.kernel, (x,)) == 0


@pytest.mark.parametrize("case", cases.BY_NAME.values(), ids=lambda c: c.name)
def test_every_case_can_be_traced(case):
  """Where no GPU is, and without a warning."""
  x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
  results = jax.tree.leaves(jax.eval_shape(lambda x: case.kernel(case.prepare(x)), x))
  assert results and all(result.size for result in results)


def test_runs_that_differ_are_counted():
  """One bit of one of two results, in every third run; NaN is no difference."""
  runs = iter(range(100))

  def kernel(x):
    odd = jax.pure_callback(
      lambda: np.int32(next(runs) % 3 == 2), jax.ShapeDtypeStruct((), np.int32)
    )
    codes = jax.lax.bitcast_convert_type(x, jnp.uint16).at[7, 3].add(odd.astype(jnp.uint16))
    return x * jnp.nan, codes

  assert runs_that_differ(kernel, (tensor(64, 128),), runs=9) == 3


@gpu
@pytest.mark.parametrize("rows", [8, 9, 33, 100])
def test_rows_that_no_tile_divides(rows):
  for name in ("quantize_fp8_rows float32", "mxfp4_to_fp8_rows", "quantize_mxfp4 rceil"):
    case = cases.BY_NAME[name]
    x = jax.jit(case.prepare)(tensor(256, 512)[:rows])
    assert_same(jax.jit(case.kernel)(x), jax.jit(case.definition)(x), "to_fp8" not in name)


@gpu
def test_stochastic_rounding_is_unbiased_and_its_draws_differ():
  quantize = jax.jit(lambda x, seed: mxfp4.quantize_mxfp4(x, scale_rule="rceil", seed=seed))
  fmt = cases.mxfp4_format("rceil")
  grid = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
  for low, high in itertools.pairwise(grid):
    for p in (0.125, 0.5, 0.875):
      value = low + p * (high - low)
      x = jnp.full((1024, 1024), value, jnp.bfloat16).at[:, ::32].set(6.0)
      codes, scales = quantize(x, jnp.uint32([3, 5]))
      y = np.asarray(jax.jit(dequantize)(QuantizedArray(codes, scales, None, fmt, -1)))
      up = y[:, np.arange(1024) % 32 != 0] == high
      assert np.isin(y, [low, high, 6]).all()
      # 16 bits and a half: the probability is within 2^-17 of p.
      z = (up.mean() - p) / np.sqrt(p * (1 - p) / up.size)
      assert abs(z) < 5, (low, p, z)
      if p == 0.5:
        for other in (up[1:] ^ up[:-1], up[:, 1:] ^ up[:, :-1], up[:, 8:] ^ up[:, :-8]):
          assert abs(other.mean() - 0.5) < 5 * 0.5 / np.sqrt(other.size)
        for seed in ([4, 5], [3, 6]):
          changed = np.asarray(quantize(x, jnp.uint32(seed))[0] != codes).mean()
          assert abs(changed - 0.75 * 15 / 16 - 0.5 / 16) < 0.02


@gpu
@pytest.mark.parametrize("case", cases.SWIGLU, ids=lambda c: c.name)
def test_swiglu(case):
  x = tensor(256, 512)
  arguments = jax.jit(case.prepare)(jnp.where(jnp.isfinite(x), jnp.clip(x, -100, 100), 1))
  outputs = [jax.jit(f)(arguments) for f in (case.kernel, case.definition)]
  assert near(*outputs)


def test_near_is_near():
  """A scale off by a sixteenth in one row, half a percent of codes off by one, sums off by 2^-7."""
  x = cases.quantize(tensor(256, 512)[64:], formats.FP8_BLOCK)
  codes, scales = jax.lax.bitcast_convert_type(x.codes, jnp.float8_e4m3fn), x.scales.T
  sums = jnp.linspace(-1, 1, len(codes))
  assert near((codes, scales, sums), (codes, scales, sums))
  assert not near((codes, scales.at[:, 100].multiply(1.25), sums), (codes, scales, sums))
  one_up = jax.lax.bitcast_convert_type(x.codes.at[:, ::200].add(1), jnp.float8_e4m3fn)
  assert not near((one_up, scales, sums), (codes, scales, sums))
  assert not near((codes, scales, sums.at[-1].multiply(1 + 2.0**-6)), (codes, scales, sums))
  assert not near((codes, scales, sums.at[3].set(jnp.nan)), (codes, scales, sums))
  packed = jnp.zeros((4, 64), jnp.uint8), jnp.ones((4, 4), jnp.uint8)
  assert near((*packed, codes, scales), (*packed, codes, scales))
  for i in (0, 1):
    wrong = [p.at[3, 2].add(i == j) for j, p in enumerate(packed)]
    assert not near((*wrong, codes, scales), (*packed, codes, scales))


@gpu
def test_widening_is_lossless_within_14_binades():
  rng = np.random.default_rng(1)
  codes = rng.integers(0, 256, (256, 128), dtype=np.uint8)
  scales = rng.integers(100, 115, (256, 8), dtype=np.uint8)
  packed = jnp.asarray(codes), jnp.asarray(scales)
  values = np.asarray(dequantize(QuantizedArray(*packed, None, formats.MXFP4, -1)))
  wide, scale = jax.jit(convert.mxfp4_to_fp8_rows)(*packed)
  back = np.asarray(wide, np.float32) * np.asarray(scale).T.repeat(128, 1)
  np.testing.assert_array_equal(back, values)
  wide, scale = jax.jit(convert.mxfp4_to_fp8_columns)(*packed)
  back = np.asarray(wide, np.float32) * np.asarray(scale).T.repeat(128, 1)
  np.testing.assert_array_equal(back, values.T)


BF16, U8, E4M3, F32 = jnp.bfloat16, jnp.uint8, jnp.float8_e4m3fn, jnp.float32


def zeros(*shape, dtype=BF16):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
  "error, message, call, arguments",
  [
    (TypeError, "x is int32", mxfp4.quantize_mxfp4, [zeros(32, 64, dtype=jnp.int32)]),
    (ValueError, "k % 32 == 0", mxfp4.quantize_mxfp4, [zeros(64, 48)]),
    (ValueError, "m \\* k >= 1024", mxfp4.quantize_mxfp4, [zeros(3, 32)]),
    (TypeError, "x is float32", mxfp4.quantize_mxfp4_both, [zeros(128, 128, dtype=F32)]),
    (ValueError, "m % 128 == k % 128", mxfp4.quantize_mxfp4_both, [zeros(128, 192)]),
    (TypeError, "x is float16", fp8.quantize_fp8_rows, [zeros(32, 128, dtype=jnp.float16)]),
    (ValueError, "k % 128 == 0", fp8.quantize_fp8_rows, [zeros(32, 96)]),
    (ValueError, "m >= 8", fp8.quantize_fp8_rows, [zeros(4, 128)]),
    (ValueError, r"m % 128 == k % 128", fp8.quantize_fp8_columns, [zeros(100, 128)]),
    (TypeError, "x is float32", fp8.quantize_fp8_both, [zeros(128, 128, dtype=F32)]),
    (
      ValueError,
      "100 rows are not .* m % 128",
      gather.gather_fp8_both,
      [zeros(64, 128), zeros(100, dtype=jnp.int32), zeros(100, dtype=F32)],
    ),
    (
      TypeError,
      "rows are uint32, not int32",
      gather.gather_fp8_both,
      [zeros(64, 128), zeros(128, dtype=jnp.uint32), zeros(128, dtype=F32)],
    ),
    (
      ValueError,
      r"factors have the shape \(128, 1\), not \(128,\)",
      gather.gather_fp8_both,
      [zeros(64, 128), zeros(128, dtype=jnp.int32), zeros(128, 1, dtype=F32)],
    ),
    (
      TypeError,
      "codes are uint8, not float8_e4m3fn",
      convert.fp8_to_mxfp4,
      [zeros(32, 128, dtype=U8), zeros(1, 32, dtype=F32)],
    ),
    (
      ValueError,
      r"scales have the shape \(32, 1\), not \(1, 32\)",
      convert.fp8_to_mxfp4,
      [zeros(32, 128, dtype=E4M3), zeros(32, 1, dtype=F32)],
    ),
    (
      ValueError,
      "128",
      convert.mxfp4_to_fp8_columns,
      [zeros(100, 64, dtype=U8), zeros(100, 4, dtype=U8)],
    ),
    (
      ValueError,
      "a scale for 16 bytes",
      dequantizer.dequantize_mxfp4,
      [zeros(32, 64, dtype=U8), zeros(32, 8, dtype=U8)],
    ),
    (ValueError, "f % 128 == 0", swiglu.swiglu_fp8_rows, [zeros(32, 128)]),
    (ValueError, "m >= 8", swiglu.keep_swiglu_fp8_rows, [zeros(4, 256)]),
    (TypeError, "h: float32", swiglu.keep_swiglu_fp8_rows, [zeros(32, 256, dtype=F32)]),
    (
      ValueError,
      "m % 128 == f % 128 == 0",
      swiglu.swiglu_backward_fp8,
      [zeros(64, 256), zeros(64, 128), zeros(64, dtype=F32)],
    ),
    (
      ValueError,
      r"g: bfloat16 \(128, 256\), not bfloat16 \(128, 128\)",
      swiglu.swiglu_backward_fp8,
      [zeros(128, 256), zeros(128, 256), zeros(128, dtype=F32)],
    ),
    (
      TypeError,
      r"the scales of h: float32 \(128, 8\), not uint8 \(128, 8\)",
      swiglu.swiglu_backward_fp8,
      [
        (zeros(128, 128, dtype=U8), zeros(128, 8, dtype=F32)),
        zeros(128, 128),
        zeros(128, dtype=F32),
      ],
    ),
  ],
)
def test_refusals(error, message, call, arguments):
  with pytest.raises(error, match=message):
    jax.eval_shape(call, *arguments)


def test_options_are_refused():
  x = jnp.zeros((32, 64), BF16)
  with pytest.raises(ValueError, match="scale_rule='ceil' is not one of"):
    mxfp4.quantize_mxfp4(x, scale_rule="ceil")
  with pytest.raises(ValueError, match="scale_rule='ceil' is not one of"):
    mxfp4.quantize_mxfp4_both(jnp.zeros((128, 128), BF16), scale_rule="ceil")
  with pytest.raises(ValueError, match=r"seed has the shape \(3,\), not \(2,\)"):
    mxfp4.quantize_mxfp4(x, seed=np.zeros(3, np.uint32))
  with pytest.raises(ValueError, match=r"signs have the shape \(16,\), not \(32,\)"):
    mxfp4.quantize_mxfp4(x, signs=np.ones(16))


@pytest.mark.parametrize("case", [*cases.CASES, *cases.SWIGLU], ids=lambda c: c.name)
def test_lowers_for_hopper(case):
  x = jax.eval_shape(case.prepare, zeros(256, 512))
  jax.jit(case.kernel).trace(x).lower(lowering_platforms=("cuda",))
