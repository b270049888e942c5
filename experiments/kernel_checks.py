"""Whether kernels compute what they should, and repeat themselves bit for bit."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from experiments.kernel_cases import Case
from pallas_kernels import grouped_matmul as gm

WAVE = 64  # rows of the output that share a wgmma: one of each is looked at


class CheckFailed(ValueError):
  """A kernel that computes something else: its time means nothing."""


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
    out: what `grouped_matmul` or `grouped_wgrad` gave for `arguments`, the FP8 ones or the bf16.
  """
  if len(arguments) == 3:
    arguments = _with_unit_scales(gemm, *arguments)
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


def _with_unit_scales(gemm, lhs, rhs, sizes):
  """The operands of a bf16 matmul as those of the FP8 one lie, K-major."""
  if gemm == "wgrad":
    lhs, rhs = lhs.T, rhs.T
  elif gemm == "fprop":
    rhs = rhs.swapaxes(1, 2)
  blocks = lhs.shape[1] // 128
  shape = (blocks, len(rhs)) if gemm == "wgrad" else (len(rhs), rhs.shape[1] // 128, blocks)
  return lhs, jnp.ones((blocks, len(lhs))), rhs, jnp.ones(shape), sizes


def check_gemm(gemm: str, out: Float[Array, "..."], arguments: tuple) -> float:
  """`sampled_error`, which is at most 1.

  Raises:
    CheckFailed: it is more.
  """
  error = sampled_error(gemm, out, arguments)
  if not error <= 1:
    raise CheckFailed(f"an error of {error:.3g} times its bound")
  return error


def check_rows(actual: dict[str, Array], expected: dict[str, Array]) -> dict[str, float]:
  """The norm of the difference over the expected one, of results of the same rows by name.

  One through kernels, the other through XLA. Sums in two orders: few results fall on the other side
  of a rounding, to E4M3 by 2^-3 of them, to E2M1 by a third.

  Raises:
    CheckFailed: it is more than a hundredth.
  """
  errors = {}
  for name, e in expected.items():
    a, e = (np.asarray(v, np.float64) for v in (actual[name], e))
    errors[name] = float(np.linalg.norm(a - e) / np.linalg.norm(e))
  wrong = [f"{name} {error:.3g}" for name, error in errors.items() if not error <= 0.01]
  if wrong:
    raise CheckFailed(f"differs from XLA's by more than 0.01 of the norm: {', '.join(wrong)}")
  return errors


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


def check_case(case: Case, actual: Any, expected: Any) -> bool:
  """Whether two results of `case` are equal in every bit.

  Raises:
    CheckFailed: they are not, and the case is exact, or they are not even near.
  """
  same = equal(actual, expected)
  if not same and (case.exact or not near(actual, expected)):
    raise CheckFailed("differs from its definition")
  return same


def near(actual: Sequence[Array], expected: Sequence[Array]) -> bool:
  """Whether results of SwiGLU's kernels, codes and scales, differ by exp's last bits alone.

  They move few values to the neighbouring bf16, and fewer to another E4M3 code. What is kept in
  MXFP4 is the same.
  """
  return bool(_near(tuple(actual), tuple(expected)))


@jax.jit
def _near(actual, expected):
  fine = []
  for i in range(0, len(actual) - 1, 2):
    if actual[i].dtype == jnp.uint8:
      fine += [jnp.array_equal(actual[j], expected[j]) for j in (i, i + 1)]
      continue
    a, e = (x[i].astype(jnp.float32) * jnp.repeat(x[i + 1].T, 128, 1) for x in (actual, expected))
    bound = 1e-3 + (2.0**-3 + 2.0**-7) * jnp.abs(e)
    fine += [jnp.mean(a != e) < 2e-3, jnp.all(jnp.abs(a - e) <= bound)]
  if len(actual) % 2:  # sums of products
    # XLA does not round a to bf16 on its way into the sum of 256 products.
    a, e = actual[-1], expected[-1]
    fine.append(jnp.all(jnp.abs(a - e) <= 2.0**-8 * (jnp.abs(e) + jnp.max(jnp.abs(e)))))
  return jnp.all(jnp.stack(fine))


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
