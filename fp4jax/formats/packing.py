"""Codes of n bits, packed along one axis: the first code of a byte in its low bits."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8


def codes_per_group(bits: int) -> int:
  """Codes that fill whole bytes: 2 of 4 bits in one, 4 of 6 bits in three."""
  return math.lcm(bits, 8) // bits


def pack(codes: UInt8[Array, "*s"], bits: int, axis: int) -> UInt8[Array, "*packed"]:
  """Little-endian bits; the length of `axis` is a multiple of `codes_per_group`."""
  if bits == 8:
    return codes
  axis %= codes.ndim
  if bits == 4:
    return _pack_nibbles(codes, axis)
  groups = _split(codes, codes_per_group(bits), axis)
  return _join(_regroup(groups, bits, 8), codes, axis, bits / 8)


def unpack(packed: UInt8[Array, "*packed"], bits: int, axis: int) -> UInt8[Array, "*s"]:
  if bits == 8:
    return packed
  axis %= packed.ndim
  if bits == 4:
    # Shifts rather than a stack, which XLA would write to memory before it decodes.
    pairs = (jnp.expand_dims(packed, axis + 1) >> _nibble_shifts(packed.ndim + 1, axis + 1)) & 15
    return pairs.reshape(*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :])
  groups = _split(packed, codes_per_group(bits) * bits // 8, axis)
  return _join(_regroup(groups, 8, bits), packed, axis, 8 / bits)


def _regroup(groups, before, after):
  """The bits of numbers of `before` bits along the last axis, as numbers of `after` bits."""
  place = lambda n: jnp.arange(n, dtype=jnp.uint8).reshape([1] * groups.ndim + [n])  # noqa: E731
  stream = (groups[..., None] >> place(before)) & 1
  stream = stream.reshape(*groups.shape[:-1], groups.shape[-1] * before // after, after)
  return jnp.sum(stream << place(after), axis=-1, dtype=jnp.uint8)


def _split(x, group, axis):
  """x with `axis` last, in groups: (*rest, number, group)."""
  x = jnp.moveaxis(x, axis, -1)
  return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _join(groups, like, axis, ratio):
  length = round(like.shape[axis] * ratio)
  rest = [n for i, n in enumerate(like.shape) if i != axis]
  return jnp.moveaxis(groups.reshape(*rest, length), -1, axis)


def _pack_nibbles(codes, axis):
  before, n, after = codes.shape[:axis], codes.shape[axis], codes.shape[axis + 1 :]
  pairs = codes.reshape(*before, n // 2, 2, *after)  # not -1, which an empty tensor leaves open
  shifts = _nibble_shifts(pairs.ndim, axis + 1)
  # A reduction rather than two strided slices, with which XLA's CPU loop is 7 times slower.
  return lax.reduce(pairs << shifts, jnp.uint8(0), lax.bitwise_or, (axis + 1,))


def _nibble_shifts(ndim, axis):
  return jnp.array([0, 4], jnp.uint8).reshape([2 if i == axis else 1 for i in range(ndim)])
