"""Trains a model under several recipes and reports how they diverge.

    python -m experiments.run --config=configs/demo.py --workdir=runs/demo
    ... --config.recipes=bf16,mxfp4 --config.seeds=3 --config.model.num_layers=6

The same command goes on where a stopped one left off. SIGTERM and Ctrl-C save first, unless
`checkpoint_every` is 0; the status is 143 or 130.

Several processes train together, on a workdir that all of them see: each is started with the same
flags and `--config.distributed.coordinator=host:port --config.distributed.num_processes=2
--config.distributed.process_id=0`, or 1; in a Slurm step of several tasks without these. A signal
to any of them stops all. The first alone writes, but for the others' parts of the checkpoints.
"""

from experiments.stop_signals import StopSignals

if __name__ == "__main__":
  _STOP = StopSignals().listen()  # before the imports that take seconds and start threads

from pathlib import Path

from absl import app

from experiments import command_line, data, logs, runner
from experiments import mesh as meshes
from experiments.checks import validate
from experiments.config import Experiment
from experiments.environment import COMMIT, describe_environment
from experiments.loop import train_run
from experiments.processes import Group
from experiments.report import write_report
from experiments.speed_of_light import at_peak, flops_by_dtype, seconds_at_peak
from experiments.summary import write_summary
from experiments.train import (
  make_trainer,
  parameter_counts,
  saved_activation_bytes,
  schedule_of,
)
from experiments.workdir import Run, WorkDir, with_token_parts
from fp4jax.implementation import choose, device_obstacle
from fp4jax.models import Policy

_CONFIG = command_line.define_config()
_WORKDIR = command_line.define_workdir("Folder of this experiment.")


def main(_) -> None:
  config, workdir = _CONFIG.value, _WORKDIR.value
  runner.main(config.distributed, lambda group: run(config, workdir, _STOP, COMMIT.value, group))


def run(
  config: Experiment,
  workdir: str | Path,
  stop: StopSignals | None = None,
  commit: str | None = None,
  group: Group | None = None,
) -> None:
  """Trains whatever of `config` is not yet in `workdir`, then writes its report.

  With several processes in `group`, each of them calls this.
  """
  stop = stop or StopSignals()
  group = group or Group()
  stop.before_exit = group.stopped
  choose(config.implementation, device_obstacle())  # before what "mosaic" asks of other settings
  validate(config)
  config = with_token_parts(config, Path(workdir), len(meshes.all_devices()))
  mesh = meshes.make_mesh(config)
  corpus = data.load_corpus(config.data)
  phases = {
    name: [
      (step, make_trainer(config, corpus.vocab_size, policy, mesh))
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
    | {"mesh": meshes.mesh_sizes(config, len(meshes.all_devices()))}
    | at_peak(config, corpus.vocab_size, {name: p[0][1].policy for name, p in phases.items()})
  )
  peaks = environment["peak_flops_per_s"]
  gemm_seconds = {
    name: [
      seconds_at_peak(_work_of_a_device(config, corpus.vocab_size, trainer.policy), peaks)
      for _, trainer in own
    ]
    for name, own in phases.items()
  }

  def train(this: Run, progress: logs.Progress) -> None:
    of_run = phases[this.recipe], gemm_seconds[this.recipe]
    train_run(this, config, corpus, *of_run, progress, lambda: stop.number, group, mesh)

  runner.train_unfinished(
    folder,
    environment,
    train,
    report=lambda: _report(folder),
    make_progress=lambda steps: logs.Progress(steps, batch * length),
    stop=stop,
    group=group,
  )


def _work_of_a_device(config: Experiment, vocab_size: int, policy: Policy) -> dict[str, float]:
  work = flops_by_dtype(config, vocab_size, policy)
  return {dtype: flops / len(meshes.all_devices()) for dtype, flops in work.items()}


def _report(folder: WorkDir) -> Path:
  write_summary(folder.path)
  return write_report(folder.path)


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
