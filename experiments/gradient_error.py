"""How far the gradients of every recipe are from BF16's, at one state of a run.

    python -m experiments.gradient_error --config=configs/moe_1b.py \\
        --config.recipes=bf16,hopper_fp4,fp8,fp8_pow2 --under=fp8 --after=150 \\
        --out=results/moe_1b_gradients.jsonl

Trains under one recipe, then takes the gradients of the same batches under each from those weights.
Errors that differ from batch to batch average out of the mean gradient, as they do over the steps
of a run; what they have in common does not. `projection` is of a gradient on BF16's, 1 for errors
that neither shrink nor stretch it.
"""

from absl import app, flags

from experiments import command_line, gradients, logs
from experiments.checks import validate
from experiments.environment import COMMIT, describe_environment

_CONFIG = command_line.define_config()
_AFTER = flags.DEFINE_integer("after", 300, "Steps of training before.", lower_bound=0)
_UNDER = flags.DEFINE_string("under", "bf16", "Recipe of those steps.")
_BATCHES = flags.DEFINE_integer("batches", 6, "Batches of the mean gradient.", lower_bound=2)
_OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)


def main(_) -> None:
  config = _CONFIG.value
  validate(config)
  environment = {"kind": "environment"} | describe_environment(COMMIT.value)
  log = logs.Rewritten(_OUT.value, environment | {"under": _UNDER.value, "after": _AFTER.value})
  for row in gradients.measure(config, _UNDER.value, _AFTER.value, _BATCHES.value):
    log.write(row)
    print(
      f"{row['recipe']:12s} {row['batches']} {row['tensor']:32s} "
      f"error {row['relative_error']:.4f}, projection {row['projection']:.4f}"
    )
  log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
