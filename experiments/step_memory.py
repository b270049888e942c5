"""Device memory of a training step of every recipe, each in a process of its own.

    python -m experiments.step_memory --config=configs/moe_1b.py --out=results/moe_1b_memory.jsonl

A device counts the peak of a process and never resets it, hence the processes.
"""

import concurrent.futures
import functools
import multiprocessing
import os

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import command_line, data, logs
from experiments.checks import validate
from experiments.config import Experiment
from experiments.environment import COMMIT, describe_environment
from experiments.mesh import make_mesh
from experiments.train import make_trainer, policy_of
from fp4jax import recipes

_CONFIG = command_line.define_config()
_OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
_STEPS = 3


def measure(config: Experiment, commit: str | None, recipe: str) -> dict:
  """Bytes: of the state, of what the compiler plans beside it, and the device's peak over steps.

  The peak is None on a device that does not count, such as a CPU.
  """
  corpus = data.load_corpus(config.data)
  batches = data.batches(corpus, config.data, 0, "train")
  policy = policy_of(recipes.by_name(recipe), config)
  trainer = make_trainer(config, corpus.vocab_size, policy, make_mesh(config))
  seed = jnp.int32(0)
  state = jax.eval_shape(trainer.init, seed)
  # Compiled before anything is on the device, so that no tuning run adds to the peak.
  step = trainer.step.lower(state, batches[0], seed).compile()
  state = trainer.init(seed)
  for i in range(_STEPS):
    state, _ = jax.block_until_ready(step(state, batches[i], seed))
  environment = describe_environment(commit)
  return {
    "recipe": recipe,
    "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    "temp_bytes": step.memory_analysis().temp_size_in_bytes,
    "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    "tokens_per_step": config.data.batch_size * config.data.sequence_length,
  } | {key: environment[key] for key in ("device", "git_commit", "git_dirty", "versions")}


def main(_) -> None:
  config = _CONFIG.value
  validate(config)
  # A child takes what it uses, so that there may be others on the device.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  log = logs.Rewritten(_OUT.value)
  processes = concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
  )
  with processes as pool:
    rows = pool.map(functools.partial(measure, config, COMMIT.value), config.recipes)
    for row in rows:
      log.write(row)
      peak = "uncounted" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
      print(f"{row['recipe']:20s} peak {peak}, temporaries {row['temp_bytes'] / 1e9:.2f} GB")
  log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
