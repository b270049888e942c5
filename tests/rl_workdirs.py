"""Workdirs of reinforcement learning that never ran, whose every number can be told by hand."""

import json
from pathlib import Path

from workdirs import log_of, operand_row, write_rows

ARMS = ("bf16", "mxfp4", "mxfp4.deadzone@backward")
PATHS = {
  "mxfp4": [("rollout", "fprop"), ("forward", "fprop")],
  "mxfp4+aqn@rollout": [("rollout", "fprop")],
  "mxfp4.deadzone@backward": [("backward", "dgrad"), ("backward", "wgrad")],
}


def make_rl_workdir(
  path: Path,
  *,
  arms=ARMS,
  seeds=3,
  steps=20,
  at_end=None,
  is_dense=False,
  replays=False,
  probes=True,
  diverged=None,
  stopped_at=None,
  share_right=1,
) -> Path:
  """Held-out reward is 0.25 at step 0 and of seed s `at_end[arm][s]` at the last, by default 0.75.

  Of arm a: reward in training step / 100 + a / 10 + s / 1000, token_mult_prob_error 1 + a / 10
  but 1.5 + a in step 3, router flips a / 10. Of the held-out reward `share_right` is of answers
  worth 1. `diverged` (arm, seed, step) ends that run.
  """
  path.mkdir(parents=True)
  config = {"arms": list(arms), "seeds": seeds, "steps": steps}
  config |= {"task": {"name": "toys:largest", "held_out": 64}}
  config["rollout"] = {"prompts": 4, "group": 8, "replay_routing": replays}
  (path / "config.json").write_text(json.dumps(config))
  (path / "environment.json").write_text(json.dumps({"parameters": 7, "device": "a CPU"}))
  logs = {"metrics": [], "timing": [], "samples": [], "probes": []}
  for a, arm in enumerate(arms):
    for seed in range(seeds):
      run = {"recipe": arm, "seed": seed}
      diverges = diverged is not None and diverged[:2] == (arm, seed)
      planned = steps if stopped_at is None else stopped_at
      ends = diverged[2] if diverges else planned
      for step in range(ends + 1):
        now = run | {"step": step}
        if step:
          logs["metrics"].append(now | train_row(a, seed, step))
          logs["timing"].append(now | timing_row(a, step))
        if step % 10 == 0 or step == steps:
          last = at_end[arm][seed] if at_end else 0.75
          reward = 0.25 + (last - 0.25) * step / steps
          own = {"reward": reward, "accuracy": reward * share_right, "entropy": 0.5}
          logs["metrics"].append(now | {"split": "held_out"} | own)
          answer = {"question": "7 & 9?", "expected": "<9>", "answer": f"{a}{seed}{step}\n"}
          logs["samples"].append(now | answer | {"reward": 0.5})
          if step < steps:
            logs["metrics"].append(now | gap_row(a, is_dense))
            logs["probes"] += probe_rows(now) if probes else []
      if diverges:
        logs["metrics"].append(run | {"step": ends, "split": "event", "event": "diverged"})
  for name, rows in logs.items():
    write_rows(log_of(path, name), rows)
  return path


def train_row(a, seed, step):
  error = 1.5 + a if step == 3 else 1 + a / 10
  return {
    "split": "train",
    "reward": step / 100 + a / 10 + seed / 1000,
    "entropy": 2 - step / 100,
    "length": 5 + a,
    "truncated": 0.0,
    "groups/mixed": 1 / step,
    "noise": 0.01 / step if a == 1 else 0.0,
    "learning_rate": 1e-3,
    "loss": 0.0,
    "grad_norm": 0.0 if step == 2 else 1.0 + a,
    "pg_clipfrac": 0.0,
    "is_ratio/max": 1.0,
    "ppo_kl": a / 100,
    "rollout_kl": 9.0 * a if step == 3 else a / 50,
    "sampler_trainer/logp_diff_mean": a / 20,
    "sampler_trainer/logp_diff_max": a / 2 * step,
    "token_mult_prob_error": error,
    "sampler_is/weight_mean": 1 - a / 100,
    "sampler_is/weight_min": 1 - a / 10,
  }


def timing_row(a, step):
  """The first compiles; an arm is twice as slow as the one before."""
  slow = 1000 if step == 1 else 1
  return {
    "step_time_ms": 10.0 * 2**a * slow,
    "rollout_ms": 4.0 * 2**a * slow,
    "update_ms": 6.0 * 2**a * slow,
    "rollout_tokens_per_s": 4000 / 2**a / slow,
  }


def gap_row(a, is_dense):
  row = {"split": "gap", "unreplayed/token_mult_prob_error": 1 + a, "unreplayed/ppo_kl": a}
  flips = {"router_flips/tokens": a / 10, "router_flips/choices": a / 40}
  return row | ({} if is_dense else flips)


def probe_rows(now):
  """The rollout's error is 20 dB below its tensor, the trainer's 16 dB."""
  rows = []
  for path, gemm in PATHS.get(now["recipe"], ()):
    for side in ("lhs", "rhs"):
      row = operand_row(now["recipe"], f"{gemm} {side}", 20.0 if path == "rollout" else 16.0)
      rows.append(row | now | {"path": path, "format": "MXFP4", "scale_rule": "rceil"})
      rows[-1] |= {"flushed": 0.1, "clipped": 0.0, "gain": 1.0, "cosine": -0.5}
  return rows
