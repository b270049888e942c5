"""Text to tokens to batches; a batch depends on (corpus, seed, step) alone: resume needs no state.

A document is one file, or one line of a .jsonl file. Bytes are tokens unless `data.tokenizer` names
a tokenizer; a 0 byte stands between documents (a tokenizer's own boundary tokens, see `_encode`).
"""

import dataclasses
import hashlib
import math
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np
import tokenizers

from experiments import config as config_lib
from experiments import documents as documents_lib

_PIECE_BYTES = 1 << 20  # an Encoding takes about 100 bytes per token, so long texts go in pieces

# A BPE model without an unknown token drops what it does not know in silence. Given one that its
# vocabulary lacks, it raises instead, as the other models do; this name shows in the message.
_NO_UNKNOWN_TOKEN = "(no unk_token is set)"


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
    files = documents_lib.standard_library(root)
  else:
    name = config.path
    root, files = documents_lib.matching_files(config.path)
  documents = [d for file in files for d in documents_lib.read(file, root) if d.text]
  if config.path is None and tokenizer is not None:  # it has tests of other encodings
    documents = [d for d in documents if _is_utf8(d.text)]
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
    train=_encode(train, tokenizer, config.tokenizer),
    validation=_encode(validation, tokenizer, config.tokenizer),
    vocab_size=256 if tokenizer is None else _vocab_size(tokenizer),
    tokenizer_sha256=tokenizer_sha256,
  )
  for split in ("train", "validation"):
    _num_windows(corpus, config, split)
  return corpus


def batches(
  corpus: Corpus,
  config: config_lib.Data,
  seed: int,
  split: Literal["train", "validation"],
  sharding: jax.sharding.Sharding | None = None,
) -> grain.MapDataset:
  """`dataset[step]` is int32[batch_size, sequence_length + 1]: inputs [:, :-1], targets [:, 1:].

  With `sharding` it is a jax.Array so sharded, of which each process reads its own windows alone.

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

  def read(windows: np.ndarray, columns: slice = slice(None)) -> np.ndarray:
    return tokens[windows[:, None] * length + offsets[columns]].astype(np.int32)

  def place(windows: np.ndarray) -> jax.Array:
    part = lambda index: read(windows[index[0]], index[1])  # noqa: E731
    return jax.make_array_from_callback((len(windows), length + 1), sharding, part)

  batched = order.batch(config.batch_size, drop_remainder=True)
  return batched.map(read if sharding is None else place)


def _check_settings(config: config_lib.Data) -> None:
  if not 0 < config.validation_fraction < 1:
    raise ValueError(
      f"data.validation_fraction={config.validation_fraction} must lie between 0 and 1, both out"
    )
  for field in ("sequence_length", "batch_size", "microbatches"):
    if getattr(config, field) < 1:
      raise ValueError(f"data.{field}={getattr(config, field)} must be at least 1")
  if config.batch_size % config.microbatches:
    raise ValueError(
      f"data.batch_size={config.batch_size} is no multiple of "
      f"data.microbatches={config.microbatches}"
    )


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


def _split(
  documents: list[documents_lib.Document], config: config_lib.Data
) -> tuple[list[documents_lib.Document], list[documents_lib.Document]]:
  if len(documents) == 1 and documents[0].place == ".":
    return _cut(documents[0], config.validation_fraction)
  if len(documents) == 1:
    raise ValueError(
      f"data.path={config.path!r} holds one document, {documents[0].source}; "
      "train and validation need one each"
    )
  count = round(config.validation_fraction * len(documents))
  count = min(max(count, 1), len(documents) - 1)

  def rank(d: documents_lib.Document) -> bytes:
    return hashlib.sha256(d.place.encode("utf-8", "surrogateescape")).digest()

  chosen = {d.place for d in sorted(documents, key=rank)[:count]}
  train = [d for d in documents if d.place not in chosen]
  return train, [d for d in documents if d.place in chosen]


def _cut(
  document: documents_lib.Document, fraction: float
) -> tuple[list[documents_lib.Document], list[documents_lib.Document]]:
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
    raise ValueError(
      f"data.tokenizer={path!r} is not a `tokenizers` JSON file ({error})"
    ) from error
  if not tokenizer.get_vocab_size():
    raise ValueError(
      f"data.tokenizer={path!r} has an empty vocabulary; train it before you save it"
    )
  model = tokenizer.model
  if isinstance(model, tokenizers.models.BPE) and model.unk_token is None:
    model.unk_token = _NO_UNKNOWN_TOKEN
  tokenizer.no_truncation()  # a saved tokenizer may cut every document at its model's length
  tokenizer.no_padding()
  return tokenizer, hashlib.sha256(content).hexdigest()


def _vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
  return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps


def _encode(
  documents: list[documents_lib.Document], tokenizer: tokenizers.Tokenizer | None, path: str | None
) -> np.ndarray:
  """Tokens of all documents in a row, read-only; `path` is the tokenizer's, for messages.

  With a tokenizer, what it makes of the empty text (say, one end-of-text token) follows every
  document, or a newline's tokens where that is nothing. A document over 1 MiB is encoded in pieces
  that end at line ends.
  """
  if tokenizer is None:
    return np.frombuffer(b"\0".join(d.text for d in documents), np.uint8)

  def encode(text: str, source: str) -> list[int]:
    try:
      return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises no narrower class
      raise ValueError(
        f"{source}: data.tokenizer={path!r} cannot encode {_unknown(text, tokenizer)!r} ({error}); "
        "give it an unknown token or byte fallback; without a tokenizer any bytes will do"
      ) from error

  boundary = tokenizer.encode("").ids or encode("\n", "the end of a document")
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
      arrays.append(np.array(encode(text, d.source), dtype))
    arrays.append(np.array(boundary, dtype))
  tokens = np.concatenate(arrays)
  tokens.setflags(write=False)
  return tokens


def _is_utf8(text: bytes) -> bool:
  try:
    text.decode()
  except UnicodeDecodeError:
    return False
  return True


def _unknown(text: str, tokenizer: tokenizers.Tokenizer) -> str:
  """The first line, of it the first word, of it the first character that is refused on its own."""
  patterns = [r"[^\n]*\n?", r"\s+|\S+"]
  if isinstance(tokenizer.model, (tokenizers.models.BPE, tokenizers.models.Unigram)):
    patterns.append(r"(?s:.)")  # to the other models, words are known or unknown as a whole

  def refused(part: str) -> bool:
    try:
      tokenizer.encode(part, add_special_tokens=False)
    except Exception:
      return True
    return False

  for pattern in patterns:
    text = next(filter(refused, re.findall(pattern, text)), text)
  return text[:60]


def _pieces(text: bytes) -> Iterator[bytes]:
  start = 0
  while start < len(text):
    end = len(text)
    if end - start > _PIECE_BYTES:
      end = text.find(b"\n", start + _PIECE_BYTES) + 1 or len(text)
    yield text[start:end]
    start = end
