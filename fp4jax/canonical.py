"""Any dimension numbers as a product of rows of tokens and a matrix.

lhs (*b, *m, k) @ rhs (*b, k, n) -> (*b, *m, n)
"""

import math
from typing import NamedTuple

from jax import lax
from jaxtyping import Array, Float


class Canonical(NamedTuple):
  lhs: Float[Array, "*b_and_m k"]
  rhs: Float[Array, "*b k n"]
  batch: int  # how many axes *b has


def canonical(
  lhs: Array,
  rhs: Array,
  dimension_numbers: lax.DotDimensionNumbers,
  token_multiple: int | None = None,
) -> Canonical:
  """The operands as lhs (*b, *m, k) and rhs (*b, k, n), with *b one axis or none, and *m one.

  With `token_multiple` axes of batches and tokens stay apart, for a sharded axis that is merged
  into another one loses its sharding. But blocks along the tokens are those of all tokens in one
  row: so many of the last axes are merged that their length is a multiple of `token_multiple`, all
  of them if it never is. XLA sums over several axes in another order than over one.
  """
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
  lhs_free = [d for d in range(lhs.ndim) if d not in (*lhs_contract, *lhs_batch)]
  rhs_free = [d for d in range(rhs.ndim) if d not in (*rhs_contract, *rhs_batch)]

  def sizes(x, dims):
    return tuple(x.shape[d] for d in dims)

  batch, tokens = sizes(lhs, lhs_batch), sizes(lhs, lhs_free)
  if token_multiple is None:
    batch, tokens = (math.prod(batch),) if batch else (), (math.prod(tokens),)
  else:
    tokens = tokens_apart(tokens, token_multiple)
  k = math.prod(sizes(lhs, lhs_contract))
  n = math.prod(sizes(rhs, rhs_free))
  lhs = lhs.transpose(*lhs_batch, *lhs_free, *lhs_contract).reshape(*batch, *tokens, k)
  rhs = rhs.transpose(*rhs_batch, *rhs_contract, *rhs_free).reshape(*batch, k, n)
  return Canonical(lhs, rhs, len(batch))


def tokens_apart(sizes: tuple[int, ...], multiple: int) -> tuple[int, ...]:
  """At least one axis, the last a multiple of `multiple` where merging can make it one."""
  for i in reversed(range(len(sizes))):
    if math.prod(sizes[i:]) % multiple == 0:
      return (*sizes[:i], math.prod(sizes[i:]))
  return (math.prod(sizes),)
