"""SwiGLU and its backward pass on words of two bf16, in float32, as instructions of Hopper.

exp is 2 to a product that is rounded to float32: off by 2^-20 of its value at |x| = 8, by more
beyond, and by 2^-22 near 0. A sigmoid below 2^-126 is 0.
"""

import math

from pallas_kernels import packed as pk

_ONE = pk.float_bits(1.0)
_SIGN = 0x80000000


def forward(gate, up):
  """silu(gate) * up, rounded to bf16."""
  low, high = (
    _silu(g)[0].times_float(u) for g, u in zip(pk.floats([gate]), pk.floats([up]), strict=True)
  )
  return high.to_bf16(low)


def backward(gate, up, g, after):
  """What the backward pass needs of a = silu(gate) * up, given the gradient g of its result.

  a and da = after * g are rounded to bf16 first, as are the results.

  Args:
    gate, up, g: two bf16 each.
    after: a float32, of both.

  Returns:
    the gradients of gate and up, and a * after; and the float32 sum of the two a * g.
  """
  gates, ups, gs = pk.floats([gate]), pk.floats([up]), pk.floats([g])
  silus, sigmoids = zip(*(_silu(x) for x in gates), strict=True)
  a = _rounded([s.times_float(u) for s, u in zip(silus, ups, strict=True)])
  da = _rounded([x.times_float(after) for x in gs])
  dgates = []
  for x, u, d, sigmoid in zip(gates, ups, da, sigmoids, strict=True):
    dsilu = d.times_float(u)
    slope = (sigmoid ^ _SIGN).times_plus_float(sigmoid, sigmoid)
    dgates.append(dsilu.times_float(x).times_plus_float(slope, dsilu.times_float(sigmoid)))
  dups = [d.times_float(s) for d, s in zip(da, silus, strict=True)]
  results = dgates, dups, [x.times_float(after) for x in a]
  product = a[0].times_plus_float(gs[0], a[1].times_float(gs[1]))
  return *(high.to_bf16(low) for low, high in results), product


def _silu(x):
  """x * sigmoid, sigmoid."""
  exp = x.times_float(pk.float_bits(-math.log2(math.e))).exp2_float()
  sigmoid = exp.plus_float(_ONE).reciprocal_float()
  return x.times_float(sigmoid), sigmoid


def _rounded(pair):
  """Two float32 rounded to bf16, as float32."""
  low, high = pair
  return pk.floats([high.to_bf16(low)])
