"""What BF16, FP8 and HOPPER_FP4 have room to keep for the backward pass, on two H200.

Claim: where attention and norms are computed again, HOPPER_FP4 needs 18 points less of the memory
than FP8 (106 and 131 GB of the 143 that a process may have); FP8 has no room to keep all,
HOPPER_FP4 has, and its fastest step is 1.10 times as fast as FP8's fastest. With twice the batch
FP8 can keep nothing, and HOPPER_FP4 is 1.11 times as fast. Without a loop over the layers FP8 has
room to keep all, and HOPPER_FP4 is 1.02 times as fast. arXiv 2603.02731 reports the like of 671
billion parameters on 256 GPUs.
Command: .venv/bin/python -m experiments.recompute_table --config=configs/moe_10b.py \\
    --rounds=5 --out=results/recompute.jsonl
Cost: 12 programs that compile at once, in a minute, then 12 measurements of half a minute each,
with steps of 65,536 tokens, on two H200 of one host. On four GPUs of 80 GB:
--config.mesh.expert=4
Expected: tokens per GPU and second, where nothing is computed again, 32,400 in HOPPER_FP4; where
attention and norms are, 30,500, 29,400 in FP8, 20,600 in BF16.

10.2 billion parameters, 2.9 billion of them active: 12 layers of 8 experts of 4096 x 16,384 and
8192 x 4096, 2 per token. Each GPU has its share of a layer's experts and room for 1.25 times its
share of the choices; all else is on every GPU. Attention stays in bf16.
"""

from experiments.config import Experiment, Names
from fp4jax.models import ModelConfig


def get_config() -> Experiment:
  config = Experiment(
    recipes=Names(("bf16", "fp8_dispatch", "hopper_fp4_dispatch")),
    steps=900,
    probe_every=0,
    checkpoint_every=0,
    implementation="mosaic",
    model=ModelConfig(
      num_layers=12,
      d_model=4096,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      num_experts=8,
      top_k=2,
      d_ff=8192,
    ),
  )
  config.quantize.attention = False
  config.data.sequence_length = 4096
  config.data.batch_size = 16
  config.mesh.expert = 2
  config.mesh.capacity_factor = 1.25
  # As in moe_wide.py, where one expert otherwise took most tokens.
  config.optimizer.learning_rate = 2e-4
  config.optimizer.load_balance_weight = 0.05
  config.optimizer.warmup_steps = 100
  return config
