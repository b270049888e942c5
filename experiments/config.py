"""Every setting of an experiment: typed dataclasses, nothing hidden anywhere else.

A file in configs/ builds an `Experiment` and changes only what it is about; the command line
changes single fields on top, `--config.model.num_layers=6`.
"""

import dataclasses
import difflib
import math
import operator
import typing
from typing import Any

from absl import flags
from ml_collections import config_flags

from fp4jax import recipes as fp4_recipes
from fp4jax.implementation import Implementation
from fp4jax.models import ModelConfig
from fp4jax.models.remat import Remat
from fp4jax.recipe import Recipe


class Names(tuple):
  """Names in order, `bf16,mxfp4` on the command line."""


class _NamesParser(flags.ArgumentParser):
  def parse(self, argument):
    parts = argument.split(",") if isinstance(argument, str) else argument
    return Names(part.strip() for part in parts if part.strip())

  def flag_type(self):
    return "comma-separated names"


config_flags.register_flag_parser_for_type(Names, _NamesParser())


@dataclasses.dataclass
class Data:
  """Text to train on; None takes the source text of Python's standard library."""

  path: str | None = None  # text, or .jsonl with a "text" in every line; also .gz; or a glob
  tokenizer: str | None = None  # a Hugging Face `tokenizers` JSON file; None: bytes are tokens
  sequence_length: int = 128  # tokens
  batch_size: int = 16  # sequences
  microbatches: int = 1  # equal parts of a batch, one after the other; a step takes their mean
  validation_fraction: float = 0.05  # of the files (of the lines, for one JSONL or text file)


@dataclasses.dataclass
class Quantize:
  """Which modules run the recipe; the others run in bf16, the router in float32."""

  experts: bool = True  # dense and shared feed-forward blocks too
  attention: bool = True  # q, k, v and output projections
  scores: bool = False  # q k^T; probabilities times v stay in bf16
  router: bool = False
  head: bool = False
  first_bf16: int = 0  # blocks at the beginning that run the recipe in no module
  last_bf16: int = 0  # and at the end


@dataclasses.dataclass
class StableSpam:
  """The settings of arXiv 2502.17055 for FP4; `experiments/optimizers/stable_spam.py` explains."""

  gamma1: float = 0.7  # of the mean norm
  gamma2: float = 0.9  # of the mean squared norm
  gamma3: float = 0.999  # of the mean largest value
  reset_every: int = 500  # steps between two resets of Adam's moments
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  final_scale: float = 1.0  # a cosine leads gamma1 and b1 to this share of themselves


@dataclasses.dataclass
class Optimizer:
  """One of `experiments.optimizers`, with linear warmup and cosine decay of the learning rate."""

  name: str = "adamw"
  learning_rate: float = 3e-3
  warmup_steps: int = 20
  # Of the peak, at the last step; at 1 a finished workdir can be given more steps.
  final_fraction: float = 0.1
  b1: float = 0.9  # of adamw
  b2: float = 0.95  # of adamw
  weight_decay: float = 0.1
  clip_norm: float = 1.0  # of adamw
  load_balance_weight: float = 1e-2  # of the routing losses in the total loss
  router_z_weight: float = 1e-3
  stable_spam: StableSpam = dataclasses.field(default_factory=StableSpam)


ALL_GEMMS = Names(("fprop", "dgrad", "wgrad"))
ALL_RECIPES = Names(("bf16", "fp8", "mxfp4", "mxfp4_rht_sr", "hopper_fp4"))


@dataclasses.dataclass
class Experiment:
  """One comparison: every recipe from the same weights, over the same batches, once a seed."""

  recipes: Names = ALL_RECIPES
  seeds: int = 1  # runs of every recipe, seeded 0, 1, ...
  steps: int = 100
  final_recipe: str | None = None  # of the last steps of all runs but bf16's; None: their own
  final_share: float = 0.18  # of the steps; NVIDIA's late switch to bf16, arXiv 2509.25149
  final_gemms: Names = ALL_GEMMS  # that run final_recipe then; `fprop` alone costs least
  log_every: int = 1
  eval_every: int = 20
  eval_batches: int = 8
  probe_every: int = 20  # 0: never
  checkpoint_every: int = 50  # 0: never, so that a stopped run begins again
  checkpoints_kept: int = 2
  implementation: str | None = None  # "mosaic" or "xla", see `Policy`; None: "mosaic" if it can run
  data: Data = dataclasses.field(default_factory=Data)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  quantize: Quantize = dataclasses.field(default_factory=Quantize)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)

  def recipes_of(self, run: str) -> tuple[tuple[int, Recipe], ...]:
    """The recipes of the run of that name, each with the step from which it trains."""
    recipe = fp4_recipes.by_name(run)
    if self.final_recipe is None or run == "bf16":
      return ((0, recipe),)
    final = _with_gemms(recipe, fp4_recipes.by_name(self.final_recipe), self.final_gemms)
    start = self.steps - round(self.final_share * self.steps)
    return ((0, recipe),) if final == recipe else ((0, recipe), (start, final))


def _with_gemms(recipe: Recipe, other: Recipe, gemms: Names) -> Recipe:
  """`recipe` but for `gemms`, which run `other`; x is kept for its wgrad, w for its dgrad."""
  if set(gemms) == set(ALL_GEMMS):
    return other
  changes = {gemm: getattr(other, gemm) for gemm in gemms}
  for gemm, kept in (("wgrad", "lhs"), ("wgrad", "hidden"), ("dgrad", "rhs")):
    if gemm in gemms:
      changes[f"residual.{kept}"] = getattr(other.residual, kept)
  name = f"{recipe.name}[{','.join(gemms)}={other.name}]"
  return recipe.replace(changes | {"name": name, "citation": f"{name}: {recipe.citation}"})


_INT32 = 2**31 - 1
# Of every number but those of `data`, which `load_corpus` checks.
_RANGES = (
  ("from 1 to 1000", lambda x: 1 <= x <= 1000, "seeds"),
  (f"from 1 to {_INT32}", lambda x: 1 <= x <= _INT32, "steps"),
  (
    "at least 1",
    lambda x: x >= 1,
    "log_every eval_every eval_batches checkpoints_kept"
    " model.num_layers model.d_model model.num_heads model.num_kv_heads model.head_dim model.top_k"
    " model.d_ff optimizer.stable_spam.reset_every",
  ),
  (
    "at least 0",
    lambda x: x >= 0,
    "probe_every checkpoint_every quantize.first_bf16 quantize.last_bf16 model.num_experts"
    " model.d_ff_shared model.vocab_chunk optimizer.warmup_steps optimizer.weight_decay"
    " optimizer.load_balance_weight optimizer.router_z_weight",
  ),
  (
    "above 0",
    lambda x: x > 0,
    "optimizer.learning_rate optimizer.clip_norm optimizer.stable_spam.eps model.rope_theta",
  ),
  ("above 0 and below 1", lambda x: 0 < x < 1, "final_share"),
  (
    "from 0 to 1",
    lambda x: 0 <= x <= 1,
    "optimizer.final_fraction optimizer.stable_spam.final_scale",
  ),
  (
    "at least 0 and below 1",
    lambda x: 0 <= x < 1,
    "optimizer.b1 optimizer.b2 optimizer.stable_spam.b1 optimizer.stable_spam.b2"
    " optimizer.stable_spam.gamma1 optimizer.stable_spam.gamma2 optimizer.stable_spam.gamma3",
  ),
)


def validate(config: Experiment) -> None:
  """Raises ValueError for settings that no run can have; names the value and what is allowed."""
  _check_types(config)
  if not config.recipes:
    raise ValueError("recipes is empty; name at least one of " + ", ".join(fp4_recipes.RECIPES))
  for name in config.recipes:
    fp4_recipes.by_name(name)
  if len(set(config.recipes)) < len(config.recipes):
    raise ValueError(f"recipes {','.join(config.recipes)} names one twice")
  for allowed, holds, names in _RANGES:
    for name in names.split():
      value = operator.attrgetter(name)(config)
      if not (holds(value) and math.isfinite(value)):
        raise ValueError(f"{name}={value} is not {allowed}")
  _validate_final(config)
  kept = config.quantize.first_bf16 + config.quantize.last_bf16
  if kept > config.model.num_layers:
    raise ValueError(
      f"quantize.first_bf16={config.quantize.first_bf16} and quantize.last_bf16="
      f"{config.quantize.last_bf16} are more than model.num_layers={config.model.num_layers}"
    )
  if config.implementation not in (None, *typing.get_args(Implementation)):
    raise ValueError(f"implementation={config.implementation!r} is not 'mosaic' or 'xla'")
  if config.implementation == "mosaic" and config.probe_every:
    raise ValueError(
      f"probe_every={config.probe_every}: probes read the tensors of implementation='xla'; "
      "set probe_every=0 for implementation='mosaic'"
    )
  if config.implementation == "mosaic" and config.quantize.head and config.model.vocab_chunk:
    raise ValueError(
      f"model.vocab_chunk={config.model.vocab_chunk}: a head in chunks is XLA's; set it to 0, or "
      "quantize.head=false, for implementation='mosaic'"
    )
  if config.optimizer.warmup_steps >= config.steps:
    raise ValueError(
      f"optimizer.warmup_steps={config.optimizer.warmup_steps} is not below steps={config.steps}; "
      f"add --config.optimizer.warmup_steps={config.steps // 5}"
    )
  if config.model.remat not in typing.get_args(Remat):
    raise ValueError(
      f"model.remat={config.model.remat!r} is not one of {', '.join(typing.get_args(Remat))}"
    )
  if config.model.dtype not in ("bfloat16", "float32"):
    raise ValueError(f"model.dtype={config.model.dtype!r} is not 'bfloat16' or 'float32'")


def _check_types(config: Experiment) -> None:
  """A file of configs/ can set anything."""
  for path, kind in _field_types().items():
    value = operator.attrgetter(path)(config)
    if kind is Names:
      if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{path}={value!r} is not a list of names, such as Names(('bf16',))")
      continue
    kinds = typing.get_args(kind) or (kind,)
    if int in kinds and isinstance(value, bool):
      raise ValueError(f"{path}={value!r} is not a number")
    if not isinstance(value, kinds + (int,) * (float in kinds)):
      wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
      raise ValueError(f"{path}={value!r} is not of type {wanted}")


def _validate_final(config: Experiment) -> None:
  if config.final_recipe is None:
    return
  if not config.final_gemms or not set(config.final_gemms) <= set(ALL_GEMMS):
    raise ValueError(f"final_gemms={','.join(config.final_gemms)} is not of {','.join(ALL_GEMMS)}")
  if not 0 < round(config.final_share * config.steps) < config.steps:
    raise ValueError(
      f"final_share={config.final_share} of steps={config.steps} leaves one of the two recipes "
      "without a step"
    )
  for name in config.recipes:
    config.recipes_of(name)


def why_not_longer(config: Experiment) -> str | None:
  """Why a run of `config` is not the beginning of one with more steps; None: it is."""
  optimizer, spam = config.optimizer, config.optimizer.stable_spam
  if not config.checkpoint_every:
    return "checkpoint_every=0 keeps no state to go on from"
  if optimizer.final_fraction != 1:
    return f"optimizer.final_fraction={optimizer.final_fraction} ends the fall of the learning rate"
  if config.final_recipe is not None:
    return f"final_recipe={config.final_recipe} has trained the last of them"
  if optimizer.name == "stable_spam" and spam.final_scale != 1:
    return f"optimizer.stable_spam.final_scale={spam.final_scale} ends a cosine over the steps"
  return None


def to_dict(config: Experiment) -> dict[str, Any]:
  """Nested plain values, as written to config.json."""
  fields = dataclasses.asdict(config)
  return {name: list(v) if isinstance(v, Names) else v for name, v in fields.items()}


def field_paths() -> list[str]:
  """Dotted names of every setting, `model.num_layers`."""
  return list(_field_types())


def _field_types(cls: type = Experiment, prefix: str = "") -> dict[str, Any]:
  types = {}
  for name, kind in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(kind):
      types |= _field_types(kind, f"{prefix}{name}.")
    else:
      types[prefix + name] = kind
  return types


def near_fields(name: str) -> list[str]:
  """Up to three settings that a wrong name may mean: near in full, in its last part, or `lr`."""
  last = name.rpartition(".")[2]

  def likeness(path: str) -> float:
    end = path.rpartition(".")[2]
    if last == "".join(word[0] for word in end.split("_")):
      return 1.0
    pairs = ((name, path), (last, end))
    return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

  near = [path for path in field_paths() if likeness(path) >= 0.6]
  return sorted(near, key=likeness, reverse=True)[:3]
