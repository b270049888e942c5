"""Where the time of a training step goes: the profile behind `step_profile`."""

import collections
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import data
from experiments.config import Experiment
from experiments.mesh import make_mesh
from experiments.train import make_trainer, policy_of
from fp4jax import recipes

_STEPS = 5
PARTS = ("optimizer", "attention", "feed_forward", "head")  # named scopes of the step
_GEMM = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|dot", re.IGNORECASE)
_CONTROL = re.compile(r"while|conditional|call")  # on a CPU, the time of what they contain
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', re.MULTILINE)


def kind_of(kernel: str, op_name: str) -> tuple[str, str]:
  """Part of the model, `other` outside of all; `kernels` for those of pallas_kernels, `gemm` for
  the compiler's products, `rest` for the remaining element-wise work, copies and sorting."""
  part = next((part for part in PARTS if re.search(rf"\b{part}\b", op_name)), "other")
  if "mosaic" in kernel:
    return part, "kernels"
  product = _GEMM.search(kernel) or op_name.endswith("dot_general")
  return part, "gemm" if product else "rest"


def kernel_times(folder: Path, op_names: dict[str, str]) -> Iterator[tuple[str, str, float]]:
  """(part, kind, ms) of every kernel in a profile."""
  by_kernel = {name.replace(".", "_").replace("-", "_"): op for name, op in op_names.items()}
  (path,) = folder.rglob("*.xplane.pb")
  planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
  device = [plane for plane in planes if "/device:GPU" in plane.name]
  for plane in device or [plane for plane in planes if plane.name == "/host:CPU"]:
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        op = stats.get("hlo_op")
        if line.name.startswith("Stream") if device else op and not _CONTROL.match(op):
          op_name = op_names.get(op) or by_kernel.get(event.name, "")
          yield *kind_of(event.name, op_name), event.duration_ns / 1e6


def profile(config: Experiment, recipe: str) -> dict[tuple[str, str], float]:
  """Milliseconds per step, by part and kind."""
  corpus = data.load_corpus(config.data)
  batches = data.batches(corpus, config.data, 0, "train")
  policy = policy_of(recipes.by_name(recipe), config)
  trainer = make_trainer(config, corpus.vocab_size, policy, make_mesh(config))
  seed = jnp.int32(0)
  state = trainer.init(seed)
  step = trainer.step.lower(state, batches[0], seed).compile()
  op_names = dict(_INSTRUCTION.findall(step.as_text()))
  state, _ = jax.block_until_ready(step(state, batches[0], seed))
  totals = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for i in range(_STEPS):
        state, _ = jax.block_until_ready(step(state, batches[i], seed))
    for part, kind, ms in kernel_times(Path(folder), op_names):
      totals[part, kind] += ms / _STEPS
  return totals
