"""A policy from a folder in Hugging Face's layout: its tokenizer, its template, its weights."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from hugging_face_oracle import QWEN3_MOE, new_arrays, write
from rl_cases import small_rl

from experiments.folder_tokenizer import FolderTokenizer
from experiments.rl.config import Teaching
from experiments.rl.run import Setting
from experiments.rl.start import source_of, start_params
from experiments.tasks import Problem, TaskSettings

WORDS = ["[UNK]", "<s>", "<|end|>", "user", "assistant", ":", "2", "+", "3", "5"]
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} <|end|> {% endfor %}"
  "{% if add_generation_prompt %}assistant :{% endif %}"
)


def sums(i):
  return Problem(" + ".join("23"[int(bit)] for bit in f"{i % 64:b}"), "5")


@pytest.fixture
def folder(tmp_path):
  path = write(tmp_path / "policy", QWEN3_MOE, new_arrays(QWEN3_MOE))
  words = {word: i for i, word in enumerate(WORDS)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(["<s>", "<|end|>"])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )  # the template of a chat has its own
  tokenizer.save(str(path / "tokenizer.json"))
  settings(path, chat_template=TEMPLATE)
  return path


def settings(path, **changes):
  given = {"bos_token": {"content": "<s>"}, "eos_token": "<|end|>"} | changes
  (path / "tokenizer_config.json").write_text(json.dumps(given))


def test_a_chat_is_by_the_folders_own_template(folder):
  tokenizer = FolderTokenizer(folder)
  prompt = tokenizer.chat([{"role": "user", "content": "2 + 3"}])
  assert prompt == "<s>user : 2 + 3 <|end|> assistant :"
  ids = tokenizer.encode(prompt)
  assert [WORDS[i] for i in ids] == prompt.replace("<s>", "<s> ").split()
  assert tokenizer.eos_id == 2
  assert tokenizer.decode([9, 2]) == "5"
  assert tokenizer.decode([9, 2], special=True) == "5 <|end|>"
  (folder / "chat_template.jinja").write_text("another one")
  assert FolderTokenizer(folder).chat([]) == "another one"


def test_without_a_chat_a_prompt_begins_as_the_tokenizer_begins_a_text(folder):
  config = small_rl(**{"start.pretrained": str(folder), "start.chat": False})
  words = "start.chat=False of .*: a line end, .* is the tokens \\[\\], not one"
  with pytest.raises(ValueError, match=words):
    source_of(config)
  found = json.loads((folder / "tokenizer.json").read_text())
  found["pre_tokenizer"] = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "Removed",
    "invert": False,
  }
  found["model"]["vocab"]["\n"] = len(WORDS)
  (folder / "tokenizer.json").write_text(json.dumps(found))
  text = source_of(config).text
  assert text.stop_token == len(WORDS)
  assert [WORDS[i] for i in text.prompt("2 + 3")] == ["<s>", "2", "+", "3"]


def test_teaching_leaves_the_folders_weights(folder, tmp_path):
  """A training step gives away the arrays that it is given."""
  changes = {"teaching": Teaching(steps=1, warmup_steps=0, batch_size=2)}
  config = small_rl(**{"start.pretrained": str(folder), "rollout.max_prompt_tokens": 24})
  config.task = TaskSettings("test_folder_tokenizer:sums", held_out=4)
  config = dataclasses.replace(config, start=dataclasses.replace(config.start, **changes))
  setting = Setting.of(config)
  taught = [
    start_params(tmp_path / name, config, setting.source, setting.problems, lambda *_: None)
    for name in ("one", "two")
  ]
  jax.tree.map(np.testing.assert_array_equal, *taught)


def test_what_is_missing_is_named(folder):
  settings(folder)
  with pytest.raises(ValueError, match=r"no chat template; --config\.start\.chat=false"):
    FolderTokenizer(folder).chat([])
  settings(folder, eos_token="<eos>")
  with pytest.raises(ValueError, match="eos_token='<eos>' is no token"):
    FolderTokenizer(folder)
  (folder / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
    FolderTokenizer(folder)


def test_a_policy_begins_with_the_weights_of_the_folder(folder):
  config = small_rl(**{"start.pretrained": str(folder)})
  config.model.remat = "everything"
  source = source_of(config)
  assert (source.model.num_experts, source.model.remat) == (6, "everything")
  assert (source.text.vocab_size, source.text.stop_token) == (50, 2)
  table = new_arrays(QWEN3_MOE)["model.embed_tokens.weight"]
  found = jax.device_get(source.params()["embedding"]["embedding"])
  np.testing.assert_array_equal(found, table)
  assert source.text.decode([9, 2]) == "5"
  before = source.sha256
  write(folder, QWEN3_MOE, new_arrays(QWEN3_MOE, seed=1))
  assert source_of(config).sha256 != before
