"""BF16, FP8 and HOPPER_FP4 on a mixture of experts of a billion parameters, on one Hopper GPU.

Claim: over 2000 steps four seeds tell neither HOPPER_FP4 nor FP8 in the experts' GEMMs from BF16,
while HOPPER_FP4 keeps two thirds of the bytes of activations that BF16 keeps.
Command: .venv/bin/python -m experiments.run --config=configs/moe_1b.py --workdir=runs/moe_1b
Cost: 12 runs of 2000 steps of 4096 tokens, 8 million per run: the standard library once or less, by
how much of it is installed. At 41 to 44 ms per step it takes 18 minutes on one H100 beside the
compiling, and 20 GB. There are no checkpoints (12 GB each), so a stopped run begins again;
`--config.checkpoint_every=500` keeps them.
Expected: losses near 0.99 nats, 2 below the unigram entropy of the validation bytes; the intervals
of both gaps hold 0. One seed alone ends up to 1.4 % from BF16.

1,033 million parameters, 126 million of them active: each expert is 1024 x 2048 and 1024 x 1024,
40 a layer, 4 a token, so that the experts alone are 1,007 million and 101 million active. Attention
stays in bf16, so that the recipes differ in the experts alone.
"""

from experiments.config import Experiment, Names
from fp4jax.models import ModelConfig


def get_config() -> Experiment:
  config = Experiment(
    recipes=Names(("bf16", "hopper_fp4", "fp8")),
    seeds=4,
    steps=2000,
    log_every=10,
    eval_every=100,
    eval_batches=16,
    probe_every=0,
    checkpoint_every=0,
    implementation="mosaic",
    model=ModelConfig(
      num_layers=8,
      d_model=1024,
      num_heads=8,
      num_kv_heads=4,
      head_dim=128,
      num_experts=40,
      top_k=4,
      d_ff=1024,
    ),
  )
  config.quantize.attention = False
  config.data.sequence_length = 512
  config.data.batch_size = 8
  config.optimizer.learning_rate = 5e-4
  config.optimizer.warmup_steps = 100
  return config
