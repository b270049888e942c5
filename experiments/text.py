"""Questions and answers as tokens of a policy."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from experiments.tasks import Problem


@runtime_checkable
class Text(Protocol):
  """How a policy reads and writes."""

  vocab_size: int
  stop_token: int  # ends an answer
  pad_token: int

  def prompt(self, question: str) -> list[int]:
    """What the answer follows."""

  def answer(self, answer: str) -> list[int]:
    """With the stop token."""

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of an answer, without the stop token."""


class Bytes:
  """UTF-8; a line end follows the question, a 0 byte the answer."""

  vocab_size = 256
  stop_token = pad_token = 0

  def prompt(self, question: str) -> list[int]:
    return [*question.encode(), ord("\n")]

  def answer(self, answer: str) -> list[int]:
    return [*answer.encode(), self.stop_token]

  def decode(self, tokens: Sequence[int]) -> str:
    return bytes(t for t in tokens if t != self.stop_token).decode(errors="replace")


class Chat:
  """By a chat model's own template; `tokenizer` has encode, decode, chat and eos_id."""

  def __init__(self, tokenizer, vocab_size: int, system: str = ""):
    self._tokenizer = tokenizer
    self._before = [{"role": "system", "content": system}] if system else []
    self.vocab_size = vocab_size
    self.stop_token = self.pad_token = tokenizer.eos_id

  def prompt(self, question: str) -> list[int]:
    messages = [*self._before, {"role": "user", "content": question}]
    return self._tokenizer.encode(self._tokenizer.chat(messages))

  def answer(self, answer: str) -> list[int]:
    return [*self._tokenizer.encode(answer), self.stop_token]

  def decode(self, tokens: Sequence[int]) -> str:
    return self._tokenizer.decode(list(tokens))


class FewShot:
  """Questions as a base model reads them: solved ones before, a line each. A line end ends an
  answer. `tokenizer` has encode, decode and prefix.

  Raises ValueError where a line end is not one token."""

  def __init__(self, tokenizer: Any, vocab_size: int, solved: Sequence[Problem] = ()):
    self._tokenizer, self.vocab_size = tokenizer, vocab_size
    self._before = "".join(f"{p.question} {p.answer}\n" for p in solved)
    line_end = tokenizer.encode("\n")
    if len(line_end) != 1:
      raise ValueError(f"a line end, which ends an answer, is the tokens {line_end}, not one")
    (self.stop_token,) = line_end
    self.pad_token = self.stop_token

  def prompt(self, question: str) -> list[int]:
    return [*self._tokenizer.prefix, *self._tokenizer.encode(self._before + question)]

  def answer(self, answer: str) -> list[int]:
    return [*self._tokenizer.encode(f" {answer}"), self.stop_token]

  def decode(self, tokens: Sequence[int]) -> str:
    return self._tokenizer.decode([t for t in tokens if t != self.stop_token])
