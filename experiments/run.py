"""Trains a model under several recipes and reports how they diverge.

    python -m experiments.run --config=configs/demo.py --workdir=runs/demo
    ... --config.recipes=bf16,mxfp4 --config.seeds=3 --config.model.num_layers=6

The same command goes on where a stopped one left off. SIGTERM and Ctrl-C save first, unless
`checkpoint_every` is 0; the status is 143 or 130.
"""

from experiments.stop_signals import StopSignals

if __name__ == "__main__":
  _STOP = StopSignals().listen()  # before the imports that take seconds and start threads

import contextlib
import sys
from pathlib import Path

from absl import app

from experiments import command_line, data, logs
from experiments.config import Experiment, validate
from experiments.environment import COMMIT, describe_environment
from experiments.loop import Interrupted, train_run
from experiments.report import write_report
from experiments.speed_of_light import at_peak, flops_by_dtype, seconds_at_peak
from experiments.summary import write_summary
from experiments.train import (
  make_trainer,
  parameter_counts,
  saved_activation_bytes,
  schedule_of,
)
from experiments.workdir import WorkDir
from fp4jax.implementation import choose, device_obstacle

_CONFIG = command_line.define_config()
_WORKDIR = command_line.define_workdir("Folder of this experiment.")


def main(_) -> None:
  try:
    run(_CONFIG.value, _WORKDIR.value, _STOP, COMMIT.value)
  except Interrupted as stopped:
    print(f"\n{stopped}", file=sys.stderr)
    sys.exit(128 + stopped.number)


def run(
  config: Experiment,
  workdir: str | Path,
  stop: StopSignals | None = None,
  commit: str | None = None,
) -> None:
  """Trains whatever of `config` is not yet in `workdir`, then writes its report."""
  stop = stop or StopSignals()
  choose(config.implementation, device_obstacle())  # before what "mosaic" asks of other settings
  validate(config)
  corpus = data.load_corpus(config.data)
  phases = {
    name: [
      (step, make_trainer(config, corpus.vocab_size, policy))
      for step, policy in schedule_of(config, name)
    ]
    for name in config.recipes
  }
  folder = WorkDir(workdir, config)
  batch, length = config.data.batch_size, config.data.sequence_length
  # Of the recipe that a run begins with.
  costs = {name: saved_activation_bytes(p[0][1], batch, length) for name, p in phases.items()}
  environment = (
    describe_environment(commit)
    | parameter_counts(config, corpus.vocab_size)
    | {"corpus": corpus.describe(), "saved_activation_bytes_per_token": costs}
    | at_peak(config, corpus.vocab_size, {name: p[0][1].policy for name, p in phases.items()})
  )
  peaks = environment["peak_flops_per_s"]
  gemm_seconds = {
    name: [
      seconds_at_peak(flops_by_dtype(config, corpus.vocab_size, trainer.policy), peaks)
      for _, trainer in own
    ]
    for name, own in phases.items()
  }
  with folder.begin(environment):
    runs = folder.unfinished()
    progress = logs.Progress(len(runs) * config.steps, batch * length)
    try:
      with stop.after_step(), contextlib.closing(progress):
        for this in runs:
          of_run = phases[this.recipe], gemm_seconds[this.recipe]
          train_run(this, config, corpus, *of_run, progress, lambda: stop.number)
    except BaseException:
      # After a full disk, say: what went wrong first is what counts.
      with contextlib.suppress(OSError, ValueError):
        _report(folder)
      raise
    print(f"report: {_report(folder)}")


def _report(folder: WorkDir) -> Path:
  write_summary(folder.path)
  return write_report(folder.path)


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
