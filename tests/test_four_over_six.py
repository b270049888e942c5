"""NVFP4_4O6: the choice of every block and its codes against float64."""

import dataclasses

import format_laws as laws
import format_oracles as oracle
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax.formats import NVFP4_4O6

pytestmark = pytest.mark.usefixtures("strict_promotion")
CORPUS = oracles.corpus(block=16)


def tensors():
  rng = np.random.default_rng(0)
  gaussian, heavy = rng.standard_normal((2048, 16)), rng.standard_t(1.2, (2048, 16))
  grid = rng.choice(oracle.ties(oracles.E2M1, (4, 6), 16)[:, 1:].ravel(), (512, 16))
  for x in (gaussian, heavy, gaussian * 2.0 ** rng.integers(-14, 1, (2048, 1)), grid, 0 * gaussian):
    yield x.astype(np.float32)
  yield CORPUS[:512]


def test_is_the_oracle():
  counts = np.zeros(2, int)
  for x in tensors():
    q = laws.jit_quantize(x, NVFP4_4O6)
    tensor_scale = float(np.asarray(q.tensor_scale).squeeze())
    largest = np.abs(x[np.isfinite(x)]).max().astype(np.float64)
    ideal = max(largest / (6 * 256), 2.0**-126) if largest else 1.0
    assert abs(tensor_scale / ideal - 1) <= 2.0**-23  # two float32 divisions
    scales = np.asarray(q.scales)[:, 0]
    unrounded, codes, errors = oracle.four_over_six(x, tensor_scale)
    bad = np.isnan(unrounded[0])
    assert (scales[bad] == oracles.NAN_E4M3).all()
    # As in NVFP4, a scale is a product of float32 factors: near a tie either neighbour is right.
    near = [oracles.neighbours(np.nan_to_num(u), oracles.E4M3, 1e-6) for u in unrounded]
    fits = [(low <= scales) & (scales <= high) for low, high in near]
    clear = ~bad & (near[0][0] == near[0][1]) & (near[1][0] == near[1][1])
    clear &= np.abs(errors[1] - errors[0]) > 1e-5 * errors[0]  # float32 sums of 16 squares
    four = errors[1] < errors[0]
    assert np.where(four, fits[1], fits[0])[clear].all()
    assert (fits[0] | fits[1])[~bad].all()
    equal = ~bad & (errors[0] == errors[1])
    assert (scales == codes[0])[equal].all()
    counts += [(clear & ~four).sum(), (clear & four).sum()]
    # Codes under the scale that was chosen, as for NVFP4.
    element_scale = oracles.signed_values(oracles.E4M3)[scales][:, None] * tensor_scale
    element_scale = np.broadcast_to(element_scale, x.shape)
    packed = np.asarray(q.codes)
    element = np.stack([packed % 16, packed // 16], -1).reshape(x.shape)
    alive = element_scale > 0
    low, high = oracles.neighbours(
      np.abs(x[alive].astype(np.float64)) / element_scale[alive], oracles.E2M1, 1e-6
    )
    assert (low <= element[alive] % 8).all() and (element[alive] % 8 <= high).all()
    assert (element[~alive] % 8 == 0).all()
  assert (counts > 1000).all()


def test_worked_example():
  """5 and 4.5 beside 6: on 6, both are a step of 1 off the grid; on 4, that is 2/3."""
  x = np.float32([[6, 5, 4.5, 3] + [0] * 12, [6, 4, 3, 2] + [0] * 12, [1536, 0] + [0] * 14])
  q = laws.jit_quantize(x, NVFP4_4O6)
  assert float(np.asarray(q.tensor_scale).squeeze()) == 1
  values = np.asarray(laws.jit_dequantize(q))
  np.testing.assert_array_equal(values[0, :4], [6, 4.5, 4.5, 3])
  np.testing.assert_array_equal(values[1, :4], [6, 4, 3, 2])
  scales = np.asarray(q.scales)[:, 0].view(NVFP4_4O6.to(6.0).codec.grid.dtype).astype(float)
  assert scales.tolist() == [1.5, 1, 256]


def test_error_is_the_smaller_one():
  x = laws.gaussian((64, 128))

  def error(fmt):
    values = np.asarray(laws.jit_fake_quantize(x, fmt), np.float64)
    return np.square(values - x).reshape(64, 8, 16).sum(2)

  ours, six = error(NVFP4_4O6), error(NVFP4_4O6.to(6.0))
  assert (ours <= six * (1 + 1e-5)).all() and (ours < six).mean() > 0.3
  assert ours.sum() < error(fp4jax.NVFP4).sum()


def test_clipped_asks_the_scale_that_was_chosen():
  x = laws.gaussian((64, 128))
  q = laws.jit_quantize(x, NVFP4_4O6)
  scales = oracles.signed_values(oracles.E4M3)[np.asarray(q.scales)].repeat(16, 1)
  scaled = np.abs(x) / (scales * np.asarray(q.tensor_scale, np.float64))
  clear = np.abs(scaled - 6) > 1e-5  # off by a few roundings of 2^-24
  clipped = np.asarray(laws.jit_decompose(x, NVFP4_4O6).clipped)
  np.testing.assert_array_equal(clipped[clear], (scaled > 6)[clear])
  assert clipped.any() and (scaled > 4).sum() > 2 * clipped.sum()


def test_a_tile_makes_one_choice():
  fmt = dataclasses.replace(NVFP4_4O6, name="NVFP4_4O6_2D", block_shape=(16, 16))
  x = laws.gaussian((64, 64))
  assert laws.jit_quantize(x, fmt).scales.shape == (4, 4)
  np.testing.assert_array_equal(
    np.asarray(laws.jit_fake_quantize(x.T, fmt)), np.asarray(laws.jit_fake_quantize(x, fmt)).T
  )


@pytest.mark.slow
def test_laws():
  x = laws.gaussian((32, 128))
  assert NVFP4_4O6.bits_per_value == 4.5
  laws.lies_along_every_axis(NVFP4_4O6, laws.gaussian((256, 64)))
  laws.is_the_same_compiled(NVFP4_4O6, CORPUS[::8])
  laws.loses_no_octave(NVFP4_4O6, 1 / 4)
  laws.decomposes(NVFP4_4O6, x)
  laws.keeps_nan_in_its_block(NVFP4_4O6, 16)
  laws.has_unbiased_draws(NVFP4_4O6, x)
  laws.multiplies(NVFP4_4O6)
