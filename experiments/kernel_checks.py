"""Errors of grouped FP8 matmuls and their bounds; whether a kernel repeats itself, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pallas_kernels import grouped_matmul as gm

WAVE = 64  # rows of the output that share a wgmma: one of each is looked at


def error_bound(
  reference: Float32[Array, "*s"], magnitudes: Float32[Array, "*s"], contraction: int, dtype
) -> Float32[Array, "*s"]:
  """Of each output; `magnitudes` is the reference of the operands' magnitudes.

  float32 sums of `contraction` exact products, in any order, and two roundings for the scales;
  wgmma keeps only about 13 bits below its largest addend: 2^-13 of the magnitudes, per 32.
  """
  bound = magnitudes * (contraction * 2.0**-24 + 2.0**-12) + 1e-30
  return bound if dtype == jnp.float32 else bound + jnp.abs(reference) * 2.0**-8


def magnitudes_of(operands: tuple[Array, ...]) -> tuple[Array, ...]:
  return tuple(jnp.abs(x.astype(jnp.float32)).astype(x.dtype) for x in operands)


def sampled_error(gemm: str, out: Float[Array, "..."], arguments: tuple, seed: int = 0) -> float:
  """Largest error over its bound, infinite for NaN, of one row in each wave of a call's output.

  Args:
    gemm: "fprop", "dgrad" or "wgrad".
    out: what `grouped_matmul` or `grouped_wgrad` gave for `arguments`.
  """
  lhs, lhs_scales, rhs, rhs_scales, sizes = arguments
  starts = np.arange(0, len(lhs), WAVE)
  lengths = np.minimum(len(lhs) - starts, WAVE)
  rows = starts + np.random.default_rng(seed).integers(0, lengths)
  if gemm == "wgrad":
    out, reference = out[:, rows], gm.grouped_wgrad_reference
  else:
    ends = np.cumsum(np.asarray(sizes))
    rows = rows[rows < ends[-1]]
    group = np.searchsorted(ends, rows, side="right")
    sizes = jnp.asarray(np.bincount(group, minlength=len(ends)), jnp.int32)
    out, reference = out[rows], gm.grouped_matmul_reference
  operands = lhs[rows], lhs_scales[:, rows], rhs, rhs_scales
  return float(_error(reference, out, operands, sizes))


@functools.partial(jax.jit, static_argnums=0)
def _error(reference, out, operands, sizes):
  expected = reference(*operands, sizes, out_dtype=jnp.float32)
  magnitudes = reference(*magnitudes_of(operands), sizes, out_dtype=jnp.float32)
  bound = error_bound(expected, magnitudes, operands[0].shape[1], out.dtype)
  error = jnp.abs(out.astype(jnp.float32) - expected) / bound
  return jnp.max(jnp.where(jnp.isnan(error), jnp.inf, error))  # a maximum may pass over NaN


def equal(actual, expected) -> bool:
  """Every bit of every array of two results."""
  return not _differ(*(tuple(jax.tree.leaves(x)) for x in (actual, expected)))


@jax.jit
def _differ(actual, expected):
  bits = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")  # noqa: E731
  pairs = zip(actual, expected, strict=True)
  return jnp.any(jnp.stack([jnp.any(bits(a) != bits(e)) for a, e in pairs]))


def runs_that_differ(kernel, arguments: tuple, runs: int = 50) -> int:
  """Of `runs` more calls, those that give other bits than the first: a race shows now and then."""
  kernel = jax.jit(kernel)
  first = kernel(*arguments)
  return sum(not equal(kernel(*arguments), first) for _ in range(runs))
