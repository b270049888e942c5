"""What a test of a quantizer asks for: a recipe with it, what a GEMM reads, and where it must work.

`check_everywhere` runs a recipe in dot_general, grouped_dot and moe_ffn, compiled, with gradients,
taps and states. What the numbers are is for the test of each quantizer to say.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import fp4jax
from fp4jax import Gemm, Operand, Recipe, operands

MATMUL = (((1,), (0,)), ((), ()))
KEY = jax.random.key(3)
FP32 = Operand(jnp.float32)


def recipe_of(**quantizers) -> Recipe:
  """`fprop_lhs=...` and so on; float32 elsewhere, with the transform of the other operand."""

  def gemm(name):
    lhs, rhs = (quantizers.get(f"{name}_{side}", FP32) for side in ("lhs", "rhs"))
    if lhs is FP32:
      lhs = dataclasses.replace(FP32, transform=rhs.transform)
    if rhs is FP32:
      rhs = dataclasses.replace(FP32, transform=lhs.transform)
    return Gemm(lhs, rhs)

  gemms = {name: gemm(name) for name in ("fprop", "dgrad", "wgrad")}
  return Recipe(name="test", citation="a test", **gemms)


def random(*shape, seed=0) -> np.ndarray:
  """Rows of very different size."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 4, (shape[0], *[1] * (len(shape) - 1)))
  return x.astype(np.float32)


def as_read(quantizer, x, key=KEY, state=None) -> np.ndarray:
  """The values of x that fprop reads as its lhs: its product with the identity.

  Exact for a quantizer without transform; otherwise transformed back by the product.
  """
  recipe = recipe_of(fprop_lhs=quantizer)
  state = None if state is None else {"fprop.lhs": state}
  dot = fp4jax.dot_general(recipe, key=key, state=state)
  return np.asarray(dot(x, np.eye(x.shape[1], dtype=np.float32), MATMUL))


def next_state(quantizer, x, state):
  """The state after a step in which fprop reads x as its lhs."""
  w = np.ones((x.shape[1], 1), np.float32)

  def loss(state):
    return fp4jax.dot_general(recipe_of(fprop_lhs=quantizer), state=state)(x, w, MATMUL).sum()

  return jax.grad(loss)({"fprop.lhs": state})["fprop.lhs"]


def check_everywhere(recipe: Recipe, m: int = 40, k: int = 64, n: int = 32) -> None:
  x, w = random(m, k), random(k, n, seed=1)
  y = _dot_general(recipe, x, w)
  sizes = np.array([5, 0, m - 9], np.int32)
  grouped = _grouped_dot(recipe, x, np.stack([w, 2 * w, w]), sizes)
  assert (grouped[m - 4 :] == 0).all()
  if not recipe.is_stochastic:  # draws differ with the shape
    # Sums of fewer than 128 products in two orders, of which each is at most about 8 |y|.
    np.testing.assert_allclose(grouped[: m - 4], y[: m - 4], rtol=1e-5, atol=1e-5 * np.abs(y).max())
  _moe_ffn(recipe, x)


def _check(recipe, grads, tap, state, next_state):
  for g in grads:
    assert np.isfinite(g).all() and (np.asarray(g) != 0).any()
  if tap is not None:
    live = np.isin(operands.ROLES, list(operands.quantized_roles(recipe)))
    assert not np.isnan(tap).any()  # an SQNR is infinite where nothing is lost
    np.testing.assert_array_equal((np.asarray(tap) != 0).any(1), live)
  assert jax.tree.structure(next_state) == jax.tree.structure(state)
  leaves = list(zip(jax.tree.leaves(state), jax.tree.leaves(next_state), strict=True))
  for old, new in leaves:
    assert old.shape == new.shape and old.dtype == new.dtype and np.isfinite(new).all()
  assert not leaves or any((np.asarray(old) != new).any() for old, new in leaves)


def _dot_general(recipe, x, w):
  state = fp4jax.init_state(recipe, x.shape, w.shape)

  @jax.jit
  def step(x, w, tap, state):
    def loss(x, w, tap, state):
      y = fp4jax.dot_general(recipe, key=KEY, tap=tap, state=state)(x, w, MATMUL)
      return (y**2).sum(), y

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, w, tap, state)

  (dx, dw, tap, after), y = step(x, w, operands.new_tap(), state)
  _check(recipe, (dx, dw), tap, state, after)
  return np.asarray(y)


def _grouped_dot(recipe, x, w, sizes):
  state = fp4jax.init_state(recipe, x.shape, w.shape)

  @jax.jit
  def step(x, w, sizes, state):
    def loss(x, w, state):
      y = fp4jax.grouped_dot(x, w, sizes, recipe, key=KEY, state=state)
      return (y**2).sum(), y

    return jax.grad(loss, (0, 1, 2), has_aux=True)(x, w, state)

  (dx, dw, after), y = step(x, w, sizes, state)
  _check(recipe, (dx, dw), None, state, after)
  return np.asarray(y)


def _moe_ffn(recipe, x, experts=2, f=32):
  """The second layer has a tap: one program less to compile in full."""
  (m, d), choices = x.shape, 2
  w13, w2 = random(experts, d, 2 * f, seed=1) / d, random(experts, f, d, seed=2) / f
  chosen = np.tile(np.arange(choices, dtype=np.int32), (m, 1))
  weights = np.full((m, choices), 0.5, np.float32)
  states = (
    fp4jax.init_state(recipe, (m * choices, d), w13.shape),
    fp4jax.init_state(recipe, (m * choices, f), w2.shape),
  )

  @jax.jit
  def step(x, w13, w2, weights, tap, states):
    def loss(x, w13, w2, weights, tap, states):
      keys = tuple(jax.random.split(KEY))
      y = fp4jax.moe_ffn(
        x, w13, w2, chosen, weights, recipe, keys=keys, taps=(None, tap), states=states
      )
      return (y**2).sum()

    return jax.grad(loss, (0, 1, 2, 3, 4, 5))(x, w13, w2, weights, tap, states)

  *grads, tap, after = step(x, w13, w2, weights, operands.new_tap(), states)
  for of_layer, state, next_state in zip((None, tap), states, after, strict=True):
    _check(recipe, grads, of_layer, state, next_state)
