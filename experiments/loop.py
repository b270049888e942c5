"""One run from its last checkpoint, or its first step, to its end, writing as it goes."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from experiments import data, logs, probes
from experiments.checkpoints import Checkpoints
from experiments.config import Experiment
from experiments.mesh import BATCH
from experiments.optimizers import learning_rate
from experiments.processes import Group
from experiments.train import Trainer, TrainState
from experiments.workdir import Run

LOGS = ("metrics", "probes", "timing")


class Interrupted(Exception):
  """Signal `number` asked the run to stop, and it has saved if it saves at all."""

  def __init__(self, message: str, number: int):
    super().__init__(message)
    self.number = number


def train_run(
  run: Run,
  config: Experiment,
  corpus: data.Corpus,
  phases: Sequence[tuple[int, Trainer]],
  gemm_seconds: Sequence[float | None],
  progress: logs.Progress,
  asked_to_stop: Callable[[], int | None],
  group: Group | None = None,
  mesh: Mesh | None = None,
) -> None:
  """Trains `run` to its end on the `mesh` of its trainers, with all processes of `group`, of which
  the first writes.

  `phases` are trainers with the step from which each trains, the first at 0: what is measured after
  a step runs under the policy of the next one, after the last step under the last policy.
  `gemm_seconds` are what the GEMMs of a step of each phase take at the peak of the device, None
  where it is not known; over the time of a step, that is its row's `flops_utilization`.
  Rows behind the checkpoint from which the run resumes are from a process that died, and are cut
  off. `asked_to_stop` tells the number of the signal that did; all processes stop after the step in
  which one of them was asked.
  """
  group = group or Group()
  if stop := _first(group.gather(asked_to_stop())):
    raise Interrupted(f"stopped before {run.name}; the same command goes on from there", stop)
  seed = jnp.int32(run.seed)
  place = mesh and NamedSharding(mesh, BATCH)
  train = data.batches(corpus, config.data, run.seed, "train", place)
  validation = data.batches(corpus, config.data, run.seed, "validation", place)
  validation = [validation[i] for i in range(min(config.eval_batches, len(validation)))]
  schedule = learning_rate(config.optimizer, config.steps)
  label = {"recipe": run.recipe, "seed": run.seed}

  def trainer_of(step: int) -> Trainer:
    return [trainer for start, trainer in phases if start <= step][-1]

  def abstract_state(step: int) -> TrainState:
    return trainer_of(step).init.eval_shape(seed)

  def utilization_of(step: int, step_time: float) -> float | None:
    pairs = zip(phases, gemm_seconds, strict=True)
    seconds = [own for (start, _), own in pairs if start <= step][-1]
    return None if seconds is None else seconds / step_time

  with contextlib.ExitStack() as stack:
    closing = lambda resource: stack.enter_context(contextlib.closing(resource))  # noqa: E731
    checkpoints = closing(Checkpoints(run.folder / "checkpoints", config.checkpoints_kept, group))
    restored = checkpoints.restore_latest(abstract_state)
    if restored is None:
      if (step := run.finished_at()) is not None:
        raise ValueError(
          f"{run.folder} has no checkpoint of its last step, {step}, to go on from; "
          "remove the folder to train that run from its first"
        )
      start, state, offsets = 0, trainer_of(0).init(seed), dict.fromkeys(LOGS, 0)
    else:
      start, state, metadata = restored
      offsets = metadata["offsets"]
      logging.info("%s resumes from its checkpoint of step %d", run.name, start)
    saved = restored and start
    if group.index == 0:
      rows = {name: closing(log) for name, log in run.open_logs(offsets).items()}
      board = closing(logs.TensorBoard(run.folder / "tensorboard", start + 1 if restored else None))
    else:
      rows, board = dict.fromkeys(LOGS, logs.Nowhere()), logs.Nowhere()

    def write(log: str, step: int, row: dict) -> None:
      rows[log].write(label | {"step": step} | row)

    def evaluate(step: int) -> None:
      loss_of = trainer_of(step).evaluate
      losses = [loss_of(state, batch, seed, i) for i, batch in enumerate(validation)]
      loss = float(np.mean(losses))
      write("metrics", step, {"split": "validation", "loss": loss})
      board.write(step, {"validation/loss": loss})

    def probe(step: int, tokens: np.ndarray | jax.Array) -> list[dict]:
      trainer = trainer_of(step)
      taps = jax.device_get(trainer.probe(state, tokens, seed))
      found = probes.probe_rows(taps, trainer.policy, config.model.num_layers)
      for row in found:
        write("probes", step, row)
      board.write(step, probes.scalars(found))
      return found

    def save(step: int) -> None:
      nonlocal saved
      lengths = {name: log.sync() for name, log in rows.items()}
      if config.checkpoint_every and saved != step:
        checkpoints.save(step, state, {"offsets": lengths})
        saved = step

    progress.start(run.name, config.steps, start)
    if start == 0:
      evaluate(0)
      if config.probe_every:
        probe(0, validation[0])
    batch, done, diverged = train[start], start, False
    for step in range(start, config.steps):
      began = time.perf_counter()
      state, scalars = trainer_of(step).step(state, batch, seed)
      following = train[step + 1]  # gathered while the device computes
      stop = _first(group.gather(asked_to_stop()))  # as is this
      scalars = jax.device_get(scalars)
      step_time = time.perf_counter() - began
      load = scalars.pop("expert_load", None)
      scalars = {name: float(value) for name, value in scalars.items()}
      if not (math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"])):
        where = probes.first_non_finite(probe(step, batch)) if config.probe_every else None
        where = where and {"step": step} | where
        write("metrics", step, {"split": "event", "event": "diverged", "probe": where})
        logging.warning("%s diverged at step %d: %s", run.name, step, scalars)
        diverged, done = True, step
        save(step)
        break
      done = step + 1
      last = done == config.steps
      if trainer_of(done) is not trainer_of(step):
        state = trainer_of(done).adopt(state)
      if done % config.log_every == 0 or last:
        scalars["learning_rate"] = float(schedule(step))
        write("metrics", done, {"split": "train"} | scalars)
        tokens_per_s = config.data.batch_size * config.data.sequence_length / step_time
        timing = {"step_time_ms": step_time * 1e3, "tokens_per_s": tokens_per_s}
        timing["flops_utilization"] = utilization_of(step, step_time)
        write("timing", done, timing)
        board.write(done, {f"train/{name}": value for name, value in scalars.items()})
        known = {name: value for name, value in timing.items() if value is not None}
        board.write(done, {f"timing/{name}": value for name, value in known.items()})
      progress.update(done, scalars["loss"])
      if done % config.eval_every == 0 or last:
        evaluate(done)
        if load is not None:
          write("metrics", done, {"split": "routing", "load": np.round(load, 6).tolist()})
          busiest = load.shape[-1] * float(load.max(axis=-1).mean())
          board.write(done, {"routing/busiest_expert": busiest})
      if config.probe_every and (done % config.probe_every == 0 or last):
        probe(done, validation[0])
      batch = following
      if last or stop or (config.checkpoint_every and done % config.checkpoint_every == 0):
        save(done)
      if stop and not last:
        raise Interrupted(
          f"{run.name} saved its state after step {done} and stopped; "
          "the same command goes on from there"
          if config.checkpoint_every
          else f"{run.name} stopped after step {done} without a checkpoint; "
          "the same command begins it again",
          stop,
        )
    progress.end()
  if group.index == 0:
    run.finish(done, diverged)
  group.gather(None)  # none begins the next run, or a report, before


def _first(numbers: Sequence[int | None]) -> int | None:
  """Of the signal that a process was sent."""
  return next(filter(None, numbers), None)
