"""Trains a model under several recipes and reports how they diverge.

    python -m experiments.run --config=configs/demo.py --workdir=runs/demo
    ... --config.recipes=bf16,mxfp4 --config.seeds=3 --config.model.num_layers=6

The same command goes on where a stopped one left off. SIGTERM and Ctrl-C save first, unless
`checkpoint_every` is 0.
"""

import contextlib
import logging as python_logging
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import data, logs
from experiments.config import field_paths, near_fields, validate
from experiments.environment import describe_environment
from experiments.loop import Interrupted, train_run
from experiments.report import write_report
from experiments.summary import write_summary
from experiments.train import (
  make_trainer,
  parameter_counts,
  policy_of,
  saved_activation_bytes,
)
from experiments.workdir import WorkDir
from fp4jax import recipes

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this experiment.", required=True)


def main(_) -> None:
  # At INFO, JAX tells of every backend that it did not find.
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
  try:
    run(_CONFIG.value, _WORKDIR.value)
  except (ValueError, OSError) as error:
    logging.debug("", exc_info=True)
    sys.exit(f"error: {error}")
  except Interrupted as stopped:
    print(f"\n{stopped}", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def run(config, workdir: str) -> None:
  """Trains whatever of `config` is not yet in `workdir`, then writes its report."""
  validate(config)
  folder = WorkDir(workdir, config)
  corpus = data.load_corpus(config.data)
  policies = {
    name: policy_of(recipes.by_name(name), config.quantize, config.implementation)
    for name in config.recipes
  }
  trainers = {
    name: make_trainer(config, corpus.vocab_size, policy) for name, policy in policies.items()
  }
  batch, length = config.data.batch_size, config.data.sequence_length
  costs = {name: saved_activation_bytes(t, batch, length) for name, t in trainers.items()}
  folder.begin(
    describe_environment()
    | parameter_counts(config, corpus.vocab_size)
    | {"corpus": corpus.describe(), "saved_activation_bytes_per_token": costs}
  )
  runs, offsets = folder.unfinished()
  stop_signals = []
  handlers = {
    number: signal.signal(number, lambda number, _: stop_signals.append(number))
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  compiling = len({this.recipe for this in runs})
  progress = logs.Progress(len(runs) * config.steps, compiling, batch * length)
  try:
    for this in runs:
      offsets = train_run(
        this,
        config,
        corpus,
        trainers[this.recipe],
        folder.open_logs,
        offsets,
        progress,
        lambda: bool(stop_signals),
      )
  except BaseException:
    with contextlib.suppress(OSError):  # a full disk, say: what went wrong first is what counts
      _report(folder)
    raise
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
  print(f"report: {_report(folder)}")


def _report(folder: WorkDir) -> Path:
  write_summary(folder.path)
  return write_report(folder.path)


def _parse_flags(argv: list[str]) -> list[str]:
  """absl's parsing, with an error that names the near settings for a misspelt one."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, OSError) as error:
    sys.exit(f"error: {error}")
  except (KeyError, AttributeError) as error:
    for argument in argv:
      flag = argument.lstrip("-").partition("=")[0]
      path = flag.removeprefix("config.")
      if path != flag and path not in field_paths() and path.rpartition(".")[2] in str(error):
        near = ", ".join(f"--config.{name}" for name in near_fields(path))
        sys.exit(f"error: there is no --{flag}; did you mean {near}?")
    raise


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
