"""MXFP4_MBS_S and MXFP4_MBS_D against NumPy: factors, codes and values bit for bit."""

import dataclasses

import format_laws as laws
import format_oracles as oracle
import jax
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax.formats import MXFP4_MBS_D, MXFP4_MBS_S

pytestmark = pytest.mark.usefixtures("strict_promotion")
FORMATS = {"static": MXFP4_MBS_S, "dynamic": MXFP4_MBS_D}
CORPUS = np.concatenate(
  [oracles.corpus(block=128)[::4], oracle.ties(oracles.E2M1, (3.2, 3.6, 6.9, 7), 128)]
)
FINITE = CORPUS[np.isfinite(CORPUS).all(1)]
both = pytest.mark.parametrize("factor", FORMATS)


def data():
  rng = np.random.default_rng(0)
  random = np.concatenate([rng.standard_normal((512, 128)), rng.standard_t(1.2, (512, 128))])
  return np.concatenate([CORPUS, random.astype(np.float32)])


@both
def test_is_the_oracle(factor):
  x = data()
  q = laws.jit_quantize(x, FORMATS[factor])
  m8 = np.asarray(q.tensor_scale)
  assert m8.dtype == np.uint8 and m8.shape == (len(x), 1)
  m8 = m8[:, 0].astype(int)
  if factor == "static":
    np.testing.assert_array_equal(m8, oracle.static_factor(x))
  else:
    best_of_sixteen(x, m8)
  expected = oracle.macro_scaled(x, m8)
  np.testing.assert_array_equal(np.asarray(q.scales), expected.scales)
  np.testing.assert_array_equal(np.asarray(q.codes[::8]), oracle.pack(expected.codes[::8], 4))
  values = np.asarray(laws.jit_dequantize(q))
  np.testing.assert_array_equal(np.isnan(values), np.isnan(expected.values))
  # A product with float32(1 / factor) is rounded once; a subnormal one may be flushed.
  normal = np.abs(expected.values) >= oracles.SMALLEST_NORMAL
  np.testing.assert_array_equal(values[normal], expected.values[normal].astype(np.float32))
  small = ~normal & ~np.isnan(values)
  assert np.abs(values - expected.values)[small].max() < oracles.SMALLEST_NORMAL


def best_of_sixteen(x, m8):
  assert (m8 % 16 == 0).all()
  errors = oracle.macro_errors(x)
  # float32 sums of 128 squares, halved seven times, of errors rounded at 2^-24 of values some 10
  # times as large: 1e-5 is ample. Errors below 2^-126 may be flushed, of amax 2^-100 below 2^-26.
  clear = np.abs(np.where(np.isfinite(x), x, 0)).max(1) > 2.0**-100
  clear &= np.isfinite(x).all(1)
  chosen = errors[np.arange(len(x)), m8 // 16]
  assert (chosen <= errors.min(1) * (1 + 1e-5))[clear].all()
  assert (m8[~np.isfinite(x).all(1)] == 0).all()
  assert len(set(m8)) == 16


def test_static_factor_puts_the_largest_value_on_six():
  """Or up to 2^-8 below, times a power of two; six stays six."""
  x = np.abs(laws.gaussian((64, 128)))
  x[0, :] = np.minimum(x[0], 6)
  x[0, 0] = 6
  m8 = np.asarray(laws.jit_quantize(x, MXFP4_MBS_S).tensor_scale).astype(np.float64)
  landed = (1 + m8[:, 0] / 256) * x.max(1).astype(np.float64) / 6
  fraction = landed / 2.0 ** np.ceil(np.log2(landed) - 1e-12)
  assert m8[0, 0] == 0 and (fraction > 1 - 2.0**-7).all()


def test_ties_of_the_search_go_to_the_smallest_factor():
  x = np.zeros((2, 128), np.float32)
  x[1] = np.tile(np.append(oracles.E2M1, -oracles.E2M1), 8)  # exact under the factor 1
  q = laws.jit_quantize(x, MXFP4_MBS_D)
  assert not np.asarray(q.tensor_scale).any()
  np.testing.assert_array_equal(np.asarray(laws.jit_dequantize(q)), x)


def test_each_step_lowers_the_error():
  """Of Gaussian data: MXFP4, the overflow-aware rule, the static factor, the dynamic one."""
  x = laws.gaussian((256, 128))
  oas = dataclasses.replace(fp4jax.MXFP4, scale_rule="oas")
  errors = [
    float(np.square(np.asarray(laws.jit_fake_quantize(x, fmt), np.float64) - x).sum())
    for fmt in (fp4jax.MXFP4, oas, MXFP4_MBS_S, MXFP4_MBS_D)
  ]
  assert errors == sorted(errors, reverse=True)


def test_hybrid_is_a_recipe():
  """MBS-H: weights dynamic, activations static."""
  recipe = fp4jax.recipes.MXFP4.replace(
    {"fprop.lhs.format": MXFP4_MBS_S, "fprop.rhs.format": MXFP4_MBS_D}
  )
  x, w = laws.gaussian((2, 128, 128))
  y = jax.jit(fp4jax.dot_general(recipe), static_argnums=2)(x, w, (((1,), (0,)), ((), ())))
  lhs = np.asarray(laws.jit_fake_quantize(x, MXFP4_MBS_S), np.float64)
  rhs = np.asarray(laws.jit_fake_quantize(w, MXFP4_MBS_D, 0), np.float64)
  slack = 128 * 2.0**-24 * (np.abs(lhs) @ np.abs(rhs))
  assert (np.abs(np.asarray(y) - lhs @ rhs) <= slack).all()


@both
def test_ideal_is_that_of_mxfp4_whatever_the_factor(factor):
  x = laws.gaussian((64, 128))
  ours, mxfp4 = (laws.jit_decompose(x, fmt) for fmt in (FORMATS[factor], fp4jax.MXFP4))
  for part in ("deadzone", "grid_noise"):
    laws.same(getattr(ours, part), getattr(mxfp4, part))
  assert (np.asarray(ours.scale_bias) != np.asarray(mxfp4.scale_bias)).any()


@pytest.mark.slow
@both
def test_laws(factor):
  fmt, x = FORMATS[factor], laws.gaussian((32, 128))
  assert fmt.bits_per_value == 4.3125 and fmt.block_shape == (128,)
  laws.lies_along_every_axis(fmt, FINITE[-256:])
  laws.is_the_same_compiled(fmt, CORPUS[::8])
  laws.loses_no_octave(fmt, 1 / 4)
  laws.decomposes(fmt, x)
  laws.keeps_nan_in_its_block(fmt, 128)
  laws.has_unbiased_draws(fmt, x)
  laws.multiplies(fmt)


def test_bad_values_are_refused():
  for changes, message in (
    ({"factor": "hybrid"}, "self.factor='hybrid' is not 'static' or 'dynamic'"),
    ({"macro_block": 80}, "self.macro_block=80 is not a multiple of .*'s 32"),
    ({"base": fp4jax.NVFP4}, "NVFP4 has no blocks of one row, or a scale of the slice"),
    ({"base": fp4jax.FP8_TENSOR}, "FP8_TENSOR has no blocks of one row"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(MXFP4_MBS_S, **changes)
