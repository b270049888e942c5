"""Files to documents: one file is one, but of .jsonl and .ndjson every line with text is one.

Either may be packed, with .gz at the end of its name. Upper case in suffixes means the same.
"""

import dataclasses
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

_UNPACK = "unpack it first"
_ROWS = 'write its texts to a .jsonl file, each line with a "text"'
_TEXT = "give the text itself"

# What is not text: its name, its suffixes, how its bytes begin (a pattern), and what to do. .pt is
# missing: it is Portuguese as often as PyTorch. PAR1 is a gene, so the byte behind it counts too.
_BINARY = (
  ("gzip", "", rb"\x1f\x8b\x08", f"{_UNPACK}, or let its name end in .gz"),
  ("bzip2", ".bz2 .tbz2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", _UNPACK),
  ("xz", ".xz .txz .lzma", rb"\xfd7zXZ\0", _UNPACK),
  ("zstd", ".zst .zstd", rb"\x28\xb5\x2f\xfd", _UNPACK),
  ("lz4", ".lz4", rb"\x04\x22\x4d\x18", _UNPACK),
  ("7-Zip", ".7z", rb"7z\xbc\xaf\x27\x1c", _UNPACK),
  ("zip", ".zip", rb"PK\x03\x04", _UNPACK),
  ("tar", ".tar .tgz", rb".{257}ustar(\0|  \0)", _UNPACK),
  ("Parquet", ".parquet", rb"PAR1[\0-\x08\x0e-\x1f]", _ROWS),
  ("Arrow", ".arrow .feather", rb"ARROW1\0\0", _ROWS),
  ("Avro", ".avro", rb"Obj\x01", _ROWS),
  ("TFRecord", ".tfrecord .tfrecords", None, _ROWS),
  ("NumPy", ".npy .npz", rb"\x93NUMPY", _TEXT),
  ("HDF5", ".h5 .hdf5", rb"\x89HDF\r\n\x1a\n", _TEXT),
  ("safetensors", ".safetensors", None, _TEXT),
  ("pickle", ".pkl .pickle", None, _TEXT),
  ("PDF", ".pdf", rb"%PDF-", _TEXT),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """`place` tells documents apart and is the same on every machine; `source` is for messages."""

  place: str
  source: str
  text: bytes


def standard_library(root: Path) -> list[Path]:
  files = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = set(subfolders) - {"site-packages", "dist-packages", "__pycache__"}
    files += [Path(folder, name) for name in names if name.endswith(".py")]
  if not files:
    raise ValueError(f"no .py file below {root}: set data.path to a text file")
  return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def matching_files(pattern: str) -> tuple[Path, list[Path]]:
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


def read(file: Path, root: Path) -> Iterator[Document]:
  place = file.relative_to(root).as_posix()
  name = Path(file.name.lower())
  packed = name.suffix == ".gz"
  suffix = name.with_suffix("").suffix if packed else name.suffix
  _refuse_binary(file, suffix=suffix)
  try:
    content = file.read_bytes()
  except OSError as error:
    raise OSError(f"data.path: cannot read {file}: {error.strerror}") from error
  if packed:
    content = _unpack(content, file)
  _refuse_binary(file, content=content)
  if suffix not in (".jsonl", ".ndjson"):
    yield Document(place=place, source=str(file), text=content)
    return
  for number, line in enumerate(content.split(b"\n"), 1):
    if line.strip():
      source = f"{file}, line {number}"
      yield Document(place=f"{place}:{number}", source=source, text=_row_text(line, source))


def _refuse_binary(file: Path, *, suffix: str = "", content: bytes = b"") -> None:
  for name, suffixes, beginning, advice in _BINARY:
    begins = beginning is not None and re.match(beginning, content, re.DOTALL)
    if begins or suffix in suffixes.split():
      raise ValueError(f"data.path: {file} is {name}, not text; {advice}")


def _unpack(content: bytes, file: Path) -> bytes:
  try:
    if not content:  # of no bytes, gzip makes no error
      raise EOFError("it is empty")
    return gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"data.path: {file} is damaged or no gzip file ({error})") from error


def _row_text(line: bytes, source: str) -> bytes:
  try:
    row = json.loads(line)
  except ValueError as error:
    raise ValueError(f"{source}: not JSON ({error})") from error
  except RecursionError as error:
    raise ValueError(f"{source}: nested too deep to read, begins {line[:60]!r}") from error
  if not isinstance(row, dict) or not isinstance(row.get("text"), str):
    raise ValueError(f'{source}: needs an object with a string "text", found {line[:60]!r}')
  try:
    return row["text"].encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{source}: "text" is not valid Unicode ({error.reason})') from error
