"""What a run leaves behind while it goes: JSON rows, TensorBoard events, a progress line.

Rows and events are written straight to the file, a whole record a call: kill -9 loses at most the
record being written, and a write that fails is taken back and raises one OSError naming the file.
"""

import contextlib
import io
import json
import math
import os
import shutil
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


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
      raise ValueError(f"{self._path} has {len(written)} bytes, cannot be cut to {offset=}")
    if offset and written[offset - 1 : offset] != b"\n":
      raise ValueError(f"{self._path} has no line end before {offset=}")
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = _open_append(self._path)
    if offset < len(written):
      self._file.truncate(offset)

  def write(self, row: dict[str, Any]) -> None:
    line = json.dumps(_plain(row), separators=(",", ":"), allow_nan=False) + "\n"
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
      raise ValueError(f"{path}, line {number} is damaged: {error}") from error
    if not isinstance(row, dict):
      raise ValueError(f"{path}, line {number} is damaged: {line[:60]!r} is no object")
    rows.append(row)
  return rows


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Replaces a JSON file at once: a reader, or a crash, sees the old one or the new one."""
  path = Path(path)
  text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
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
  """One line about the run in hand and the time left of the whole job.

  On a terminal the line is rewritten in place, elsewhere printed now and then and as a run ends.
  `total_steps` are those this process has to take, all runs together, without those of before a
  resume; the first `compiling_runs` runs compile in their first step; `tokens_per_step` is
  batch_size * sequence_length.
  """

  def __init__(
    self,
    total_steps: int,
    compiling_runs: int,
    tokens_per_step: int,
    stream: TextIO | None = None,  # standard error
    clock: Callable[[], float] = time.monotonic,
  ):
    self._left = total_steps
    self._compiling_runs = compiling_runs
    self._first_s: list[float] = []  # of each such run, to the end of its first step
    self._later_s, self._later_steps = 0.0, 0  # of the other steps of all runs
    self._tokens_per_step = tokens_per_step
    self._stream = sys.stderr if stream is None else stream
    self._clock = clock
    self._terminal = self._stream.isatty()
    self._every_s = 0.1 if self._terminal else 10.0
    self._printed = clock()
    self._line = ""

  def start(self, run: str, steps: int, step: int = 0) -> None:
    """Begins the run named `run` (recipe/seed) of `steps` steps, of which `step` are done."""
    self._run, self._steps, self._step = run, steps, step
    self._told = self._clock()
    self._timed = None  # the run's first step compiles, so its speed counts from there

  def update(self, step: int, loss: float) -> None:
    """Tells that `step` steps of the run are done; prints when a line is due."""
    now = self._clock()
    seconds, steps = now - self._told, step - self._step
    self._told, self._step = now, step
    self._left -= steps
    tokens_per_s = None
    if self._timed is None:
      self._timed = now, step
      if len(self._first_s) < self._compiling_runs:
        self._first_s.append(seconds)
    else:
      self._later_s += seconds
      self._later_steps += steps
      if now > self._timed[0]:
        tokens_per_s = self._tokens_per_step * (step - self._timed[1]) / (now - self._timed[0])
    self._line = progress_line(
      self._run, step, self._steps, loss, tokens_per_s, self._seconds_left()
    )
    if now - self._printed >= self._every_s:
      self._printed = now
      self._print(end="")

  def end(self) -> None:
    """Ends the run, also one that diverged before its last step: its last line stays."""
    self._left -= self._steps - self._step
    if self._line:
      self._printed = self._clock()
      self._print(end="\n")
      self._line = ""

  def _seconds_left(self) -> float | None:
    """None before there is a step that did not compile."""
    if not self._later_steps:
      return None
    to_compile = self._compiling_runs - len(self._first_s)
    compiling_s = to_compile and to_compile * statistics.fmean(self._first_s)
    return self._later_s / self._later_steps * self._left + compiling_s

  def _print(self, end: str) -> None:
    if self._terminal:  # a wrapped line could not be rewritten
      width = shutil.get_terminal_size().columns - 1
      self._stream.write("\r" + self._line[:width].ljust(width) + end)
    else:
      self._stream.write(self._line + "\n")
    self._stream.flush()


def progress_line(
  run: str,
  step: int,
  steps: int,
  loss: float,
  tokens_per_s: float | None,
  seconds_left: float | None,
) -> str:
  """`mxfp4/0  step  40/100  loss 3.2145  12,345 tokens/s  1:02:03 left`."""
  speed = "-" if tokens_per_s is None else f"{tokens_per_s:,.0f}"
  left = "-"
  if seconds_left is not None:
    minutes, seconds = divmod(max(round(seconds_left), 0), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
  at = f"{step:{len(str(steps))}d}/{steps}"
  return f"{run}  step {at}  loss {loss:.4f}  {speed} tokens/s  {left} left"


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


def _plain(value: Any) -> Any:
  """JSON values: NumPy scalars become Python's, non-finite floats None."""
  match value:
    case dict():
      return {key: _plain(v) for key, v in value.items()}
    case list() | tuple():
      return [_plain(v) for v in value]
    case np.generic():  # before float: np.float64 is one
      return _plain(value.item())
    case float() if not math.isfinite(value):
      return None
    case _:
      return value


def _checksum(data: bytes) -> bytes:
  return struct.pack("<I", masked_crc32c(data))
