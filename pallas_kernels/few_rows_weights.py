"""Packed weights as operand A of wgmma: from codes in shared memory to bf16 in registers.

A tile has 64 values along k and 128 columns, which are the operand's rows. A thread holds columns
of either 64 of them: lane 4g + c of a warp columns 2g and 2g + 1 of the warp's 16, which are rows g
and g + 8 to wgmma, at 2c and 2c + 1 of every 8 along k. `load_mxfp4` and `load_e4m3` give its
words, two bf16 each, in the order of the layout: of either 64 columns, for each 16 along k, the
pairs of the first 8 and then those of the last 8, of column 2g and of 2g + 1.
"""

from pallas_kernels import packed as pk
from pallas_kernels.e2m1 import expand

COLUMNS = 128  # of a tile: 128 bytes of codes, one row of a swizzle pattern
STEP = 64  # along k
BLOCK = 32  # of MXFP4
TILE = 128  # of a scale of E4M3, along k and along n


def values(word, scales):
  """Four words of two bf16 values, of four bytes of E2M1 nibbles.

  Args:
    word: bytes of the columns 0, 1, 0, 1, two values of k in each.
    scales: words, the E8M0 codes of columns 0 and 1, both below 128.
  """
  factors = [(scale + 126) * 0x00800080 for scale in scales]
  return [v.times_bf16(factors[i % 2]) for i, v in enumerate(expand(word))]


def values_of_any_scale(word, scales):
  """As `values`; saturated, NaN where the scale is 255."""
  result = []
  for i, v in enumerate(expand(word)):
    scale = scales[i % 2]
    factor = scale.equals(0).where(0x00400040, scale * 0x00800080)
    factor = scale.equals(255).where(0x7FC07FC0, factor)
    result.append(v.times_bf16(0x7E807E80).times_bf16(factor).saturated_bf16())
  return result


def mxfp4_address(warp, lane):
  """Byte of a tile's codes (32, 128) that a lane names to `ldmatrix` for the first step of 16.

  Of the four matrices of 8 rows x 16 bytes that a lane's octet names, the first two have the 8 rows
  (of two k each) of one step of 16 and the columns of a warp in either 64; the others those of the
  next step. Rows come in the order 0, 4, 1, 5, ..: transposed, a lane of the group's four gets rows
  c and c + 4 of two columns, which is what it holds of wgmma's operand. Chunks of 16 bytes are
  swizzled.
  """
  matrix, i = lane >> 3, lane & 7
  row = (i >> 1) | ((i & 1) << 2)
  chunk = (((matrix & 1) << 2) | warp) ^ row
  return ((matrix >> 1) << 10) + (row << 7) + (chunk << 4)


def scale_address(warp, lane):
  """Byte of a row of scales (128,) at which a lane's two columns of the first 64 begin."""
  return (warp << 4) + ((lane >> 2) << 1)


def load_mxfp4(codes, scales):
  """The words of a thread, of values times their scales.

  Args:
    codes: address of the codes (32, 128) of a tile, to which `mxfp4_address` is added.
    scales: address of its scales (2, 128), to which `scale_address` is added.
  """
  halves = [[], []]
  for block in range(STEP // BLOCK):
    words = codes.load_matrices_transposed(2048 * block)
    pairs = [scales.load_16_bits(COLUMNS * block + 64 * half) for half in (0, 1)]
    own = [[pair & 0xFF, pair >> 8] for pair in pairs]
    jobs = [(word, own[half]) for half in (0, 1) for word in words[half::2]]
    usual = [v for job in jobs for v in values(*job)]

    def rare(jobs=jobs):
      return [v for job in jobs for v in values_of_any_scale(*job)]

    result = ((pairs[0] | pairs[1]) & 0x8080).above(0).branch(rare, usual)
    for half in (0, 1):
      halves[half] += result[8 * half : 8 * half + 8]
  return halves[0] + halves[1]


def e4m3_addresses(warp, lane):
  """Bytes of a tile's codes (64, 128) that a lane names to `ldmatrix`, for either 64 columns.

  The four matrices of 8 rows x 16 bytes are 32 rows one below the other, of the 16 columns of a
  warp. Chunks of 16 bytes are swizzled.
  """
  return [(lane << 7) + (((warp | half << 2) ^ (lane & 7)) << 4) for half in (0, 1)]


def e4m3_pair(word):
  """Two bf16 of the E4M3 codes in bytes 1 and 3 of a word; those of NaN are 480.

  E4M3's seven bits of magnitude are the lowest of bf16's exponent and the highest of its fraction,
  its subnormals bf16's, times 2^-120.
  """
  apart = pk.select_bits(0x80008000, word, (word >> 4) & 0x07F007F0)
  return apart.times_bf16(0x7B807B80)


def load_e4m3(codes):
  """The words of a thread, of values without their scale.

  Args:
    codes: two addresses of the codes (64, 128) of a tile, to which `e4m3_addresses` are added.
  """
  words = []
  for address in codes:
    for block in range(2):
      for word in address.load_matrices_transposed(COLUMNS * 32 * block):
        words += [e4m3_pair(word << 8), e4m3_pair(word)]
  return words
