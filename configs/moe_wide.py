"""BF16, FP8 and HOPPER_FP4 where experts are wide enough to show what a step gains, on one GPU.

Claim: at width 4096 a whole training step is 1.31 times as fast in HOPPER_FP4 and FP8 as in BF16 on
one Hopper GPU, and 1.46 times with --config.quantize.attention=true; HOPPER_FP4 takes 0.84 of
BF16's memory, and after 29 million tokens neither ends more than 0.6 % above BF16 (95 %, three
seeds, paired).
Command: .venv/bin/python -m experiments.run --config=configs/moe_wide.py --workdir=runs/moe_wide
Cost: 9 runs of 900 steps of 32,768 tokens, 29 million per run: a sixth of the source text of the
packages in .venv, which constraints.txt pins. At 0.09 to 0.11 s per step it takes a quarter of an
hour on one H200, and 24 GB. There are no checkpoints (11 GB each), so a stopped run begins again.
Expected: the tables of docs/results.md.

891 million parameters, 286 million of them active: each expert is 4096 x 8192 and 4096 x 4096, 8 a
layer, 2 per token. Attention stays in bf16, so that the recipes differ in the experts alone.
"""

from experiments.config import Experiment, Names
from fp4jax.models import ModelConfig


def get_config() -> Experiment:
  config = Experiment(
    recipes=Names(("bf16", "hopper_fp4", "fp8")),
    seeds=3,
    steps=900,
    log_every=10,
    eval_every=100,
    eval_batches=8,
    probe_every=0,
    checkpoint_every=0,
    implementation="mosaic",
    weights_once=True,
    model=ModelConfig(
      num_layers=2,
      d_model=4096,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      num_experts=8,
      top_k=2,
      d_ff=4096,
      unroll=True,
    ),
  )
  config.quantize.attention = False
  # Packages alone: what lies beside their folders tells where this checkout is.
  config.data.path = ".venv/lib/python3.12/site-packages/[a-z]*/**/*.py"
  config.data.validation_fraction = 0.02
  config.data.sequence_length = 512
  config.data.batch_size = 64
  # At 4e-4 with the usual weight of 0.01 (b5af4a98e) one expert took 68 to 88 % of the tokens.
  config.optimizer.learning_rate = 2e-4
  config.optimizer.load_balance_weight = 0.05
  config.optimizer.warmup_steps = 100
  return config
