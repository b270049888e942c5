"""Several codes, or numbers, in a 32-bit register: the arithmetic of a lane, as instructions of
Hopper.

A `Word` is a register of every lane. Functions that compute on words use nothing but its operators
and methods, so that the tests run the same functions over arrays of uint32 and prove them without a
GPU. Four codes lie in a word, the first in the lowest byte, or eight nibbles, first lowest.
"""

import jax.numpy as jnp
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

  def larger_bf16(self, other):
    """In either half the larger magnitude of two bf16, of either sign; NaN if one is."""
    return self._assembly("max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", other)

  def times_bf16(self, other):
    """In either half the product of two bf16, rounded to nearest; subnormals are kept."""
    return self._assembly("mul.rn.bf16x2 $0, $1, $2;", other)

  def saturated_bf16(self):
    """In either half a bf16, infinity replaced by the largest number; NaN stays."""
    low = self._assembly("min.NaN.bf16x2 $0, $1, $2;", 0x7F7F7F7F)
    return low._assembly("max.NaN.bf16x2 $0, $1, $2;", 0xFF7FFF7F)

  # Words as the bits of float32. Products and sums are rounded apart but in `times_plus_float`.

  def plus_float(self, other):
    return self._assembly("add.rn.f32 $0, $1, $2;", other)

  def times_float(self, other):
    return self._assembly("mul.rn.f32 $0, $1, $2;", other)

  def times_plus_float(self, factor, summand):
    return self._assembly("fma.rn.f32 $0, $1, $2, $3;", factor, summand)

  def exp2_float(self):
    """2 to the number, off by 2 units in the last place at most; 0 below 2^-126."""
    return self._assembly("ex2.approx.ftz.f32 $0, $1;")

  def reciprocal_float(self):
    """Off by one unit in the last place at most; 0 below 2^-126."""
    return self._assembly("rcp.approx.ftz.f32 $0, $1;")

  def to_bf16(self, low):
    """This float32 and `low` rounded to bf16, nearest-even, `low` in the lower half."""
    return self._assembly("cvt.rn.bf16x2.f32 $0, $1, $2;", low)

  def to_float16(self, low):
    """As `to_bf16`, to float16."""
    return self._assembly("cvt.rn.f16x2.f32 $0, $1, $2;", low)

  def to_e4m3(self, *higher):
    """This float32 and three others rounded to E4M3, nearest-even, saturated: from the lowest byte
    up."""
    code = "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1;"
    code += " cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; mov.b32 $0, {l, h}; }"
    return self._assembly(code, *higher)

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

  # Addresses in shared memory. These stay where they are among barriers.

  def load_matrices_transposed(self, offset: int):
    """Words of four 8 x 8 matrices of 16 bits, of rows of 16 bytes: lane 8 i + j has the address of
    row j of matrix i, to which `offset` is added, and gets elements (2 (lane % 4), lane // 4) and,
    in the upper half, (2 (lane % 4) + 1, lane // 4)."""
    code = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4 + %d];"
    return _memory(code % offset, [self.value], 4)

  def make_barrier(self):
    """Of one arrival; TMA and the other threads see it after the next barrier of theirs."""
    _memory(
      "mbarrier.init.shared.b64 [$0], 1; fence.mbarrier_init.release.cluster;", [self.value], 0
    )

  def wait_barrier(self, parity: "Word"):
    """Until the phase of that parity is over."""
    code = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [$0], $1;"
    _memory(code + " @!done bra again; }", [self.value, parity.value], 0)

  def load_16_bits(self, offset: int):
    code = "{ .reg .b16 h; ld.shared.b16 h, [$1 + %d]; cvt.u32.u16 $0, h; }"
    return _memory(code % offset, [self.value], 1)[0]

  def load_shared(self, words: int):
    return self._load("shared", words)

  def of_cta(self, rank: int):
    """The address of the same place of another CTA of the cluster."""
    return _memory(f"mapa.shared::cluster.u32 $0, $1, {rank};", [self.value], 1)[0]

  def load_cluster(self, words: int):
    return self._load("shared::cluster", words)

  def _load(self, space, words):
    out = ", ".join(f"${i}" for i in range(words))
    code = f"ld.{space}.v{words}.b32 {{{out}}}, [${words}];"
    return _memory(code, [self.value], words)

  def store_shared(self, words: list["Word"]):
    sources = ", ".join(f"${i + 1}" for i in range(len(words)))
    code = f"st.shared.v{len(words)}.b32 [$0], {{{sources}}};"
    _memory(code, [self.value, *(w.value for w in words)], 0)


def _lift(word):
  if isinstance(word, Word):
    return word.value
  signed = (word + 2**31) % 2**32 - 2**31
  return arith.constant(ir.IntegerType.get_signless(32), signed)


def _memory(code, operands, results):
  """Assembly that reads or writes memory: its result words."""
  word = ir.IntegerType.get_signless(32)
  constraints = [
    "l" if isinstance(o.type, ir.IntegerType) and o.type.width == 64 else "r" for o in operands
  ]
  constraints = ",".join(["=r"] * results + constraints + ["~{memory}"])
  types = [None, word][results] if results < 2 else llvm.StructType.get_literal([word] * results)
  out = llvm.inline_asm(types, operands, code, constraints, has_side_effects=True)
  if results < 2:
    return [Word(out)] * results
  return [Word(llvm.extractvalue(word, out, [i])) for i in range(results)]


def address_of(ref) -> Word:
  """Of a reference to shared memory."""
  return Word(llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu_utils.memref_ptr(ref)))


def pointer_to(ref) -> ir.Value:
  """64 bits, of a reference to global memory."""
  return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu_utils.memref_ptr(ref))


def store_global(pointer: ir.Value, offset: Word, words: list[Word]):
  """Two words at so many bytes, below 2^31, past the pointer."""
  wide = arith.extui(pointer.type, offset.value)
  _memory(
    "st.global.v2.b32 [$0], {$1, $2};", [arith.addi(pointer, wide), *(w.value for w in words)], 0
  )


def when(condition: Word, body):
  """body() in the lanes where the condition holds."""
  branch = scf.IfOp(condition.value)
  with ir.InsertionPoint(branch.then_block):
    body()
    scf.yield_([])


def barrier_of_cta():
  _memory("bar.sync 0;", [], 0)


def barrier_of_cluster(*, release: bool = True):
  """What was written before it, in any CTA of the cluster, can be read after it, with `release`."""
  order = "release" if release else "relaxed"
  _memory(f"barrier.cluster.arrive.{order}; barrier.cluster.wait.acquire;", [], 0)


def rank_in_cluster() -> Word:
  return _memory("mov.u32 $0, %cluster_ctarank;", [], 1)[0]


def thread_of_cta() -> Word:
  return Word(mgpu_utils.thread_idx())


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


def float_bits(number: float) -> int:
  """The word of a float32."""
  return int(np.float32(number).view(np.uint32))


def floats(pairs):
  """The bf16 of the words, two in each, as float32, the lower first."""
  return [half for pair in pairs for half in (pair << 16, pair & 0xFFFF0000)]


def largest_float(words):
  """The bits of the largest magnitude of float32; a NaN is above all."""
  top, *others = (w & 0x7FFFFFFF for w in words)
  for word in others:
    top = top.max(word)
  return top


def largest_half(pairs):
  """The largest magnitude of bf16 numbers as the bits of a float32, or a NaN's."""
  top, *others = pairs
  for pair in others:
    top = top.larger_bf16(pair)
  return top.larger_bf16(top << 16) & 0x7FFF0000


def thread_of_warpgroup():
  """(warp, lane) of the thread."""
  thread = Word(mgpu_utils.thread_idx())
  return (thread >> 5) & 3, thread & 31


def registers(x: fa.FragmentedArray) -> list[list[Word]]:
  """The words of every register of x: one for each element, or for two bf16 that are neighbours."""
  word = ir.IntegerType.get_signless(32)

  def words(register):
    vector_type = ir.VectorType(register.type)
    if isinstance(vector_type.element_type, ir.BF16Type):
      (size,) = vector_type.shape
      register = vector.bitcast(ir.VectorType.get((size // 2,), word), register)
    for i in range(ir.VectorType(register.type).shape[0]):
      value = vector.extract(
        register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
      )
      yield Word(value if value.type == word else arith.bitcast(word, value))

  return [list(words(r)) for r in x.registers.flat]


def fragmented(words: list[list[Word]], shape, dtype, layout: plgpu.Layout) -> fa.FragmentedArray:
  """The array whose registers hold these words: an element each, of which a uint8 keeps the lowest
  byte, or two bf16, or four E4M3."""
  layout, dtype = layout.to_mgpu(), np.dtype(dtype)
  element = mgpu_utils.dtype_to_ir_type(dtype)
  together = dtype in (jnp.bfloat16, jnp.float8_e4m3fn)

  def value(word):
    if together or element == word.value.type:
      return word.value
    if isinstance(element, ir.IntegerType):
      return arith.trunci(element, word.value)
    return arith.bitcast(element, word.value)

  array = np.empty(len(words), object)
  for i, parts in enumerate(words):
    values = [value(w) for w in parts]
    array[i] = vector.from_elements(ir.VectorType.get((len(parts),), values[0].type), values)
    if together:
      size = len(parts) * 4 // dtype.itemsize
      array[i] = vector.bitcast(ir.VectorType.get((size,), element), array[i])
  signed = False if isinstance(element, ir.IntegerType) else None
  array = array.reshape(layout.registers_shape(shape))
  return fa.FragmentedArray(_registers=array, _layout=layout, _is_signed=signed)
