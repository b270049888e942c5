"""bf16 grouped matmuls, the baseline of the FP8 ones: JAX's own Mosaic GPU kernels, configured.

out[rows of g] = lhs[rows of g] @ rhs[g]              `grouped_matmul`
out[g] = lhs[rows of g].T @ rhs[rows of g]            `grouped_wgrad`
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

TUNING = {
  "matmul": dict(block_m=128, block_n=192, block_k=64, max_concurrent_steps=4, grid_block_n=8),
  "wgrad": dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=8),
}


def grouped_matmul(lhs, rhs, group_sizes, *, transpose_rhs=False):
  """Rows of lhs in consecutive groups, each times its rhs; what lies past them is unspecified.

  Args:
    lhs: (m, k) bfloat16.
    rhs: (e, k, n) bfloat16, or (e, n, k) with `transpose_rhs`; k a multiple of 64, n of 128.
    group_sizes: (e,) int32, summing to at most m.

  Returns:
    (m, n) bfloat16, accumulated in float32.
  """
  _check(lhs, rhs)
  return ragged_dot_mgpu.ragged_dot(
    lhs, rhs, group_sizes=group_sizes, transpose_rhs=transpose_rhs, **TUNING["matmul"]
  )


def grouped_wgrad(lhs, rhs, group_sizes):
  """(e, k, n) bfloat16 of lhs (m, k) and rhs (m, n); zeros for a group of size 0."""
  _check(lhs, rhs)
  # The kernel leaves an accumulator that nothing was added to as it found it.
  out = transposed_ragged_dot_mgpu.transposed_ragged_dot(
    lhs, rhs, group_sizes=group_sizes, **TUNING["wgrad"]
  )
  return jnp.where((group_sizes > 0)[:, None, None], out, 0)


def _check(*operands):
  for x in operands:
    if x.dtype != jnp.bfloat16:
      raise TypeError(f"an operand is {x.dtype}, not bfloat16")
