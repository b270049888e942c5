"""Parameters by what they are."""

from flax import nnx


class Matrix(nnx.Param):
  """The weights of a GEMM, or of a stack of GEMMs: what weight decay shrinks."""
