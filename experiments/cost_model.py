"""Prints what a training step costs on a mesh of GPUs, part by part, without one.

    python -m experiments.cost_model --config=configs/moe_wide.py --config.mesh.data=1 \
        --config.mesh.expert=4

Time and memory of one device, for every recipe of the config, with its part of the config's batch,
or with --tokens tokens. docs/scaling.md has the terms, what they predict and what they miss.
"""

from pathlib import Path

from absl import app, flags

from experiments import command_line
from experiments.cost_constants import fit
from experiments.cost_terms import Run, memory_bytes, shape_of, step_seconds
from fp4jax import recipes

_CONFIG = command_line.define_config()
_TOKENS = flags.DEFINE_integer(
  "tokens", None, "Of each device; by default its part of the config's batch.", lower_bound=1
)
_GPU = flags.DEFINE_enum("gpu", "H100", ["H100", "H200"], "On which the step runs.")
_IMBALANCE = flags.DEFINE_float(
  "imbalance", 1.0, "Choices on the busiest device of `expert` over those on the mean one."
)
_EXCHANGE = flags.DEFINE_string("exchange", "xla", "As in the rows of results/dispatch.jsonl.")


def main(_) -> None:
  config = _CONFIG.value
  if config.mesh.fsdp > 1:
    raise ValueError(f"mesh.fsdp={config.mesh.fsdp}: the model has no term for it")
  if config.data.microbatches > 1:
    raise ValueError(f"data.microbatches={config.data.microbatches}: the model has no term for it")
  data, expert = config.mesh.data or 1, config.mesh.expert
  sequences, rest = divmod(config.data.batch_size, data * expert)
  if rest and not _TOKENS.value:
    raise ValueError(
      f"data.batch_size={config.data.batch_size} sequences over {data * expert} devices: each has"
      " as many; or say --tokens"
    )
  run = Run(
    tokens=_TOKENS.value or sequences * config.data.sequence_length,
    length=config.data.sequence_length,
    data=data,
    expert=expert,
    capacity_factor=config.mesh.capacity_factor,
    exchange=_EXCHANGE.value,
    remat=config.model.remat,
    imbalance=_IMBALANCE.value,
  )
  shape = shape_of(config.model, config.quantize.attention)
  constants = fit(Path(__file__).parent.parent / "results", _GPU.value)
  for name in config.recipes:
    recipe = recipes.by_name(name)
    seconds = step_seconds(shape, recipe, run, constants)
    held = memory_bytes(shape, recipe, run, constants)
    total = sum(seconds.values())
    print(f"{name}: {total * 1e3:.1f} ms, {run.tokens / total:,.0f} tokens/s a GPU")
    for part, time in seconds.items():
      print(f"  {part:28s} {time * 1e3:8.1f} ms")
    for part, size in (held | {"memory": sum(held.values())}).items():
      print(f"  {part:28s} {size / 1e9:8.1f} GB")


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
