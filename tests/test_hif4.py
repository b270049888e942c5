"""HIF4 against a transcription of its published encoder."""

import format_laws as laws
import format_oracles as oracle
import ml_dtypes
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax.formats import HIF4

pytestmark = pytest.mark.usefixtures("strict_promotion")
CORPUS = oracles.corpus(block=64)


def is_the_oracle(x):
  q = laws.jit_quantize(x, HIF4)
  expected = oracle.hifloat4(x)
  assert q.scales.dtype == np.uint32
  np.testing.assert_array_equal(np.asarray(q.scales), expected.words)
  np.testing.assert_array_equal(np.asarray(q.codes), oracle.pack(expected.codes, 4))
  np.testing.assert_array_equal(np.asarray(laws.jit_dequantize(q)), expected.values)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_is_the_published_encoder(dtype):
  """On 262 144 values of either kind, over all octaves of the scale, and on all that is hard."""
  rng = np.random.default_rng(0)
  octaves = 2.0 ** rng.integers(-52, 20, (4096, 1))
  for values in (rng.standard_normal((4096, 64)), rng.standard_t(1.2, (4096, 64))):
    for x in (values, values * octaves):
      is_the_oracle(x.astype(dtype))
  is_the_oracle(CORPUS.astype(dtype))


def test_ties_of_every_level():
  """Largest values around each tie of E6M2 and each limit of a bit, groups around each quarter."""
  rng = np.random.default_rng(1)
  reciprocals = oracle.bfloat16(1 / oracle.e6m2(np.arange(192, 200)))
  limits = np.outer(1 / reciprocals, [2, 4, *(np.arange(1, 15) / 8)]).ravel()
  near = np.concatenate([oracles.next_float32(limits, ulps) for ulps in (-1, 0, 1)])
  x = rng.choice(near, (4096, 64)).astype(np.float32)
  tops = 7 * 2.0 ** rng.integers(-1, 2, 4096) * (1 + rng.integers(0, 64, 4096) / 64)
  x[:, 0] = oracles.next_float32(tops, rng.integers(-2, 3, 4096))
  is_the_oracle(np.where(rng.random(x.shape) < 0.5, -x, x))


def test_every_code_under_every_scale():
  codes = np.tile(np.arange(16, dtype=np.uint8), (1024, 4))
  words = np.arange(256, dtype=np.uint32).repeat(4)
  words |= np.random.default_rng(2).integers(0, 2**24, 1024).astype(np.uint32) << np.uint32(8)
  packed = oracle.pack(codes, 4)
  q = fp4jax.QuantizedArray(packed, words[:, None], None, HIF4, -1)
  values = np.asarray(laws.jit_dequantize(q))
  np.testing.assert_array_equal(values, oracle.hifloat4_values(words[:, None], codes))
  assert np.isnan(values[-4:]).all() and np.nanmax(values) == 1.75 * 4 * 49152
  assert (
    values[~np.isnan(values)].astype(HIF4.dequantized_dtype).astype(np.float32)
    == values[~np.isnan(values)]
  ).all()


def test_zeros_have_the_smallest_scale_and_non_finite_blocks_scale_255():
  x = np.zeros((3, 64), np.float32)
  x[1, 7], x[2, 8] = np.nan, -np.inf
  q = laws.jit_quantize(x, HIF4)
  assert np.asarray(q.scales).ravel().tolist() == [0, 255, 255]
  assert not np.asarray(q.codes).any()
  assert HIF4.bits_per_value == 4.5 and q.nbytes == 3 * 64 * 4.5 / 8


@pytest.mark.slow
def test_laws():
  x = laws.gaussian((32, 128))
  laws.lies_along_every_axis(HIF4, CORPUS[-800:])
  laws.is_the_same_compiled(HIF4, CORPUS[::4])
  laws.loses_no_octave(HIF4, 1 / 8, low=2.0**-45, high=7 * 49152)
  laws.decomposes(HIF4, x)
  laws.keeps_nan_in_its_block(HIF4, 64)
  laws.has_unbiased_draws(HIF4, x)
  laws.multiplies(HIF4)


def test_ideal_scale_is_a_seventh_of_amax():
  """Against the encoder in float64 with the scale left unrounded."""
  x = laws.gaussian((64, 64), 6)
  d = laws.jit_decompose(x, HIF4)
  magnitude = np.abs(x).astype(np.float64)
  scale = magnitude.max(1, keepdims=True) / 7
  e8 = np.repeat(magnitude.reshape(64, 8, 8).max(2) / scale >= 4, 8, 1)
  e16 = np.repeat(magnitude.reshape(64, 16, 4).max(2) / scale, 4, 1) * 0.5**e8 >= 2
  unit = scale * 2.0 ** (e8.astype(int) + e16)
  ideal = np.minimum(np.floor(magnitude / unit * 4 + 0.5), 7) / 4 * unit * np.sign(x)
  near = ideal - x - np.asarray(d.deadzone) - np.asarray(d.grid_noise)
  np.testing.assert_allclose(near, 0, atol=1e-6 * np.abs(x).max())
  np.testing.assert_array_equal(np.asarray(d.deadzone) != 0, (magnitude / unit < 0.125) & (x != 0))
