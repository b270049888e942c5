"""How the passes of a rollout and of its trainer are compiled: to round where the code does.

By itself XLA keeps float32 between operations that it fuses where bfloat16 is asked for, and fuses
a decoding step and a pass over whole sequences differently. In bf16 that sets their logits a few
units in the last place apart; an operand in 4 bits turns such a difference into one of a whole step
of its grid, and the same arm on both sides looks like two.
"""

import functools
from collections.abc import Callable

import jax


def compiler(excess_precision: bool = False) -> Callable[..., Callable]:
  """jax.jit that rounds where the code does or, with `excess_precision`, as XLA does by itself."""
  options = {"xla_allow_excess_precision": excess_precision}
  return functools.partial(jax.jit, compiler_options=options)


compiled = compiler()
