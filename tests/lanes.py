"""`packed.Word` as arrays: the instructions of Hopper, as PTX defines them, without a GPU."""

import operator

import ml_dtypes
import numpy as np


class Lanes:
  """A word of many lanes: uint32 (..., lane), or bool."""

  def __init__(self, array):
    self.array = array

  @staticmethod
  def _lift(word):
    return word.array if isinstance(word, Lanes) else np.uint32(word % 2**32)

  def _with(self, operation, other):
    return Lanes(operation(self.array, self._lift(other)))

  def _signed(self, operation, other):
    result = operation(self.array.view(np.int32), self._lift(other).view(np.int32))
    return Lanes(result if result.dtype == bool else result.view(np.uint32))

  def _reversed(self, operation, other):
    return Lanes(operation(np.full_like(self.array, self._lift(other)), self.array))

  __or__ = lambda self, other: self._with(operator.or_, other)  # noqa: E731
  __and__ = lambda self, other: self._with(operator.and_, other)  # noqa: E731
  __xor__ = lambda self, other: self._with(operator.xor, other)  # noqa: E731
  __add__ = lambda self, other: self._with(operator.add, other)  # noqa: E731
  __sub__ = lambda self, other: self._with(operator.sub, other)  # noqa: E731
  __mul__ = lambda self, other: self._with(operator.mul, other)  # noqa: E731
  __lshift__ = lambda self, other: self._with(operator.lshift, other)  # noqa: E731
  __rshift__ = lambda self, other: self._with(operator.rshift, other)  # noqa: E731
  __rsub__ = lambda self, other: self._reversed(operator.sub, other)  # noqa: E731
  __rlshift__ = lambda self, other: self._reversed(operator.lshift, other)  # noqa: E731
  __rrshift__ = lambda self, other: self._reversed(operator.rshift, other)  # noqa: E731

  def halved(self, times):
    return self._signed(operator.rshift, times)

  def min(self, other):
    return self._signed(np.minimum, other)

  def max(self, other):
    return self._signed(np.maximum, other)

  def below(self, other):
    return self._signed(operator.lt, other)

  def above(self, other):
    return self._signed(operator.gt, other)

  def equals(self, other):
    return self._with(operator.eq, other)

  def max_halves(self, other):
    a, b = np.broadcast_arrays(self.array, self._lift(other))
    high = np.maximum(a >> 16, b >> 16) << 16
    return Lanes(high | np.maximum(a & 0xFFFF, b & 0xFFFF))

  def larger_bf16(self, other):
    """As PTX defines max.NaN.xorsign.abs."""
    a, b = np.broadcast_arrays(self.array, self._lift(other))
    a, b = (np.ascontiguousarray(x).view(np.uint16) for x in (a, b))
    larger = np.maximum(a & 0x7FFF, b & 0x7FFF)
    larger = np.where(larger > 0x7F80, 0x7FFF, larger | ((a ^ b) & 0x8000))
    return Lanes(_as_words(larger.astype(np.uint16)))

  def plus_float(self, other):
    return self._floats(operator.add, other)

  def times_float(self, other):
    return self._floats(operator.mul, other)

  def times_plus_float(self, factor, summand):
    # The product is exact in float64, and its sum is rounded to float32 twice.
    return self._floats(lambda a, b, c: np.float64(a) * b + c, factor, summand)

  def exp2_float(self):
    return self._floats(np.exp2)

  def reciprocal_float(self):
    return self._floats(lambda a: np.float32(1) / a)

  def to_bf16(self, low):
    return self._pair(low, ml_dtypes.bfloat16)

  def to_float16(self, low):
    return self._pair(low, np.float16)

  def _pair(self, low, dtype):
    with np.errstate(over="ignore"):
      pair = [x.view(np.float32).astype(dtype) for x in (self._lift(low), self.array)]
    return Lanes(_as_words(np.stack(np.broadcast_arrays(*pair), -1))[..., 0])

  def to_e4m3(self, *higher):
    four = np.broadcast_arrays(self.array, *map(self._lift, higher))
    codes = np.stack([np.clip(x.view(np.float32), -448, 448) for x in four], -1)
    return Lanes(_as_words(codes.astype(ml_dtypes.float8_e4m3fn))[..., 0])

  def _floats(self, operation, *others):
    operands = [np.float32(x.view(np.float32)) for x in (self.array, *map(self._lift, others))]
    with np.errstate(all="ignore"):
      return Lanes(np.asarray(operation(*operands), np.float32).view(np.uint32))

  def times_bf16(self, other):
    a, b = np.broadcast_arrays(self.array, self._lift(other))
    with np.errstate(over="ignore", invalid="ignore"):
      return Lanes(_as_words(_as_bf16(a) * _as_bf16(b)))

  def saturated_bf16(self):
    halves = _as_bf16(self.array)
    largest = ml_dtypes.finfo(halves.dtype).max
    return Lanes(_as_words(np.clip(halves, -largest, largest).astype(halves.dtype)))

  def permute(self, other, selector):
    parts = np.broadcast_arrays(self.array, self._lift(other), self._lift(selector))
    a, b, selector = (p.astype(np.uint64) for p in parts)
    both, result = a | (b << 32), np.zeros_like(a)
    for i in range(4):
      nibble = (selector >> (4 * i)) & 15
      byte = (both >> (8 * (nibble & 7))) & 0xFF
      byte = np.where(nibble & 8, (byte >> 7) * 0xFF, byte)
      result |= byte << (8 * i)
    return Lanes(result.astype(np.uint32))

  def where(self, yes, no):
    return Lanes(np.where(self.array, self._lift(yes), self._lift(no)))

  def branch(self, rare, otherwise):
    return [self.where(a, b) for a, b in zip(rare(), otherwise, strict=True)]

  def of_lane(self, distance):
    return Lanes(self.array[..., np.arange(self.array.shape[-1]) ^ distance])

  def max_of_warp(self):
    return Lanes(np.broadcast_to(self.array.max(-1, keepdims=True), self.array.shape))


class Addresses(Lanes):
  """Addresses (warp, lane) in the shared memory `memory`, an array of bytes."""

  def __init__(self, array, memory):
    super().__init__(array)
    self.memory = memory

  def load_16_bits(self, offset):
    return Lanes(self._halves(self.array + offset).astype(np.uint32))

  def load_matrices_transposed(self, offset):
    """As PTX defines ldmatrix with .trans."""
    rows = self.array.reshape(-1, 4, 8)[..., None] + offset + 2 * np.arange(8)
    elements = self._halves(rows).astype(np.uint32)  # (warp, matrix, row, column)
    lane = np.arange(32)
    row, column = 2 * (lane % 4), lane // 4
    words = elements[:, :, row, column] | elements[:, :, row + 1, column] << 16
    return [Lanes(words[:, i]) for i in range(4)]

  def _halves(self, addresses):
    assert not (addresses % 2).any()
    return self.memory.view("<u2")[addresses // 2]


def _as_bf16(words):
  return np.ascontiguousarray(words).view(np.uint16).view(ml_dtypes.bfloat16)


def _as_words(halves):
  return np.ascontiguousarray(halves).view(np.uint32)
