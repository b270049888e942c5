"""The policy that every arm begins with: read from a file, or made and taught here."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.checkpoints import Checkpoints
from experiments.config import Experiment, Optimizer
from experiments.folder_tokenizer import FolderTokenizer
from experiments.rl.config import RLExperiment
from experiments.tasks import Problems
from experiments.text import Bytes, Chat, FewShot, Text
from experiments.train import make_trainer, policy_of
from fp4jax import recipes
from fp4jax.models import LanguageModel, ModelConfig
from fp4jax.models.hugging_face import load_hugging_face

SMOLLM2 = "smollm2"


@dataclasses.dataclass(frozen=True)
class Source:
  """What a policy is before it is taught."""

  model: ModelConfig
  text: Text
  params: Callable[[], Any]  # reads or makes them
  sha256: str | None = None  # of the files that they are read from


def source_of(config: RLExperiment) -> Source:
  """Raises ValueError or OSError for a pretrained policy that can't be read."""
  start = config.start
  if start.pretrained is None:
    text = Bytes()
    make = lambda: LanguageModel(config.model, text.vocab_size, nnx.Rngs(start.seed))  # noqa: E731
    return Source(config.model, text, lambda: _params(make()))
  if start.pretrained == SMOLLM2:
    from experiments.gguf_tokenizer import GgufTokenizer
    from fp4jax.models.gguf import load_gguf, smollm2_path

    path = smollm2_path()
    found, model = load_gguf(path, config.model.dtype)
    tokenizer, weights = GgufTokenizer(path), [path]
  else:
    folder = Path(start.pretrained)
    if not folder.is_dir():
      raise ValueError(f"start.pretrained={start.pretrained!r} is not {SMOLLM2!r}, nor a folder")
    found, model = load_hugging_face(folder, config.model.dtype)
    tokenizer = FolderTokenizer(folder)
    weights = sorted(
      path for kind in ("*.safetensors", "*.json", "*.jinja") for path in folder.glob(kind)
    )
  of_run = {name: getattr(config.model, name) for name in ("remat", "vocab_chunk", "unroll")}
  vocab_size = model.embedding.num_embeddings
  try:
    text = (
      Chat(tokenizer, vocab_size, start.system) if start.chat else FewShot(tokenizer, vocab_size)
    )
  except ValueError as error:
    raise ValueError(f"start.chat={start.chat} of {start.pretrained}: {error}") from None
  return Source(
    dataclasses.replace(found, **of_run), text, lambda: _params(model), _digest(weights)
  )


def _digest(paths: Sequence[Path]) -> str:
  digest = hashlib.sha256()
  for path in paths:
    with open(path, "rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()


def _params(model: LanguageModel) -> Any:
  return nnx.to_pure_dict(nnx.state(model))


def start_params(
  folder: Path,
  config: RLExperiment,
  source: Source,
  problems: Problems,
  tell: Callable[[int, float], None],
) -> Any:
  """What all runs begin with: the source's params, after `start.teaching` if there is any.

  What was taught is kept in `folder`, and read from there the next time; `tell` hears how many
  steps are done, and the loss, and may raise to stop.
  """
  teaching = config.start.teaching
  if not teaching.steps:
    return source.params()
  with contextlib.closing(Checkpoints(folder, keep=1)) as kept:
    restored = kept.restore_latest({"params": jax.eval_shape(source.params)})
    if restored is not None:
      return restored[1]["params"]
    params = _taught(config, source, problems, tell)
    kept.save(teaching.steps, {"params": params}, {})
  return params


def _taught(config, source, problems, tell) -> Any:
  """After reading whole problems in bf16, with the loss of pre-training."""
  teaching = config.start.teaching
  optimizer = Optimizer(learning_rate=teaching.learning_rate, warmup_steps=teaching.warmup_steps)
  settings = Experiment(steps=teaching.steps, model=source.model, optimizer=optimizer)
  trainer = make_trainer(settings, source.text.vocab_size, policy_of(recipes.BF16, settings))
  params = jax.tree.map(jnp.copy, source.params())  # a step gives away what it is given
  state = dataclasses.replace(trainer.init(jnp.int32(0)), params=params)
  seed = jnp.int32(config.start.seed)
  for step in range(teaching.steps):
    found = problems.taught(config.start.seed, step, teaching.batch_size)
    rows = taught_rows(found, source.text, config.rollout)
    state, scalars = trainer.step(state, rows, seed)
    loss, norm = float(scalars["loss"]), float(scalars["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(norm)):
      raise ValueError(
        f"teaching diverged at step {step}, loss {loss}, gradient {norm}; lower"
        f" start.teaching.learning_rate={teaching.learning_rate}"
      )
    tell(step + 1, loss)
  return state.params


def taught_rows(problems, text: Text, rollout) -> np.ndarray:
  """A problem with its answer a row, as a rollout would have sampled it, padded at the end."""
  width = rollout.max_prompt_tokens + rollout.max_new_tokens
  rows = np.full((len(problems), width), text.pad_token, np.int32)
  for row, problem in zip(rows, problems, strict=True):
    shown = problem.answer if problem.example is None else problem.example
    tokens = [*text.prompt(problem.question), *text.answer(shown)]
    if len(tokens) > width:
      raise ValueError(
        f"{problem.question[:60]!r} and its answer have {len(tokens)} tokens, more than"
        f" rollout.max_prompt_tokens + max_new_tokens={width}"
      )
    row[: len(tokens)] = tokens
  return rows
