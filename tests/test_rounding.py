"""Stochastic rounding: unbiased, only to neighbours, independent, reproducible."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax import fake_quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

BLOCKS = 32768  # times 31 values that round freely: 1 015 808 draws
MXFP4_RCEIL = dataclasses.replace(fp4jax.MXFP4, scale_rule="rceil")
LIMIT = 5  # standard deviations; 60 checks pass by chance but for one run in 30 000


jit_fake_quantize = jax.jit(fake_quantize, static_argnames=("fmt", "rounding"))


def z_score(hits, p, n):
  return abs(float(hits) / n - p) / np.sqrt(p * (1 - p) / n)


@functools.partial(jax.jit, static_argnames="fmt")
def draws(fmt, low, high, value, largest, key):
  """Counts over BLOCKS x 31 draws of `value` in blocks whose largest value is on the grid."""
  x = jnp.full((BLOCKS, 32), value).at[:, 0].set(largest)
  q = fake_quantize(x, fmt, rounding="stochastic", key=key)
  up, down = q[:, 1:] == high, q[:, 1:] == low
  return {
    "up": up.sum(),
    "elsewhere": (~up & ~down).sum(),
    "largest moved": (q[:, 0] != largest).sum(),
    "both of a pair": (up[:, 0:30:2] & up[:, 1:31:2]).sum(),
    "both of two blocks": (up[0::2] & up[1::2]).sum(),
  }


E2M1_INTERVALS = [(oracles.E2M1, code) for code in range(7)]
# In E4M3: both kinds of subnormals, the step to normal values, some binades, the last interval.
E4M3_INTERVALS = [(oracles.E4M3, code) for code in (0, 1, 7, 8, 56, 60, 79, 125)]
FRACTIONS = (0.3, 0.5, 0.03, 0.9, 0.62, 0.97, 0.11, 0.5)


@pytest.mark.parametrize("sign", [1, -1])
def test_mean_and_independence_on_every_interval(sign):
  key = jax.random.key(7 if sign > 0 else 8)
  for intervals in (E2M1_INTERVALS, E4M3_INTERVALS):
    for (table, code), fraction in zip(intervals, FRACTIONS, strict=False):
      fmt = fp4jax.MXFP4 if table is oracles.E2M1 else fp4jax.MXFP8
      low, high = table[code : code + 2]
      value = np.float32(low + fraction * (high - low))
      p = (float(value) - low) / (high - low)
      key, subkey = jax.random.split(key)
      arguments = np.float32([low, high, value, table[-1]]) * np.float32(sign)
      counts = draws(fmt, *arguments, subkey)  # the largest value makes the scale 1
      assert counts["elsewhere"] == 0 and counts["largest moved"] == 0
      # The resolution of a draw, 2^-19, is 0.01 standard deviations at most.
      assert z_score(counts["up"], p, BLOCKS * 31) < LIMIT
      assert z_score(counts["both of a pair"], p * p, BLOCKS * 15) < LIMIT
      assert z_score(counts["both of two blocks"], p * p, BLOCKS // 2 * 31) < LIMIT


def test_mean_of_a_gaussian_tensor():
  """Unclipped, Q(x) - x has mean 0 and a known variance, whatever the scales are."""
  x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
  draw = jax.jit(
    jax.vmap(lambda key: fake_quantize(jnp.asarray(x), MXFP4_RCEIL, rounding="stochastic", key=key))
  )
  q = np.asarray(draw(jax.random.split(jax.random.key(1), 400))).astype(np.float64)
  amax = np.abs(x).reshape(64, 2, 32).max(-1).astype(np.float64)
  scale = np.repeat(2.0 ** oracles.scale_exponent(amax, oracles.E2M1, "rceil"), 32, 1)
  scaled = np.abs(x) / scale
  code = np.searchsorted(oracles.E2M1, scaled, side="right") - 1
  low = oracles.E2M1[code]
  step = oracles.E2M1[np.minimum(code + 1, 7)] - low
  p = np.divide(scaled - low, step, out=np.zeros_like(step), where=step > 0)
  # Every draw is one of the two neighbours...
  allowed = np.stack([low, low + step]) * scale
  assert ((np.abs(q) == allowed[0]) | (np.abs(q) == allowed[1])).all()
  # ...and the error summed over everything is within 5 standard deviations of 0.
  variance = 400 * (p * (1 - p) * (step * scale) ** 2).sum()
  assert abs((q - x).sum()) < LIMIT * np.sqrt(variance)


@pytest.mark.parametrize("fmt", [fp4jax.MXFP4, MXFP4_RCEIL, fp4jax.MXFP8], ids=lambda f: f.name)
def test_values_on_the_grid_never_move(fmt):
  table = oracles.E2M1 if fmt.element_bits == 4 else oracles.E4M3
  grid = np.concatenate([table, -table])
  x = np.resize(grid, (2048, 31)).astype(np.float32)
  x = np.concatenate([x, np.full((2048, 1), table[-1], np.float32)], 1)
  x = np.ldexp(x, np.random.default_rng(0).integers(-100, 100, (2048, 1)))
  for seed in range(4):
    q = np.asarray(jit_fake_quantize(x, fmt, rounding="stochastic", key=jax.random.key(seed)))
    np.testing.assert_array_equal(q.view(np.int32), x.view(np.int32))  # -0 stays -0


def test_clipped_values_and_dead_blocks():
  x = np.random.default_rng(1).uniform(6, 8, (256, 32)).astype(np.float32)
  q = jit_fake_quantize(x, fp4jax.MXFP4, rounding="stochastic", key=jax.random.key(0))
  assert (np.asarray(q) == 6).all()
  x[0, 3] = np.nan
  x[1] = 0
  q = np.asarray(jit_fake_quantize(x, fp4jax.MXFP4, rounding="stochastic", key=jax.random.key(0)))
  assert np.isnan(q[0]).all() and (q[1] == 0).all() and (q[2:] == 6).all()


def test_keys_seed_the_draws():
  x = np.full((64, 64), 5, np.float32)  # 4 or 6, evenly
  draw = functools.partial(fake_quantize, x, fp4jax.MXFP4, rounding="stochastic")
  first = np.asarray(draw(key=jax.random.key(0)))
  np.testing.assert_array_equal(draw(key=jax.random.key(0)), first)
  jitted = jax.jit(lambda key: draw(key=key))(jax.random.key(0))
  np.testing.assert_array_equal(jitted, first)
  old_style = jax.random.PRNGKey(0)
  np.testing.assert_array_equal(draw(key=old_style), first)
  q = fp4jax.quantize(x, fp4jax.MXFP4, rounding="stochastic", key=jax.random.key(0))
  np.testing.assert_array_equal(fp4jax.dequantize(q), first)
  for other in (jax.random.key(1), *jax.random.split(jax.random.key(0))):
    agreeing = (np.asarray(draw(key=other)) == first).sum()
    assert z_score(agreeing, 0.5, x.size) < LIMIT


# Through dot_general: with x = w = dy = 5 everywhere each operand is 4096 even draws of 4 or 6, and
# an identity on the other side of its GEMM (exact under stochastic rounding) lays it open.


@jax.jit
def operands_drawn(key):
  stochastic = fp4jax.Operand(fp4jax.MXFP4, rounding="stochastic")
  gemm = fp4jax.Gemm(stochastic, stochastic)
  recipe = fp4jax.Recipe(name="all", fprop=gemm, dgrad=gemm, wgrad=gemm, citation="a test")
  fives, one = jnp.full((64, 64), 5.0), jnp.eye(64)
  dot = fp4jax.dot_general(recipe, key=key)

  def gemms(x, w, dy):
    y, pull = jax.vjp(lambda x, w: dot(x, w, (((1,), (0,)), ((), ()))), x, w)
    return (y, *pull(dy))

  return {
    "fprop.lhs": gemms(fives, one, one)[0],
    "fprop.rhs": gemms(one, fives, one)[0],
    "dgrad.lhs": gemms(one, one, fives)[1],
    "dgrad.rhs": gemms(one, fives, one)[1].T,
    "wgrad.lhs": gemms(fives, one, one)[2].T,
    "wgrad.rhs": gemms(one, one, fives)[2],
  }


def test_every_operand_of_every_step_draws_its_own():
  steps = [operands_drawn(jax.random.key(seed)) for seed in (0, 1)]
  again = operands_drawn(jax.random.key(0))
  named = [(step, role, np.asarray(q)) for step in (0, 1) for role, q in steps[step].items()]
  for step, role, q in named:
    assert np.isin(q, [4, 6]).all(), role
    assert z_score((q == 6).sum(), 0.5, q.size) < LIMIT
    if step == 0:
      np.testing.assert_array_equal(again[role], q)
  for i, (_, _, a) in enumerate(named):
    for _, _, b in named[i + 1 :]:
      assert z_score((a == b).sum(), 0.5, a.size) < LIMIT
      assert z_score((a == b.T).sum(), 0.5, a.size) < LIMIT


def test_a_rounding_of_few_bits_is_a_value():
  """With b bits the probability is a multiple of 2^-b: off by at most 2^-(b+1)."""
  rounding = fp4jax.formats.Stochastic(bits=3)
  n, p = 20_000, 0.3  # between the elements 4 and 6
  x = jnp.full((n // 32, 32), 4 + 2 * p).at[:, 0].set(6)
  up = fake_quantize(x, fp4jax.MXFP4, rounding=rounding, key=jax.random.key(0))[:, 1:] == 6
  share, expected = float(jnp.mean(up)), 2 / 8  # uniforms (i + 1/2) / 8: two of eight reach 0.7
  assert abs(share - expected) / (expected * (1 - expected) / up.size) ** 0.5 < 5
  operand = fp4jax.Operand(fp4jax.MXFP4, rounding)
  assert operand.needs_key and operand == fp4jax.Operand(fp4jax.MXFP4, rounding)
