"""GRPO on a mixture of experts of a hundred million parameters, taught on the task's own text.

Claim: with three seeds of each one arm's reward of 18 is told from BF16's, free or replayed: that
of MXFP4 with the routing free, 0.005 below. Outlier fallback takes MXFP4's rollout_kl, the median
over the steps, to a seventh, and leaves half of the tokens that would be sent elsewhere; macro
blocks alone change little, and NVFP4 is as far as MXFP4. Replay makes rollout_kl 1.3 to 1.9 times
smaller.
Command: .venv/bin/python -m experiments.rl --config=configs/rl_moe.py --workdir=runs/rl_moe \\
    --config.seeds=3
    and, from a copy of its policy, with --config.rollout.replay_routing=true
Cost: 400 steps of teaching with 512 problems each, in half a minute, then 30 runs of 60 steps with
1024 answers each, on one GPU. The command started several times shares the runs: with three of each
of these two at once, 60 runs took ten minutes on one GPU.
Expected: the taught policy names any of three numbers, and begins with a reward of 0.22.
"""

from configs.rl_smollm2 import ARMS
from experiments.comparison import Names
from experiments.rl.config import RLExperiment
from experiments.tasks import TaskSettings
from fp4jax.models import ModelConfig


def get_config() -> RLExperiment:
  config = RLExperiment(
    arms=Names((*ARMS, "mxfp4@rollout")),
    steps=60,
    eval_every=15,
    probe_every=30,
    checkpoint_every=0,
    task=TaskSettings("configs.rl_demo:largest", held_out=512),
    model=ModelConfig(
      num_layers=8,
      d_model=512,
      num_heads=8,
      num_kv_heads=4,
      head_dim=64,
      num_experts=16,
      top_k=2,
      d_ff=512,
    ),
  )
  config.start.teaching.steps = 400
  config.start.teaching.batch_size = 512
  config.start.teaching.learning_rate = 1e-3
  config.start.teaching.warmup_steps = 50
  config.rollout.prompts = 64
  config.rollout.group = 16
  config.rollout.max_prompt_tokens = 9
  config.rollout.max_new_tokens = 4
  config.optimizer.learning_rate = 2e-4
  config.optimizer.warmup_steps = 5
  return config
