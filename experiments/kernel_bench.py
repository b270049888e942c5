"""Times the kernels on a Hopper GPU, each after a check: what fails it has no time.

python -m experiments.kernel_bench --out=results/kernel_bench.jsonl

Device time from the profiler, two sets of random inputs in turns, each larger than L2; median and
quartiles. Ratios to what a user would pick instead are of the same run: a device copy, XLA on the
same definition, torch's matmuls, torchao's quantizers where it is installed. `moe_ffn` comes first,
before this process takes any memory.
"""

import os

from absl import app, flags

from experiments import command_line, logs
from experiments import kernel_peers as peers
from experiments.environment import COMMIT, describe_environment
from experiments.kernel_rows import PARTS, measure
from experiments.kernel_timing import tuning
from fp4jax.implementation import choose, device_obstacle

_OUT = flags.DEFINE_string("out", "results/kernel_bench.jsonl", "JSONL file to write.")
_ONLY = flags.DEFINE_list("only", ["moe_ffn", "elementwise", "matmul"], "Which parts to run.")
command_line.allow("only", PARTS)


def main(argv):
  del argv
  # For the processes of `moe_ffn`, and for torch.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  choose("mosaic", device_obstacle())
  parts = [part for part in _ONLY.value if part]
  if beside_torch := sorted({"elementwise", "matmul"}.intersection(parts)):
    peers.require_torch(beside_torch)
  environment = {"kind": "environment"} | describe_environment(COMMIT.value)
  log = logs.Rewritten(_OUT.value, environment | {"tuning": tuning()})
  try:
    measure(parts, log.write)
  finally:
    log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
