"""Independent oracles of the quantizers, in NumPy: blocks lie along the last axis, values float64.

Each is a transcription of its paper's definition on top of the tables of `oracles`; nothing here
imports fp4jax or JAX. What is random is an argument, so that a test can pass its own draws.
"""

import itertools

import numpy as np
import oracles
from oracles import E2M1, E4M3, E5M2

SMALLEST_NORMAL = 2.0**-126


def by_blocks(x: np.ndarray, block: int) -> np.ndarray:
  return np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, block)


def mxfp4(x: np.ndarray, rule: str = "floor") -> np.ndarray:
  """To the nearest of E2M1 under a power-of-two scale for each 32 values."""
  return oracles.quantize_mx(x, E2M1, rule, oracles.block_lengths(x.shape, -1, 32)).values


def signed_nearest(scaled: np.ndarray, table: np.ndarray) -> np.ndarray:
  return np.copysign(table[oracles.nearest(np.abs(scaled), table)], scaled)


def stochastic(scaled: np.ndarray, table: np.ndarray, uniform: np.ndarray) -> np.ndarray:
  """Up where the share of the way to the next magnitude exceeds 1 - uniform; saturates."""
  magnitude = np.minimum(np.abs(scaled), table[-1])
  below = np.clip(np.searchsorted(table, magnitude, side="right") - 1, 0, len(table) - 2)
  low, high = table[below], table[below + 1]
  up = np.floor((magnitude - low) / (high - low) + uniform)
  return np.copysign(low + up * (high - low), scaled)


# Outlier fallback (arXiv 2605.20402) and clamping with compensation (arXiv 2501.17116).


def outlier_fallback(x: np.ndarray, quantize, alpha: float = 0.5) -> np.ndarray:
  """A second pass quantizes what the first one left."""
  first = quantize(x)
  return first + alpha * quantize((np.asarray(x, np.float64) - first).astype(np.float32))


def clamp_outliers(x: np.ndarray, alpha: float = 0.99) -> tuple[np.ndarray, np.ndarray]:
  """x clamped to signed quantiles of each row, and what was cut off."""
  n = x.shape[-1]
  ordered = np.sort(x, axis=-1)
  low, high = ordered[..., int((1 - alpha) * n)], ordered[..., min(int(alpha * n), n - 1)]
  clamped = np.clip(x, low[..., None], high[..., None])
  return clamped, x.astype(np.float64) - clamped


def occ_product(x, w, quantize_rows, quantized_w, alpha: float = 0.99) -> np.ndarray:
  """Q(clamped) @ Q(w) + cut @ w: what was cut off meets the weights as they are."""
  clamped, cut = clamp_outliers(x, alpha)
  return quantize_rows(clamped) @ quantized_w + cut @ np.asarray(w, np.float64)


# The differentiable gradient estimator (arXiv 2501.17116).


def dge_derivative(scaled: np.ndarray, k: float = 5, limit: float = 3.0) -> np.ndarray:
  """f' of each interval of E2M1: |2 x / width - 1|^(1/k - 1) / k, at most `limit`; 0 beyond +-6."""
  magnitude = np.abs(np.asarray(scaled, np.float64))
  slope = np.zeros_like(magnitude)
  for low, high in itertools.pairwise(E2M1):
    inside = (magnitude >= low) & (magnitude <= high)
    distance = np.abs(2 * (magnitude[inside] - low) / (high - low) - 1)
    with np.errstate(divide="ignore"):
      slope[inside] = np.minimum(distance ** (1 / k - 1) / k, limit)
  return slope


# QuEST (arXiv 2502.05003) as the forward pass of Quartet (arXiv 2505.14669) uses it.

CLIP = 2.92247856  # of the standard deviation: the E2M1 clip with the least error on a Gaussian


def quest(x: np.ndarray, exponent: str = "nearest") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rotated and rounded values, the mask of what is not clipped, and log2 of the exact scale."""
  rotated = by_blocks(x, 32) @ oracles.sylvester(32)
  deviation = np.sqrt(np.mean((rotated - rotated.mean(-1, keepdims=True)) ** 2, -1, keepdims=True))
  log_scale = np.log2(CLIP / 6 * deviation + 1e-8)
  scale = 2.0 ** {"nearest": np.rint, "floor": np.floor}[exponent](log_scale)
  values = signed_nearest(rotated / scale, E2M1) * scale
  return values.reshape(x.shape), (np.abs(rotated / scale) < 6).reshape(x.shape), log_scale[..., 0]


def quest_pull(mask: np.ndarray, g: np.ndarray) -> np.ndarray:
  """From the gradient of the rotated values to that of x; H is its own inverse."""
  return (by_blocks(mask * g, 32) @ oracles.sylvester(32)).reshape(g.shape)


# MS-EDEN (Quartet II, arXiv 2601.22813).

EDEN_LIMIT = 6 / (17 / 16 * 0.93)  # where amax falls on the grid


def rotate(x: np.ndarray, signs: np.ndarray) -> np.ndarray:
  n = len(signs)
  return ((by_blocks(x, n) * signs) @ oracles.sylvester(n)).reshape(x.shape)


def rotate_back(x: np.ndarray, signs: np.ndarray) -> np.ndarray:
  n = len(signs)
  return ((by_blocks(x, n) @ oracles.sylvester(n)) * signs).reshape(x.shape)


def eden(
  rotated: np.ndarray, uniform: np.ndarray, group: int = 128, refit: bool = True
) -> tuple[np.ndarray, np.ndarray]:
  """Values, and |x| / scale before rounding; `uniform` is one draw for each 16 values.

  Codes to the nearest; then each scale grows by S = sum x^2 / sum x q over `group` values, and is
  rounded stochastically to E4M3.
  """
  x = by_blocks(rotated, 16)
  tensor_scale = np.abs(x).max() / (255.99 * EDEN_LIMIT) or 1.0
  amax = np.abs(x).max(-1, keepdims=True)
  scale = signed_nearest(amax / (EDEN_LIMIT * tensor_scale), E4M3)
  scale = np.where(scale == 0, 1, scale)
  scaled = x / (scale * tensor_scale)
  codes = signed_nearest(scaled, E2M1)
  dequantized = codes * scale * tensor_scale
  groups = (*rotated.shape[:-1], -1, group)
  energy = (x * x).reshape(groups).sum(-1, keepdims=True)
  product = (x * dequantized).reshape(groups).sum(-1, keepdims=True)
  factor = np.where(product == 0, 1, energy / np.where(product == 0, 1, product))
  factor = np.broadcast_to(factor, (*factor.shape[:-1], group // 16)).reshape(scale.shape)
  stored = stochastic((factor if refit else 1) * scale, E4M3, uniform.reshape(scale.shape))
  return (codes * stored * tensor_scale).reshape(rotated.shape), np.abs(scaled)


# Scales and averages that are kept from one step to the next.

FP8_TABLES = {"e4m3": E4M3, "e5m2": E5M2}


def delayed_scaling(
  state: tuple[np.float32, np.ndarray], x: np.ndarray, table: np.ndarray, margin: int = 0
) -> tuple[np.ndarray, tuple[np.float32, np.ndarray]]:
  """TransformerEngine's DelayedScaling with the largest of the history, in float32.

  The state is the multiplier of x and the history, newest first. x is multiplied by what earlier
  steps left; its own amax counts from the next step on.
  """
  multiplier, history = state
  scaled = x.astype(np.float32) * multiplier
  values = signed_nearest(scaled, table).astype(np.float32) * (np.float32(1) / multiplier)
  history = np.concatenate([[np.abs(x).max()], history[:-1]]).astype(np.float32)
  amax = history.max()
  if amax > 0 and np.isfinite(amax):
    with np.errstate(over="ignore"):
      multiplier = np.float32(table[-1]) / amax / np.float32(2.0**margin)
    multiplier = min(multiplier, np.float32(2.0**126))  # TransformerEngine: the largest float32
  return values, (np.float32(multiplier), history)


def q_ema(w: np.ndarray, ema: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Of the two E2M1 values around w / scale, the one nearer to ema / scale; the upper of equals."""
  grid = np.concatenate([-E2M1[:0:-1], E2M1])
  scaled = np.clip(np.asarray(w, np.float64) / scale, -6, 6)
  low = grid[np.searchsorted(grid, scaled, side="right") - 1]
  high = grid[np.searchsorted(grid, scaled, side="left")]
  target = np.asarray(ema, np.float64) / scale
  return np.where(np.abs(high - target) <= np.abs(target - low), high, low) * scale


def grad_scale(multiplier: float, g: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, float]:
  """Values on the table under a power-of-two multiplier, and the next one (Sun et al. 2020)."""
  scaled = np.asarray(g, np.float64) * multiplier
  values = signed_nearest(scaled, table) / multiplier
  amax = np.abs(scaled).max()
  if amax > table[-1]:
    return values, multiplier / 2
  return values, multiplier * 2 if amax <= table[-1] / 2 else multiplier


# Three quarters (arXiv 2502.20586).


def three_quarters(x: np.ndarray, uniform: np.ndarray) -> np.ndarray:
  """The values of the codes; their mean is 3/4 x. Nothing clips: 3/4 of less than 8 is under 6."""
  blocks = by_blocks(x, 32)
  amax = np.abs(blocks).max(-1, keepdims=True)
  exponent = np.clip(oracles.scale_exponent(amax, E2M1, "floor"), -127, 127)
  scale = np.ldexp(1.0, exponent)
  return (stochastic(0.75 * blocks / scale, E2M1, uniform.reshape(blocks.shape)) * scale).reshape(
    x.shape
  )


# The parts of the error (arXiv 2605.20402).


def error_parts(x: np.ndarray, rule: str) -> dict[str, np.ndarray]:
  """MXFP4's error in its three parts; the ideal scale is amax / 6."""
  x = np.asarray(x, np.float64)
  lengths = oracles.block_lengths(x.shape, -1, 32)
  amax = oracles.spread(oracles.block_amax(x, lengths), lengths)
  ideal_scale = np.maximum(amax / 6, SMALLEST_NORMAL)
  ideal = signed_nearest(x / ideal_scale, E2M1) * ideal_scale
  dead = np.abs(x) / ideal_scale < 0.25
  return {
    "scale_bias": mxfp4(x, rule) - ideal,
    "deadzone": np.where(dead, ideal - x, 0),
    "grid_noise": np.where(dead, 0, ideal - x),
  }


# MXFP4 weights under FP8 compute (TransformerEngine's pull request 3264).


def mxfp4_weight(w: np.ndarray) -> np.ndarray:
  """Scales 2^clamp(ceil(log2(amax / 6)), -126, 125) for each 32 values."""
  blocks = by_blocks(w, 32)
  amax = np.abs(blocks).max(-1, keepdims=True)
  scale = np.ldexp(1.0, np.clip(oracles.scale_exponent(amax, E2M1, "rceil"), -126, 125))
  return (signed_nearest(blocks / scale, E2M1) * scale).reshape(w.shape)


def fp8_tiles(w: np.ndarray, tile: int = 128) -> np.ndarray:
  """E4M3 under power-of-two scales of `tile` x `tile`, rounded up so that nothing clips."""
  return oracles.quantize_mx(w, E4M3, "rceil", (tile, tile)).values
