import contextlib
import io
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments import logs

ROOT = Path(__file__).parents[1]


def test_rows_come_back_bit_for_bit(tmp_path):
  rng = np.random.default_rng(0)
  floats = np.frombuffer(rng.bytes(8 * 2000), np.float64)
  floats = [x for x in floats.tolist() if math.isfinite(x)] + [5e-324, -0.0, 0.1, 1e22, 2.0]
  singles = rng.standard_normal(200).astype(np.float32)
  rows = [
    {"z": i, "a": x, "nested": {"list": [x, None, True, "é\n"]}} for i, x in enumerate(floats)
  ]
  rows.append({"float32": singles[0], "float64": np.float64(0.1), "int": np.int32(7)})
  file = logs.JsonLines(tmp_path / "new" / "metrics.jsonl")
  for row in rows:
    file.write(row)
  file.close()
  found = logs.read_rows(tmp_path / "new" / "metrics.jsonl")
  assert found == rows
  assert [math.copysign(1, row["a"]) for row in found[:-1]] == [math.copysign(1, x) for x in floats]
  assert list(found[0]) == ["z", "a", "nested"]
  assert np.float32(found[-1]["float32"]) == singles[0]


def test_rows_are_compact_and_on_file_at_once(tmp_path):
  file = logs.JsonLines(tmp_path / "m.jsonl")
  file.write({"step": 1, "loss": 0.1, "bad": [math.nan, -math.inf, np.float32("inf")]})
  expected = b'{"step":1,"loss":0.1,"bad":[null,null,null]}\n'
  assert (tmp_path / "m.jsonl").read_bytes() == expected
  assert file.sync() == len(expected)
  with pytest.raises(TypeError):
    file.write({"step": 2, "loss": np.zeros(3)})
  assert (tmp_path / "m.jsonl").read_bytes() == expected
  file.close()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
  path = tmp_path / "m.jsonl"
  file = logs.JsonLines(path)
  file.write({"step": 1})
  offset = file.sync()
  file.write({"step": 2})
  file.close()
  for again in range(2):
    file = logs.JsonLines(path, offset)
    file.write({"step": 2, "again": again})
    file.close()
    assert logs.read_rows(path) == [{"step": 1}, {"step": 2, "again": again}]
  logs.JsonLines(path, 0).close()
  assert path.read_bytes() == b""


def test_without_an_offset_complete_rows_stay(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_bytes(b'{"step":1}\n{"st')
  file = logs.JsonLines(path)
  file.write({"step": 2})
  file.close()
  assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'


@pytest.mark.parametrize(
  "offset, message",
  [(12, "has 11 bytes, less than 12"), (-1, "less than -1"), (5, "no line end before")],
)
def test_an_impossible_offset_changes_nothing(tmp_path, offset, message):
  path = tmp_path / "m.jsonl"
  path.write_bytes(b'{"step":1}\n')
  with pytest.raises(ValueError, match=message):
    logs.JsonLines(path, offset)
  assert path.read_bytes() == b'{"step":1}\n'
  with pytest.raises(ValueError, match="has 0 bytes, less than 3"):
    logs.JsonLines(tmp_path / "missing.jsonl", 3)
  assert os.listdir(tmp_path) == ["m.jsonl"]


@pytest.mark.parametrize(
  "content, rows",
  [
    (b"", []),
    (b'{"a":1}\n{"a":2}\n', [{"a": 1}, {"a": 2}]),
    (b'{"a":1}\n{"a":', [{"a": 1}]),
    (b'{"a":1}\n{"a":2}', [{"a": 1}]),  # without its line end it may be {"a":25}
  ],
)
def test_read_rows(tmp_path, content, rows):
  (tmp_path / "m.jsonl").write_bytes(content)
  assert logs.read_rows(tmp_path / "m.jsonl") == rows
  assert logs.read_rows(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("damaged", [b'{"a":', b"\0\0\0", b'{"a":"\xff"}', b"", b"[1]"])
def test_a_damaged_row_is_named(tmp_path, damaged):
  path = tmp_path / "m.jsonl"
  path.write_bytes(b'{"a":1}\n' + damaged + b'\n{"a":3}\n')
  with pytest.raises(ValueError, match="line 2 is damaged") as caught:
    logs.read_rows(path)
  assert str(path) in str(caught.value)


def test_write_json_replaces_the_whole_file(tmp_path):
  path = tmp_path / "config.json"
  logs.write_json(path, {"b": [1, 2], "a": math.nan})
  assert path.read_text() == '{\n  "b": [\n    1,\n    2\n  ],\n  "a": null\n}\n'
  logs.write_json(path, {"x": 1.5})
  assert json.loads(path.read_text()) == {"x": 1.5}
  assert os.listdir(tmp_path) == ["config.json"]


def test_write_json_never_shows_half_a_file(tmp_path, monkeypatch):
  path = tmp_path / "config.json"
  logs.write_json(path, "old")
  seen = []

  def replace(partial, final):
    seen.append((json.loads(Path(partial).read_text()), json.loads(Path(final).read_text())))
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(logs.os, "replace", replace)
  with pytest.raises(OSError, match=r"cannot write .*config.json: Input/output error"):
    logs.write_json(path, "new")
  assert seen == [("new", "old")]
  assert os.listdir(tmp_path) == ["config.json"]
  with pytest.raises(OSError, match=r"cannot write .*none/config.json: No such file"):
    logs.write_json(tmp_path / "none" / "config.json", 1)


def test_a_file_is_rewritten_once_there_is_a_row(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_text('{"a":1}\n{"a":2}\n')
  logs.Rewritten(path, {"of": "now"}).close()
  assert logs.read_rows(path) == [{"a": 1}, {"a": 2}]
  file = logs.Rewritten(path, {"of": "now"})
  for b in (3, 4):
    file.write({"b": b})
    assert logs.read_rows(path)[:2] == [{"of": "now"}, {"b": 3}]
  file.close()
  assert logs.read_rows(path) == [{"of": "now"}, {"b": 3}, {"b": 4}]
  with pytest.raises(OSError):
    logs.Rewritten(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_clear_error():
  file = logs.JsonLines("/dev/full")
  with pytest.raises(OSError, match="cannot write to /dev/full: No space left on device"):
    file.write({"step": 1})
  file.close()


FILL_THE_FILE = """
import json, os, resource, sys
from experiments import logs

folder = sys.argv[1]
limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
rows = logs.JsonLines(folder + "/m.jsonl")
board = logs.TensorBoard(folder + "/board")
logs.write_json(folder + "/config.json", "old")
limit(1000)
messages = []
for write in (
  lambda step: rows.write({"step": step, "text": "x" * 300}),
  lambda step: board.write(step, {"loss" * 50: 1.0}),
  lambda step: logs.write_json(folder + "/config.json", ["x" * 300] * step),
):
  for step in range(10):
    try:
      write(step)
    except OSError as error:
      messages.append(str(error))
      break
limit(resource.RLIM_INFINITY)
rows.write({"step": 99})
board.write(99, {"loss": 2.0})
rows.close()
board.close()
print(json.dumps(messages))
"""


def test_a_partial_write_is_taken_back(tmp_path):
  child = subprocess.run(
    [sys.executable, "-W", "error", "-c", FILL_THE_FILE, str(tmp_path)],
    capture_output=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    text=True,
    timeout=60,
  )
  assert (child.returncode, child.stderr) == (0, "")
  (board,) = (tmp_path / "board").iterdir()
  assert json.loads(child.stdout) == [
    f"cannot write to {tmp_path}/m.jsonl: File too large",
    f"cannot write to {board}: File too large",
    f"cannot write {tmp_path}/config.json: File too large",
  ]
  assert [row["step"] for row in logs.read_rows(tmp_path / "m.jsonl")] == [0, 1, 2, 99]
  assert [event.step for event in events(board)] == [0, 0, 1, 2, 99]
  # ["x" * 300] * 3 and its JSON marks fit in 1000 bytes, 4 do not: the last whole one stays.
  assert len(json.loads((tmp_path / "config.json").read_text())) == 3
  assert sorted(os.listdir(tmp_path)) == ["board", "config.json", "m.jsonl"]


def crc32c(data: bytes) -> int:
  """Castagnoli's CRC, bit by bit."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def events(path: Path) -> list[Event]:
  """Reads TFRecord framing: length, its masked CRC, data, its masked CRC."""
  assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's CRC

  def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

  content, found = path.read_bytes(), []
  while content:
    length, crc = struct.unpack_from("<QI", content)
    assert crc == masked(content[:8])
    data = content[12 : 12 + length]
    assert struct.unpack_from("<I", content, 12 + length) == (masked(data),)
    found.append(Event.FromString(data))
    content = content[16 + length :]
  return found


def test_tensorboard_events(tmp_path):
  board = logs.TensorBoard(tmp_path / "mxfp4" / "0")
  board.write(1, {"loss": 3.5, "grad_norm": np.float32(0.25)})
  board.write(2, {"loss": math.nan})
  board.close()
  again = logs.TensorBoard(tmp_path / "mxfp4" / "0", purge_step=2)
  again.write(2, {"loss": 3.0})
  again.close()
  first, second = [events(f) for f in sorted((tmp_path / "mxfp4" / "0").iterdir())]
  assert all("tfevents" in f.name for f in (tmp_path / "mxfp4" / "0").iterdir())
  assert first[0].file_version == second[0].file_version == "brain.Event:2"
  assert [e.step for e in first] == [0, 1, 2]
  assert {v.tag: v.simple_value for v in first[1].summary.value} == {"loss": 3.5, "grad_norm": 0.25}
  assert math.isnan(first[2].summary.value[0].simple_value)
  assert (second[1].step, second[1].session_log.status) == (2, SessionLog.START)
  assert (second[2].step, second[2].summary.value[0].simple_value) == (2, 3.0)
  assert 0 <= second[2].wall_time - first[0].wall_time < 60


def run_progress(stream, **shown):
  """Two runs of 50 steps of 10 tokens; the second resumes at step 20 and diverges at step 40."""
  with contextlib.closing(logs.Progress(100, 10, stream, **shown)) as progress:
    for run, first, last in (("a-0", 0, 50), ("b-0", 20, 40)):
      progress.start(run, steps=50, step=first)
      for step in range(first + 2, last + 1, 2):
        progress.update(step, step / 10)
      progress.end()


def test_progress_in_a_file_is_lines_and_waits_for_no_step_that_will_not_come():
  stream = io.StringIO()
  run_progress(stream)
  assert "\r" not in stream.getvalue()
  lines = stream.getvalue().splitlines()
  assert len(lines) <= 5  # the first, as a run ends, at the end: the whole took no 10 s
  of_a = next(line for line in lines if line.startswith("a-0  step 50/50  loss 5.0000"))
  assert " 50%|" in of_a and "tokens/s" in of_a
  assert lines[-1].startswith("b-0  step 40/50  loss 4.0000  100%|")
  assert lines[-1].endswith("00:00 left")


def test_progress_shows_the_number_and_the_unit_that_it_is_told():
  stream = io.StringIO()
  run_progress(stream, unit="answers", shown="reward")
  last = stream.getvalue().splitlines()[-1]
  assert last.startswith("b-0  step 40/50  reward 4.0000  100%|") and " answers/s" in last


def test_progress_on_a_terminal_rewrites_its_line():
  stream = io.StringIO()
  stream.isatty = lambda: True
  run_progress(stream)
  assert stream.getvalue().count("\n") == 1 and stream.getvalue().endswith("\n")
  pieces = stream.getvalue().strip().split("\r")
  assert len(pieces) > 2 and pieces[-1].startswith("b-0  step 40/50")
