"""Format values, their refusals, and the oracles against two other implementations."""

import dataclasses

import gfloat
import gfloat.formats
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax import formats
from fp4jax.formats.grids import TableGrid

pytestmark = pytest.mark.usefixtures("strict_promotion")

TABLES = [
  pytest.param(oracles.E2M1, gfloat.formats.format_info_ocp_e2m1, formats.E2M1, id="E2M1"),
  pytest.param(oracles.E4M3, gfloat.formats.format_info_ocp_e4m3, formats.E4M3, id="E4M3"),
  pytest.param(oracles.E5M2, gfloat.formats.format_info_ocp_e5m2, formats.E5M2, id="E5M2"),
]


# The oracles themselves, against gfloat and ml_dtypes.


@pytest.mark.parametrize("table, gfloat_format, dtype", TABLES)
def test_tables_of_the_oracle(table, gfloat_format, dtype):
  codes = np.arange(2 * oracles.SIGN_BIT[len(table)], dtype=np.uint8)
  by_gfloat = np.array([gfloat.decode_float(gfloat_format, int(c)).fval for c in codes])
  by_ml_dtypes = codes.view(dtype).astype(np.float64)
  for other in (by_gfloat, by_ml_dtypes):
    other[np.isinf(other)] = np.nan  # E5M2 has infinities, which no quantizer here emits
    np.testing.assert_array_equal(oracles.signed_values(table), other)
    np.testing.assert_array_equal(np.signbit(oracles.signed_values(table))[codes == 0], False)
  assert np.signbit(oracles.signed_values(table)[oracles.SIGN_BIT[len(table)]])  # -0


@pytest.mark.parametrize("table, gfloat_format, dtype", TABLES)
def test_rounding_of_the_oracle(table, gfloat_format, dtype):
  midpoints = (table[1:] + table[:-1]) / 2
  near = [oracles.next_float32(midpoints, ulps) for ulps in (-1, 0, 1)]
  uniform = np.random.default_rng(0).uniform(0, 1.5 * table[-1], 500)
  # float32, through which ml_dtypes rounds a float64
  x = np.concatenate([table, *near, uniform]).astype(np.float32).astype(np.float64)
  codes = oracles.nearest(x, table)
  by_gfloat = [
    gfloat.encode_float(gfloat_format, gfloat.round_float(gfloat_format, v, sat=True)) for v in x
  ]
  np.testing.assert_array_equal(codes, by_gfloat)
  inside = x <= table[-1]  # beyond, ml_dtypes overflows where the formats saturate
  np.testing.assert_array_equal(table[codes[inside]], x[inside].astype(dtype).astype(np.float64))


@pytest.mark.parametrize(
  "table, gfloat_format",
  [
    (oracles.E2M1, gfloat.formats.format_info_mxfp4_e2m1),
    (oracles.E4M3, gfloat.formats.format_info_mxfp8_e4m3),
  ],
)
def test_blocks_of_the_oracle(table, gfloat_format):
  blocks = np.random.default_rng(1).standard_normal((40, 32)) * 2.0 ** np.arange(-20, 20)[:, None]
  blocks = blocks.astype(np.float32).astype(np.float64)
  values = oracles.quantize_mx(blocks, table, "floor", (1, 32)).values
  by_gfloat = [
    gfloat.quantize_block(gfloat_format, block, gfloat.compute_scale_amax) for block in blocks
  ]
  np.testing.assert_array_equal(values, by_gfloat)


@pytest.mark.parametrize("table", [oracles.E2M1, oracles.E4M3])
def test_corpus_is_hard(table):
  x = oracles.corpus()
  finite = x[np.isfinite(x).all(1)].astype(np.float64)
  assert (~np.isfinite(x)).any(1).sum() == 128
  midpoints = (table[1:] + table[:-1]) / 2
  for (size, rule), (low, *_) in oracles.SCALED_AMAX.items():
    if size != len(table):
      continue
    q = oracles.quantize_mx(finite, table, rule, (1, 32))
    scaled = np.abs(finite) / oracles.spread(oracles.e8m0(q.scales), (1, 32))
    assert np.isin(scaled, midpoints).sum() > 2000
    assert len(np.unique(scaled[np.isin(scaled, midpoints)])) >= 0.4 * len(midpoints)
    assert (scaled > table[-1]).any() == (rule != "rceil")
    ends = scaled.max(1)[q.scales[:, 0] > 0]  # the block maximum reaches both ends of its interval
    assert ends.min() <= low * (1 + 2.0**-22) and ends.max() >= 2 * low * (1 - 2.0**-22)
    assert len(np.unique(q.scales)) > 240
  subnormal = (finite != 0) & (np.abs(finite) < oracles.SMALLEST_NORMAL)
  assert subnormal.sum() > 5000 and subnormal.all(1).sum() > 100
  assert np.abs(finite).max() == np.finfo(np.float32).max
  assert ((finite == 0) & np.signbit(finite)).any() and ((finite == 0) & ~np.signbit(finite)).any()


# The library's formats.


def test_formats_are_those_of_their_specifications():
  # (bits of an element, largest, smallest, block, bits of a value with its share of the scale)
  expected = {
    "MXFP4": (4, 6, 0.5, (32,), 4.25),
    "MXFP8": (8, 448, 2.0**-9, (32,), 8.25),
    "NVFP4": (4, 6, 0.5, (16,), 4.5),
    "FP8_BLOCK": (8, 448, 2.0**-9, (128,), 8.25),
    "FP8_BLOCK_2D": (8, 448, 2.0**-9, (128, 128), 8 + 32 / 16384),
    "FP8_BLOCK_POW2": (8, 448, 2.0**-9, (128,), 8.25),
    "FP8_BLOCK_POW2_2D": (8, 448, 2.0**-9, (128, 128), 8 + 32 / 16384),
    "FP8_TENSOR": (8, 448, 2.0**-9, None, 8),
  }
  assert tuple(expected) == oracles.FORMATS
  assert all(name == fmt.name for name, fmt in fp4jax.FORMATS.items())
  for name, (bits, largest, smallest, block_shape, bits_per_value) in expected.items():
    fmt = fp4jax.FORMATS[name]
    assert fmt is getattr(fp4jax, name) and fmt.name == name
    assert (fmt.element_bits, fmt.q_max, fmt.q_min) == (bits, largest, smallest)
    assert (fmt.block_shape, fmt.bits_per_value) == (block_shape, bits_per_value)
    assert fmt.block_size == (block_shape[-1] if block_shape else None)
    assert fmt.has_tensor_scale == (name == "NVFP4")
    assert fmt.has_power_of_two_scales == (fmt.scale_rule != "nearest")
  rules = {name: fp4jax.FORMATS[name].scale_rule for name in expected}
  assert rules["MXFP4"] == rules["MXFP8"] == "floor"
  assert rules["FP8_BLOCK_POW2"] == rules["FP8_BLOCK_POW2_2D"] == "rceil"
  assert {rules[n] for n in ("NVFP4", "FP8_BLOCK", "FP8_BLOCK_2D", "FP8_TENSOR")} == {"nearest"}


def test_formats_are_values():
  twin = dataclasses.replace(fp4jax.MXFP4)
  assert twin == fp4jax.MXFP4 and hash(twin) == hash(fp4jax.MXFP4)
  by_name = dataclasses.replace(twin, element_dtype="float4_e2m1fn", scale_dtype="float8_e8m0fnu")
  by_type = dataclasses.replace(twin, element_dtype=jnp.float4_e2m1fn)
  for other in (by_name, by_type):  # a static argument of jit
    assert other == fp4jax.MXFP4 and hash(other) == hash(fp4jax.MXFP4)
  assert dataclasses.replace(fp4jax.MXFP4, scale_rule="rceil") != fp4jax.MXFP4
  with pytest.raises(dataclasses.FrozenInstanceError):
    fp4jax.MXFP4.scale_rule = "rceil"


@pytest.mark.parametrize("name", oracles.FORMATS)
def test_dequantized_dtype_holds_every_product(name):
  fmt = fp4jax.FORMATS[name]
  if not fmt.has_power_of_two_scales:
    assert fmt.dequantized_dtype == np.float32
    return
  table = oracles.E2M1 if fmt.element_bits == 4 else oracles.E4M3
  exact = np.outer(table, 2.0 ** np.arange(-117, 119))  # all normal and finite
  np.testing.assert_array_equal(exact.astype(fmt.dequantized_dtype).astype(np.float64), exact)


@pytest.mark.parametrize(
  "fmt, changes, message",
  [
    ("MXFP4", {"scale_rule": "ceil"}, r"scale_rule='ceil' is not one of .*'rceil'"),
    ("MXFP4", {"scale_rule": "nearest"}, r"scale_rule='nearest' is not one of .*'floor'"),
    ("NVFP4", {"scale_rule": "rceil"}, r"scale_rule='rceil' is not one of \['nearest'\]"),
    ("FP8_BLOCK", {"scale_rule": "round"}, r"scale_rule='round' is not one of .*'nearest'"),
    ("MXFP8", {"scale_rule": "oas"}, r'"oas" is defined for E2M1 elements, not float8_e4m3fn'),
    ("MXFP4", {"element_dtype": np.float16}, r"element_dtype='float16' is not one of .*e2m1fn"),
    ("MXFP4", {"scale_dtype": np.float64}, r"scale_dtype='float64' is not one of .*e8m0fnu"),
    ("MXFP4", {"has_tensor_scale": True}, r"tensor scale goes with E4M3 .* not float8_e8m0fnu"),
    ("MXFP4", {"block_shape": (31,)}, r"self.block_shape=\(31,\) is not"),
    ("MXFP4", {"block_shape": (0,)}, r"self.block_shape=\(0,\) is not"),
    ("MXFP4", {"block_shape": (2, 2, 2)}, r"self.block_shape=\(2, 2, 2\) is not"),
    ("MXFP4", {"block_shape": ()}, r"self.block_shape=\(\) is not"),
    ("MXFP4", {"block_shape": 16}, r"self.block_shape=16 is not a tuple \(even,\) or"),
    ("MXFP4", {"block_shape": [16]}, r"self.block_shape=\[16\] is not a tuple"),
    ("MXFP4", {"block_shape": (16.0,)}, r"self.block_shape=\(16.0,\) is not a tuple"),
    ("MXFP4", {"block_shape": "16"}, r"self.block_shape='16' is not a tuple"),
  ],
)
def test_bad_formats_are_refused(fmt, changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(fp4jax.FORMATS[fmt], **changes)


def test_unknown_names_are_refused():
  with pytest.raises(TypeError):
    dataclasses.replace(fp4jax.MXFP4, scale_rul="rceil")


@pytest.mark.parametrize("table, _, dtype", TABLES)
def test_magnitudes_of_a_grid_are_the_finite_ones(table, _, dtype):
  assert formats.FloatGrid(dtype).magnitudes == tuple(table)


def test_what_is_no_grid_is_told_what_it_lacks():
  class Half:
    name, bits = "half a grid", 4

  with pytest.raises(TypeError, match=r"element_dtype=.*Half.* nor a Grid, for it lacks .*'round'"):
    dataclasses.replace(fp4jax.MXFP4, element_dtype=Half())
  small = formats.TableGrid("small", (0, 0.5, 1, 1.5))
  with pytest.raises(
    ValueError, match=r"E8M0 scales reach 2\^127 where the largest element is 1.5"
  ):
    dataclasses.replace(fp4jax.MXFP4, element_dtype=small)
  tensor = dataclasses.replace(fp4jax.FP8_BLOCK, element_dtype=small, name="small")
  assert abs(float(fp4jax.fake_quantize(jnp.full(128, 1e38), tensor)[0]) / 1e38 - 1) < 2.0**-22
  for field, given, known in (
    ("element_dtype", "fp4", "float4_e2m1fn, .*nor a Grid"),
    ("scale_dtype", "e8m0", "float8_e8m0fnu, .*nor a ScaleCodec"),
  ):
    with pytest.raises(TypeError, match=f"{field}='{given}' is none of {known}"):
      dataclasses.replace(fp4jax.MXFP4, **{field: given})
  with pytest.raises(TypeError, match=r"mine: magnitudes=\[0, 1\] is a list"):
    TableGrid("mine", [0, 1])
