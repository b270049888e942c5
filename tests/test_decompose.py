"""The error decomposition: published figures, exact sums, the lemma, the summary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import fp4jax
from fp4jax import decompose, fake_quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

RULES = {r: dataclasses.replace(fp4jax.MXFP4, scale_rule=r) for r in ("floor", "even", "rceil")}
RCEIL = RULES["rceil"]
jit_decompose = jax.jit(decompose, static_argnames=("fmt", "axis", "rounding", "dtype"))
jit_summary = jax.jit(lambda x, fmt: decompose(x, fmt).summary(), static_argnames="fmt")
jit_fake_quantize = jax.jit(fake_quantize, static_argnames=("fmt", "axis", "rounding"))
FORMATS = [*RULES.values(), *(fp4jax.FORMATS[name] for name in oracles.FORMATS[1:])]


def format_id(fmt):
  return f"{fmt.name}-{fmt.scale_rule}"


def gaussian(blocks, seed=0, block=32):
  """Block scales spread evenly over a binade, as those of a real tensor do."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((blocks, block)) * 2 ** rng.uniform(0, 1, (blocks, 1))
  return x.astype(np.float32)


def assert_total(total, q, x, fmt):
  """Q(x) - x. XLA may fuse `element * scale - x`, which leaves out the rounding of Q(x) itself."""
  difference = np.abs(np.asarray(total) - (q - x))
  slack = 0 if fmt.has_power_of_two_scales else 1  # of which there is none with powers of two
  assert (difference <= slack * np.spacing(np.maximum(np.abs(x), np.abs(q)))).all()


def numpy_parts(d):
  return [np.asarray(p, np.float64) for p in (d.scale_bias, d.deadzone, d.grid_noise)]


def test_published_magnitudes():
  """arXiv 2605.20402, Qwen2.5-3B weights: 1.725, .026, .703 of |e|^2, cosine -.657."""
  s = jit_summary(gaussian(31250), RCEIL)
  assert 1.70 <= s.scale_bias <= 1.78
  assert 0.71 <= s.grid_noise <= 0.76
  assert 0.018 <= s.deadzone <= 0.022
  assert -0.67 <= s.cosine <= -0.65
  assert s.cross_scale_deadzone == 0
  total = s.scale_bias + s.deadzone + s.grid_noise + s.cross_scale_grid
  # Sums of a million float32; XLA adds in chunks, so far less than n 2^-24 is lost.
  assert abs(total - 1) < 1e-4


@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
def test_parts_are_those_of_the_definition(fmt):
  """Q from `fake_quantize` (proven elsewhere), Q* from the table on the ideal scale in float64."""
  x = gaussian(128 * 4).reshape(128, 128) * np.float32(3)
  table = oracles.E2M1 if fmt.element_bits == 4 else oracles.E4M3
  for axis in (-1, 0):
    lengths = x.shape
    if fmt.block_shape is not None and len(fmt.block_shape) == 1:
      lengths = oracles.block_lengths(x.shape, axis, fmt.block_size)
    d = jit_decompose(x, fmt, axis)
    x64 = x.astype(np.float64)
    ideal_scale = oracles.spread(oracles.block_amax(x64, lengths) / table[-1], lengths)
    scaled = np.abs(x64) / ideal_scale
    low, high = oracles.neighbours(scaled, table, 2.0**-21)
    clear = (low == high) & (np.abs(scaled / (table[1] / 2) - 1) > 2.0**-21)  # of ties, of D's edge
    assert clear.mean() > 0.99
    ideal = np.sign(x64) * table[low] * ideal_scale
    q = np.asarray(jit_fake_quantize(x, fmt, axis), np.float64)
    dead = scaled < table[1] / 2
    expected = [q - ideal, np.where(dead, ideal - x64, 0), np.where(dead, 0, ideal - x64)]
    # Q* carries the rounding of the scale, of the product and of the difference: 2^-24 each.
    for part, e in zip(numpy_parts(d), expected, strict=True):
      assert (np.abs(part - e)[clear] <= 4 * 2.0**-24 * np.abs(x64)[clear] + 2e-9).all()
    assert_total(d.total, q.astype(np.float32), x, fmt)
    np.testing.assert_array_equal(d.x, x)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
def test_parts_sum_to_the_total(fmt, rounding):
  x = gaussian(128 * 4, seed=1).reshape(128, 128)
  x[5] *= np.float32(1e-3)
  options = {"rounding": rounding, "key": jax.random.key(0) if rounding == "stochastic" else None}
  d = jit_decompose(x, fmt, **options)
  assert d.total.dtype == np.float32
  q = np.asarray(jit_fake_quantize(x, fmt, **options))
  assert_total(d.total, q, x, fmt)
  # One ulp of x; of Q(x) or Q*(x) where a draw made them larger than x.
  size = np.abs(x) if rounding == "nearest" else np.maximum(np.abs(q), np.abs(d.scale_bias - q))
  size = np.maximum(np.abs(x), size)
  assert (np.abs(sum(numpy_parts(d)) - np.asarray(d.total)) <= np.spacing(size)).all()
  with jax.enable_x64(True):
    d = jit_decompose(x, fmt, **options, dtype=jnp.float64)
    parts = numpy_parts(d)
    assert all(p.dtype == np.float64 for p in (d.total, d.scale_bias, d.deadzone, d.grid_noise))
    np.testing.assert_array_equal(parts[0] + (parts[1] + parts[2]), np.asarray(d.total))
    np.testing.assert_array_equal(np.asarray(d.total), q.astype(np.float64) - x)
  assert ((parts[1] == 0) | (parts[2] == 0)).all()  # disjoint, so orthogonal


def test_stochastic_scale_bias_is_of_the_scale_alone():
  """Q and Q* share their draws: where the stored scale is the ideal one they are the same."""
  x = np.clip(gaussian(64), -6, 6)
  x[:, 0] = 6
  d = jit_decompose(x, RCEIL, rounding="stochastic", key=jax.random.key(0))
  assert (np.asarray(d.total) != 0).mean() > 0.9
  assert (np.asarray(d.scale_bias) == 0).all()


def test_lemma_under_rceil():
  """Scale bias is zero wherever the deadzone is not, even one ulp around every edge."""
  blocks = [gaussian(2000, seed=2)]
  rng = np.random.default_rng(3)
  tops = np.concatenate(
    [oracles.next_float32(np.full(25, 6), np.arange(-12, 13)), rng.uniform(3, 6, 999)]
  )
  for top in tops.astype(np.float32):
    edge = oracles.next_float32(
      np.full(32, rng.choice([top / 24, np.float32(0.25)])), np.arange(-16, 16)
    )
    edge[0] = top
    blocks.append(edge[None])
  d = jit_decompose(np.concatenate(blocks), RCEIL)
  scale_bias, deadzone, _ = numpy_parts(d)
  assert (deadzone != 0).sum() > 10_000
  assert (scale_bias[deadzone != 0] == 0).all()
  assert d.summary().cross_scale_deadzone == 0


@pytest.mark.parametrize("rule", ["floor", "even"])
def test_lemma_needs_rceil(rule):
  """amax / 24 is above 0.25, where a scale of 1 begins to round up to 0.5."""
  top, x = {"floor": (7.9, 0.3), "even": (6.9, 0.28)}[rule]
  block = np.zeros((1, 32), np.float32)
  block[0, :2] = top, -x
  d = decompose(block, RULES[rule])
  assert d.deadzone[0, 1] == np.float32(x) and d.scale_bias[0, 1] == -0.5
  assert d.summary().cross_scale_deadzone < 0
  assert decompose(block, RCEIL).summary().cross_scale_deadzone == 0


@pytest.mark.parametrize("fmt", [RULES["floor"], RCEIL, fp4jax.NVFP4], ids=format_id)
def test_summary_is_that_of_numpy(fmt):
  x = gaussian(128, seed=4)
  x[3] *= 1e-4  # all flushed in NVFP4
  x[4, ::2] = 0
  d = decompose(x, fmt)
  s = d.summary()
  x64, total = (np.asarray(v, np.float64) for v in (d.x, d.total))
  scale, dead, grid = numpy_parts(d)
  error = (total**2).sum()
  expected = {
    "scale_bias": (scale**2).sum() / error,
    "deadzone": (dead**2).sum() / error,
    "grid_noise": (grid**2).sum() / error,
    "cross_scale_grid": 2 * (scale * grid).sum() / error,
    "cross_scale_deadzone": 2 * (scale * dead).sum() / error,
    "cosine": (scale * grid).sum() / np.sqrt((scale**2).sum() * (grid**2).sum()),
    "sqnr_db": 10 * np.log10((x64**2).sum() / error),
    "gain": (x64 * (x64 + total)).sum() / (x64**2).sum(),
    "flushed": ((x64 != 0) & (x64 + total == 0)).sum() / (x64 != 0).sum(),
  }
  q = jax.jit(fp4jax.quantize, static_argnames="fmt")(x, fmt)
  block_scale = oracles.signed_values(oracles.E4M3)[np.asarray(q.scales)]
  if fmt is fp4jax.NVFP4:
    block_scale = block_scale * float(q.tensor_scale)
  else:
    block_scale = oracles.e8m0(q.scales)
  scaled = np.abs(x64) / np.where(block_scale > 0, block_scale, np.inf).repeat(fmt.block_size, 1)
  near = np.abs(scaled / 6 - 1) < 1e-6  # NVFP4's largest values are 6 but for rounding
  clipped = (scaled > 6) & ~near
  for name, value in expected.items():
    # 4096 terms added in float32, in the worst order: 4096 * 2^-24 of the sum of magnitudes.
    np.testing.assert_allclose(getattr(s, name), value, rtol=3e-4, atol=1e-7, err_msg=name)
  slack = near.sum() / (x64 != 0).sum()
  exact = clipped.sum() / (x64 != 0).sum()
  assert exact * (1 - 1e-6) <= s.clipped <= (exact + slack) * (1 + 1e-6)
  assert (exact > 0) == (fmt is not RCEIL)
  assert {*expected, "clipped"} == {f.name for f in dataclasses.fields(s)}


def test_summary_does_not_depend_on_the_magnitude():
  x = gaussian(64, seed=5)
  reference = jit_summary(x, RCEIL)
  for j in (-90, 100):  # squares would leave float32
    jax.tree.map(np.testing.assert_array_equal, jit_summary(np.ldexp(x, j), RCEIL), reference)


def test_nothing_lost_shares_nothing():
  grid = np.tile(np.concatenate([oracles.E2M1, -oracles.E2M1] * 2), (4, 1)).astype(np.float32)
  s = jit_summary(grid, RCEIL)
  for name in ("scale_bias", "deadzone", "grid_noise", "cross_scale_grid", "cosine", "flushed"):
    assert getattr(s, name) == 0
  assert s.gain == 1 and s.clipped == 0 and s.sqnr_db == np.inf
  for shape in ((2, 32), (0, 32), (32, 0)):
    zero = jit_summary(np.zeros(shape, np.float32), RCEIL)
    assert zero.scale_bias == zero.deadzone == zero.grid_noise == zero.flushed == zero.clipped == 0


def test_float64_needs_x64():
  with pytest.raises(ValueError, match=r"dtype=float64 needs .*jax_enable_x64"):
    decompose(gaussian(1), RCEIL, dtype=jnp.float64)
