"""Speed and memory of a training step by what it computes again, for every recipe.

    python -m experiments.recompute_table --config=configs/moe_10b.py --out=results/recompute.jsonl

All steps are compiled at once, into JAX's cache; then each is measured in a process of its own, for
a device counts the peak of a process and never resets it. A step for which memory does not suffice
is a row too. `make tables` puts the rows into docs/results.md.
"""

import concurrent.futures
import dataclasses
import functools
import os
import tempfile
import time
from typing import get_args
from unittest import mock

from absl import app, flags

from experiments import command_line, data, logs
from experiments.apart import alone
from experiments.checks import validate
from experiments.config import Experiment
from experiments.environment import COMMIT
from experiments.mesh import make_mesh
from experiments.step_cost import (
  compile_all,
  gigabytes,
  lower_step,
  measure_step,
  planned_bytes,
)
from experiments.train import make_trainer, policy_of
from fp4jax import recipes
from fp4jax.models.remat import Remat

_CONFIG = command_line.define_config()
_OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
_POLICIES = flags.DEFINE_list(
  "policies", [*reversed(get_args(Remat))], "Values of model.remat to measure."
)
command_line.allow("policies", get_args(Remat))
_ROUNDS = flags.DEFINE_integer("rounds", 8, "Timed steps of each.", lower_bound=2)
_COMPILERS = flags.DEFINE_integer("compilers", 4, "Processes that compile at once.", lower_bound=1)
_TIMEOUT_S = flags.DEFINE_float("timeout_s", 120, "For one measurement, the start included.")
# A step's temporaries are one piece of up to half the memory. A pool that grows has it from the
# driver; the pool that JAX otherwise takes at once refused 44 GB where the plan left 74 of 138 (why
# is not known). The driver's own, cuda_async, gives a step's memory back and maps it anew each
# time: steps took 1.2 to 1.5 times as long.
_MEMORY = {
  "XLA_PYTHON_CLIENT_ALLOCATOR": "default",
  "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
}
Cell = tuple[Experiment, str]  # a recipe, under the policy that the config names


def cells_of(config: Experiment, policies: list[str]) -> list[Cell]:
  models = [dataclasses.replace(config.model, remat=policy) for policy in policies]
  configs = [dataclasses.replace(config, model=model) for model in models]
  return [(config, recipe) for config in configs for recipe in config.recipes]


def plan(cells: list[Cell]) -> list[dict[str, int | None]]:
  """Compiles the step of each; what it will need, which a program from a cache may not tell."""
  mesh = make_mesh(cells[0][0])
  vocab_size = data.load_corpus(cells[0][0].data).vocab_size

  def lowered(config, recipe):
    policy = policy_of(recipes.by_name(recipe), config)
    return lower_step(make_trainer(config, vocab_size, policy, mesh), config, mesh)

  return [planned_bytes(step) for step in compile_all(lowered(*cell) for cell in cells)]


def plan_at_once(cells: list[Cell], processes: int) -> list[dict[str, int | None]]:
  """`plan`, with every so many of the cells in a process: lowering holds Python's lock."""
  shares = [cells[i::processes] for i in range(processes)]
  with (
    # A process takes what its tuning uses, so that there is room for the others.
    mock.patch.dict(os.environ, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
    concurrent.futures.ThreadPoolExecutor(processes) as pool,
  ):
    found = list(pool.map(functools.partial(alone, plan), shares))
  return [found[i % processes][i // processes] for i in range(len(cells))]


def main(_) -> None:
  config = _CONFIG.value
  validate(config)
  cells = cells_of(config, [policy for policy in _POLICIES.value if policy])
  if not cells:
    raise ValueError(f"--policies is empty; name one of {', '.join(get_args(Remat))}")
  log = logs.Rewritten(_OUT.value)
  with tempfile.TemporaryDirectory() as folder:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # cuDNN's attention is partitioned by a function whose address would be part of the key.
    os.environ["JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY"] = "true"
    for name, value in _MEMORY.items():
      os.environ.setdefault(name, value)
    began = time.monotonic()
    planned = plan_at_once(cells, min(_COMPILERS.value, len(cells)))
    print(f"{len(cells)} steps compiled in {time.monotonic() - began:.0f} s", flush=True)
    failed = []
    for (config, recipe), sizes in zip(cells, planned, strict=True):
      name = f"{config.model.remat:24s} {recipe:20s}"
      try:
        row = alone(
          measure_step, config, recipe, _ROUNDS.value, COMMIT.value, timeout_s=_TIMEOUT_S.value
        )
      except ChildProcessError as error:
        failed.append(name.strip())
        print(f"{name} failed: {error}", flush=True)
        continue
      row |= sizes
      log.write(row)
      print(f"{name} {_said(row)}", flush=True)
  log.close()
  if failed:
    raise ChildProcessError(f"{len(failed)} of {len(cells)} failed: {'; '.join(failed)}")


def _said(row):
  planned = f"{gigabytes(row['argument_bytes'])} and {gigabytes(row['temp_bytes'])} planned"
  if row["oom"]:
    asked, free = (gigabytes(row[name]) for name in ("oom_bytes", "largest_free_bytes"))
    return f"out of memory: {asked} asked, largest free piece {free}; {planned}"
  speed = f"{row['tokens_per_gpu_s']:,.0f} tokens per GPU and second"
  return f"{speed}, peak {gigabytes(row['peak_bytes'])}, {planned}"


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
