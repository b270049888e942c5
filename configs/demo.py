"""BF16, FP8 and three kinds of FP4 on a small MoE language model.

Claim: on the same text, weights and batches, naive MXFP4 in all GEMMs trains visibly worse than
BF16, FP8 does not, and scale bias is the largest part of the FP4 error.
Command: make demo
"""

from experiments.config import Experiment


def get_config() -> Experiment:
  config = Experiment()
  return config
