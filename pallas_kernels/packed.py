"""Several codes in a 32-bit register: the arithmetic of a lane, as instructions of Hopper.

A `Word` is a register of every lane. Functions that compute on words use nothing but its operators
and methods, so that the tests run the same functions over arrays of uint32 and prove them without a
GPU. Four codes lie in a word, the first in the lowest byte, or eight nibbles, first lowest.
"""

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

BYTES = 0x01010101  # times a byte: the byte in all four places
SIGNS = 0x80808080


class Word:
  """32 bits of a lane, or a truth value, which comparisons give. Integers are taken as words."""

  def __init__(self, value: ir.Value):
    self.value = value

  def __or__(self, other):
    return self._binary(arith.ori, other)

  def __and__(self, other):
    return self._binary(arith.andi, other)

  def __xor__(self, other):
    return self._binary(arith.xori, other)

  def __add__(self, other):
    return self._binary(arith.addi, other)

  def __sub__(self, other):
    return self._binary(arith.subi, other)

  def __mul__(self, other):
    return self._binary(arith.muli, other)

  def __lshift__(self, places):
    return self._binary(arith.shli, places)

  def __rshift__(self, places):
    return self._binary(arith.shrui, places)

  def __rsub__(self, other):
    return Word(_lift(other)) - self

  def __rlshift__(self, other):
    return Word(_lift(other)) << self

  def __rrshift__(self, other):
    return Word(_lift(other)) >> self

  def halved(self, times: int):
    """The signed number shifted right: divided by 2^times and rounded down."""
    return self._binary(arith.shrsi, times)

  def min(self, other):
    """The smaller signed number."""
    return self._binary(arith.minsi, other)

  def max(self, other):
    """The larger signed number."""
    return self._binary(arith.maxsi, other)

  def max_halves(self, other):
    """In either half of 16 bits the larger unsigned number."""
    return self._assembly("max.u16x2 $0, $1, $2;", other)

  def permute(self, other, selector):
    """Byte i is what nibble i of the selector names: 0 to 3 of self, 4 to 7 of other.

    Where the nibble has its highest bit set, the sign bit of that byte, eight times. The selector
    has four nibbles; what lies above them does not count.
    """
    return self._assembly("prmt.b32 $0, $1, $2, $3;", other, selector)

  def below(self, other):
    """Whether the signed number is smaller; `above`: larger."""
    return self._compare(arith.CmpIPredicate.slt, other)

  def above(self, other):
    return self._compare(arith.CmpIPredicate.sgt, other)

  def equals(self, other):
    return self._compare(arith.CmpIPredicate.eq, other)

  def where(self, yes, no):
    """`yes` where this truth value holds, otherwise `no`."""
    return Word(arith.select(self.value, _lift(yes), _lift(no)))

  def branch(self, rare, otherwise: list["Word"]) -> list["Word"]:
    """`rare()` in the lanes where this holds, which alone pay for it; `otherwise` in the others."""
    types = [w.value.type for w in otherwise]
    branch = scf.IfOp(self.value, types, has_else=True)
    for block, words in ((branch.then_block, rare), (branch.else_block, lambda: otherwise)):
      with ir.InsertionPoint(block):
        scf.yield_([w.value for w in words()])
    return [Word(r) for r in branch.results]

  def of_lane(self, distance: int):
    """The word of the lane whose number differs in the bit `distance`."""
    return Word(mgpu_utils.shfl_bfly(self.value, distance))

  def max_of_warp(self):
    """The largest unsigned number of the 32 lanes."""
    everyone = _lift(0xFFFFFFFF)
    return Word(nvvm.redux_sync(self.value, nvvm.ReductionKind.UMAX, everyone))

  def _binary(self, operation, other):
    return Word(operation(self.value, _lift(other)))

  def _compare(self, predicate, other):
    return Word(arith.cmpi(predicate, self.value, _lift(other)))

  def _assembly(self, code, *others):
    operands = [self.value, *map(_lift, others)]
    constraints = ",".join(["=r", *["r"] * len(operands)])
    return Word(llvm.inline_asm(operands[0].type, operands, code, constraints))


def _lift(word):
  if isinstance(word, Word):
    return word.value
  signed = (word + 2**31) % 2**32 - 2**31
  return arith.constant(ir.IntegerType.get_signless(32), signed)


def select_bits(mask: int, ones, zeros):
  """Bits of `ones` where the mask has ones, of `zeros` where it has zeros: one instruction."""
  return (ones & mask) | (zeros & (mask ^ 0xFFFFFFFF))


def largest_byte(words, lanes: int = 1):
  """The largest of all bytes of the words of `lanes` neighbouring lanes.

  Halves of 16 bits order by their upper bytes, whatever lies below those.
  """
  pairs = [w for word in words for w in (word, word.permute(0, 0x2104))]
  top = pairs[0]
  for pair in pairs[1:]:
    top = top.max_halves(pair)
  top = top.max_halves(top << 16)
  distance = 1
  while distance < lanes:
    top = top.max_halves(top.of_lane(distance))
    distance *= 2
  return top >> 24


def thread_of_warpgroup():
  """(warp, lane) of the thread."""
  thread = Word(mgpu_utils.thread_idx())
  return (thread >> 5) & 3, thread & 31


def registers(x: fa.FragmentedArray) -> list[list[Word]]:
  """The words of every register of x, in the order of its elements."""

  def part(register, i):
    value = vector.extract(
      register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
    )
    word = ir.IntegerType.get_signless(32)
    return Word(value if value.type == word else arith.bitcast(word, value))

  return [[part(r, i) for i in range(ir.VectorType(r.type).shape[0])] for r in x.registers.flat]


def fragmented(words: list[list[Word]], shape, dtype, layout: plgpu.Layout) -> fa.FragmentedArray:
  """The array whose registers hold these words, of which a uint8 keeps the lowest byte."""
  layout = layout.to_mgpu()
  element = mgpu_utils.dtype_to_ir_type(np.dtype(dtype))

  def value(word):
    if isinstance(element, ir.IntegerType):
      return word.value if element.width == 32 else arith.trunci(element, word.value)
    return arith.bitcast(element, word.value)

  array = np.empty(len(words), object)
  for i, parts in enumerate(words):
    array[i] = vector.from_elements(
      ir.VectorType.get((len(parts),), element), [value(w) for w in parts]
    )
  signed = False if isinstance(element, ir.IntegerType) else None
  array = array.reshape(layout.registers_shape(shape))
  return fa.FragmentedArray(_registers=array, _layout=layout, _is_signed=signed)
