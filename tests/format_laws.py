"""What every further format does, whatever its numbers are; each has its oracle in a test file."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import fp4jax
from fp4jax import recipes

jit_quantize = jax.jit(fp4jax.quantize, static_argnames=("fmt", "axis", "rounding"))
jit_dequantize = jax.jit(fp4jax.dequantize)
jit_fake_quantize = jax.jit(fp4jax.fake_quantize, static_argnames=("fmt", "axis", "rounding"))
jit_decompose = jax.jit(fp4jax.decompose, static_argnames=("fmt", "axis", "rounding"))

jit_each = jax.jit(
  lambda x, fmt: jax.vmap(lambda x: fp4jax.fake_quantize(x, fmt))(x), static_argnames="fmt"
)
jit_each_packed = jax.jit(
  lambda x, fmt: jax.vmap(lambda x: fp4jax.dequantize(fp4jax.quantize(x, fmt), x.dtype))(x),
  static_argnames="fmt",
)


def same(actual, expected) -> None:
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def gaussian(shape, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lies_along_every_axis(fmt, rows: np.ndarray) -> None:
  """3-D arrays along each axis are the rows one by one, packed in as many bits as is said."""
  rows = rows[: len(rows) // 8 * 8]
  expected = np.asarray(jit_dequantize(jit_quantize(rows, fmt)))
  for axis in range(3):
    x = np.moveaxis(rows.reshape(8, -1, rows.shape[-1]), -1, axis)
    q = jit_quantize(x, fmt, axis)
    assert q.axis == axis - 3 and q.shape == x.shape
    bits = x.size * fmt.bits_per_value
    assert 0 <= 8 * q.nbytes - bits <= 32  # but for the scale of a slice
    values = np.asarray(jit_dequantize(q))
    same(np.moveaxis(values, axis, -1).reshape(rows.shape), expected)
    same(jit_fake_quantize(x, fmt, axis), values)


def loses_no_octave(fmt, share: float, low: float = 2.0**-120, high: float = np.inf) -> None:
  """One block for each octave of float32, in each dtype: finite, packed as not packed, and off by
  at most a `share` of the block's largest value while that is in [low, high]; then it saturates."""
  rng = np.random.default_rng(9)
  for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
    largest = float(ml_dtypes.finfo(dtype).max)
    x = rng.uniform(-1, 1, (277, 1, 128))
    x[:, 0, 5] = rng.uniform(1, 2, 277) * rng.choice([-1, 1], 277)
    x = np.clip(x * 2.0 ** np.arange(-149, 128)[:, None, None], -largest, largest)
    x = np.concatenate([x, np.full((1, 1, 128), largest)]).astype(dtype)
    values = np.asarray(jit_each(x, fmt))
    assert values.dtype == dtype and np.isfinite(values.astype(np.float64)).all()
    same(values, jit_each_packed(x, fmt))
    top = np.abs(x.astype(np.float64)).max((1, 2))
    expected = np.clip(x.astype(np.float64), -high, high)
    error = np.abs(values.astype(np.float64) - expected).max((1, 2))
    # A float16 below 2^-14 is rounded to a multiple of 2^-24, a bfloat16 to 8 bits.
    slack = 2.0**-25 + 2.0**-9 * top if dtype is np.float16 else 2.0**-9 * top
    assert (error <= share * np.minimum(top, high) + slack)[top >= low].all()


def is_the_same_compiled(fmt, x: np.ndarray) -> None:
  """Packed or not, compiled or op by op, to nearest and stochastically: codes, scales, values."""
  for rounding, key in (("nearest", None), ("stochastic", jax.random.key(3))):
    options = {"rounding": rounding, "key": key}
    q = jit_quantize(x, fmt, **options)
    values = jit_dequantize(q)
    same(jit_fake_quantize(x, fmt, **options), values)
  with jax.disable_jit():
    same(fp4jax.quantize(x, fmt, **options), q)
    same(fp4jax.dequantize(q), values)


def decomposes(fmt, x: np.ndarray) -> None:
  """The parts sum to the total, of which deadzone and grid noise share no element."""
  for rounding, key in (("nearest", None), ("stochastic", jax.random.key(4))):
    options = {"rounding": rounding, "key": key}
    d = jit_decompose(x, fmt, **options)
    same(d.total, np.asarray(jit_fake_quantize(x, fmt, **options)) - x)
    parts = np.asarray(d.scale_bias, np.float64) + d.deadzone + d.grid_noise
    # Each part is a float32 difference of values of up to 2 |x| and the block's largest element.
    largest = np.abs(x).max(-1, keepdims=True)
    assert (np.abs(parts - d.total) <= 4 * 2.0**-23 * largest).all()
    assert not ((np.asarray(d.deadzone) != 0) & (np.asarray(d.grid_noise) != 0)).any()
    assert np.asarray(d.deadzone).any() and np.asarray(d.grid_noise).any()


def keeps_nan_in_its_block(fmt, block: int) -> None:
  clean = gaussian((4, 4 * block)) / 8
  clean[0, 0] = 1  # the largest of the slice, beside no NaN
  x = clean.copy()
  x[1, block + 3], x[2, 0], x[3, 4 * block - 1] = np.nan, np.inf, -np.inf
  bad = ~np.isfinite(x).reshape(4, 4, block).all(-1).repeat(block, -1).reshape(x.shape)
  for function in (jit_fake_quantize, lambda x, fmt: jit_dequantize(jit_quantize(x, fmt))):
    values = np.asarray(function(x, fmt))
    same(np.isnan(values), bad)
    same(values[~bad], np.asarray(function(clean, fmt))[~bad])


def has_unbiased_draws(fmt, x: np.ndarray, draws: int = 400) -> None:
  """Each value goes to one of two, and to the upper one as often as its distance says, within 5
  standard deviations, wherever nothing clips."""

  @jax.jit
  def statistics(keys):
    q = jax.vmap(lambda key: fp4jax.fake_quantize(x, fmt, rounding="stochastic", key=key))(keys)
    high, low = jnp.max(q, 0), jnp.min(q, 0)
    count = jnp.sum(q == high[None], 0)
    return low, high, count, jnp.all((q == high[None]) | (q == low[None]))

  keys = jax.random.split(jax.random.key(5), draws)
  low, high, count, only_two = (np.asarray(a, np.float64) for a in statistics(keys))
  d = jit_decompose(x, fmt, rounding="stochastic", key=keys[0])
  p = (x - low) / np.where(high > low, high - low, np.nan)
  free = ~np.asarray(d.clipped) & (p > 0.1) & (p < 0.9)  # where the count is close to normal
  assert only_two and free.mean() > 0.4
  z = (count - draws * p) / np.sqrt(draws * p * (1 - p))
  assert np.abs(z[free]).max() < 5


def multiplies(fmt) -> None:
  """In all six operands of a linear layer: the products of what the format makes of each."""
  roles = [f"{role}.format" for role, _ in recipes.MXFP4.operands()]
  dot_general = fp4jax.dot_general(recipes.MXFP4.replace(dict.fromkeys(roles, fmt)))
  x, w, dy = gaussian((3, 128, 128), 1)

  def dot(x, w):
    return dot_general(x, w, (((1,), (0,)), ((), ())))

  @jax.jit
  def both(x, w, dy):
    y, pull = jax.vjp(dot, x, w)
    return y, *pull(dy)

  y, dx, dw = both(x, w, dy)
  q = lambda a, axis: np.asarray(jit_fake_quantize(a, fmt, axis), np.float64)  # noqa: E731
  for actual, lhs, rhs in (
    (y, q(x, 1), q(w, 0)),
    (dx, q(dy, 1), q(w, 1).T),
    (dw, q(x, 0).T, q(dy, 0)),
  ):
    # Products are exact or rounded once, and 128 of them are summed in float32.
    slack = 128 * 2.0**-24 * (np.abs(lhs) @ np.abs(rhs))
    assert (np.abs(np.asarray(actual) - lhs @ rhs) <= slack).all()
