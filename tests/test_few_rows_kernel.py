"""`few_rows`: its arithmetic and its addresses over arrays, anywhere; the kernel, on Hopper."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lanes import Addresses, Lanes

from pallas_kernels import few_rows as kernel
from pallas_kernels import few_rows_weights as weights

gpu = pytest.mark.gpu
# The values of E2M1's codes, as OCP's table has them.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])


def value(nibbles, scales):
  """bf16, in float64 up to the last rounding."""
  exact = E2M1[nibbles] * np.where(scales == 255, np.nan, np.exp2(scales - 127.0))
  largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
  return np.clip(exact, -largest, largest).astype(ml_dtypes.bfloat16)


def dequantized(codes, scales):
  """(k, n) of codes (k / 2, n) and scales (k / 32, n)."""
  nibbles = np.stack([codes & 15, codes >> 4], 1).reshape(-1, codes.shape[1])
  return value(nibbles, scales.repeat(32, 0))


def half(word, i):
  """The lower or the upper bf16 of words."""
  return ((word.array >> (16 * i)) & 0xFFFF).astype(np.uint16).view(ml_dtypes.bfloat16)


def assert_same(actual, expected):
  """To the bit but for which NaN it is."""
  actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
  np.testing.assert_array_equal(actual, expected)
  is_number = ~np.isnan(expected)
  np.testing.assert_array_equal(np.signbit(actual)[is_number], np.signbit(expected)[is_number])


@pytest.mark.parametrize(
  ("f", "scales"), [(weights.values, 128), (weights.values_of_any_scale, 256)], ids=["usual", "any"]
)
def test_every_pair_of_codes_under_every_scale(f, scales):
  codes, scale = np.meshgrid(np.arange(256, dtype=np.uint32), np.arange(scales, dtype=np.uint32))
  others, other_scale = codes[:, ::-1], scale[::-1]
  word = codes | others << 8 | others << 16 | codes << 24
  words = f(Lanes(word), [Lanes(scale), Lanes(other_scale)])
  for found, byte, own in zip(
    words, (codes, others, others, codes), (scale, other_scale) * 2, strict=True
  ):
    assert_same(half(found, 0), value(byte & 15, own))
    assert_same(half(found, 1), value(byte >> 4, own))


def in_shared_memory(tile):
  """Bytes of rows of 128 as TMA lays them out: chunk i of 16 bytes of row r in the place i ^ r."""
  chunks = tile.reshape(len(tile), 8, 16)
  rows = np.arange(len(tile))[:, None]
  return chunks[rows, np.arange(8) ^ (rows % 8)].reshape(-1)


def fragment_places():
  """(row, first of two k) of the registers of wgmma's operand (warp, lane): as PTX has it."""
  warp, lane = np.indices((4, 32))
  group, c = lane // 4, lane % 4
  for upper in (0, 1):
    for step in range(4):
      for register in range(4):
        row = 64 * upper + 16 * warp + group + 8 * (register % 2)
        yield row, 16 * step + 2 * c + 8 * (register // 2)


def columns_of_rows():
  """The column of the matrix in each row of the operand: neighbours are 8 rows apart."""
  return np.arange(128).reshape(8, 8, 2).swapaxes(1, 2).ravel()


def threads():
  return tuple(Lanes(place.astype(np.uint32)) for place in np.indices((4, 32)))


@pytest.mark.parametrize("largest", [127, 255])
def test_threads_load_the_operand_of_the_tensor_cores(largest):
  rng = np.random.default_rng(largest)
  codes = rng.integers(0, 256, (32, 128), dtype=np.uint8)
  scales = rng.integers(0, largest, (2, 128), endpoint=True).astype(np.uint8)
  memory = np.concatenate([in_shared_memory(codes), scales.ravel()])
  warp, lane = threads()
  words = weights.load_mxfp4(
    Addresses(weights.mxfp4_address(warp, lane).array, memory),
    Addresses((weights.scale_address(warp, lane) + codes.size).array, memory),
  )
  operand = np.full((128, 64), np.nan, ml_dtypes.bfloat16)
  for word, (row, k) in zip(words, fragment_places(), strict=True):
    for i in (0, 1):
      operand[row, k + i] = half(word, i)
  expected = dequantized(codes, scales)
  assert_same(operand, expected.T[columns_of_rows()])


def test_every_pair_of_e4m3_codes():
  low, high = np.meshgrid(np.arange(256, dtype=np.uint32), np.arange(256, dtype=np.uint32))
  found = weights.e4m3_pair(Lanes(low << 8 | high << 24 | 0x00FF00FF))
  values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(ml_dtypes.bfloat16)
  values[[0x7F, 0xFF]] = 480, -480
  assert_same(half(found, 0), values[low])
  assert_same(half(found, 1), values[high])


def test_threads_load_e4m3_as_the_operand_of_the_tensor_cores():
  codes = np.random.default_rng(0).integers(0, 255, (64, 128), dtype=np.uint8)
  codes[codes == 0x7F] = 0
  memory = in_shared_memory(codes)
  words = weights.load_e4m3(
    [Addresses(a.array, memory) for a in weights.e4m3_addresses(*threads())]
  )
  operand = np.full((128, 64), np.nan, ml_dtypes.bfloat16)
  for word, (row, k) in zip(words, fragment_places(), strict=True):
    for i in (0, 1):
      operand[row, k + i] = half(word, i)
  assert_same(operand, codes.view(ml_dtypes.float8_e4m3fn).T[columns_of_rows()])


def test_loads_of_codes_meet_no_bank_twice():
  """Eight lanes name a matrix of eight rows of 16 bytes: 128 bytes of different banks."""
  for address in (weights.mxfp4_address(*threads()), *weights.e4m3_addresses(*threads())):
    chunks = (address.array // 16 % 8).reshape(4, 4, 8)
    assert (np.sort(chunks, -1) == np.arange(8)).all()


@pytest.mark.parametrize("rows", [8, 64, 128])
def test_every_sum_has_its_place(rows):
  warp, lane = threads()
  columns, found, places = columns_of_rows(), *np.zeros((2, rows, 128), int)
  for row, column, registers in kernel.own_sums(warp, lane, rows):
    address = kernel.sum_address(row, column).array
    assert not (address % 8).any()  # a pair is stored at once
    # Half a warp stores 128 bytes at a time.
    assert all(len(set(banks)) == 16 for banks in (address // 8 % 16).reshape(-1, 16).tolist())
    for i, register in enumerate(registers):
      # Registers of wgmma's result (128, rows): 64 rows, 8 columns, row + 8, column + 1.
      upper, eight, lower, odd = np.unravel_index(register, (2, rows // 8, 2, 2))
      of_operand = 64 * upper + 16 * warp.array + lane.array // 4 + 8 * lower
      np.testing.assert_array_equal(columns[of_operand], column.array + i)
      np.testing.assert_array_equal(row.array, 8 * eight + 2 * (lane.array % 4) + odd)
      found[row.array, column.array + i] += 1
      places[row.array, column.array + i] = address // 4 + i
  assert (found == 1).all()
  assert len(np.unique(places)) == rows * 128 and places.max() == rows * 128 - 1
  # Four sums of a row are read at once.
  row, column = np.indices((rows, 32)).astype(np.uint32)
  fours = kernel.sum_address(Lanes(row), Lanes(4 * column)).array
  np.testing.assert_array_equal(fours // 4, places[:, ::4])
  assert not (fours % 16).any()


def operands(m, k, n, scales, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((m, k)).astype(ml_dtypes.bfloat16)
  codes = rng.integers(0, 256, (k // 2, n), dtype=np.uint8)
  return x, codes, rng.integers(*scales, (k // 32, n), endpoint=True).astype(np.uint8)


def assert_near(y, x, w):
  """float32 sums of exact products in any order, of which wgmma keeps 13 bits below the largest of
  those that it adds at once; half a step of bf16; what float32 or bf16 flushes."""
  x, w, y = (np.asarray(a, np.float64) for a in (x, w, y))
  with np.errstate(invalid="ignore"):
    exact, magnitude = x @ w, np.abs(x) @ np.abs(w)
  np.testing.assert_array_equal(np.isnan(y), np.isnan(exact))
  bound = magnitude * (x.shape[1] * 2.0**-24 + 2.0**-12) + np.abs(exact) * 2.0**-8 + 2.0**-126
  assert (np.abs(y - exact) <= bound)[~np.isnan(exact)].all()


def fp8_operands(m, k, n, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((m, k)).astype(ml_dtypes.bfloat16)
  codes = rng.integers(0, 255, (k, n), dtype=np.uint8)
  codes[codes == 0x7F] = 0
  return x, codes, rng.uniform(1e-3, 1e-1, (k // 128, n // 128)).astype(np.float32)


def fp8_values(codes, scales):
  """In float64."""
  values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
  return values * scales.astype(np.float64).repeat(128, 0).repeat(128, 1)


SPLIT = [(64, 128), (576, 1536), (2048, 256), (1024, 17408)]  # k among one CTA to eight


@gpu
@pytest.mark.parametrize("m", [1, 8, 64, 128])
@pytest.mark.parametrize(("k", "n"), SPLIT)
def test_products_on_hopper(m, k, n):
  x, codes, scales = operands(m, k, n, (110, 130))
  for config in (None, *kernel.VARIANTS.values())[: 3 if m <= 64 else 1]:
    y = kernel.few_rows_matmul(
      jnp.asarray(x), jnp.asarray(codes), jnp.asarray(scales), config=config
    )
    assert_near(y, x, dequantized(codes, scales))


FP8_SPLIT = [(128, 128), (640, 1536), (2048, 256), (1024, 17408)]


@gpu
@pytest.mark.parametrize("m", [1, 8, 33, 64])
@pytest.mark.parametrize(("k", "n"), FP8_SPLIT)
def test_fp8_products_on_hopper(m, k, n):
  x, codes, scales = fp8_operands(m, k, n)
  for config in (None, *kernel.FP8_VARIANTS.values()):
    y = kernel.few_rows_matmul(*map(jnp.asarray, (x, codes, scales)), config=config)
    assert_near(y, x, fp8_values(codes, scales))
  scales[0, 0] = np.nan
  y = kernel.few_rows_matmul(*map(jnp.asarray, (x, codes, scales)))
  assert_near(y, x, fp8_values(codes, scales))


def of_matrices(e, make, *arguments):
  """Of e calls of `make`, stacked."""
  return [
    np.stack(parts) for parts in zip(*(make(*arguments, seed=i) for i in range(e)), strict=True)
  ]


@gpu
@pytest.mark.parametrize("m", [1, 9, 64])
@pytest.mark.parametrize(("e", "k", "n"), [(3, 576, 256), (8, 2048, 4096), (5, 1024, 128)])
@pytest.mark.parametrize("fp8", [False, True])
def test_every_matrix_has_its_own_rows_on_hopper(e, k, n, m, fp8):
  k, variants = (k // 128 * 128, kernel.FP8_VARIANTS) if fp8 else (k, kernel.VARIANTS)
  make = (fp8_operands, m, k, n) if fp8 else (operands, m, k, n, (110, 130))
  args = of_matrices(e, *make)
  for config in (None, *variants.values()):
    y = kernel.few_rows_matmul(*map(jnp.asarray, args), config=config)
    for own, *of_own in zip(y, *args, strict=True):
      alone = kernel.few_rows_matmul(*map(jnp.asarray, of_own), config=config)
      x, codes, scales = of_own
      w = fp8_values(codes, scales) if fp8 else dequantized(codes, scales)
      assert_near(own, x, w)
      assert_near(alone, x, w)


@gpu
@pytest.mark.parametrize("m", [1, 64])
def test_scales_of_every_size_on_hopper(m):
  """Eight scales at a time, else the largest would hide the others."""
  blocks, n = 8, 256
  for first in range(0, 256, blocks):
    x, codes, _ = operands(m, 32 * blocks, n, (0, 0), first)
    scales = np.tile(np.arange(first, first + blocks, dtype=np.uint8)[:, None], (1, n))
    x = x * ml_dtypes.bfloat16(2.0**-10 if first > 200 else 1)
    y = kernel.few_rows_matmul(*map(jnp.asarray, (x, codes, scales)))
    assert_near(y, x, dequantized(codes, scales))


@gpu
@pytest.mark.parametrize(
  ("make", "m"),
  [
    *((functools.partial(operands, scales=(0, 255)), m) for m in (8, 64, 128)),
    *((fp8_operands, m) for m in (8, 64)),
  ],
)
def test_repeats_are_the_same_bits_on_hopper(make, m):
  """Where most CTAs share k, each of several workers."""
  args = [jnp.asarray(a) for a in make(m, 2048, 256)]
  first, *others = [np.asarray(kernel.few_rows_matmul(*args)).view(np.uint16) for _ in range(50)]
  assert all((other == first).all() for other in others)


def test_what_the_kernel_can_not_take_is_refused():
  x, codes, scales = map(jnp.asarray, operands(8, 128, 128, (0, 255)))
  two, none = ([jnp.stack([a] * 2)[:e] for a in (x, codes, scales)] for e in (2, 0))
  for error, message, args in (
    (TypeError, "x is float32, not bfloat16", (x.astype(jnp.float32), codes, scales)),
    (
      ValueError,
      "m=129 rows of x are not 1 to 128",
      (jnp.zeros((129, 128), x.dtype), codes, scales),
    ),
    (ValueError, "k=96 is not a multiple of 64", (x[:, :96], codes[:48], scales[:3])),
    (ValueError, "n=64 not of 128", (x, codes[:, :64], scales[:, :64])),
    (ValueError, r"codes have the shape \(32, 128\)", (x, codes[:32], scales)),
    (TypeError, "scales are int8", (x, codes, scales.astype(jnp.int8))),
    (ValueError, "m=65 rows of x are not 1 to 64", fp8_operands(65, 128, 128)),
    (ValueError, "k=192 is not a multiple of 128", fp8_operands(8, 192, 128)),
    (ValueError, r"codes have the shape \(64, 128\)", (x, codes, fp8_operands(8, 128, 128)[2])),
    (ValueError, "not .m, k. and .k / 2, n., or .e, ....", (x[None], codes, scales)),
    (
      ValueError,
      r"scales have the shape \(1, 4, 128\), not \(2, 4, 128\)",
      (*two[:2], scales[None]),
    ),
    (ValueError, r"results of shape \(0, 8, 128\) are none", none),
  ):
    with pytest.raises(error, match=message):
      kernel.few_rows_matmul(*args)


@pytest.mark.parametrize("m", [1, 8, 64, 128])
@pytest.mark.parametrize("config", [None, *kernel.VARIANTS.values()])
@pytest.mark.parametrize(("k", "n"), SPLIT)
def test_the_kernel_can_be_lowered_anywhere(m, k, n, config):
  shapes = (m, k), (k // 2, n), (k // 32, n)
  dtypes = jnp.bfloat16, jnp.uint8, jnp.uint8
  args = [jax.ShapeDtypeStruct(*a) for a in zip(shapes, dtypes, strict=True)]
  if config is not None and m > 64:
    pytest.skip("a schedule of up to 64 rows")
  matmul = jax.jit(functools.partial(kernel.few_rows_matmul, config=config))
  assert matmul.trace(*args).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize(("k", "n"), SPLIT[:3])
def test_the_kernel_of_several_matrices_can_be_lowered_anywhere(m, k, n):
  args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in of_matrices(3, operands, m, k, n, (0, 1))]
  matmul = jax.jit(kernel.few_rows_matmul)
  assert matmul.trace(*args).lower(lowering_platforms=("cuda",))
  assert jax.eval_shape(matmul, *args).shape == (3, m, n)


@pytest.mark.parametrize("m", [1, 33, 64])
@pytest.mark.parametrize("config", [None, *kernel.FP8_VARIANTS.values()])
@pytest.mark.parametrize(("k", "n"), FP8_SPLIT)
def test_the_kernel_of_fp8_can_be_lowered_anywhere(m, k, n, config):
  shapes = (m, k), (k, n), (k // 128, n // 128)
  dtypes = jnp.bfloat16, jnp.uint8, jnp.float32
  args = [jax.ShapeDtypeStruct(*a) for a in zip(shapes, dtypes, strict=True)]
  matmul = jax.jit(functools.partial(kernel.few_rows_matmul, config=config))
  assert matmul.trace(*args).lower(lowering_platforms=("cuda",))


def test_a_schedule_without_room_is_refused():
  x, codes, scales = map(jnp.asarray, operands(128, 128, 128, (0, 255)))
  for message, config in (
    ("the slots have no room for the sums", kernel.TuningConfig(stages=3)),
    ("the slots take .* bytes of shared memory, above", kernel.TuningConfig(workers=4)),
  ):
    with pytest.raises(ValueError, match=message):
      kernel.few_rows_matmul(x, codes, scales, config=config)


def test_k_is_divided_until_the_chip_is_full():
  def ctas(k, n, **config):
    return kernel._cluster(n, k // 64, kernel.TuningConfig(**config))

  assert (ctas(2048, 8192), ctas(8192, 2048), ctas(4096, 16384)) == (2, 8, 1)
  assert ctas(576, 1536) == 2  # nine steps for eight workers
  assert ctas(64, 128) == 1 and ctas(2048, 8192, ctas_per_sm=2) == 4
