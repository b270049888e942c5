"""The tokenizer and the chat template that a GGUF file holds beside its weights."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, pre_tokenizers

_CONTROL = gguf.TokenType.CONTROL


class GgufTokenizer:
  """Byte-level BPE in which each digit is a token, as SmolLM2 has it; needs the package `gguf`.

      tokenizer = GgufTokenizer(smollm2_path())
      prompt = tokenizer.chat([{"role": "user", "content": "What is 2 + 2?"}])
      ids = tokenizer.encode(prompt)

  Raises:
    ValueError: another kind of tokenizer.
  """

  prefix = ()  # ids before a text that is no chat

  def __init__(self, path: str | Path):
    fields = gguf.GGUFReader(path).fields
    read = lambda name: fields[name].contents() if name in fields else None  # noqa: E731
    kind = read("tokenizer.ggml.model"), read("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
      raise ValueError(f"{path}: tokenizer {kind} is not ('gpt2', 'smollm')")
    tokens = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    self._tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, of_bytes])
    self._tokenizer.decoder = decoders.ByteLevel()
    types = read("tokenizer.ggml.token_type")
    self._tokenizer.add_special_tokens(
      [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    self.eos_id: int = read("tokenizer.ggml.eos_token_id")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    self._template = environment.from_string(read("tokenizer.chat_template") or "")

  def save(self, path: str | Path) -> None:
    """As a `tokenizers` JSON file, such as `experiments.data` reads."""
    self._tokenizer.save(str(path))

  def encode(self, text: str) -> list[int]:
    """Ids; special tokens in the text, `<|im_end|>`, are one id each."""
    return self._tokenizer.encode(text).ids

  def decode(self, ids: Sequence[int], special: bool = False) -> str:
    """Text, with special tokens or without."""
    return self._tokenizer.decode(list(ids), skip_special_tokens=not special)

  def chat(self, messages: Sequence[dict[str, str]]) -> str:
    """The prompt after which the assistant answers; messages have "role" and "content"."""
    return self._template.render(messages=list(messages), add_generation_prompt=True)
