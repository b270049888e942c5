"""The pretrained model with the text and the problems that it is judged by and trained on."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments import data
from experiments.config import Data
from experiments.qat.settings import Settings
from experiments.tasks import Problem, Problems, TaskSettings, answer_in, load_task
from experiments.text import FewShot, Text
from fp4jax.models import LanguageModel


@dataclasses.dataclass(frozen=True)
class Source:
  """Windows are int32 and have one token more than a model reads of them."""

  model: LanguageModel
  text: Text
  problems: tuple[Problem, ...]
  held_out: np.ndarray  # (windows, window + 1)
  corpus: data.Corpus
  settings: Settings

  def train_windows(self, count: int, length: int) -> np.ndarray:
    """The first `count` of the order that the seed draws: (count, length + 1)."""
    config = Data(sequence_length=length, batch_size=1)
    batches = data.batches(self.corpus, config, self.settings.seed, "train")
    return np.concatenate([batches[i] for i in range(count)])

  def describe(self) -> dict[str, Any]:
    """What a row says of the corpus."""
    return {"corpus": self.corpus.name, "corpus_sha256": self.corpus.sha256}


def load_source(settings: Settings) -> Source:
  """Raises ValueError or OSError for a model, a text or a task that can't be read."""
  from experiments.gguf_tokenizer import GgufTokenizer
  from fp4jax.models.gguf import load_gguf, smollm2_path

  path = Path(settings.model) if settings.model else smollm2_path()
  _, model = load_gguf(path)
  return make_source(model, GgufTokenizer(path), settings)


def make_source(model: LanguageModel, tokenizer: Any, settings: Settings) -> Source:
  """`tokenizer` has encode, decode, prefix and save."""
  s = settings
  task = load_task(TaskSettings(s.task, s.task_options, s.task_pattern or None))
  problems = Problems(task, s.problems)
  for problem in problems.held_out:
    if problem.reward(answer_in(problem.answer, s.task_pattern or None)) != 1:
      raise ValueError(
        f"task_pattern={s.task_pattern!r} does not find {problem.answer!r}, an answer of"
        f" task={s.task}"
      )
  solved = problems.train(s.seed, 0, s.shots)
  text = FewShot(tokenizer, model.embedding.num_embeddings, solved)
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "tokenizer.json"
    tokenizer.save(file)
    config = Data(
      path=s.text or None, tokenizer=str(file), sequence_length=s.window, batch_size=s.windows
    )
    corpus = data.load_corpus(config)
  held_out = data.batches(corpus, config, s.seed, "validation")[0]
  return Source(model, text, problems.held_out, held_out, corpus, settings)
