"""LLM-FP4's formats and its search, against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantizer_checks import MATMUL, as_read, random, recipe_of

import fp4jax
from fp4jax import Operand
from fp4jax.formats.llm_fp4 import LLM_FP4
from fp4jax.quantizers import PreShifted, llm_fp4

DELTAS = np.arange(-10, 31) / 20
MAGNITUDES = [
  sorted(
    (1 + m / 2**m_bits) * 2.0 ** (e - 1) if e else m / 2**m_bits
    for e in range(2**e_bits)
    for m in range(2**m_bits)
  )
  for e_bits, m_bits in ((1, 2), (2, 1), (3, 0))
]  # with bias 1, by the definition
search = jax.jit(llm_fp4.search_tensor)


def test_the_grids_are_those_of_the_definition():
  for fmt, magnitudes in zip(LLM_FP4, MAGNITUDES, strict=True):
    ratio = np.array(fmt.grid.magnitudes)[1:] / magnitudes[1:]
    assert len(magnitudes) == 8 and (ratio == ratio[0]).all()  # the bias is free


def nearest(x, scale, magnitudes):
  m = np.array(magnitudes)
  return np.sign(x) * m[np.abs(np.abs(x / scale)[..., None] - m).argmin(-1)] * scale


def exhaustive(x, deltas):
  """Of every format and every choice of a bias for each column, the least error: columns apart."""
  x = x.astype(np.float64)
  found = []
  for number, (fmt, m) in enumerate(zip(LLM_FP4, MAGNITUDES, strict=True)):
    m = np.array(m) * fmt.q_max / m[-1]
    scales, total = [], 0.0
    for column in x.T:
      tried = [np.abs(column).max() / m[-1] * 2.0**-d for d in deltas]
      errors = [((nearest(column, s, m) - column) ** 2).sum() for s in tried]
      scales.append(tried[int(np.argmin(errors))])
      total += min(errors)
    found.append((total, number, scales))
  return min(found)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_exhaustive(seed):
  """With biases that are but higher too."""
  deltas = DELTAS[10 * (seed > 2) :]
  rng = np.random.default_rng(seed)
  draw = (rng.standard_normal, lambda s: rng.uniform(-1, 1, s), lambda s: rng.standard_t(1.5, s))
  x = draw[seed % 3]((24, 4)).astype(np.float32)
  error, number, scales = exhaustive(x, deltas)
  found = search(x, jnp.float32(deltas))
  assert int(found.format) == number
  np.testing.assert_allclose(found.error, error, rtol=1e-4)
  np.testing.assert_allclose(found.scale, scales, rtol=1e-5)


def test_every_format_is_the_best_of_something():
  rng = np.random.default_rng(0)
  even, gaussian = rng.uniform(-1, 1, (64, 4)), rng.standard_normal((64, 4))
  powers = 2.0 ** rng.integers(-6, 1, (64, 4)) * rng.choice([-1, 1], (64, 4))
  found = [int(search(x.astype(np.float32), jnp.float32(DELTAS)).format) for x in (even, gaussian)]
  found.append(int(search(powers.astype(np.float32), jnp.float32(DELTAS)).format))
  assert found == [0, 1, 2]


def test_it_errs_less_than_rounding_to_nearest_on_every_tensor():
  """E2M1 with the largest magnitude of each column on 6."""
  rng = np.random.default_rng(0)
  for shape, draw in itertools.product(
    [(64, 8), (192, 3)], [rng.standard_normal, lambda s: rng.standard_t(2, s), rng.laplace]
  ):
    x = draw(size=shape) if draw == rng.laplace else draw(shape)
    x = x.astype(np.float32)
    rtn = nearest(x.astype(np.float64), np.abs(x).max(0) / 6, LLM_FP4[1].grid.magnitudes)
    assert float(search(x, jnp.float32(DELTAS)).error) < 0.99 * ((rtn - x) ** 2).sum()


def test_shifts_are_whole_and_within_the_exponent():
  amax = jnp.array([8.0, 4, 3, 1, 1e-3, 0])
  np.testing.assert_array_equal(
    llm_fp4.shifts(amax), [[0, 1, 1, 1, 1, 0], [0, 1, 1, 3, 3, 0], [0, 1, 1, 3, 7, 0]]
  )


@pytest.mark.parametrize("number", range(3))
def test_activations_are_read_by_the_state(number):
  x, scale = random(8, 12), np.abs(random(12, 1, seed=3)[:, 0]) + np.float32(0.1)
  state = {"scale": scale, "format": np.float32(number)}
  expected = nearest(x.astype(np.float64), scale, LLM_FP4[number].grid.magnitudes)
  found = as_read(PreShifted(), x, state=state)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_weights_are_refused():
  recipe = recipe_of(fprop_rhs=PreShifted())

  state = fp4jax.init_state(recipe, (32, 32), (32, 32))
  with pytest.raises(ValueError, match="along axis -1, not -2"):
    fp4jax.dot_general(recipe, state=state)(
      random(32, 32), random(32, 32), (((1,), (0,)), ((), ()))
    )


def test_the_state_stays():

  recipe = recipe_of(fprop_lhs=PreShifted(), fprop_rhs=Operand(jnp.float32))
  first = fp4jax.init_state(recipe, (8, 32), (32, 4))
  x, w = random(8, 32), random(32, 4)

  def loss(state):
    return fp4jax.dot_general(recipe, state=state)(x, w, MATMUL).sum()

  jax.tree.map(np.testing.assert_array_equal, jax.grad(loss)(first), first)
