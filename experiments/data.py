"""Text to tokens to batches; a batch depends on (corpus, seed, step) alone: resume needs no state.

A document is one file, or one line of a .jsonl file. Bytes are tokens unless `data.tokenizer` names
a tokenizer; a 0 byte stands between documents (a tokenizer's own boundary tokens, see `_encode`).
"""

import dataclasses
import glob
import hashlib
import json
import math
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np
import tokenizers

from experiments import config as config_lib

_PIECE_BYTES = 1 << 20  # an Encoding takes about 100 bytes a token, so long texts go in pieces


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Corpus:
  """Tokens of both splits; `sha256` covers every document's text, its bounds and its place."""

  name: str
  sha256: str
  files: int
  train: np.ndarray
  validation: np.ndarray
  vocab_size: int
  tokenizer_sha256: str | None

  def describe(self) -> dict[str, Any]:
    """Facts for config.json; the entropy is of the validation tokens, each drawn on its own."""
    counts = np.bincount(self.validation)
    p = counts[counts > 0] / self.validation.size
    return {
      "name": self.name,
      "sha256": self.sha256,
      "files": self.files,
      "train_tokens": self.train.size,
      "validation_tokens": self.validation.size,
      "unigram_entropy_nats": float(-np.sum(p * np.log(p))),
      "vocab_size": self.vocab_size,
      "tokenizer_sha256": self.tokenizer_sha256,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Document:
  """`place` tells documents apart and is the same on every machine; `source` is for messages."""

  place: str
  source: str
  text: bytes


def load_corpus(config: config_lib.Data) -> Corpus:
  """Reads, splits and tokenizes the text of `config`.

  Whole documents go to validation: `validation_fraction` of them, those whose place (path below the
  common folder, with line number in .jsonl) has the smallest SHA-256, at least one and never all.
  One text file alone is cut instead, at the line end nearest before its last `validation_fraction`.
  Empty documents are dropped. Bad settings raise ValueError, unreadable files OSError.
  """
  _check_settings(config)
  tokenizer, tokenizer_sha256 = _load_tokenizer(config.tokenizer)
  if config.path is None:
    name = f"python-{platform.python_version()}-stdlib"
    root = Path(sysconfig.get_path("stdlib"))
    files = _standard_library(root)
  else:
    name = config.path
    root, files = _matching_files(config.path)
  documents = [d for file in files for d in _documents(file, root) if d.text]
  if not documents:
    raise ValueError(f"data.path={config.path!r} holds no text: {len(files)} files, all empty")
  train, validation = _split(documents, config)
  digest = hashlib.sha256()
  for d in documents:
    place = d.place.encode("utf-8", "surrogateescape")
    for part in (place, d.text):
      digest.update(len(part).to_bytes(8, "little"))
      digest.update(part)
  corpus = Corpus(
    name=name,
    sha256=digest.hexdigest(),
    files=len(files),
    train=_encode(train, tokenizer),
    validation=_encode(validation, tokenizer),
    vocab_size=256 if tokenizer is None else _vocab_size(tokenizer),
    tokenizer_sha256=tokenizer_sha256,
  )
  for split in ("train", "validation"):
    _num_windows(corpus, config, split)
  return corpus


def batches(
  corpus: Corpus, config: config_lib.Data, seed: int, split: Literal["train", "validation"]
) -> grain.MapDataset:
  """`dataset[step]` is int32[batch_size, sequence_length + 1]: inputs [:, :-1], targets [:, 1:].

  Window i starts at token i * sequence_length, so every token but the first is a target once.
  train: all windows in an order drawn from `seed`, a new order every epoch, without end.
  validation: `len(dataset)` batches, the same for every seed; any number of the first of them
  is spread evenly over the whole text.
  """
  _check_settings(config)
  n = _num_windows(corpus, config, split)
  length = config.sequence_length
  if split == "train":
    # Grain shuffles epoch e by seed + e: unmixed, epoch 1 of seed 0 would be epoch 0 of seed 1.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    tokens, order = corpus.train, grain.MapDataset.range(n).shuffle(seed=mixed).repeat()
  else:
    tokens, order = corpus.validation, grain.MapDataset.source(_spread(n))
  offsets = np.arange(length + 1)

  def gather(windows: np.ndarray) -> np.ndarray:
    return tokens[windows[:, None] * length + offsets].astype(np.int32)

  return order.batch(config.batch_size, drop_remainder=True).map(gather)


def _check_settings(config: config_lib.Data) -> None:
  if not 0 < config.validation_fraction < 1:
    raise ValueError(
      f"data.validation_fraction={config.validation_fraction} must lie between 0 and 1, both out"
    )
  for field in ("sequence_length", "batch_size"):
    if getattr(config, field) < 1:
      raise ValueError(f"data.{field}={getattr(config, field)} must be at least 1")


def _num_windows(corpus: Corpus, config: config_lib.Data, split: str) -> int:
  """Windows of a split, refusing fewer than one batch of them."""
  match split:
    case "train":
      have = corpus.train.size
    case "validation":
      have = corpus.validation.size
    case _:
      raise ValueError(f'{split=} must be "train" or "validation"')
  need = config.batch_size * config.sequence_length + 1
  if have < need:
    raise ValueError(
      f"the {split} split of {corpus.name} has {have} tokens, one batch needs {need} "
      f"(data.batch_size={config.batch_size} * data.sequence_length={config.sequence_length} + 1); "
      f"the split follows data.validation_fraction={config.validation_fraction}"
    )
  return (have - 1) // config.sequence_length


def _spread(n: int) -> np.ndarray:
  """0..n-1, every prefix of which covers the range evenly: the ranks of n golden-ratio steps."""
  steps = np.arange(n) * ((math.sqrt(5) - 1) / 2) % 1
  return np.argsort(np.argsort(steps))


def _standard_library(root: Path) -> list[Path]:
  files = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = set(subfolders) - {"site-packages", "dist-packages", "__pycache__"}
    files += [Path(folder, name) for name in names if name.endswith(".py")]
  if not files:
    raise ValueError(f"no .py file below {root}: set data.path to a text file")
  return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _matching_files(pattern: str) -> tuple[Path, list[Path]]:
  """The folder common to all files (the file itself when alone), and the files in order."""
  expanded = os.path.expanduser(pattern)
  if os.path.isdir(expanded):
    raise ValueError(
      f"data.path={pattern!r} is a folder; give a file or a glob such as "
      f"{os.path.join(pattern, '**', '*.txt')!r}"
    )
  matches = [expanded] if os.path.lexists(expanded) else glob.glob(expanded, recursive=True)
  files = {Path(os.path.abspath(match)) for match in matches if not os.path.isdir(match)}
  if not files:
    raise FileNotFoundError(
      f"data.path={pattern!r} matches no file; give a text file, a glob or a .jsonl file"
    )
  root = Path(os.path.commonpath(files))
  return root, sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _documents(file: Path, root: Path) -> Iterator[_Document]:
  place = file.relative_to(root).as_posix()
  try:
    content = file.read_bytes()
  except OSError as error:
    raise OSError(f"data.path: cannot read {file}: {error.strerror}") from error
  if file.suffix != ".jsonl":
    yield _Document(place=place, source=str(file), text=content)
    return
  for number, line in enumerate(content.split(b"\n"), 1):
    if not line.strip():
      continue
    source = f"{file}, line {number}"
    try:
      row = json.loads(line)
    except ValueError as error:
      raise ValueError(f"{source}: not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
      raise ValueError(f'{source}: needs an object with a string "text", found {line[:60]!r}')
    try:
      text = row["text"].encode()
    except UnicodeEncodeError as error:
      raise ValueError(f'{source}: "text" is no valid Unicode ({error.reason})') from error
    yield _Document(place=f"{place}:{number}", source=source, text=text)


def _split(
  documents: list[_Document], config: config_lib.Data
) -> tuple[list[_Document], list[_Document]]:
  if len(documents) == 1 and documents[0].place == ".":
    return _cut(documents[0], config.validation_fraction)
  if len(documents) == 1:
    raise ValueError(
      f"data.path={config.path!r} holds one document, {documents[0].source}; "
      "train and validation need one each"
    )
  count = round(config.validation_fraction * len(documents))
  count = min(max(count, 1), len(documents) - 1)

  def rank(d: _Document) -> bytes:
    return hashlib.sha256(d.place.encode("utf-8", "surrogateescape")).digest()

  chosen = {d.place for d in sorted(documents, key=rank)[:count]}
  train = [d for d in documents if d.place not in chosen]
  return train, [d for d in documents if d.place in chosen]


def _cut(document: _Document, fraction: float) -> tuple[list[_Document], list[_Document]]:
  """Cuts before the last `fraction`, after a line end or, in the first line, before a character."""
  text = document.text
  target = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
  at = text.rfind(b"\n", 0, target) + 1
  if at == 0:
    at = target
    while at > 0 and text[at] & 0xC0 == 0x80:  # a continuation byte of UTF-8
      at -= 1
  parts = [dataclasses.replace(document, text=part) for part in (text[:at], text[at:])]
  return parts[:1], parts[1:]


def _load_tokenizer(path: str | None) -> tuple[tokenizers.Tokenizer | None, str | None]:
  if path is None:
    return None, None
  try:
    content = Path(path).expanduser().read_bytes()
  except OSError as error:
    raise OSError(
      f"data.tokenizer={path!r} cannot be read: {error.strerror}; give a `tokenizers` JSON file"
    ) from error
  try:
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
  except ValueError as error:
    raise ValueError(f"data.tokenizer={path!r} is no `tokenizers` JSON file ({error})") from error
  tokenizer.no_truncation()  # a saved tokenizer may cut every document at its model's length
  tokenizer.no_padding()
  return tokenizer, hashlib.sha256(content).hexdigest()


def _vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
  return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps


def _encode(documents: list[_Document], tokenizer: tokenizers.Tokenizer | None) -> np.ndarray:
  """Tokens of all documents in a row, read-only.

  With a tokenizer, what it makes of the empty text (say, one end-of-text token) follows every
  document, or a newline's tokens where that is nothing. A document over 1 MiB is encoded in pieces
  that end at line ends.
  """
  if tokenizer is None:
    return np.frombuffer(b"\0".join(d.text for d in documents), np.uint8)
  boundary = tokenizer.encode("").ids or tokenizer.encode("\n", add_special_tokens=False).ids
  dtype = np.uint16 if _vocab_size(tokenizer) <= 1 << 16 else np.uint32
  arrays = []
  for d in documents:
    for piece in _pieces(d.text):
      try:
        text = piece.decode()
      except UnicodeDecodeError as error:
        raise ValueError(
          f"{d.source}: not UTF-8 ({error.reason}), which data.tokenizer needs; "
          "without a tokenizer any bytes will do"
        ) from error
      arrays.append(np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype))
    arrays.append(np.array(boundary, dtype))
  tokens = np.concatenate(arrays)
  tokens.setflags(write=False)
  return tokens


def _pieces(text: bytes) -> Iterator[bytes]:
  start = 0
  while start < len(text):
    end = len(text)
    if end - start > _PIECE_BYTES:
      end = text.find(b"\n", start + _PIECE_BYTES) + 1 or len(text)
    yield text[start:end]
    start = end
