import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pytest

from experiments import config, data

SMALL = {"sequence_length": 8, "batch_size": 2}
TEXTS = [f"document {i}\nwith a second line é" for i in range(20)]
ROWS = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
LINES = "".join(f"line {i} é\n" for i in range(100)).encode()


def load(path, **settings):
  return data.load_corpus(config.Data(path=str(path), **(SMALL | settings)))


def refusal(path) -> str:
  with pytest.raises(ValueError) as caught:
    load(path)
  message = str(caught.value)
  assert str(path) in message and "\n" not in message
  return message


@pytest.mark.parametrize(
  "pattern, sha256",
  [
    ("**/*", "f6e9d40f833671414346b795a6f875d6a6c84f7643c4cde07a9ede8ec905e1b3"),
    ("a.txt", "ae7156a704276939c576e1dab45207aad23b67ac0f9e5ddf2d364eaf6a0ec246"),
    ("c.jsonl", "807181ba419664350dd2cca8be2cb3a8caa26cf80b2683982e6e77dcf4a91b11"),
  ],
)
def test_a_corpus_keeps_its_sha256(tmp_path, pattern, sha256):
  """Typed in: results of earlier runs name their corpus so."""
  (tmp_path / "sub").mkdir()
  (tmp_path / "a.txt").write_bytes(b"one \xff\n" * 9)
  (tmp_path / "sub" / "b.PY").write_bytes(b"two\r\n" * 9)
  rows = '{"text": "three é and more"}\n\n{"text": "four, the last text"}\n'
  (tmp_path / "c.jsonl").write_text(rows)
  corpus = load(tmp_path / pattern, batch_size=1, validation_fraction=0.4)
  assert corpus.sha256 == sha256


@pytest.mark.parametrize(
  "name", ["A.JSONL", "a.ndjson", "a.NdJson", "a.jsonl.gz", "a.ndjson.gz", "A.JSONL.GZ"]
)
def test_rows_go_by_their_usual_names(tmp_path, name):
  (tmp_path / "a.jsonl").write_bytes(ROWS)
  expected = load(tmp_path / "a.jsonl")
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / name).write_bytes(gzip.compress(ROWS) if name[-1] in "zZ" else ROWS)
  corpus = load(tmp_path / "b" / name)
  assert corpus.sha256 == expected.sha256
  np.testing.assert_array_equal(corpus.train, expected.train)


@pytest.mark.parametrize("name", ["a.json", ".jsonl", "a.jsonl.txt", "jsonl"])
def test_other_names_are_text(tmp_path, name):
  (tmp_path / name).write_bytes(ROWS)
  corpus = load(tmp_path / name)
  assert corpus.train.tobytes() + corpus.validation.tobytes() == ROWS


@pytest.mark.parametrize("name", ["a.txt.gz", "a.TXT.GZ", "a.gz", "a.json.gz"])
def test_gzip_is_decompressed(tmp_path, name):
  (tmp_path / "a.txt").write_bytes(LINES)
  half = len(LINES) // 2
  members = gzip.compress(LINES[:half]) + gzip.compress(LINES[half:])  # as `cat` makes of two files
  (tmp_path / name).write_bytes(members)
  corpus, expected = load(tmp_path / name), load(tmp_path / "a.txt")
  assert corpus.sha256 == expected.sha256
  np.testing.assert_array_equal(corpus.validation, expected.validation)


def test_damaged_gzip_is_refused(tmp_path):
  """Cut anywhere, or with any byte changed behind the header, which has no checksum."""
  file = tmp_path / "a.txt.gz"
  packed = gzip.compress(LINES[:400])
  for length in range(len(packed)):
    file.write_bytes(packed[:length])
    assert "a.txt.gz is damaged or no gzip" in refusal(file)
  for at in range(10, len(packed)):
    changed = bytearray(packed)
    changed[at] ^= 0x55
    file.write_bytes(changed)
    assert "a.txt.gz is damaged or no gzip" in refusal(file)
  file.write_bytes(LINES)
  assert "a.txt.gz is damaged or no gzip" in refusal(file)


def tar(content: bytes) -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as archive:
    entry = tarfile.TarInfo("a.txt")
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
  return buffer.getvalue()


def zipped(content: bytes) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("a.txt", content)
  return buffer.getvalue()


def npy(content: bytes) -> bytes:
  buffer = io.BytesIO()
  np.save(buffer, np.frombuffer(content, np.uint8))
  return buffer.getvalue()


# Where Python has no writer, the beginning as the format's specification gives it.
FOREIGN = {
  "gzip": gzip.compress(LINES),
  "bzip2": bz2.compress(LINES),
  "xz": lzma.compress(LINES),
  "zstd": b"\x28\xb5\x2f\xfd" + LINES,
  "lz4": b"\x04\x22\x4d\x18" + LINES,
  "7-Zip": b"7z\xbc\xaf\x27\x1c" + LINES,
  "zip": zipped(LINES),
  "tar": tar(LINES),
  "Parquet": b"PAR1\x15\x04" + LINES + b"PAR1",
  "Arrow": b"ARROW1\0\0" + LINES,
  "Avro": b"Obj\x01" + LINES,
  "NumPy": npy(LINES),
  "HDF5": b"\x89HDF\r\n\x1a\n" + LINES,
  "PDF": b"%PDF-1.7\n" + LINES,
}


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize("format_name", FOREIGN)
def test_what_is_no_text_is_refused_by_its_beginning(tmp_path, format_name, name):
  content = FOREIGN[format_name]
  (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
  message = refusal(tmp_path / name)
  assert f"{name} is {format_name}" in message and "; " in message


@pytest.mark.parametrize(
  "suffix, format_name",
  [
    (".parquet", "Parquet"),
    (".PARQUET", "Parquet"),
    (".parquet.gz", "Parquet"),
    (".arrow", "Arrow"),
    (".feather", "Arrow"),
    (".avro", "Avro"),
    (".zst", "zstd"),
    (".jsonl.zst", "zstd"),
    (".zstd", "zstd"),
    (".xz", "xz"),
    (".lzma", "xz"),
    (".bz2", "bzip2"),
    (".lz4", "lz4"),
    (".zip", "zip"),
    (".7z", "7-Zip"),
    (".tar", "tar"),
    (".tar.gz", "tar"),
    (".tgz", "tar"),
    (".npy", "NumPy"),
    (".npz", "NumPy"),
    (".safetensors", "safetensors"),
    (".h5", "HDF5"),
    (".pkl", "pickle"),
    (".tfrecord", "TFRecord"),
    (".pdf", "PDF"),
  ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, suffix, format_name):
  (tmp_path / f"a{suffix}").write_bytes(LINES)
  assert f"a{suffix} is {format_name}" in refusal(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
  "name, start",
  [
    ("a.txt", b"PAR1 is a gene"),
    ("a.txt", b"BZh9 is a header"),
    ("a.txt", b"PK, 7z, Obj and ARROW1"),
    ("a.txt", b"ustar" * 100),
    ("a.txt", b"\xff\xfe\0\x1f\x8b"),  # any bytes will do
    ("europarl.pt", b"texto em portugu\xc3\xaas"),
    ("a.bin", b"\0\1\2"),
  ],
)
def test_text_is_not_taken_for_another_format(tmp_path, name, start):
  (tmp_path / name).write_bytes(start + b"\n" + LINES)
  corpus = load(tmp_path / name)
  assert corpus.train.tobytes() + corpus.validation.tobytes() == start + b"\n" + LINES


@pytest.mark.parametrize(
  "line, message",
  [
    (b'{"text": "a"', "not JSON"),
    (b'{"txt": "a"}', 'needs an object with a string "text"'),
    (b"[" * 200_000 + b"]" * 200_000, "nested too deep"),
    (b'{"text": ' * 200_000 + b"0" + b"}" * 200_000, "nested too deep"),
  ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_bad_row_is_named(tmp_path, name, line, message):
  rows = b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n'
  (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
  found = refusal(tmp_path / name)
  assert f"{name}, line 3: {message}" in found and len(found) < 1000
