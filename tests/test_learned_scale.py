"""Learned block scales against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import E2M1
from quantizer_checks import MATMUL, check_everywhere, random, recipe_of

import fp4jax
from fp4jax import MXFP4, NVFP4, Hadamard, Operand
from fp4jax.formats import FP8_BLOCK_2D, FP32
from fp4jax.formats.llm_fp4 import FP4_E2M1
from fp4jax.quantizers import LearnedScale

REAL = dataclasses.replace(MXFP4, scale_dtype=FP32, scale_rule="nearest")


def nearest(scaled):
  """The elements nearest to values that are no ties."""
  return np.sign(scaled) * E2M1[np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1)]


def spread(scale, k):
  return np.asarray(scale, np.float64).repeat(-(-k // scale.shape[0]), 0)[:k]


def weights_and_scales(k=96, n=5):
  """Some weights are beyond 6 scales."""
  w = random(k, n)
  scale = np.abs(random(k // 32, n, seed=1)) / 4 + np.float32(0.05)
  return w, scale.astype(np.float32)


def gradients(quantizer, w, scale, dv, **state):
  """Of w and of the scale, where that of what multiplies is dv; and what multiplies."""
  recipe, x = recipe_of(fprop_rhs=quantizer), np.eye(len(w), dtype=np.float32)

  def loss(w, state):
    y = fp4jax.dot_general(recipe, state=state)(x, w, MATMUL)
    return (y * dv).sum(), y

  state = {"fprop.rhs": {"scale": scale} | state}
  (dw, found), values = jax.grad(loss, (0, 1), has_aux=True)(w, state)
  return np.asarray(dw), np.asarray(found["fprop.rhs"]["scale"]), np.asarray(values)


def test_values_and_gradients_are_those_of_lsq():
  (w, scale), dv = weights_and_scales(), random(96, 5, seed=2)
  dw, ds, values = gradients(LearnedScale(Operand(REAL)), w, scale, dv)
  s = spread(scale, 96)
  u = w.astype(np.float64) / s
  q, inside = nearest(u), np.abs(u) <= 6
  assert 0.01 < 1 - inside.mean() < 0.9
  np.testing.assert_allclose(values, q * s, rtol=1e-6)
  np.testing.assert_array_equal(dw, np.where(inside, dv, 0))
  terms = dv * np.where(inside, q - u, q)
  # Sums of 32 float32 terms.
  bound = 1e-5 * np.abs(terms).reshape(3, 32, 5).sum(1).max()
  np.testing.assert_allclose(ds, terms.reshape(3, 32, 5).sum(1), rtol=1e-5, atol=bound)


def test_with_frozen_elements_the_gradient_is_that_of_the_product():
  """Against a finite difference in float64: the loss is linear in the scales."""
  (w, scale), dv = weights_and_scales(), random(96, 5, seed=2)
  q = nearest(w / spread(scale, 96)).astype(np.float32)
  dw, ds, values = gradients(LearnedScale(Operand(REAL), frozen=True), q, scale, dv)
  loss = lambda s: (q * spread(s, 96) * dv.astype(np.float64)).sum()  # noqa: E731
  for at in np.ndindex(scale.shape):
    step = np.zeros(scale.shape)
    step[at] = 1e-3
    expected = (loss(scale + step) - loss(scale - step)) / 2e-3
    np.testing.assert_allclose(ds[at], expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(values, q * spread(scale, 96), rtol=1e-6)
  np.testing.assert_allclose(dw, dv * spread(scale, 96), rtol=1e-6)


@pytest.mark.parametrize("fmt", [REAL, MXFP4, NVFP4, FP4_E2M1], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("k", [96, 80])
def test_it_begins_as_the_format_rounds(fmt, k):
  w = random(k, 5)
  quantizer = LearnedScale(Operand(fmt))
  state = quantizer.first_state(jnp.asarray(w))
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, quantizer.init(w.shape))
  read = lambda q, w, state: np.asarray(  # noqa: E731
    fp4jax.dot_general(recipe_of(fprop_rhs=q), state={"fprop.rhs": state} if state else None)(
      np.eye(k, dtype=np.float32), w, MATMUL
    )
  )
  if fmt.block_shape is None:  # here of each column, in formats of the whole
    expected = np.stack([read(Operand(fmt), w[:, i : i + 1], None)[:, 0] for i in range(5)], 1)
  else:
    expected = read(Operand(fmt), w, None)
  np.testing.assert_allclose(read(quantizer, w, state), expected, rtol=1e-6)
  elements = quantizer.elements(jnp.asarray(w), state)
  frozen = LearnedScale(Operand(fmt), frozen=True)
  np.testing.assert_array_equal(read(frozen, elements, state), read(quantizer, w, state))
  assert set(np.abs(np.unique(elements))) <= set(E2M1)


def test_scales_are_stored_as_the_format_stores_them():
  scale = jnp.array([[0.01, 1.41, 1.42, 3.0, -1.0]])
  e8m0 = LearnedScale(Operand(MXFP4)).stored({"scale": scale})
  # 0.01 lies between 2^-7 and 2^-6, whose geometric mean is 0.011.
  np.testing.assert_array_equal(e8m0, [[2.0**-7, 1, 2, 4, 2.0**-100]])
  real = LearnedScale(Operand(REAL)).stored({"scale": scale})
  np.testing.assert_array_equal(real, jnp.maximum(scale, 2.0**-100))
  state = {"scale": 0.5 * jnp.array([[17.0, 19, 0, 448, 500]]), "unit": jnp.float32(0.5)}
  nvfp4 = LearnedScale(Operand(NVFP4)).stored(state)
  np.testing.assert_array_equal(nvfp4, [[8, 10, 0, 224, 224]])  # E4M3 has steps of 2 from 16


def test_what_it_does_not_learn_is_refused():
  for operand, words in (
    (Operand(jnp.bfloat16), "1-D blocks"),
    (Operand(FP8_BLOCK_2D), "1-D blocks"),
    (Operand(MXFP4, "stochastic"), "to nearest"),
    (Operand(MXFP4, transform=Hadamard(32)), "to nearest"),
  ):
    with pytest.raises(ValueError, match=words):
      LearnedScale(operand)
  recipe = recipe_of(fprop_lhs=LearnedScale(Operand(MXFP4)))
  state = fp4jax.init_state(recipe, (32, 32), (32, 32))
  with pytest.raises(ValueError, match="along axis -2, not -1"):
    fp4jax.dot_general(recipe, state=state)(random(32, 32), random(32, 32), MATMUL)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [REAL, NVFP4], ids=lambda fmt: fmt.name)
def test_works_everywhere(fmt):
  check_everywhere(recipe_of(fprop_rhs=LearnedScale(Operand(fmt)), fprop_lhs=Operand(MXFP4)))
