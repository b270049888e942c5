"""Codes, scales and values against the oracles, bit for bit; packing; identities; refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax import QuantizedArray, dequantize, fake_quantize, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

CORPUS = oracles.corpus()
FINITE = CORPUS[np.isfinite(CORPUS).all(1)]
MX = [
  *[dataclasses.replace(fp4jax.MXFP4, scale_rule=r) for r in ("floor", "even", "rceil", "oas")],
  *[dataclasses.replace(fp4jax.MXFP8, scale_rule=r) for r in ("floor", "even", "rceil")],
]
FORMATS = [fp4jax.FORMATS[name] for name in oracles.FORMATS]
FP8 = [fmt for fmt in FORMATS if fmt.name.startswith("FP8")]

jit_quantize = jax.jit(quantize, static_argnames=("fmt", "axis", "rounding"))
jit_dequantize = jax.jit(dequantize, static_argnames="dtype")
jit_fake_quantize = jax.jit(fake_quantize, static_argnames=("fmt", "axis", "rounding"))


def rule_id(fmt):
  return f"{fmt.name}-{fmt.scale_rule}"


def table_of(fmt):
  return oracles.E2M1 if fmt.element_bits == 4 else oracles.E4M3


def lengths_of(fmt, shape, axis):
  """Block length along every axis."""
  if fmt.block_shape is None:
    return shape
  if len(fmt.block_shape) == 1:
    return oracles.block_lengths(shape, axis, fmt.block_shape[0])
  rows, columns = fmt.block_shape
  last = (rows, columns) if axis % len(shape) == len(shape) - 1 else (columns, rows)
  return (1,) * (len(shape) - 2) + last


def unpacked(q):
  """One code a byte, in the tensor's shape: of each byte the low nibble first."""
  codes = np.asarray(q.codes)
  if q.fmt.element_bits == 8:
    return codes
  codes = np.moveaxis(codes, q.axis, -1)
  codes = np.stack([codes % 16, codes // 16], -1).reshape(*codes.shape[:-1], -1)
  return np.moveaxis(codes, -1, q.axis)


def assert_same_bits(actual, expected):
  """float32 by bits, any NaN for any NaN."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == expected.dtype == np.float32 and actual.shape == expected.shape
  nan = np.isnan(expected)
  np.testing.assert_array_equal(np.isnan(actual), nan)
  np.testing.assert_array_equal(actual.view(np.int32)[~nan], expected.view(np.int32)[~nan])


def to_float32(values):
  """Rounded once; what is beyond float32 saturates."""
  largest = np.finfo(np.float32).max
  return np.clip(np.asarray(values, np.float64), -largest, largest).astype(np.float32)


def assert_is_oracle(q, x):
  expected = oracles.quantize_mx(
    x, table_of(q.fmt), q.fmt.scale_rule, lengths_of(q.fmt, x.shape, q.axis)
  )
  np.testing.assert_array_equal(np.asarray(q.scales), expected.scales)
  np.testing.assert_array_equal(unpacked(q), expected.codes)
  # Exact: an element times a power of two, rounded nowhere above 2^-149; float32 may overflow.
  assert_same_bits(jit_dequantize(q), to_float32(expected.values))


# Power-of-two scales: MXFP4 and MXFP8.


@pytest.mark.parametrize("fmt", MX, ids=rule_id)
def test_mx_is_the_oracle(fmt):
  q = jit_quantize(CORPUS, fmt)
  assert_is_oracle(q, CORPUS)
  with jax.disable_jit():
    op_by_op = quantize(CORPUS, fmt)
    assert_same_bits(dequantize(op_by_op), jit_dequantize(q))
  jax.tree.map(np.testing.assert_array_equal, op_by_op, q)


@pytest.mark.parametrize("fmt", MX, ids=rule_id)
def test_mx_along_every_axis(fmt):
  for axis in range(3):
    x = oracles.blocks_along(CORPUS[-1000:], axis)
    q = jit_quantize(x, fmt, axis)
    assert q.axis == axis - 3 and q.shape == x.shape
    assert_is_oracle(q, x)
    jax.tree.map(np.testing.assert_array_equal, jit_quantize(x, fmt, axis - 3), q)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("fmt", [MX[0], MX[2], MX[4]], ids=rule_id)
def test_mx_of_half_precision(fmt, dtype):
  with np.errstate(over="ignore"):
    x = CORPUS.astype(dtype)
  x = x[(np.isfinite(x) & (x != 0)).any(1)]
  assert len(x) > 500 and (x.astype(np.float64) < ml_dtypes.finfo(dtype).smallest_normal).any()
  assert_is_oracle(jit_quantize(x, fmt), x)
  # Every product has at most 4 significant bits: exact in x's dtype, saturated beyond its range.
  largest = float(ml_dtypes.finfo(dtype).max)
  expected = np.clip(jit_dequantize(jit_quantize(x, fmt)), -largest, largest).astype(dtype)
  actual = np.asarray(jit_fake_quantize(x, fmt))
  assert actual.dtype == dtype
  assert_same_bits(actual.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("fmt", [MX[0], fp4jax.NVFP4], ids=rule_id)
def test_vmap_is_a_loop(fmt):
  x = CORPUS[:600].reshape(3, 200, 32)
  mapped = jax.jit(jax.vmap(lambda t: quantize(t, fmt, axis=-1)))(x)
  values = jax.jit(jax.vmap(dequantize))(mapped)
  for i in range(3):
    one = jit_quantize(x[i], fmt)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a: a[i], mapped), one)  # noqa: B023
    assert_same_bits(values[i], jit_dequantize(one))


@pytest.mark.parametrize("rows", [8, 32])
def test_mx_of_tiles(rows):
  fmt = dataclasses.replace(fp4jax.MXFP4, block_shape=(rows, 32))
  x = oracles.blocks_along(CORPUS[:1024], 2)[..., :128].repeat(8, 1)
  factors = 2.0 ** np.random.default_rng(0).integers(-9, 1, x.shape)
  x = (x * factors).astype(np.float32)
  for axis, shape in ((-1, (8, 32 // rows, 4)), (-2, (8, 1, 128 // rows))):
    q = jit_quantize(x, fmt, axis)
    assert q.scales.shape == shape
    assert_is_oracle(q, x)


def test_decoding_of_every_code_and_scale():
  """16 codes x 256 scales, most of the subnormal float32 among them, and an overflow."""
  pairs = np.arange(16).reshape(8, 2) @ [1, 16]  # low nibble first
  codes = np.tile(pairs.astype(np.uint8), (256, 2))
  scales = np.arange(256, dtype=np.uint8)[:, None]
  expected = np.tile(oracles.signed_values(oracles.E2M1), 2) * oracles.e8m0(scales)
  q = QuantizedArray(codes, scales, None, fp4jax.MXFP4, -1)
  assert_same_bits(dequantize(q), to_float32(expected))
  assert_same_bits(jit_dequantize(q), to_float32(expected))
  assert (np.abs(to_float32(expected)) < oracles.SMALLEST_NORMAL).sum() > 32
  beyond = np.abs(expected) > np.finfo(np.float32).max  # 2^128 and more saturates
  assert beyond.any() and np.isnan(expected)[255].all()


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_decoding_of_every_byte_and_scale(element):
  fmt, table = {
    "e4m3": (fp4jax.MXFP8, oracles.E4M3),
    "e5m2": (dataclasses.replace(fp4jax.MXFP8, element_dtype=ml_dtypes.float8_e5m2), oracles.E5M2),
  }[element]
  codes = np.arange(256, dtype=np.uint8)
  finite = np.isin(codes % 128, np.arange(len(table)))  # the others are NaN, or E5M2's infinities
  codes = np.tile(np.where(finite, codes, 0), (256, 1))
  scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8, 1)
  expected = oracles.signed_values(table)[codes] * oracles.e8m0(scales[:, :1])
  q = QuantizedArray(codes, scales, None, fmt, -1)
  assert_same_bits(jit_dequantize(q), to_float32(expected))
  if element == "e4m3":
    nans = dataclasses.replace(q, codes=np.full_like(codes, 0x7F))
    assert np.isnan(jit_dequantize(nans)).all()


def test_e5m2_is_the_oracle():
  for rule in ("floor", "rceil"):
    fmt = dataclasses.replace(
      fp4jax.MXFP8, element_dtype=ml_dtypes.float8_e5m2, scale_rule=rule, name="MXFP8_E5M2"
    )
    q = jit_quantize(CORPUS, fmt)
    expected = oracles.quantize_mx(CORPUS, oracles.E5M2, rule, (1, 32))
    np.testing.assert_array_equal(np.asarray(q.scales), expected.scales)
    np.testing.assert_array_equal(np.asarray(q.codes), expected.codes)


def test_non_finite_blocks_are_nan_alone():
  x = np.ones((4, 64), np.float32)
  x[0, 5], x[1, 40], x[2, 63] = np.nan, np.inf, -np.inf
  x[:, ::3] *= -1
  bad = np.zeros((4, 2), bool)
  bad[0, 0] = bad[1, 1] = bad[2, 1] = True
  clean = np.where(np.isfinite(x), x, 1)
  for fmt in (*MX, dataclasses.replace(fp4jax.NVFP4, block_shape=(32,))):
    q, q_clean = jit_quantize(x, fmt), jit_quantize(clean, fmt)
    nan_code = oracles.NAN_E4M3 if fmt.has_tensor_scale else oracles.NAN_E8M0
    np.testing.assert_array_equal(np.asarray(q.scales) == nan_code, bad)
    np.testing.assert_array_equal(np.asarray(q.scales)[~bad], np.asarray(q_clean.scales)[~bad])
    element_is_bad = bad.repeat(32, 1)
    assert (unpacked(q)[element_is_bad] == 0).all()
    np.testing.assert_array_equal(unpacked(q)[~element_is_bad], unpacked(q_clean)[~element_is_bad])
    np.testing.assert_array_equal(np.isnan(jit_dequantize(q)), element_is_bad)


def test_negative_zero_keeps_its_code():
  x = np.float32([[-0.0, 0.0, -1e-9, 1e-9, -0.25, 1] + [0] * 26])
  assert (unpacked(jit_quantize(x, fp4jax.MXFP4))[0, :6] == [8, 0, 8, 0, 10, 6]).all()  # scale 1/4
  zeros = jit_quantize(-np.zeros((1, 32), np.float32), fp4jax.MXFP4)
  assert (unpacked(zeros) == 8).all() and (np.asarray(zeros.scales) == 0).all()
  assert np.signbit(jit_dequantize(zeros)).all()


# NVFP4 and FP8: scales that are rounded quotients.


def nvfp4_tensors():
  """Tensors (256, 16), each with a tensor scale of its own."""
  rng = np.random.default_rng(3)
  gaussian = rng.standard_normal((256, 16)).astype(np.float32)
  heavy = rng.standard_t(1.2, (256, 16)).astype(np.float32)
  rows = 2.0 ** rng.integers(-14, 1, (256, 1)).astype(np.float32)  # down to scales of zero
  grid = rng.choice(np.concatenate([oracles.E2M1, oracles.E2M1[:-1] + 0.25]), (256, 16))
  grid[:, 0] = 6
  grid[0, 1] = 2688  # tensor scale 1, so that scales and many values are exact ties
  tensors = [gaussian, heavy, gaussian * rows, grid.astype(np.float32), 448 * heavy * rows]
  tensors += [gaussian * np.float32(2.0**j) for j in (-140, -128, -118, -60, 60, 125)]
  tensors += [np.zeros_like(gaussian), -np.zeros_like(gaussian), gaussian * np.float32(1e-45)]
  tensors += [CORPUS[i : i + 128].reshape(256, 16) for i in (0, 640, len(CORPUS) - 128)]
  return [np.clip(t, np.finfo(np.float32).min, np.finfo(np.float32).max) for t in tensors]


def assert_between_neighbours(codes, scaled, table, slack):
  low, high = oracles.neighbours(scaled, table, slack)
  assert (low <= codes).all() and (codes <= high).all()


def assert_values(q, element_scale):
  """Dequantized values within one float32 rounding of code times scale; subnormals may flush."""
  values = np.asarray(jit_dequantize(q)).astype(np.float64)
  exact = oracles.signed_values(table_of(q.fmt))[unpacked(q)] * element_scale
  np.testing.assert_array_equal(np.isnan(values), np.isnan(exact))
  normal = np.abs(exact) >= oracles.SMALLEST_NORMAL
  np.testing.assert_array_equal(values[normal], to_float32(exact)[normal])
  small = ~normal & ~np.isnan(exact)
  assert (np.abs(values - exact)[small] < oracles.SMALLEST_NORMAL).all()


def test_nvfp4_is_the_oracle():
  fmt = fp4jax.NVFP4
  flushed_blocks = 0
  for x in nvfp4_tensors():
    q = jit_quantize(x, fmt)
    x = x.astype(np.float64)
    lengths = (1, 16)
    amax = oracles.block_amax(x, lengths)
    bad = np.isnan(amax)
    tensor_amax = np.nan_to_num(amax).max()
    ideal = max(tensor_amax / 2688, 2.0**-126) if tensor_amax else 1.0
    tensor_scale = float(q.tensor_scale)
    # Two float32 divisions, 2^-24 each.
    assert abs(tensor_scale / ideal - 1) <= 2.0**-23
    # The scaled amax and the scaled values are products of at most four factors, each rounded by
    # 2^-24: off by less than 3e-7, so within 1e-6 of a tie either neighbour is right.
    scales = np.asarray(q.scales)
    assert (scales[bad] == oracles.NAN_E4M3).all()
    assert_between_neighbours(scales[~bad], amax[~bad] / 6 / tensor_scale, oracles.E4M3, 1e-6)
    block_scale = oracles.signed_values(oracles.E4M3)[scales]
    element_scale = oracles.spread(block_scale, lengths) * tensor_scale
    codes = unpacked(q)
    expected = oracles.encode(x, element_scale, scales, oracles.E2M1)
    alive = ~oracles.spread(bad, lengths) & (element_scale > 0)
    np.testing.assert_array_equal(codes[~alive], expected.codes[~alive])
    np.testing.assert_array_equal(codes[alive] & 8, expected.codes[alive] & 8)
    scaled = np.abs(x[alive]) / element_scale[alive]
    assert_between_neighbours(codes[alive] & 7, scaled, oracles.E2M1, 1e-6)
    assert_values(q, element_scale)
    flushed_blocks += ((scales == 0) & (amax > 0)).sum()
  assert flushed_blocks > 100


def test_nvfp4_along_every_axis():
  x = np.random.default_rng(0).standard_normal((16, 32, 48)).astype(np.float32)
  rows = np.asarray(dequantize(jit_quantize(x.reshape(-1, 16), fp4jax.NVFP4))).reshape(x.shape)
  for axis in range(3):
    q = jit_quantize(np.moveaxis(x, -1, axis), fp4jax.NVFP4, axis)
    assert_same_bits(np.moveaxis(np.asarray(jit_dequantize(q)), axis, -1), rows)


def test_nvfp4_decoding_of_every_code_and_scale():
  codes = np.tile((np.arange(16).reshape(8, 2) @ [1, 16]).astype(np.uint8), (256, 1))
  scales = np.arange(256, dtype=np.uint8)[:, None]
  products = oracles.signed_values(oracles.E2M1) * oracles.signed_values(oracles.E4M3)[scales]
  for tensor_scale in np.float32([1, 0.3, 2.0**-100, 3.1e34]):
    q = QuantizedArray(codes, scales, tensor_scale, fp4jax.NVFP4, -1)
    # The product of code and scale is exact, so there is one rounding.
    assert_same_bits(jit_dequantize(q), to_float32(products * float(tensor_scale)))


def test_nvfp4_properties():
  """Techniques, II.2: never beyond amax (1 + 2^-4), block maxima within half an ulp of E4M3."""
  x = np.random.default_rng(4).standard_normal((64, 64)).astype(np.float32)
  values = np.asarray(jit_fake_quantize(x, fp4jax.NVFP4))
  assert np.abs(values).max() <= np.abs(x).max() * (1 + 2.0**-4)
  amax, kept = (np.abs(v).reshape(64, 4, 16).max(-1) for v in (x, values))
  np.testing.assert_allclose(kept, amax, rtol=2.0**-4 * 1.00001)
  assert np.isfinite(jit_quantize(np.zeros_like(x), fp4jax.NVFP4).tensor_scale)


@pytest.mark.parametrize("fmt", FP8, ids=lambda fmt: fmt.name)
def test_fp8_is_the_oracle(fmt):
  rng = np.random.default_rng(5)
  gaussian = rng.standard_normal((256, 384)) * 2.0 ** rng.integers(-12, 12, (256, 384))
  corpus = FINITE[: 64 * 32].ravel().reshape(256, 256)
  with_nan = gaussian.copy()
  with_nan[3, 5] = np.nan
  with_nan[200, 300] = -np.inf
  tensors = [gaussian, gaussian * 2.0**110, gaussian * 2.0**-122, corpus, with_nan]
  tensors += [-np.zeros((256, 256)), np.full((256, 256), 2.0**-149)]
  for x in tensors:
    for axis in (-1, -2):
      x = x.astype(np.float32)
      q = jit_quantize(x, fmt, axis)
      lengths = lengths_of(fmt, x.shape, axis)
      amax = oracles.block_amax(x.astype(np.float64), lengths)
      bad = np.isnan(amax)
      scales = np.asarray(q.scales)
      assert scales.shape == amax.shape and scales.dtype == np.float32
      assert np.isnan(scales[bad]).all()
      if fmt.has_power_of_two_scales:
        k = np.clip(oracles.scale_exponent(amax[~bad], oracles.E4M3, "rceil"), -126, 127)
        np.testing.assert_array_equal(scales[~bad], np.ldexp(1.0, k))
      else:
        ideal = np.maximum(amax[~bad] / 448, oracles.SMALLEST_NORMAL).astype(np.float32)
        # fl(amax * fl(1/448)): fl(1/448) is off by 0.75 * 2^-24, less than 3/4 of an ulp of the
        # product; with the last rounding less than 5/4 ulp off, so at most the next float32.
        assert oracles.float32_ulps(scales[~bad], ideal).max(initial=0) <= 1
      element_scale = oracles.spread(scales.astype(np.float64), lengths)
      codes = np.asarray(q.codes)
      lost = np.isnan(element_scale)
      assert (codes[lost] == 0).all()
      np.testing.assert_array_equal(codes[~lost] >= 128, np.signbit(x)[~lost])
      scaled = np.abs(x.astype(np.float64)[~lost]) / element_scale[~lost]
      # Times a rounded reciprocal: two roundings of 2^-24. Powers of two round nowhere.
      slack = 0 if fmt.has_power_of_two_scales else 2.0**-22
      assert_between_neighbours(codes[~lost] & 127, scaled, oracles.E4M3, slack)
      assert_values(q, element_scale)


# Packing.


def test_packing_is_low_nibble_first_along_the_axis():
  x = np.zeros((32, 2), np.float32)
  x[:8, 0] = oracles.E2M1
  x[:8, 1] = -oracles.E2M1[::-1]
  q = jit_quantize(x, fp4jax.MXFP4, 0)
  assert q.codes.shape == (16, 2) and q.codes.dtype == np.uint8
  # Codes 0 1 2 3 4 5 6 7, and 15 14 13 12 11 10 9 8.
  np.testing.assert_array_equal(np.asarray(q.codes)[:4, 0], [0x10, 0x32, 0x54, 0x76])
  np.testing.assert_array_equal(np.asarray(q.codes)[:4, 1], [0xEF, 0xCD, 0xAB, 0x89])
  np.testing.assert_array_equal(np.asarray(q.scales), [[127, 127]])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_shape_bytes_and_pytree(fmt):
  x = np.random.default_rng(0).standard_normal((2, 128, 256)).astype(np.float32)
  for axis in (1, 2):
    q = jit_quantize(x, fmt, axis)
    assert q.shape == x.shape
    per_tensor = 4 * (fmt.has_tensor_scale or fmt.block_shape is None)
    assert q.nbytes == x.size * fmt.bits_per_value / 8 + per_tensor
    assert q.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    lengths = lengths_of(fmt, x.shape, axis)
    assert q.scales.shape == tuple(n // b for n, b in zip(x.shape, lengths, strict=True))
    through = jax.jit(lambda q: jax.tree.map(jnp.asarray, q))(q)
    assert (through.fmt, through.axis, through.shape) == (fmt, axis - 3, x.shape)
    assert_same_bits(jit_dequantize(through), jit_dequantize(q))
  abstract = jax.eval_shape(lambda x: quantize(x, fmt), x)
  assert abstract.shape == x.shape and abstract.nbytes == q.nbytes


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (2, 0, 128), (0, 0)])
def test_nothing_quantizes_to_nothing(fmt, shape):
  @functools.partial(jax.jit, static_argnums=1)
  def run(x, axis):
    q = quantize(x, fmt, axis)
    return q, dequantize(q), fake_quantize(x, fmt, axis)

  for axis in (-1, -2):
    q, *values = run(np.zeros(shape, np.float32), axis)
    assert q.shape == shape and q.codes.size == 0
    assert np.isfinite(q.scales).all() and q.tensor_scale in (None, 1)
    assert [v.shape for v in values] == [shape, shape]


# Identities.


def equal_values(a, b):
  np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("fmt", MX, ids=rule_id)
def test_quantizing_twice_changes_nothing(fmt):
  once = np.asarray(jit_fake_quantize(CORPUS, fmt))
  once = once[np.isfinite(once).all(1)]  # Q(x) may overflow where 2^127 < x
  assert len(once) > 5000
  assert_same_bits(jit_fake_quantize(once, fmt), once)


@pytest.mark.parametrize(
  "fmt", [*MX, fp4jax.NVFP4, fp4jax.FP8_BLOCK, fp4jax.FP8_TENSOR], ids=rule_id
)
def test_powers_of_two_pass_through(fmt):
  x = np.random.default_rng(6).standard_normal((64, 128)).astype(np.float32)
  values = np.asarray(jit_fake_quantize(x, fmt))
  for j in (-80, -7, 1, 80):  # far from overflow and from the subnormals
    equal_values(jit_fake_quantize(np.ldexp(x, j), fmt), np.ldexp(values, j))


@pytest.mark.parametrize("fmt", [f for f in MX if f.scale_rule == "rceil"], ids=rule_id)
def test_rceil_never_clips(fmt):
  q = jit_quantize(FINITE, fmt)
  scaled = np.abs(FINITE.astype(np.float64)) / oracles.spread(oracles.e8m0(q.scales), (1, 32))
  assert scaled.max() == fmt.q_max


def test_square_blocks_commute_with_transposition():
  x = np.random.default_rng(7).standard_t(2, (256, 384)).astype(np.float32)
  square = dataclasses.replace(fp4jax.MXFP4, block_shape=(32, 32))
  for fmt in (square, fp4jax.FP8_BLOCK_2D, fp4jax.FP8_BLOCK_POW2_2D):
    equal_values(jit_fake_quantize(x.T, fmt), np.asarray(jit_fake_quantize(x, fmt)).T)
    equal_values(jit_fake_quantize(x, fmt, -2), jit_fake_quantize(x, fmt, -1))
  rows = np.asarray(jit_fake_quantize(x, fp4jax.MXFP4)).T
  assert (np.asarray(jit_fake_quantize(x.T, fp4jax.MXFP4)) != rows).any()
  equal_values(jit_fake_quantize(x.T, fp4jax.MXFP4, 0), rows)


@pytest.mark.parametrize("fmt", [*MX[:3], *FORMATS], ids=rule_id)
def test_fake_quantize_is_quantize_and_dequantize(fmt):
  x = CORPUS[-1024 * 4 :].reshape(1024, 128)
  for axis in (0, 1):
    expected = jit_dequantize(jit_quantize(x, fmt, axis))
    assert_same_bits(jit_fake_quantize(x, fmt, axis), expected)
  if fmt in (fp4jax.MXFP4, fp4jax.NVFP4, fp4jax.FP8_BLOCK):
    with jax.disable_jit():
      assert_same_bits(fake_quantize(x, fmt, axis), expected)
  key = jax.random.key(0)
  drawn = jit_dequantize(jit_quantize(x, fmt, rounding="stochastic", key=key))
  assert_same_bits(jit_fake_quantize(x, fmt, rounding="stochastic", key=key), drawn)


def test_gradient_of_fake_quantize_is_the_identity():
  rng = np.random.default_rng(8)
  x, cotangent, tangent = rng.standard_normal((3, 32, 64)).astype(np.float32)
  x[0, 0] = 1e6  # clips under "floor", flushes its neighbours
  for fmt in (fp4jax.MXFP4, fp4jax.NVFP4, fp4jax.FP8_TENSOR):
    for rounding in ("nearest", "stochastic"):

      @jax.jit
      def both(x, key, fmt=fmt, rounding=rounding):
        f = lambda x: fake_quantize(x, fmt, 0, rounding=rounding, key=key)  # noqa: E731
        return jax.vjp(f, x)[1](jnp.asarray(cotangent)), jax.jvp(f, (x,), (jnp.asarray(tangent),))

      (pulled,), (value, pushed) = both(x, jax.random.key(1))
      equal_values(pulled, cotangent)
      equal_values(pushed, tangent)
      assert (np.asarray(value) != x).any()


# Refusals.


@pytest.mark.parametrize("function", [quantize, fake_quantize, fp4jax.decompose])
@pytest.mark.parametrize(
  "shape, options, message",
  [
    ((4, 32), {"axis": 2}, r"axis=2 is out of range for x of shape \(4, 32\)"),
    ((4, 32), {"axis": -3}, r"axis=-3 is out of range for x of shape \(4, 32\)"),
    ((), {}, r"axis=-1 is out of range for x of shape \(\)"),
    ((4, 33), {}, r"axis -1 of shape \(4, 33\) is not a multiple of the block of 32 of MXFP4"),
    ((4, 32), {"axis": 0}, r"axis -2 of shape \(4, 32\) is not a multiple of the block of 32"),
    ((4, 32), {"rounding": "stochastik"}, r"rounding='stochastik' is not one of \('nearest', "),
    ((4, 32), {"rounding": "stochastic"}, r'rounding="stochastic" needs a key'),
  ],
)
def test_bad_arguments_are_refused(function, shape, options, message):
  with pytest.raises(ValueError, match=message):
    function(np.zeros(shape, np.float32), fp4jax.MXFP4, **options)


@pytest.mark.parametrize("function", [quantize, fake_quantize, fp4jax.decompose])
@pytest.mark.parametrize("dtype", ["int32", "complex64", "float64", "bool", "float8_e4m3fn"])
def test_dtypes_are_refused(function, dtype):
  x = np.ones((2, 32)).astype(dtype)
  with pytest.raises(TypeError, match=f"x is {dtype}; quantize takes float32, bfloat16 or float16"):
    function(x, fp4jax.MXFP4)


@pytest.mark.parametrize("function", [quantize, fake_quantize, fp4jax.decompose])
@pytest.mark.parametrize(
  "x, fmt, message",
  [
    (fp4jax.MXFP4, np.zeros((2, 32), np.float32), "fmt has type ndarray, not BlockFormat such as "),
    (
      np.zeros(32),
      fp4jax.recipes.MXFP4,
      r"fmt has type Recipe, not BlockFormat such as fp4jax.MXFP4",
    ),
    (np.zeros(32), "MXFP4", "fmt has type str, not BlockFormat"),
    (np.zeros(32), jnp.bfloat16, "fmt has type _ScalarMeta, not BlockFormat"),
    ([[0.0] * 32], fp4jax.MXFP4, "x has type list, not jax.Array"),
    (1.0, fp4jax.MXFP4, "x has type float, not jax.Array"),
  ],
)
def test_arguments_of_the_wrong_kind_are_refused(function, x, fmt, message):
  with pytest.raises(TypeError, match=message) as raised:
    function(x, fmt)
  assert len(str(raised.value)) < 80  # neither the array nor the recipe


def test_only_a_quantized_array_is_dequantized():
  with pytest.raises(TypeError, match=r"^q has type ndarray, not QuantizedArray$"):
    dequantize(np.zeros((2, 32), np.float32))


def test_blocks_of_tiles_are_refused():
  with pytest.raises(ValueError, match=r"axis -2 of shape \(96, 128\) is not a multiple .* of 128"):
    quantize(np.zeros((96, 128), np.float32), fp4jax.FP8_BLOCK_2D)
  with pytest.raises(ValueError, match=r"axis=-3 .* 2-D blocks of FP8_BLOCK_2D tile the last two"):
    quantize(np.zeros((128, 128, 128), np.float32), fp4jax.FP8_BLOCK_2D, axis=0)
  with pytest.raises(ValueError, match=r"axis=-1 .*\(128,\): the 2-D blocks of FP8_BLOCK_2D"):
    quantize(np.zeros(128, np.float32), fp4jax.FP8_BLOCK_2D)
  odd = dataclasses.replace(fp4jax.MXFP4, scale_dtype=np.float32, block_shape=None)
  with pytest.raises(ValueError, match=r"axis -1 of shape \(2, 33\) is odd"):
    quantize(np.zeros((2, 33), np.float32), odd)
