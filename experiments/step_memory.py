"""Device memory of a training step of every recipe, each in a process of its own.

    python -m experiments.step_memory --config=configs/moe_1b.py --out=results/moe_1b_memory.jsonl

A device counts the peak of a process and never resets it, hence the processes.
"""

import os

from absl import app, flags

from experiments import command_line, logs
from experiments.apart import alone
from experiments.checks import validate
from experiments.environment import COMMIT
from experiments.step_cost import gigabytes, measure_step

_CONFIG = command_line.define_config()
_OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
_ROUNDS = 3


def main(_) -> None:
  config = _CONFIG.value
  validate(config)
  # A child takes what it uses, so that there may be others on the device.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  log = logs.Rewritten(_OUT.value)
  for recipe in config.recipes:
    row = alone(measure_step, config, recipe, _ROUNDS, COMMIT.value)
    log.write(row)
    peak = "out of memory" if row["oom"] else f"peak {gigabytes(row['peak_bytes'])}"
    print(f"{recipe:20s} {peak}, temporaries {gigabytes(row['temp_bytes'])}")
  log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
