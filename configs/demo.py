"""BF16, FP8 and three kinds of FP4 on a small mixture-of-experts language model.

Claim: from the same weights over the same batches, MXFP4 in all three GEMMs ends above BF16, FP8 is
not told apart from it, and an ideal scale would remove about a quarter of MXFP4's squared error:
the rest is the grid's. Two seeds are too few for the first half, eight tell.
Command: make demo
    and for eight seeds .venv/bin/python -m experiments.run --config=configs/demo.py \\
    --workdir=runs/demo --config.seeds=8
Cost: 10 runs of 80 steps, 164 thousand tokens each; under 5 minutes and 4 GiB on 2 CPU cores, half
of it compiling.
Expected: BF16 ends at least 0.8 nats below the unigram entropy of the validation bytes; the README
has the table of one run.
"""

from experiments.config import Experiment


def get_config() -> Experiment:
  config = Experiment(seeds=2, steps=80, checkpoint_every=40)
  config.optimizer.learning_rate = 4e-3
  return config
