"""One run from its last checkpoint, or its first step, to its end, writing as it goes."""

import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from experiments import data, logs, probes
from experiments.config import Experiment
from experiments.mesh import BATCH
from experiments.optimizers import learning_rate
from experiments.processes import Group
from experiments.session import RunSession
from experiments.train import Trainer, TrainState
from experiments.workdir import Run

LOGS = ("metrics", "probes", "timing")


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
  the first writes; see `RunSession` for how it resumes and stops.

  `phases` are trainers with the step from which each trains, the first at 0: what is measured after
  a step runs under the policy of the next one, after the last step under the last policy.
  `gemm_seconds` are what the GEMMs of a step of each phase take at the peak of the device, None
  where it is not known; over the time of a step, that is its row's `flops_utilization`.
  """
  with RunSession(run, config, LOGS, asked_to_stop, group or Group()) as session:
    seed = jnp.int32(run.seed)
    place = mesh and NamedSharding(mesh, BATCH)
    train = data.batches(corpus, config.data, run.seed, "train", place)
    validation = data.batches(corpus, config.data, run.seed, "validation", place)
    validation = [validation[i] for i in range(min(config.eval_batches, len(validation)))]
    schedule = learning_rate(config.optimizer, config.steps)

    def trainer_of(step: int) -> Trainer:
      return [trainer for start, trainer in phases if start <= step][-1]

    def abstract_state(step: int) -> TrainState:
      return trainer_of(step).init.eval_shape(seed)

    def utilization_of(step: int, step_time: float) -> float | None:
      pairs = zip(phases, gemm_seconds, strict=True)
      seconds = [own for (start, _), own in pairs if start <= step][-1]
      return None if seconds is None else seconds / step_time

    def evaluate(step: int) -> None:
      loss_of = trainer_of(step).evaluate
      losses = [loss_of(state, batch, seed, i) for i, batch in enumerate(validation)]
      loss = float(np.mean(losses))
      session.write("metrics", step, {"split": "validation", "loss": loss})
      session.scalars(step, {"validation/loss": loss})

    def probe(step: int, tokens: np.ndarray | jax.Array) -> list[dict]:
      trainer = trainer_of(step)
      taps = jax.device_get(trainer.probe(state, tokens, seed))
      found = probes.probe_rows(taps, trainer.policy, config.model.num_layers)
      for row in found:
        session.write("probes", step, row)
      session.scalars(step, probes.scalars(found))
      return found

    start, state = session.restore(abstract_state, lambda: trainer_of(0).init(seed))
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
      stop = session.stop()  # as is this
      scalars = jax.device_get(scalars)
      step_time = time.perf_counter() - began
      load = scalars.pop("expert_load", None)
      scalars = {name: float(value) for name, value in scalars.items()}
      if not (math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"])):
        where = probes.first_non_finite(probe(step, batch)) if config.probe_every else None
        where = where and {"step": step} | where
        session.write("metrics", step, {"split": "event", "event": "diverged", "probe": where})
        logging.warning("%s diverged at step %d: %s", run.name, step, scalars)
        diverged, done = True, step
        session.save(step, state)
        break
      done = step + 1
      last = done == config.steps
      if trainer_of(done) is not trainer_of(step):
        state = trainer_of(done).adopt(state)
      if done % config.log_every == 0 or last:
        scalars["learning_rate"] = float(schedule(step))
        session.write("metrics", done, {"split": "train"} | scalars)
        tokens_per_s = config.data.batch_size * config.data.sequence_length / step_time
        timing = {"step_time_ms": step_time * 1e3, "tokens_per_s": tokens_per_s}
        timing["flops_utilization"] = utilization_of(step, step_time)
        session.write("timing", done, timing)
        session.scalars(done, {f"train/{name}": value for name, value in scalars.items()})
        session.scalars(done, {f"timing/{name}": value for name, value in timing.items()})
      progress.update(done, scalars["loss"])
      if done % config.eval_every == 0 or last:
        evaluate(done)
        if load is not None:
          session.write("metrics", done, {"split": "routing", "load": np.round(load, 6).tolist()})
          busiest = load.shape[-1] * float(load.max(axis=-1).mean())
          session.scalars(done, {"routing/busiest_expert": busiest})
      if config.probe_every and (done % config.probe_every == 0 or last):
        probe(done, validation[0])
      batch = following
      session.end_step(done, state, stop)
    progress.end()
    session.finish(done, diverged)
