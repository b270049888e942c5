"""Every setting of an experiment: typed dataclasses, nothing hidden anywhere else.

A file in configs/ builds an `Experiment` and changes only what it is about; the command line
changes single fields on top, `--config.model.num_layers=6`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from experiments.comparison import Comparison, Names, plain_fields
from fp4jax import recipes as fp4_recipes
from fp4jax.models import ModelConfig
from fp4jax.recipe import Recipe


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
class Mesh:
  """The devices: data * fsdp * expert of them. Each has its part of every batch."""

  data: int | None = None  # None: the devices that the other two leave
  fsdp: int = 1  # divides each matrix where it is kept
  expert: int = 1  # divides the experts
  # No block along the tokens of the experts' GEMMs reaches from one part of a microbatch into
  # another: the numbers depend on them, not on the devices. None: as many as the workdir began
  # with, one for each device in a new one.
  token_parts: int | None = None
  # Choices that the experts of a device have room for, in their share where all are chosen alike;
  # the others are dropped, and the share of them is logged. None: none is dropped.
  capacity_factor: float | None = None
  # How rows travel among the devices of `expert`, "xla" or "mosaic": see `moe_ffn`; None: "mosaic"
  # where it can run. The numbers are the same.
  exchange: str | None = None


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

  def why_not_longer(self) -> str | None:
    """As `Comparison` says it, of what changes over the steps."""
    if self.final_fraction != 1:
      return f"optimizer.final_fraction={self.final_fraction} ends the fall of the learning rate"
    if self.name == "stable_spam" and self.stable_spam.final_scale != 1:
      scale = self.stable_spam.final_scale
      return f"optimizer.stable_spam.final_scale={scale} ends a cosine over the steps"
    return None


ALL_GEMMS = Names(("fprop", "dgrad", "wgrad"))
ALL_RECIPES = Names(("bf16", "fp8", "mxfp4", "mxfp4_rht_sr", "hopper_fp4"))


@dataclasses.dataclass
class Experiment(Comparison):
  """Recipes compared in pre-training, over the same batches."""

  ARMS: ClassVar[str] = "recipes"
  KEPT: ClassVar[Mapping[str, str]] = {
    "corpus.tokenizer_sha256": "tokenizer",
    "corpus.sha256": "corpus",
  }
  BY_ARM: ClassVar[tuple[str, ...]] = ("saved_activation_bytes_per_token", "gemm_seconds_at_peak")

  recipes: Names = ALL_RECIPES
  final_recipe: str | None = None  # of the last steps of all runs but bf16's; None: their own
  final_share: float = 0.18  # of the steps; NVIDIA's late switch to bf16, arXiv 2509.25149
  final_gemms: Names = ALL_GEMMS  # that run final_recipe then; `fprop` alone costs least
  eval_batches: int = 8
  data: Data = dataclasses.field(default_factory=Data)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  quantize: Quantize = dataclasses.field(default_factory=Quantize)
  weights_once: bool = False  # float32 experts are read once a step, not twice; see `moe_ffn`
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)

  def recipes_of(self, run: str) -> tuple[tuple[int, Recipe], ...]:
    """The recipes of the run of that name, each with the step from which it trains."""
    recipe = fp4_recipes.by_name(run)
    if self.final_recipe is None or run == "bf16":
      return ((0, recipe),)
    final = _with_gemms(recipe, fp4_recipes.by_name(self.final_recipe), self.final_gemms)
    start = self.steps - round(self.final_share * self.steps)
    return ((0, recipe),) if final == recipe else ((0, recipe), (start, final))

  def definitions(self) -> dict[str, Any]:
    used = [*self.recipes, *filter(None, [self.final_recipe])]
    return {name: definition(fp4_recipes.by_name(name)) for name in used}

  def why_not_longer(self) -> str | None:
    final = self.final_recipe and f"final_recipe={self.final_recipe} has trained the last of them"
    return super().why_not_longer() or self.optimizer.why_not_longer() or final

  def to_dict(self) -> dict[str, Any]:
    fields = super().to_dict()
    for name in ("data", "fsdp", "expert", "exchange"):  # other devices may go on with it
      del fields["mesh"][name]
    return fields


def definition(recipe: Recipe) -> dict[str, Any]:
  """Every field of the recipe but its name and citation."""
  fields = plain_fields(recipe)
  del fields["name"], fields["citation"]
  return fields


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
