"""What the kernels compute with instructions of their own, as an emulator can run it.

A kernel's loads, stores, loops and indices are then emulated, and races between warpgroups found;
within one the emulator has a single thread. That its lanes compute the same as these is shown in
`test_eights`; that registers hold what their layouts say, partly in `test_kernels`, shows a GPU.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from fp4jax.swiglu import swiglu, swiglu_backward
from pallas_kernels import blocks, e2m1, e4m3, gather, transpose
from pallas_kernels import swiglu as kernels

_GRID = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@contextlib.contextmanager
def in_place():
  """While a kernel is traced that has not been traced before."""
  with contextlib.ExitStack() as stack:
    for module, name, stand_in in (
      (blocks, "largest", _largest),
      (e4m3, "_codes", lambda x, inverse, layout: e4m3.rounded(x, inverse[..., None])),
      (e2m1, "values", _values),
      (kernels, "quantize_blocks", _quantize_blocks),
      (kernels, "_forward", _forward),
      (kernels, "_backward", _backward),
      (transpose, "write", _write),
      (transpose, "read", lambda smem: smem[...].T.reshape(-1, *transpose.BLOCKS)),
      (gather, "_gathered", _gathered),
    ):
      stack.enter_context(mock.patch.object(module, name, stand_in))
    jax.clear_caches()
    stack.callback(jax.clear_caches)
    yield


def _largest(x, layout):
  del layout
  return blocks.bits(jnp.max(jnp.abs(x), axis=x.ndim - 1).astype(jnp.float32))


def _values(words, scales, layout):
  del layout
  nibble = words[..., None] >> (4 * jnp.arange(8, dtype=jnp.uint32))
  magnitude = jnp.select([(nibble & 7) == i for i in range(8)], list(_GRID))
  scale = jnp.exp2(scales.astype(jnp.float32) - 127)[..., None, None]
  return (jnp.where(nibble & 8, -magnitude, magnitude) * scale).astype(jnp.bfloat16)


def _quantize_blocks(x, rule, layout):
  """To nearest, ties to the even code, with the rule "floor"."""
  assert rule == "floor"
  x = x.astype(jnp.float32)
  code = jnp.maximum((jnp.max(_largest(x, layout), axis=x.ndim - 2) >> 23) - 2, 0)
  magnitude = jnp.abs(x) * jnp.exp2(127.0 - code)[..., None, None]
  nibble = jnp.where(blocks.bits(x) < 0, jnp.uint32(8), jnp.uint32(0))
  for below, midpoint in enumerate((_GRID[1:] + _GRID[:-1]) / 2):
    passed = magnitude >= midpoint if below % 2 else magnitude > midpoint
    nibble += passed.astype(jnp.uint32)
  words = jnp.sum(
    nibble << (4 * jnp.arange(8, dtype=jnp.uint32)), axis=x.ndim - 1, dtype=jnp.uint32
  )
  return words, code.astype(jnp.uint8)


def _forward(gate, up):
  return _apart(swiglu(_together(gate, up)))


def _backward(gate, up, g, after):
  a, dh, _ = swiglu_backward(_together(gate, up), g.reshape(len(g), -1), after[:, None])
  # The sum of a row lies in its first lane.
  plain, _, _ = swiglu_backward(_together(gate, up), g.reshape(len(g), -1), jnp.ones((len(g), 1)))
  sums = jnp.sum(_apart(plain).astype(jnp.float32) * g.astype(jnp.float32), axis=3)
  return *map(_apart, jnp.split(dh, 2, axis=1)), _apart(a), sums


def _together(gate, up):
  return jnp.concatenate([x.reshape(len(x), -1) for x in (gate, up)], axis=1)


def _apart(x):
  return x.reshape(len(x), *transpose.BLOCKS)


def _write(parts, smem):
  smem[...] = jnp.concatenate([part.reshape(len(part), -1) for part in parts])


def _gathered(x_gmem, rows, column):
  return jnp.stack([x_gmem[rows[i], column] for i in range(8)])
