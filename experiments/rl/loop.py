"""One arm with one seed from its last checkpoint, or its first step, to its end."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from experiments import logs, probes
from experiments.optimizers import learning_rate
from experiments.processes import Group
from experiments.rl.config import RLExperiment
from experiments.rl.learner import Learner
from experiments.session import RunSession
from experiments.workdir import Run

LOGS = ("metrics", "probes", "timing", "samples")


def train_run(
  run: Run,
  config: RLExperiment,
  learner: Learner,
  params: Any,
  progress: logs.Progress,
  asked_to_stop: Callable[[], int | None],
) -> None:
  """Trains the policy that begins with `params`, which are also its reference, to the end of `run`;
  see `RunSession` for how it resumes and stops.

  Rows of "metrics" have the split "train": what a step sampled and what its updates said of it;
  "held_out": the answers to held-out problems after so many steps; or "gap", beside the rows of
  "probes": how far rollout and trainer are apart where no routing is replayed.
  """
  seed = run.seed
  updates = config.grpo.iterations * config.grpo.minibatches
  schedule = learning_rate(config.optimizer, config.steps * updates)
  with RunSession(run, config, LOGS, asked_to_stop, Group()) as session:

    def evaluate(step: int) -> None:
      said, told = learner.evaluate(state.params)
      session.write("metrics", step, {"split": "held_out"} | said)
      session.scalars(step, {f"held_out/{name}": value for name, value in said.items()})
      for sample in told:
        session.write("samples", step, sample)

    def probe(step: int, answers) -> None:
      rows, said = learner.probe(state, answers, params, seed, step)
      session.write("metrics", step, {"split": "gap"} | said)
      session.scalars(step, said | probes.scalars(rows))
      for row in rows:
        session.write("probes", step, row)

    start, state = session.restore(
      lambda _: jax.eval_shape(learner.trainer.init, params), lambda: learner.trainer.init(params)
    )
    progress.start(run.name, config.steps, start)
    if start == 0:
      evaluate(0)
    done, diverged = start, False
    for step in range(start, config.steps):
      began = time.perf_counter()
      answers, said = learner.collect(state.params, seed, step)
      sampled = time.perf_counter()
      if config.probe_every and step % config.probe_every == 0:
        probe(step, answers)
      probed = time.perf_counter()
      state, of_update = learner.update(state, answers, params, seed, step)
      stop, now = session.stop(), time.perf_counter()
      if not (math.isfinite(of_update["loss"]) and math.isfinite(of_update["grad_norm"])):
        session.write("metrics", step, {"split": "event", "event": "diverged"})
        logging.warning("%s diverged at step %d: %s", run.name, step, of_update)
        diverged, done = True, step
        session.save(step, state)
        break
      done = step + 1
      last = done == config.steps
      if done % config.log_every == 0 or last:
        said["noise"] = learner.noise(step)
        said["learning_rate"] = float(schedule(updates * step))
        said |= of_update
        session.write("metrics", done, {"split": "train"} | said)
        session.scalars(done, {f"train/{name}": value for name, value in said.items()})
        rollout_s, update_s = sampled - began, now - probed
        timing = {
          "step_time_ms": 1e3 * (rollout_s + update_s),
          "rollout_ms": 1e3 * rollout_s,
          "update_ms": 1e3 * update_s,
          "rollout_tokens_per_s": said["length"] * said["sampled"] / rollout_s,
        }
        session.write("timing", done, timing)
        session.scalars(done, {f"timing/{name}": value for name, value in timing.items()})
      progress.update(done, said["reward"])
      if done % config.eval_every == 0 or last:
        evaluate(done)
      session.end_step(done, state, stop)
    progress.end()
    session.finish(done, diverged)
