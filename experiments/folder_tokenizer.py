"""The tokenizer and the chat template beside the weights of a folder in Hugging Face's layout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment


class FolderTokenizer:
  """tokenizer.json with the template of chat_template.jinja or tokenizer_config.json.

  `eos_id` ends an answer: eos_token of tokenizer_config.json. `prefix` are the ids that the
  tokenizer puts before a text, Llama's <|begin_of_text|>; a chat's template writes its own.

  Raises:
    FileNotFoundError: no tokenizer.json, or no tokenizer_config.json.
    ValueError: an eos_token that there is not; in `chat`, no template.
  """

  def __init__(self, folder: str | Path):
    self._folder = Path(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
      if not (self._folder / name).is_file():
        raise FileNotFoundError(f"{self._folder} has no {name}")
    self._tokenizer = tokenizers.Tokenizer.from_file(str(self._folder / "tokenizer.json"))
    settings = json.loads((self._folder / "tokenizer_config.json").read_text())
    self._special = {
      name: _text(settings[name]) for name in ("bos_token", "eos_token") if settings.get(name)
    }
    self.eos_id = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
    if self.eos_id is None:
      raise ValueError(f"{self._folder}: eos_token={settings.get('eos_token')!r} is no token")
    self.prefix: list[int] = self._tokenizer.encode("").ids
    file = self._folder / "chat_template.jinja"
    source = file.read_text() if file.is_file() else settings.get("chat_template")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    self._template = None if source is None else environment.from_string(source)

  def encode(self, text: str) -> list[int]:
    """Ids; special tokens in the text are one id each, none are added."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], special: bool = False) -> str:
    """Text, with special tokens or without."""
    return self._tokenizer.decode(list(ids), skip_special_tokens=not special)

  def chat(self, messages: Sequence[dict[str, str]]) -> str:
    """The prompt after which the assistant answers; messages have "role" and "content"."""
    if self._template is None:
      raise ValueError(
        f"{self._folder} has no chat template; --config.start.chat=false asks for none"
      )
    return self._template.render(
      messages=list(messages), add_generation_prompt=True, **self._special
    )


def _text(token: Any) -> str:
  """A token as tokenizer_config.json has it: text, or an object with it."""
  return token if isinstance(token, str) else token["content"]
