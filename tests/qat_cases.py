"""A small model and what it is judged by, for the tests of experiments.qat."""

import functools

import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from experiments.qat.settings import Settings
from experiments.qat.source import Source, make_source
from experiments.tasks import Problem
from fp4jax.models import LanguageModel, ModelConfig

SHAPE = ModelConfig(d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=0, d_ff=96)
SMALL = {
  "windows": 4,
  "window": 16,
  "window_batch": 2,
  "problems": 4,
  "task": "qat_cases:letters",
  "task_options": "",
  "shots": 1,
  "max_new_tokens": 2,
  "steps": 4,
  "batch": 2,
  "length": 16,
  "acs_fraction": 0.5,
  "acs_epochs": 2,
  "acs_reselect": 1,
  "block_windows": 4,
  "block_batch": 2,
  "calibration_windows": 2,
  "search_rounds": 1,
}


def letters(i: int) -> Problem:
  return Problem(f"{chr(97 + i % 26)}?", str(i % 26))


class Characters:
  """A token for each byte."""

  prefix = ()

  def __init__(self):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    self._tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    self._tokenizer.decoder = decoders.ByteLevel()

  def save(self, path):
    self._tokenizer.save(str(path))

  def encode(self, text):
    return self._tokenizer.encode(text).ids

  def decode(self, ids):
    return self._tokenizer.decode(list(ids))


@functools.cache
def small_model(dtype: str = "bfloat16", vocab: int = 256) -> LanguageModel:
  """One whose next tokens are not all alike."""
  config = ModelConfig(**(vars(SHAPE) | {"dtype": dtype}))
  model = LanguageModel(config, vocab, nnx.Rngs(0))
  model.w_head[...] = 4 * model.w_head[...]
  return model


def small_source(corpus: str, **changes) -> Source:
  return make_source(small_model(), Characters(), Settings(**(SMALL | {"text": corpus} | changes)))
