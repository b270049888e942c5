"""Tokens per second of a rollout in BF16, FP8 and packed MXFP4 weights, all in one run.

    python -m experiments.rl.rollout_bench --batch=8 --out=results/rl_rollout.jsonl

Numerics take turns, a whole rollout each, so that a busy machine slows them alike. `w4a16` has
weights alone in MXFP4, `w4a4` activations too; `packed` weights are codes and scales in memory,
the others are quantized by the pass of every token. On a Hopper GPU a kernel multiplies packed
weights, but where `XLA` stands. `w8a16` has weights in FP8 with scales that are powers of two:
bfloat16 holds these values, and multiplies the prompts. Values under float32 scales are float32
there. Prompts and answers all have full length.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from experiments import command_line, logs
from experiments.config import Quantize
from experiments.environment import COMMIT
from experiments.programs import decoding
from experiments.rl.config import RLExperiment, Start
from experiments.rl.start import source_of
from experiments.step_cost import compile_all, describe_source
from experiments.train import quantized_policy
from fp4jax import formats, recipes
from fp4jax.implementation import Implementation
from fp4jax.models import LanguageModel, ModelConfig, Policy, generate, pack_model
from fp4jax.quantizers import Operand
from fp4jax.recipe import Recipe

_MXFP4 = dataclasses.replace(formats.MXFP4, scale_rule="rceil")


def weights_in(fmt, name: str) -> Recipe:
  """BF16 but for the weights that the forward GEMM reads."""
  return recipes.BF16.replace({"fprop.rhs": Operand(fmt), "name": name})


def numerics() -> dict[str, tuple[Recipe, bool, Implementation | None]]:
  """Each a recipe, whether its weights are packed, and what multiplies."""
  w4a16 = weights_in(_MXFP4, "w4a16")
  w4a4 = w4a16.replace({"fprop.lhs": Operand(_MXFP4), "name": "w4a4"})
  return {
    "bf16": (recipes.BF16, False, None),
    "w8a16 packed": (weights_in(formats.FP8_BLOCK_POW2_2D, "w8a16"), True, None),
    "w8a16 packed, float32 scales": (weights_in(formats.FP8_BLOCK_2D, "w8a16"), True, None),
    "w4a16 packed": (w4a16, True, None),
    "w4a16 packed, XLA": (w4a16, True, "xla"),
    "w4a4 packed": (w4a4, True, None),
    "w4a4": (w4a4, False, None),
  }


def time_rollouts(
  model: LanguageModel, batch: int, prompt: int, new: int, rounds: int
) -> dict[str, dict[str, Any]]:
  """Seconds of each rollout, and the bytes of the weights that it reads."""
  vocab = model.embedding.num_embeddings
  prompts = jax.random.randint(jax.random.key(0), (batch, prompt), 0, vocab)
  lengths = jnp.full(batch, prompt)
  params_of, lowered, found = {}, [], {}
  # Weights in bfloat16, as a rollout without a trainer has them.
  params = jax.tree.map(lambda w: w.astype(model.dtype) if w.ndim > 1 else w, nnx.state(model))
  nnx.update(model, params)
  for name, (recipe, is_packed, implementation) in numerics().items():
    policy = quantized_policy(recipe, Quantize(), implementation)
    graph, params_of[name] = nnx.split(pack_model(model, policy) if is_packed else model)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params_of[name]))
    found[name] = {"weight_bytes": size, "seconds": []}
    program = functools.partial(_rollout, graph, policy, new)
    lowered.append(decoding(program).lower(params_of[name], prompts, lengths))
  rollouts = dict(zip(found, compile_all(lowered), strict=True))
  for i in range(rounds + 1):
    for name, rollout in rollouts.items():
      began = time.perf_counter()
      jax.block_until_ready(rollout(params_of[name], prompts, lengths))
      if i > 0:
        found[name]["seconds"].append(time.perf_counter() - began)
  return found


def _rollout(graph: nnx.GraphDef, policy: Policy, new: int, params, prompts, lengths):
  model = nnx.merge(graph, params)
  return generate(model, prompts, lengths, policy, key=jax.random.key(1), max_new_tokens=new)


def _model() -> tuple[LanguageModel, dict[str, Any]]:
  if _PRETRAINED.value:
    source = source_of(RLExperiment(start=Start(pretrained=_PRETRAINED.value)))
    model = nnx.eval_shape(lambda: LanguageModel(source.model, source.text.vocab_size, nnx.Rngs(0)))
    nnx.update(model, source.params())
    return model, dataclasses.asdict(source.model)
  width = _WIDTH.value
  config = ModelConfig(
    num_layers=_LAYERS.value,
    d_model=width,
    num_heads=width // 128,
    num_kv_heads=max(1, width // 512),
    head_dim=128,
    num_experts=_EXPERTS.value,
    d_ff=4 * width if not _EXPERTS.value else width,
  )
  return LanguageModel(config, 32768, nnx.Rngs(0)), dataclasses.asdict(config)


def main(_) -> None:
  log, source = logs.Rewritten(_OUT.value), describe_source(COMMIT.value)
  model, config = _model()
  for batch in map(int, _BATCH.value):
    found = time_rollouts(model, batch, _PROMPT.value, _NEW.value, _ROUNDS.value)
    base = found["bf16"]["seconds"]
    for name, own in found.items():
      ratios = [b / a for a, b in zip(own["seconds"], base, strict=True)]
      tokens_per_s = batch * _NEW.value / statistics.median(own["seconds"])
      row = {
        "numerics": name,
        "batch": batch,
        "prompt": _PROMPT.value,
        "new": _NEW.value,
        "tokens_per_s": tokens_per_s,
        "speed_of_bf16": statistics.median(ratios),
        "speed_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "rounds": _ROUNDS.value,
        "weight_bytes": own["weight_bytes"],
      }
      print(
        f"{batch:4d} answers  {name:13s} {tokens_per_s:10,.0f} tokens/s"
        f"  {row['speed_of_bf16']:5.2f} of bf16  {own['weight_bytes'] / 1e6:8.1f} MB"
      )
      log.write(row | {"model": config, "pretrained": _PRETRAINED.value} | source)
  log.close()


if __name__ == "__main__":
  _OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
  _PRETRAINED = flags.DEFINE_string("pretrained", None, "smollm2; without: a new model, see below.")
  _LAYERS = flags.DEFINE_integer("layers", 8, "Of a new model.", lower_bound=1)
  _WIDTH = flags.DEFINE_integer("width", 2048, "Of a new model, d_model.", lower_bound=128)
  _EXPERTS = flags.DEFINE_integer("experts", 0, "Of a new model; 0: dense.", lower_bound=0)
  _BATCH = flags.DEFINE_list("batch", ["8", "64"], "Answers at once.")
  _PROMPT = flags.DEFINE_integer("prompt", 64, "Tokens.", lower_bound=1)
  _NEW = flags.DEFINE_integer("new", 128, "Tokens.", lower_bound=2)
  _ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rollouts of each.", lower_bound=3)
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
