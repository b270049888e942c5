"""LLM-FP4 of GEMMs and of a model, against NumPy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qat_cases import small_model

from experiments.qat import blocks, llm_fp4, policies
from experiments.qat.evaluate import Student
from fp4jax.formats.llm_fp4 import LLM_FP4

DELTAS = (-0.5, 0.0, 0.5, 1.0)


def nearest(x, scale, number):
  m = np.array(LLM_FP4[number].grid.magnitudes)
  return np.sign(x) * m[np.abs(np.abs(x / scale)[..., None] - m).argmin(-1)] * scale


def draws(t=24, k=8, n=5, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((t, k)) * np.array([8.0] + [1.0] * (k - 1))  # a column of outliers
  return x.astype(np.float32), rng.standard_t(3, (k, n)).astype(np.float32)


def test_weights_are_searched_for_exhaustively():
  """By the error of the product: columns apart, in all formats."""
  x, w = draws()
  found = llm_fp4.search_gemm(x, w, deltas=DELTAS, activations=False)
  x, w = x.astype(np.float64), w.astype(np.float64)
  best = []
  for number, fmt in enumerate(LLM_FP4):
    total, scales = 0.0, []
    for column in w.T:
      tried = [np.abs(column).max() / fmt.q_max * 2.0**-d for d in DELTAS]
      errors = [((x @ (nearest(column, s, number) - column)) ** 2).sum() for s in tried]
      total += min(errors)
      scales.append(tried[int(np.argmin(errors))])
    best.append((total, number, scales))
  error, number, scales = min(best)
  assert int(found.weights.format) == number
  np.testing.assert_allclose(found.weights.scale, scales, rtol=1e-5)
  np.testing.assert_allclose(found.error, error / ((x @ w) ** 2).sum(), rtol=1e-4)


def test_activations_are_searched_for_with_the_weights_that_were_found():
  x, w = draws()
  found = llm_fp4.search_gemm(x, w, deltas=DELTAS, rounds=1)
  values = nearest(w.astype(np.float64), np.asarray(found.weights.scale), int(found.weights.format))
  amax, y = np.abs(x.astype(np.float64)).max(0), x.astype(np.float64) @ w
  best = []
  for number, delta in itertools.product(range(3), DELTAS):
    shift = np.clip(np.round(np.log2(amax.max() / amax)), 0, 2 ** (number + 1) - 1)
    scale = amax.max() / LLM_FP4[number].q_max * 2.0 ** -(delta + shift)
    best.append((((nearest(x, scale, number) @ values - y) ** 2).sum(), number, tuple(scale)))
  error, number, scale = min(best)
  assert int(found.activations.format) == number
  np.testing.assert_allclose(found.activations.scale, scale, rtol=1e-5)
  np.testing.assert_allclose(found.error, error / (y**2).sum(), rtol=1e-4)


@pytest.mark.parametrize("activations", [False, True])
def test_the_search_errs_less_than_the_largest_on_the_largest(activations):
  for seed in range(4):
    x, w = draws(64, 32, 8, seed)
    own = llm_fp4.search_gemm(x, w, activations=activations)
    minmax = llm_fp4.search_gemm(
      x, w, deltas=llm_fp4.MINMAX, formats=(1,), activations=activations, rounds=1
    )
    assert float(own.error) < 0.9 * float(minmax.error)


def test_more_rounds_err_no_more_in_a_case_that_they_help():
  x, w = draws(64, 32, 8, seed=1)
  errors = [float(llm_fp4.search_gemm(x, w, rounds=r).error) for r in (1, 3)]
  assert errors[1] < errors[0]


@pytest.mark.parametrize("activations", [False, True], ids=["weights", "both"])
def test_a_model_runs_under_what_was_found(activations):
  """The first GEMM of the last layer, of the product that the search minimized."""
  model = small_model()
  tokens = np.random.default_rng(0).integers(0, 256, (4, 16)).astype(np.int32)
  student, told = llm_fp4.quantize_model(model, tokens, activations, deltas=DELTAS, rounds=1)
  assert len(told) == 2 * 4
  graph, params = blocks.split_blocks(model)
  x = model.embedding(tokens).astype(jnp.bfloat16)
  for of_layer in params:
    x, reads = blocks.record_block(graph, policies.TEACHER, of_layer, x)
  read = np.asarray(reads["attention.qkv"], np.float64).reshape(-1, 64)
  w = np.asarray(model.blocks.attention.w_qkv[1].astype(jnp.bfloat16), np.float64)
  state = {role: s for role, s in student.states["0:2"]["attention.qkv"].items()}
  elements = np.asarray(student.model.blocks.attention.w_qkv[1], np.float64)
  values = elements * np.asarray(state["fprop.rhs"]["scale"][1], np.float64)
  quantized = read
  if activations:
    number = int(state["fprop.lhs"]["format"][1])
    quantized = nearest(read, np.asarray(state["fprop.lhs"]["scale"][1], np.float64), number)
  error = ((quantized @ values - read @ w) ** 2).sum() / ((read @ w) ** 2).sum()
  own = next(t for t in told if (t["layer"], t["gemm"]) == (1, "attention.qkv"))
  # A value of bf16 may be a tie, which float64 and float32 scales decide differently.
  np.testing.assert_allclose(own["relative_error"], error, rtol=1e-2)
  grids = {fmt.name: set(fmt.grid.magnitudes) for fmt in LLM_FP4}
  assert set(np.unique(np.abs(elements))) <= grids[own["weights"]]


@pytest.mark.slow
def test_what_was_found_gives_the_logits_that_numpy_multiplies():
  """A model whose GEMMs read w * 1: the student in weights alone is the model of those weights."""
  model = small_model()
  tokens = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
  student, _ = llm_fp4.quantize_model(model, tokens, False, deltas=DELTAS, rounds=1)
  plain = nnx.clone(student.model)
  for name, w in plain.blocks.matrices.items():
    w.set_value(w[...] * student.states["0:2"][name]["fprop.rhs"]["scale"])
  # Weights are rounded to bf16 here, and not there: 2^-9 of each, as bf16 rounds activations too.
  expected, _ = plain(tokens, policies.TEACHER)
  found, _ = student.model(tokens, student.policy, states=student.states)
  exact, _ = model(tokens, policies.TEACHER)
  spread = np.abs(exact - expected).mean()
  assert np.abs(found - expected).mean() < 0.1 * spread


def test_minmax_is_the_format_itself_by_columns():
  model = small_model()
  tokens = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
  student, told = llm_fp4.quantize_model(
    model, tokens, False, deltas=llm_fp4.MINMAX, formats=(1,), rounds=1
  )
  assert {t["weights"] for t in told} == {"FP4_E2M1"} and isinstance(student, Student)
  scale = student.states["0:2"]["experts.w2"]["fprop.rhs"]["scale"]
  w = np.asarray(model.blocks.feed_forward.w2[...].astype(jnp.bfloat16), np.float32)
  np.testing.assert_allclose(scale[:, 0], np.abs(w).max(1) / 6, rtol=1e-6)
