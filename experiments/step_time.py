"""Step time of every recipe relative to BF16, all in one run, and which GEMM it goes to.

    python -m experiments.step_time --config=configs/demo.py --out=results/step_time.jsonl

Recipes take turns, a step each, so that a busy machine slows them alike; one state goes from hand
to hand. `--devices=2` measures on the first two. `--split=mxfp4` also times `mxfp4:fprop`, MXFP4 in
that GEMM and BF16 in the other two, and its like. `make tables` puts the rows into docs/results.md.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding

from experiments import command_line, data, logs
from experiments.checks import validate
from experiments.config import Experiment
from experiments.environment import COMMIT
from experiments.mesh import BATCH, first_devices, make_mesh
from experiments.records import BASELINE
from experiments.step_cost import (
  busiest_device,
  compile_all,
  describe_source,
  describe_step,
  lower_step,
)
from experiments.train import make_trainer, policy_of
from fp4jax import recipes
from fp4jax.implementation import choose, device_obstacle
from fp4jax.recipe import Recipe

_CONFIG = command_line.define_config()
_OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Timed steps of each recipe.", lower_bound=3)
_DEVICES = flags.DEFINE_integer("devices", None, "As many of the devices.", lower_bound=1)
_SPLIT = flags.DEFINE_list("split", [], "Recipes to time GEMM by GEMM too.")


def single_gemm(recipe: Recipe, gemm: str) -> Recipe:
  """BF16 but for one GEMM, which runs `recipe`."""
  alone = recipes.BF16.replace({gemm: getattr(recipe, gemm), "name": f"{recipe.name}:{gemm}"})
  return dataclasses.replace(alone, citation=recipe.citation)


def time_steps(
  config: Experiment, policies: dict, rounds: int, devices: Sequence[jax.Device]
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
  """Milliseconds of each timed step, the first of each policy left out; and the choices that the
  experts of the busiest device had, of what each had if all were asked alike."""
  corpus, mesh = data.load_corpus(config.data), make_mesh(config, devices)
  place = mesh and NamedSharding(mesh, BATCH)
  batches = data.batches(corpus, config.data, 0, "train", place)
  trainers = [make_trainer(config, corpus.vocab_size, p, mesh) for p in policies.values()]
  steps = compile_all(lower_step(trainer, config, mesh) for trainer in trainers)
  seed = jnp.int32(0)
  state = trainers[0].init(seed)
  times, busiest = ({name: [] for name in policies} for _ in range(2))
  for i in range(rounds + 1):
    batch = batches[i]
    for name, trainer, step in zip(policies, trainers, steps, strict=True):
      state = trainer.adopt(state)
      began = time.perf_counter()
      state, scalars = jax.block_until_ready(step(state, batch, seed))
      if i > 0:
        times[name].append((time.perf_counter() - began) * 1e3)
        busiest[name].append(busiest_device(scalars, config.mesh.expert))
  known = config.model.num_experts > 0
  return times, {n: statistics.fmean(own) if known else None for n, own in busiest.items()}


def main(_) -> None:
  config = _CONFIG.value
  choose(config.implementation, device_obstacle())  # before what "mosaic" asks of other settings
  validate(config)
  if BASELINE not in config.recipes:
    raise ValueError(
      f"recipes={','.join(config.recipes)} lack {BASELINE!r}, which times are relative to"
    )
  chosen = {name: recipes.by_name(name) for name in config.recipes}
  for name in _SPLIT.value:
    for gemm in ("fprop", "dgrad", "wgrad"):
      recipe = single_gemm(recipes.by_name(name), gemm)
      chosen[recipe.name] = recipe
  policies = {name: policy_of(recipe, config) for name, recipe in chosen.items()}
  log = logs.Rewritten(_OUT.value)
  devices = first_devices(_DEVICES.value)
  times, busiest = time_steps(config, policies, _ROUNDS.value, devices)
  told, source = describe_step(config, len(devices)), describe_source(COMMIT.value)
  base = times[BASELINE]
  for name, steps in times.items():
    ratios = [a / b for a, b in zip(steps, base, strict=True)]
    tokens_per_s = told["tokens_per_step"] / statistics.median(steps) * 1e3
    row = {
      "recipe": name,
      "ratio_to_bf16": statistics.median(ratios),
      "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
      "step_time_ms": statistics.median(steps),
      "rounds": len(steps),
      "tokens_per_s": tokens_per_s,
      "tokens_per_gpu_s": tokens_per_s / len(devices),
      "busiest_device": busiest[name],
    }
    low, high = row["ratio_quartiles"]
    print(
      f"{name:20s} {row['ratio_to_bf16']:5.2f} times bf16  ({low:.2f} to {high:.2f})"
      f"  {row['step_time_ms']:.1f} ms  {row['tokens_per_s']:,.0f} tokens/s"
    )
    log.write(row | told | source)
  log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
