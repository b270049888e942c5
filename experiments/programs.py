"""How training and rollouts are compiled: to round where the code does.

By itself XLA keeps float32 between operations that it fuses where bfloat16 is asked for, and fuses
one program unlike another: a decoding step and a pass over whole sequences, a step on one device
and on four. That sets their activations a few units in the last place apart; an operand in 4 bits
turns such a difference into a whole step of its grid. The same arm in rollout and trainer then
looks like two, and a gradient depends on the mesh by more than the order of sums.
"""

import functools
from collections.abc import Callable

import jax

from fp4jax.models.generation import COMPILER_OPTIONS


def compiler(excess_precision: bool = False, decodes: bool = False) -> Callable[..., Callable]:
  """jax.jit that rounds where the code does or, with `excess_precision`, as XLA does by itself.

  `decodes`: with the options that `generate` has by itself, too.
  """
  options = {"xla_allow_excess_precision": excess_precision}
  options |= COMPILER_OPTIONS if decodes else {}
  return functools.partial(jax.jit, compiler_options=options)


compiled, decoding = compiler(), compiler(decodes=True)
