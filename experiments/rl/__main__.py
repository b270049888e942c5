"""Trains a policy by reinforcement learning under several numerics and reports how they differ.

    python -m experiments.rl --config=configs/rl_demo.py --workdir=runs/rl_demo
    ... --config.arms=bf16,mxfp4,mxfp4+mbs+of --config.seeds=3 --config.rollout.replay_routing=true

The same command goes on where a stopped one left off. SIGTERM and Ctrl-C save first, unless
`checkpoint_every` is 0; the status is 143 or 130.
"""

from experiments.stop_signals import StopSignals

if __name__ == "__main__":
  _STOP = StopSignals().listen()  # before the imports that take seconds and start threads

from absl import app

from experiments import command_line, runner
from experiments.environment import COMMIT
from experiments.rl.config import RLExperiment
from experiments.rl.run import run

_CONFIG = command_line.define_config(RLExperiment, "configs/rl_demo.py")
_WORKDIR = command_line.define_workdir("Folder of this experiment.")


def main(_) -> None:
  config, workdir = _CONFIG.value, _WORKDIR.value
  runner.main(config.distributed, lambda group: run(config, workdir, _STOP, COMMIT.value, group))


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
