"""NVFP4_UE5M3: every scale code against a typed-in table, blocks against neighbours in float64."""

import format_laws as laws
import format_oracles as oracle
import jax
import numpy as np
import oracles
import pytest

from fp4jax.formats import NVFP4_UE5M3
from fp4jax.formats.ue5m3 import UE5M3

pytestmark = pytest.mark.usefixtures("strict_promotion")
CORPUS = oracles.corpus(block=16)


def test_every_scale_and_every_midpoint():
  codes = np.arange(256, dtype=np.uint8)
  values = np.asarray(UE5M3.read(codes))
  np.testing.assert_array_equal(values[:255], oracle.UE5M3)
  assert np.isnan(values[oracle.NAN_UE5M3])
  np.testing.assert_array_equal(np.asarray(UE5M3.grid.encode(UE5M3.read(codes[:255]))), codes[:255])
  x = oracle.exhaustive_magnitudes(oracle.UE5M3).astype(np.float32)
  expected = oracle.UE5M3[oracle.nearest(x, oracle.UE5M3)]
  np.testing.assert_array_equal(np.asarray(jax.jit(UE5M3.grid.round)(x)), expected)
  with pytest.raises(ValueError, match="round to nearest, not stochastically"):
    UE5M3.grid.round(x, np.zeros(x.shape, np.uint32))


def test_is_the_oracle():
  q = laws.jit_quantize(CORPUS, NVFP4_UE5M3)
  assert q.tensor_scale is None and NVFP4_UE5M3.bits_per_value == 4.5
  x = CORPUS.astype(np.float64)
  amax = oracles.block_amax(x, (1, 16))
  bad = np.isnan(amax)
  scales = np.asarray(q.scales)
  assert (scales[bad] == oracle.NAN_UE5M3).all()
  # amax times float32(1 / 6), and x times float32(1 / scale): off by 2^-23, so within 1e-6 of a tie
  # either neighbour is right.
  low, high = oracles.neighbours(amax[~bad] / 6, oracle.UE5M3, 1e-6)
  assert (low <= scales[~bad]).all() and (scales[~bad] <= high).all()
  assert (scales[~bad] != low).sum() < 100
  element_scale = oracles.spread(np.append(oracle.UE5M3, np.nan)[scales], (1, 16))
  codes = np.asarray(q.codes)
  codes = np.stack([codes % 16, codes // 16], -1).reshape(x.shape)
  alive = element_scale > 0  # False for NaN
  assert (codes[np.isnan(element_scale)] == 0).all() and (codes[element_scale == 0] % 8 == 0).all()
  assert ((element_scale == 0) & (x != 0)).any()
  low, high = oracles.neighbours(np.abs(x[alive]) / element_scale[alive], oracles.E2M1, 1e-6)
  assert (low <= codes[alive] % 8).all() and (codes[alive] % 8 <= high).all()
  np.testing.assert_array_equal(codes[alive] >= 8, np.signbit(x)[alive])
  # A product of 3 and 4 significant bits is exact.
  values = oracles.signed_values(oracles.E2M1)[codes] * element_scale
  np.testing.assert_array_equal(np.asarray(laws.jit_dequantize(q)), values)


def test_blocks_stand_alone():
  """A block is the same whatever the largest value of the tensor is, unlike NVFP4's."""
  x = laws.gaussian((16, 64))
  louder = np.concatenate([x, 1e5 * x])
  np.testing.assert_array_equal(
    np.asarray(laws.jit_fake_quantize(louder, NVFP4_UE5M3))[:16],
    np.asarray(laws.jit_fake_quantize(x, NVFP4_UE5M3)),
  )


@pytest.mark.slow
def test_laws():
  x = laws.gaussian((32, 128))
  laws.lies_along_every_axis(NVFP4_UE5M3, CORPUS[-800:])
  laws.is_the_same_compiled(NVFP4_UE5M3, CORPUS[::8])
  laws.loses_no_octave(NVFP4_UE5M3, 1 / 4, low=6 * 2.0**-16, high=6 * 114688)
  laws.decomposes(NVFP4_UE5M3, x)
  laws.keeps_nan_in_its_block(NVFP4_UE5M3, 16)
  laws.has_unbiased_draws(NVFP4_UE5M3, x)
  laws.multiplies(NVFP4_UE5M3)
