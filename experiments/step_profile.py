"""Where the time of a training step goes, by part of the model and kind of kernel.

    python -m experiments.step_profile --config=configs/moe_wide.py \\
        --out=results/moe_wide_profile.jsonl

JAX's profiler times every kernel of a few steps of each recipe; the compiled program tells to which
part of the model a kernel belongs. `make tables` puts the rows into docs/results.md.
"""

import os

from absl import app, flags

from experiments import command_line, logs
from experiments.checks import validate
from experiments.environment import COMMIT, describe_environment
from experiments.profiling import profile

_CONFIG = command_line.define_config()
_OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)


def main(_) -> None:
  config = _CONFIG.value
  validate(config)
  # A kernel launched from a CUDA graph does not tell to which instruction it belongs.
  flags_of_xla = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags_of_xla} --xla_gpu_enable_command_buffer="
  log = logs.Rewritten(_OUT.value)
  environment = describe_environment(COMMIT.value)
  told = {key: environment[key] for key in ("device", "git_commit", "git_dirty", "versions")}
  for recipe in config.recipes:
    found = profile(config, recipe)
    for (part, kind), ms in sorted(found.items(), key=lambda item: -item[1]):
      print(f"{recipe:14s} {part:14s} {kind:8s} {ms:8.2f} ms per step")
      log.write({"recipe": recipe, "part": part, "kind": kind, "ms_per_step": ms} | told)
    print(f"{recipe:14s} {sum(found.values()):32.2f} ms per step")
  log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
