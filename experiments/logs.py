"""What a run leaves behind while it goes: JSON rows, TensorBoard events, a progress line.

Rows and events are written straight to the file, a whole record a call: kill -9 loses at most the
record being written, and a write that fails is taken back and raises one OSError naming the file.
"""

import contextlib
import io
import json
import math
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tqdm
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

_BEGIN_AGAIN = "; mend it, or remove its folder to train that run again"


class JsonLines:
  """Appends rows to a .jsonl file, after cutting it to `offset` bytes.

  `offset` is what `sync` returned at the checkpoint to resume from: later rows are dropped.
  None keeps every complete row. A float is written as its repr, hence read back bit for bit;
  NaN and the infinities, which JSON lacks, become null.
  """

  def __init__(self, path: str | os.PathLike, offset: int | None = None):
    self._path = Path(path)
    written = self._path.read_bytes() if self._path.is_file() else b""
    if offset is None:
      offset = written.rfind(b"\n") + 1
    if not 0 <= offset <= len(written):
      raise ValueError(f"{self._path} has {len(written)} bytes, less than {offset}{_BEGIN_AGAIN}")
    if offset and written[offset - 1 : offset] != b"\n":
      raise ValueError(f"{self._path} has no line end before byte {offset}{_BEGIN_AGAIN}")
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = _open_append(self._path)
    if offset < len(written):
      self._file.truncate(offset)

  def write(self, row: dict[str, Any]) -> None:
    line = json.dumps(plain(row), separators=(",", ":"), allow_nan=False) + "\n"
    _append(self._file, self._path, line.encode())

  def sync(self) -> int:
    """Puts every row on the disk; returns the file's length in bytes."""
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise OSError(f"cannot write to {self._path}: {error.strerror}") from error
    return os.fstat(self._file.fileno()).st_size

  def close(self) -> None:
    self._file.close()


class Nowhere:
  """What a process writes to that is not the first of several."""

  def write(self, *_: Any) -> None: ...

  def sync(self) -> int:
    return 0

  def close(self) -> None: ...


class Rewritten(JsonLines):
  """A .jsonl file written anew: a place that can't be written is refused at once, and what it held
  stays until there is a first row. `header` is written before that."""

  def __init__(self, path: str | os.PathLike, header: dict[str, Any] | None = None):
    super().__init__(path)
    self._before = [] if header is None else [header]
    self._begun = False

  def write(self, row: dict[str, Any]) -> None:
    if not self._begun:
      self._file.truncate(0)
      self._begun = True
      for earlier in self._before:
        super().write(earlier)
    super().write(row)


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a .jsonl file; without a file none. A last line without its line end is no row."""
  try:
    lines = Path(path).read_bytes().split(b"\n")[:-1]
  except FileNotFoundError:
    return []
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError as error:
      raise ValueError(f"{path}, line {number} is damaged: {error}{_BEGIN_AGAIN}") from error
    if not isinstance(row, dict):
      raise ValueError(f"{path}, line {number} is damaged: {line[:60]!r} is not an object")
    rows.append(row)
  return rows


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
  """The object in a JSON file, None without a file."""
  try:
    value = json.loads(Path(path).read_bytes())
  except FileNotFoundError:
    return None
  except OSError as error:
    raise OSError(f"cannot read {path}: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} is damaged: {value!r:.60} is not an object")
  return value


def write_json(path: str | os.PathLike, value: Any) -> None:
  write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
  """Replaces a file at once: a reader, or a crash, sees the old one or the new one."""
  path = Path(path)
  partial = path.with_name(f".{path.name}.tmp")
  try:
    with open(partial, "wb") as file:
      file.write(text.encode())
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)
  except OSError as error:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise OSError(f"cannot write {path}: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
  """Puts the names in a folder on the disk: fsync of a file does not cover its name."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


class TensorBoard:
  """Scalars of one run as TensorBoard events in `folder`; every session writes its own file.

  On resume, `purge_step` makes TensorBoard hide earlier sessions' events from that step on.
  The events are tensorboardX's; its SummaryWriter is not used because it hands them to a thread
  that dies on a full disk, after which the training loop waits for ever.
  """

  def __init__(self, folder: str | os.PathLike, purge_step: int | None = None):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files of a folder in the order of their names.
    now = time.time_ns()
    seconds, nanoseconds = divmod(now, 10**9)
    name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}"
    self._path = folder / name
    self._file = _open_append(self._path)
    self._write(Event(wall_time=now / 1e9, file_version="brain.Event:2"))
    if purge_step is not None:
      start = SessionLog(status=SessionLog.START)
      self._write(Event(wall_time=now / 1e9, step=purge_step, session_log=start))

  def write(self, step: int, scalars: dict[str, float]) -> None:
    values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
    self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

  def close(self) -> None:
    self._file.close()

  def _write(self, event: Event) -> None:
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    record = length + _checksum(length) + data + _checksum(data)
    _append(self._file, self._path, record)


class Progress:
  """A bar over the tokens that this process has to train, with the run in hand, recipe-seed.

  `total_steps` are those of all runs; what a run has done already is taken off as it starts. `unit`
  is what a step has `per_step` of, `shown` the number that stands beside the step. On a terminal
  the line is rewritten in place, elsewhere one is printed every 10 s.
  """

  def __init__(
    self,
    total_steps: int,
    per_step: int,
    stream: TextIO | None = None,
    *,
    unit: str = "tokens",
    shown: str = "loss",
  ):
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    self._per_step, self._shown = per_step, shown
    self._bar = tqdm.tqdm(
      total=total_steps * per_step,
      unit=f" {unit}",
      unit_scale=True,
      file=stream if terminal else _Lines(stream),
      mininterval=0.1 if terminal else 10,
      dynamic_ncols=terminal,
      desc="the first step compiles  ",
      disable=not total_steps,
      bar_format="{desc}{percentage:3.0f}%|{bar:20}| {rate_fmt}, {remaining} left",
    )

  def start(self, run: str, steps: int, step: int = 0) -> None:
    """Begins the run of that name, of whose `steps` steps `step` are done."""
    self._run, self._steps, self._step = run, steps, step
    self._bar.total -= step * self._per_step

  def update(self, step: int, value: float) -> None:
    """Tells that `step` steps of the run are done, and the number that is shown of the last."""
    at = f"{step:{len(str(self._steps))}d}/{self._steps}"
    told = f"{self._run}  step {at}  {self._shown} {value:.4f}  "
    self._bar.set_description_str(told, refresh=False)
    self._bar.update((step - self._step) * self._per_step)
    self._step = step

  def skip(self, steps: int) -> None:
    """Takes off the steps of a run that is none of this process's."""
    self._bar.total -= steps * self._per_step

  def end(self) -> None:
    """Ends the run, also one that diverged before its last step."""
    self._bar.total -= (self._steps - self._step) * self._per_step
    self._bar.refresh()

  def close(self) -> None:
    self._bar.close()


class _Lines:
  """What tqdm writes to rewrite its line, as lines of a file."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    if line := text.strip():
      self._stream.write(line + "\n")

  def flush(self) -> None:
    self._stream.flush()


def _open_append(path: Path) -> io.FileIO:
  try:
    return open(path, "ab", buffering=0)
  except OSError as error:
    raise OSError(f"cannot write to {path}: {error.strerror}") from error


def _append(file: io.FileIO, path: Path, record: bytes) -> None:
  """Writes all of `record` or, as far as the file allows, nothing of it."""
  offset = os.fstat(file.fileno()).st_size
  rest = memoryview(record)
  try:
    while rest:  # an unbuffered write may take a part
      rest = rest[file.write(rest) :]
  except OSError as error:
    with contextlib.suppress(OSError):  # /dev/full has no length to cut
      file.truncate(offset)
    raise OSError(f"cannot write to {path}: {error.strerror}") from error


def plain(value: Any) -> Any:
  """JSON values: NumPy scalars become Python's, non-finite floats None."""
  match value:
    case dict():
      return {key: plain(v) for key, v in value.items()}
    case list() | tuple():
      return [plain(v) for v in value]
    case np.generic():  # before float: np.float64 is one
      return plain(value.item())
    case float() if not math.isfinite(value):
      return None
    case _:
      return value


def _checksum(data: bytes) -> bytes:
  return struct.pack("<I", masked_crc32c(data))
