"""What a training step costs, behind `step_time`."""

import concurrent.futures
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from experiments.config import Experiment
from experiments.environment import describe_environment
from experiments.mesh import BATCH, mesh_sizes
from experiments.train import Trainer

_SOURCE = ("device", "git_commit", "git_dirty", "versions")


def lower_step(trainer: Trainer, config: Experiment, mesh: Mesh | None) -> jax.stages.Lowered:
  """For a state and a batch that are not there yet, so that nothing is on a device."""
  seed = jax.ShapeDtypeStruct((), jnp.int32)
  state = jax.eval_shape(trainer.init, seed)
  shape = config.data.batch_size, config.data.sequence_length + 1
  place = mesh and NamedSharding(mesh, BATCH)
  return trainer.step.lower(state, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place), seed)


def compile_all(programs: Iterable[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
  """In threads, each as soon as it is lowered: XLA compiles without Python's lock."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    waiting = [pool.submit(program.compile) for program in programs]
    return [compiled.result() for compiled in waiting]


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
  return {key: environment[key] for key in _SOURCE}
