"""What a training step costs, behind `step_time`, `step_memory` and `recompute_table`."""

import concurrent.futures
import dataclasses
import re
import statistics
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments import data
from experiments.config import Experiment
from experiments.environment import describe_environment
from experiments.mesh import BATCH, first_devices, make_mesh, mesh_sizes
from experiments.train import Trainer, make_trainer, parameter_counts, policy_of
from fp4jax import recipes

_BYTES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def lower_step(trainer: Trainer, config: Experiment, mesh: Mesh | None) -> jax.stages.Lowered:
  """For a state and a batch that are not there yet, so that nothing is on a device."""
  seed = jax.ShapeDtypeStruct((), jnp.int32)
  state = trainer.init.eval_shape(seed)
  shape = config.data.batch_size, config.data.sequence_length + 1
  place = mesh and NamedSharding(mesh, BATCH)
  return trainer.step.lower(state, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place), seed)


def compile_all(programs: Iterable[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
  """In threads, each as soon as it is lowered: XLA compiles without Python's lock."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    waiting = [pool.submit(program.compile) for program in programs]
    return [compiled.result() for compiled in waiting]


def planned_bytes(step: jax.stages.Compiled) -> dict[str, int | None]:
  """What the compiler plans for each device: what a step is given, and what it needs beside it;
  None for a program from a cache that does not keep it."""
  sizes = step.memory_analysis()
  return {
    "argument_bytes": sizes and sizes.argument_size_in_bytes,
    "temp_bytes": sizes and sizes.temp_size_in_bytes,
  }


def measure_step(
  config: Experiment, recipe: str, rounds: int, commit: str | None = None
) -> dict[str, Any]:
  """A row: what the compiler plans, the times of `rounds` steps after a first one, the largest peak
  of the devices, which is that of the process, and what each may have; both None where a device
  does not count, such as a CPU. Where memory does not suffice, in place of times and peak, what was
  asked for in one piece, what was in use, and the largest piece that was free.
  """
  corpus, devices = data.load_corpus(config.data), first_devices()
  mesh, policy = make_mesh(config, devices), policy_of(recipes.by_name(recipe), config)
  place = mesh and NamedSharding(mesh, BATCH)
  batches = data.batches(corpus, config.data, 0, "train", place)
  trainer = make_trainer(config, corpus.vocab_size, policy, mesh)
  # Compiled before anything is on the device, so that no tuning run adds to the peak.
  step = lower_step(trainer, config, mesh).compile()
  told = describe_step(config, len(devices)) | parameter_counts(config, corpus.vocab_size)
  limits = _of_memory(devices, "bytes_limit")
  row = {"recipe": recipe, "remat": config.model.remat} | planned_bytes(step)
  row["limit_bytes"] = None if None in limits else min(limits) or None  # cuda_async says 0
  try:
    times, dropped = _run(trainer, step, batches, rounds)
  except jax.errors.JaxRuntimeError as error:
    if "out of memory" not in str(error).lower():
      raise
    used, free = (_of_memory(devices, n) for n in ("bytes_in_use", "largest_free_block_bytes"))
    row |= {"oom": True, "oom_bytes": asked_bytes(str(error))}
    row["used_bytes"] = None if None in used else max(used)
    row["largest_free_bytes"] = None if None in free else min(free)
  else:
    peaks = _of_memory(devices, "peak_bytes_in_use")
    median = statistics.median(times)
    row |= {
      "oom": False,
      "peak_bytes": None if None in peaks else max(peaks),
      "step_time_ms": median,
      "step_time_quartiles_ms": statistics.quantiles(times, n=4)[::2],
      "rounds": rounds,
      "tokens_per_gpu_s": told["tokens_per_step"] / len(devices) / median * 1e3,
      "dropped": statistics.fmean(dropped) if dropped else None,
    }
  return row | told | {"model": dataclasses.asdict(config.model)} | describe_source(commit)


def _of_memory(devices, name: str) -> list[int | None]:
  return [(device.memory_stats() or {}).get(name) for device in devices]


def _run(trainer, step, batches, rounds):
  """Milliseconds of each step but the first, and the shares of the choices that were dropped."""
  seed = jnp.int32(0)
  state = trainer.init(seed)
  times, dropped = [], []
  for i in range(rounds + 1):
    batch = batches[i]
    began = time.perf_counter()
    state, scalars = jax.block_until_ready(step(state, batch, seed))
    times.append((time.perf_counter() - began) * 1e3)
    if "dropped" in scalars:
      dropped.append(float(scalars["dropped"]))
  return times[1:], dropped


def busiest_device(scalars: dict, devices: int) -> float | None:
  """Choices of the experts on the busiest of `devices`, over the mean, averaged over the layers."""
  if (load := scalars.get("expert_load")) is None:
    return None
  by_device = np.asarray(load).reshape(len(load), devices, -1).sum(axis=2)
  return float(np.mean(by_device.max(axis=1) / by_device.mean(axis=1)))


def asked_bytes(message: str) -> int | None:
  """Of the allocation that failed, by XLA's message: "... to allocate 58.13GiB"."""
  found = re.search(rf"allocate ([\d.]+) ?({'|'.join(_BYTES)})", message)
  return found and round(float(found[1]) * _BYTES[found[2]])


def gigabytes(size: int | None) -> str:
  return "unknown" if size is None else f"{size / 1e9:.2f} GB"


def describe_step(config: Experiment, devices: int) -> dict[str, Any]:
  """What a row says of the work of a step, and of what shares it."""
  return {
    "tokens_per_step": config.data.batch_size * config.data.sequence_length,
    "sequence_length": config.data.sequence_length,
    "devices": devices,
    "mesh": mesh_sizes(config, devices),
    "capacity_factor": config.mesh.capacity_factor,
  }


def describe_source(commit: str | None) -> dict[str, Any]:
  """What a row says of where it comes from."""
  environment = describe_environment(commit)
  return {key: environment[key] for key in ("device", "git_commit", "git_dirty", "versions")}
