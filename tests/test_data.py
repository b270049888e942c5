import hashlib
import json
import math
import shutil
import sys
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tokenizers import models, normalizers, pre_tokenizers, trainers

from experiments import config, data

SMALL = {"sequence_length": 8, "batch_size": 2}


@pytest.fixture
def words(tmp_path):
  """A folder of text files, each with its own word repeated."""
  for i in range(40):
    file = tmp_path / "words" / f"{i % 4}" / f"{i:02d}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"w{i:02d}\n" * 30)
  return tmp_path / "words"


def counting_corpus(train: int, validation: int = 1000) -> data.Corpus:
  """Tokens are their own positions."""
  return data.Corpus(
    name="counting",
    sha256="",
    files=1,
    train=np.arange(train, dtype=np.uint16),
    validation=np.arange(validation, dtype=np.uint16),
    vocab_size=1 << 16,
    tokenizer_sha256=None,
  )


def test_default_corpus_is_the_standard_library():
  corpus = data.load_corpus(config.Data())
  root = Path(sysconfig.get_path("stdlib"))
  files = [
    f
    for f in root.rglob("*.py")
    if not {"site-packages", "dist-packages", "__pycache__"} & set(f.relative_to(root).parts)
  ]
  sizes = [f.stat().st_size for f in files]
  full = sum(size > 0 for size in sizes)
  # One 0 byte between documents, in each of the two splits.
  assert corpus.train.size + corpus.validation.size == sum(sizes) + full - 2
  assert corpus.files == len(files)
  assert corpus.train.dtype == corpus.validation.dtype == np.uint8
  assert b"class OrderedDict(dict):" in corpus.train.tobytes() + corpus.validation.tobytes()
  facts = corpus.describe()
  assert json.loads(json.dumps(facts)) == facts
  assert facts["name"] == f"python-{sys.version.split()[0]}-stdlib"
  assert facts["sha256"] == data.load_corpus(config.Data()).sha256
  assert 2.5 < facts["unigram_entropy_nats"] < 4.0  # English text and code, of at most log 256
  # 5 % of the files: their bytes scatter, at 1,700 files by about one fifth.
  assert 0.03 < corpus.validation.size / (corpus.train.size + corpus.validation.size) < 0.08


def test_installed_packages_are_no_standard_library(tmp_path, monkeypatch):
  monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
  with pytest.raises(ValueError, match=f"no .py file below {tmp_path}"):
    data.load_corpus(config.Data(**SMALL))
  for folder in ("", "email", "site-packages/numpy", "dist-packages", "email/__pycache__"):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name in ("a.py", "b.py", "c.pyc"):
      (tmp_path / folder / name).write_text(f"{folder}/{name} " * 20)
  corpus = data.load_corpus(config.Data(**SMALL))
  text = corpus.train.tobytes() + corpus.validation.tobytes()
  assert set(text.replace(b"\0", b"").split()) == {b"/a.py", b"/b.py", b"email/a.py", b"email/b.py"}


@pytest.mark.parametrize("fraction, count", [(0.05, 2), (0.5, 20), (1e-9, 1), (0.999999, 39)])
def test_whole_files_go_to_validation(words, fraction, count):
  corpus = data.load_corpus(
    config.Data(path=f"{words}/**/*.txt", validation_fraction=fraction, **SMALL)
  )
  train, validation = (split.tobytes().split(b"\0") for split in (corpus.train, corpus.validation))
  assert len(validation) == count
  # In file order, each whole and once.
  everything = [f.read_bytes() for f in sorted(words.rglob("*.txt"))]
  assert sorted(train + validation, key=everything.index) == everything
  assert train == sorted(train, key=everything.index)
  assert validation == sorted(validation, key=everything.index)


def test_corpus_is_the_same_in_another_place(words, tmp_path, monkeypatch):
  first = data.load_corpus(config.Data(path=f"{words}/**/*.txt", **SMALL))
  shutil.copytree(words, tmp_path / "elsewhere" / "deep")
  monkeypatch.chdir(tmp_path / "elsewhere")
  second = data.load_corpus(config.Data(path="**/**/*.txt", **SMALL))
  assert first.sha256 == second.sha256 and first.files == second.files == 40
  np.testing.assert_array_equal(first.validation, second.validation)
  np.testing.assert_array_equal(first.train, second.train)


@pytest.mark.parametrize("change", ["text", "bounds", "name"])
def test_sha256_tells_corpora_apart(words, change):
  settings = config.Data(path=f"{words}/**/*.txt", **SMALL)
  before = data.load_corpus(settings).sha256
  first, second = sorted((words / "0").iterdir())[:2]
  match change:
    case "text":
      first.write_bytes(first.read_bytes()[:-1] + b"x")
    case "bounds":  # one file with all that the hash would see, were lengths not part of it
      assert second == words / "0" / "04.txt"
      first.write_bytes(first.read_bytes() + b"0/04.txt" + second.read_bytes())
      second.unlink()
    case "name":
      first.rename(first.with_name("00b.txt"))
  assert data.load_corpus(settings).sha256 != before


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("y", "x"), P()])
def test_a_sharded_batch_is_the_same_and_each_device_reads_its_part(spec):
  corpus = counting_corpus(1000)
  settings = config.Data(sequence_length=7, batch_size=4)
  sharding = NamedSharding(jax.make_mesh((2, 2), ("x", "y")), spec)
  for split in ("train", "validation"):
    whole = data.batches(corpus, settings, 3, split)
    parts = data.batches(corpus, settings, 3, split, sharding)
    for step in (0, 5):
      assert parts[step].sharding == sharding and parts[step].dtype == np.int32
      for shard in parts[step].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[step][shard.index])


@pytest.mark.parametrize("pattern", ["one.txt", "on?.txt"])
def test_one_text_file_is_cut_at_a_line_end(tmp_path, pattern):
  lines = [b"line %d \xff\n" % i for i in range(1000)]
  (tmp_path / "one.txt").write_bytes(b"".join(lines))
  corpus = data.load_corpus(
    config.Data(path=str(tmp_path / pattern), validation_fraction=0.2, **SMALL)
  )
  assert corpus.train.tobytes() + corpus.validation.tobytes() == b"".join(lines)
  assert corpus.train[-1] == ord("\n")
  share = corpus.validation.size / (corpus.train.size + corpus.validation.size)
  assert 0.2 <= share < 0.2 + len(lines[-1]) / len(b"".join(lines))
  assert corpus.files == 1


def test_one_long_line_is_cut_between_characters(tmp_path):
  text = "é€😀" * 200
  (tmp_path / "one.txt").write_text(text)
  for fraction in np.linspace(0.1, 0.9, 50):
    corpus = data.load_corpus(
      config.Data(path=str(tmp_path / "one.txt"), validation_fraction=float(fraction), **SMALL)
    )
    parts = [split.tobytes().decode() for split in (corpus.train, corpus.validation)]
    assert "".join(parts) == text


def test_jsonl_splits_by_document(tmp_path):
  texts = [f"document {i}\nwith a second line é" for i in range(50)]
  rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
  (tmp_path / "a.jsonl").write_text("\n".join(rows[:30]) + "\n\n")
  (tmp_path / "b.jsonl").write_text("\r\n".join(rows[30:]))
  settings = config.Data(path=f"{tmp_path}/*.jsonl", validation_fraction=0.1, **SMALL)
  corpus = data.load_corpus(settings)
  validation = corpus.validation.tobytes().decode().split("\0")
  assert len(validation) == 5
  assert sorted(corpus.train.tobytes().decode().split("\0") + validation) == sorted(texts)
  assert corpus.files == 2
  one = data.load_corpus(config.Data(path=f"{tmp_path}/a.jsonl", **SMALL))
  assert one.validation.tobytes().decode().count("\0") == 1  # round(0.05 * 30) = 2 documents


@pytest.mark.parametrize(
  "line, message",
  [
    (b'{"text": "a"', "not JSON"),
    (b'{"text": "\xff"}', "not JSON"),
    (b'{"txt": "a"}', 'needs an object with a string "text"'),
    (b'{"text": 3}', 'needs an object with a string "text"'),
    (b'["text"]', 'needs an object with a string "text"'),
    (rb'{"text": "\ud800"}', "not valid Unicode"),
  ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
  with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*{message}"):
    data.load_corpus(config.Data(path=str(tmp_path / "a.jsonl"), **SMALL))


def test_train_windows_of_an_epoch_cover_every_token_once():
  settings = config.Data(sequence_length=10, batch_size=4)
  corpus = counting_corpus(train=10 * 36 + 1 + 7)  # 36 windows; 7 tokens are left over
  dataset = data.batches(corpus, settings, seed=0, split="train")
  rows = np.concatenate([dataset[step] for step in range(18)])  # two epochs of nine batches
  assert rows.dtype == np.int32 and rows.shape == (72, 11)
  np.testing.assert_array_equal(rows[:, 1:], rows[:, :-1] + 1)
  epochs = rows[:36, 0], rows[36:, 0]
  for starts in epochs:
    np.testing.assert_array_equal(np.sort(starts), np.arange(36) * 10)
  assert not np.array_equal(*epochs)
  assert not np.array_equal(epochs[0], np.sort(epochs[0]))


def test_batches_straddle_epochs_without_dropping_windows():
  settings = config.Data(sequence_length=10, batch_size=4)
  dataset = data.batches(counting_corpus(train=71), settings, seed=3, split="train")  # 7 windows
  starts = np.concatenate([dataset[step][:, 0] for step in range(7)]).reshape(4, 7)
  for epoch in starts:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(7) * 10)


def test_a_batch_depends_on_seed_and_step_only():
  settings = config.Data(sequence_length=10, batch_size=4)
  corpus = counting_corpus(train=4001)
  dataset = data.batches(corpus, settings, seed=1, split="train")
  straight = [dataset[step] for step in range(250)]
  resumed = data.batches(corpus, settings, seed=1, split="train")
  for step in (249, 7, 120, 121):
    np.testing.assert_array_equal(resumed[step], straight[step])
    np.testing.assert_array_equal(resumed[np.int64(step)], straight[step])
  other = data.batches(corpus, settings, seed=2, split="train")
  assert not np.array_equal(other[0], straight[0])


def test_no_seed_replays_another_seeds_epochs():
  """Grain alone shuffles epoch e with seed + e."""
  settings = config.Data(sequence_length=10, batch_size=4)
  corpus = counting_corpus(train=401)  # 40 windows, 10 batches an epoch
  datasets = [data.batches(corpus, settings, seed, "train") for seed in range(5)]
  first = {dataset[10 * epoch].tobytes() for dataset in datasets for epoch in range(5)}
  assert len(first) == 25


def test_validation_windows_are_fixed_and_spread():
  settings = config.Data(sequence_length=10, batch_size=4)
  corpus = counting_corpus(train=401, validation=10_001)
  dataset = data.batches(corpus, settings, seed=0, split="validation")
  again = data.batches(corpus, settings, seed=9, split="validation")
  assert len(dataset) == 250
  starts = np.concatenate([dataset[step][:, 0] for step in range(250)])
  np.testing.assert_array_equal(np.sort(starts), np.arange(1000) * 10)
  for step in range(250):
    np.testing.assert_array_equal(dataset[step], again[step])
  for steps in (1, 2, 8, 30):
    n = 4 * steps
    edges = np.sort(np.concatenate([[0], starts[:n], [10_000]]))
    # n golden-ratio steps leave gaps of at most 1 + 1.618 times their mean, to a window's grain.
    assert np.diff(edges).max() <= 2.62 * 10_000 / n + 2 * 10


def test_spread_visits_everything_once():
  for n in [*range(1, 200), 11_123, 65_536]:
    np.testing.assert_array_equal(np.sort(data._spread(n)), np.arange(n))


def test_unigram_entropy():
  corpus = counting_corpus(train=10, validation=64)
  assert corpus.describe()["unigram_entropy_nats"] == pytest.approx(math.log(64), rel=1e-12)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_less_than_one_batch_is_refused(split):
  settings = config.Data(sequence_length=10, batch_size=4)
  enough = {"train": 41, "validation": 41}
  data.batches(counting_corpus(**enough), settings, seed=0, split=split)[0]
  with pytest.raises(ValueError, match=f"the {split} split of counting has 40 tokens, .* needs 41"):
    data.batches(counting_corpus(**(enough | {split: 40})), settings, seed=0, split=split)


@pytest.mark.parametrize(
  "settings, error, message",
  [
    ({"validation_fraction": 0.0}, ValueError, "validation_fraction=0.0 must lie between 0 and 1"),
    ({"validation_fraction": 1.0}, ValueError, "validation_fraction=1.0 must lie between 0 and 1"),
    ({"validation_fraction": math.nan}, ValueError, "validation_fraction=nan must lie"),
    ({"batch_size": 0}, ValueError, "data.batch_size=0 must be at least 1"),
    ({"microbatches": 3}, ValueError, "data.batch_size=16 is no multiple of data.microbatches=3"),
    ({"sequence_length": -5}, ValueError, "data.sequence_length=-5 must be at least 1"),
    ({"path": "missing.txt"}, FileNotFoundError, "data.path='missing.txt' matches no file"),
    ({"path": "no/**/*.txt"}, FileNotFoundError, r"data.path='no/\*\*/\*.txt' matches no file"),
    ({"path": "folder"}, ValueError, r"'folder' is a folder; give .* 'folder/\*\*/\*.txt'"),
    ({"path": "dangling.txt"}, OSError, "cannot read .*dangling.txt: No such file"),
    ({"path": "empty.txt"}, ValueError, "'empty.txt' holds no text: 1 files, all empty"),
    ({"path": "short.txt"}, ValueError, r"train split of short.txt has 20 tokens, .* needs 2049"),
    ({"path": "byte.txt"}, ValueError, r"train split of byte.txt has 0 tokens, .* needs 2049"),
    ({"path": "one.jsonl"}, ValueError, "'one.jsonl' holds one document, .*one.jsonl, line 1;"),
    ({"tokenizer": "missing.json"}, OSError, "tokenizer='missing.json' cannot be read: No such"),
    ({"tokenizer": "folder"}, OSError, "tokenizer='folder' cannot be read: Is a directory"),
    ({"tokenizer": "short.txt"}, ValueError, "'short.txt' is not a `tokenizers` JSON file"),
    ({"tokenizer": "one.jsonl"}, ValueError, "'one.jsonl' is not a `tokenizers` JSON file"),
    ({"tokenizer": "not_utf8.txt"}, ValueError, "'not_utf8.txt' is not a `tokenizers` JSON file"),
  ],
)
def test_bad_settings_are_refused(tmp_path, monkeypatch, settings, error, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "folder").mkdir()
  (tmp_path / "dangling.txt").symlink_to("nowhere")
  (tmp_path / "empty.txt").write_text("")
  (tmp_path / "byte.txt").write_text("x")
  (tmp_path / "short.txt").write_text("0123456789012345678\nx")
  (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
  (tmp_path / "not_utf8.txt").write_bytes(b"\xff\xfe{")
  with pytest.raises(error, match=message):
    data.load_corpus(config.Data(**settings))


def save_tokenizer(path, *, boundary: bool, extra_vocab: int = 0):
  """Words by white space, with a truncation such as many saved tokenizers carry."""
  vocab = {"[UNK]": 0, "[EOS]": 1, "a": 2, "b": 3, "c": 9}
  vocab |= {f"extra{i}": 10 + i for i in range(extra_vocab)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  if boundary:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single="$A [EOS]", special_tokens=[("[EOS]", 1)]
    )
  tokenizer.enable_truncation(5)
  tokenizer.enable_padding(length=7)
  tokenizer.save(str(path))


@pytest.mark.parametrize("boundary", [True, False])
@pytest.mark.parametrize("piece_bytes", [1 << 20, 10])
def test_tokenizer(tmp_path, monkeypatch, boundary, piece_bytes):
  monkeypatch.setattr(data, "_PIECE_BYTES", piece_bytes)
  save_tokenizer(tmp_path / "t.json", boundary=boundary)
  texts = ["a b c\n" * 20, "b\n" * 40, "c c oops\n" * 10]
  for name, text in zip("xyz", texts, strict=True):
    (tmp_path / f"{name}.txt").write_text(text)
  corpus = data.load_corpus(
    config.Data(path=f"{tmp_path}/*.txt", tokenizer=str(tmp_path / "t.json"), **SMALL)
  )
  end = [1] if boundary else []
  documents = [[2, 3, 9] * 20 + end, [3] * 40 + end, [9, 9, 0] * 10 + end]
  found = corpus.validation.tolist()
  assert found in documents
  documents.remove(found)
  assert corpus.train.tolist() == documents[0] + documents[1]
  assert corpus.train.dtype == np.uint16 and not corpus.train.flags.writeable
  assert corpus.vocab_size == 10  # ids 0 to 9, though the vocabulary has five words
  expected = hashlib.sha256((tmp_path / "t.json").read_bytes()).hexdigest()
  assert corpus.describe()["tokenizer_sha256"] == expected


def test_a_large_vocabulary_gets_wider_tokens(tmp_path):
  save_tokenizer(tmp_path / "t.json", boundary=True, extra_vocab=(1 << 16) - 9)
  (tmp_path / "x.txt").write_text("extra65526 a\n" * 1000)
  corpus = data.load_corpus(
    config.Data(path=f"{tmp_path}/x.txt", tokenizer=str(tmp_path / "t.json"), **SMALL)
  )
  assert corpus.vocab_size == (1 << 16) + 1 and corpus.train.dtype == np.uint32
  assert corpus.train[0] == 1 << 16
  batch = data.batches(corpus, config.Data(**SMALL), seed=0, split="train")[0]
  assert batch.dtype == np.int32 and batch.max() == 1 << 16


def test_a_newline_ends_documents_where_the_tokenizer_has_no_other_end(tmp_path):
  byte_level = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "Ċ": 1}, merges=[]))
  byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  byte_level.save(str(tmp_path / "t.json"))
  for name in "xyz":
    (tmp_path / f"{name}.txt").write_text("a" * 20)
  corpus = data.load_corpus(
    config.Data(path=f"{tmp_path}/*.txt", tokenizer=str(tmp_path / "t.json"), **SMALL)
  )
  assert corpus.train.tolist() == ([0] * 20 + [1]) * 2


def test_of_the_standard_library_a_tokenizer_reads_what_is_utf8(tmp_path, monkeypatch):
  monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
  for name in "abcd":
    (tmp_path / f"{name}.py").write_bytes(b"a " * 20 + b"\xff" * (name == "b"))
  save_tokenizer(tmp_path / "t.json", boundary=True)
  corpus = data.load_corpus(config.Data(tokenizer=str(tmp_path / "t.json"), **SMALL))
  assert corpus.train.size + corpus.validation.size == 3 * 21
  assert data.load_corpus(config.Data(**SMALL)).sha256 != corpus.sha256


def test_text_must_be_utf8_for_a_tokenizer(tmp_path):
  save_tokenizer(tmp_path / "t.json", boundary=True)
  (tmp_path / "x.txt").write_bytes(b"a b\xff\n" * 100)
  settings = {"path": str(tmp_path / "x.txt"), **SMALL}
  data.load_corpus(config.Data(**settings))
  with pytest.raises(
    ValueError, match=r"x.txt: not UTF-8 .* without a tokenizer any bytes will do"
  ):
    data.load_corpus(config.Data(tokenizer=str(tmp_path / "t.json"), **settings))


TEXT = (
  "The quick brown fox\tjumps OVER 13 lazy dogs.\r\n\n  Ça coûte 5 €, naïve e\u0301t A\u030a ﬁn ①\n"
  "漢字 и кириллица\u200b \u00a0 \x07 <s> 😀😀 don't [MASK]\n"
)
SPECIAL = ["<unk>", "<s>"]


def gpt2():
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  return tokenizer, trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=SPECIAL[1:])


def llama3():
  tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
  digits = tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+")
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(digits, "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  return tokenizer, gpt2()[1]


def llama2():
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
  return tokenizer, trainers.BpeTrainer(limit_alphabet=20, special_tokens=SPECIAL + byte_tokens)


def llama2_without_bytes():
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
  return tokenizer, trainers.BpeTrainer(limit_alphabet=20, special_tokens=SPECIAL)


def t5():
  tokenizer = tokenizers.Tokenizer(models.Unigram())
  tokenizer.normalizer = normalizers.NFKC()
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  return tokenizer, trainers.UnigramTrainer(
    vocab_size=60, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False
  )


def bert():
  tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # drops accents, controls
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  return tokenizer, trainers.WordPieceTrainer(limit_alphabet=20, special_tokens=SPECIAL)


def word_level():
  tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL)


def lowercase_letters():
  """No unknown token; all that the vocabulary lacks is gone before the model sees the text."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
  tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("[^a-z]+"), "removed")
  return tokenizer, trainers.BpeTrainer(special_tokens=SPECIAL[1:])


@pytest.mark.parametrize(
  "build",
  [gpt2, llama3, llama2, llama2_without_bytes, t5, bert, word_level, lowercase_letters],
  ids=lambda f: f.__name__,
)
def test_a_common_tokenizer_reads_any_text(tmp_path, build):
  """Its tokens are the library's own, and no text is called unknown."""
  tokenizer, trainer = build()
  tokenizer.train_from_iterator(
    ["the quick brown fox jumps over the lazy dogs, over and over"] * 9, trainer
  )
  tokenizer.save(str(tmp_path / "t.json"))
  (tmp_path / "x.jsonl").write_text(f"{json.dumps({'text': TEXT})}\n" * 2)
  corpus = data.load_corpus(
    config.Data(path=f"{tmp_path}/x.jsonl", tokenizer=f"{tmp_path}/t.json", **SMALL)
  )
  assert corpus.train.tolist() == tokenizer.encode(TEXT).ids + tokenizer.encode("\n").ids


def split_by(pre_tokenizer, model):
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizer
  return tokenizer


WORDS, BYTES = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)
LETTERS = {"a": 0, "b": 1, "\n": 2, "Ċ": 3}
ASCII = {f"<0x{byte:02X}>": byte for byte in range(128)}
PIECES = [("a", -1.0), ("b", -1.0)]


@pytest.mark.parametrize(
  "tokenizer, text, unknown",
  [
    (tokenizers.Tokenizer(models.BPE(LETTERS, [])), "ab\nabéz\n", "é"),
    (tokenizers.Tokenizer(models.BPE(LETTERS, [])), "ab ab", " "),
    (tokenizers.Tokenizer(models.BPE(LETTERS, [])), "ab\r\nab", "\r"),
    (tokenizers.Tokenizer(models.BPE(LETTERS, [], unk_token="<unk>")), "a<unk>", "<"),
    (tokenizers.Tokenizer(models.BPE(ASCII, [], byte_fallback=True)), "ab\né", "é"),
    (split_by(BYTES, models.BPE(LETTERS, [])), "ab\na b", " "),
    (split_by(BYTES, models.BPE(LETTERS, [])), "ab\n" * 9 + "b" * 99 + "漢", "漢"),
    (split_by(BYTES, models.BPE(LETTERS, [], ignore_merges=True)), "ab\nac", "c"),
    (split_by(WORDS, models.WordLevel(LETTERS, unk_token="<unk>")), "a b\na word", "word"),
    (split_by(WORDS, models.WordPiece(LETTERS, unk_token="<unk>")), "a b\na word", "word"),
    (split_by(WORDS, models.WordLevel(LETTERS, unk_token="<unk>")), "x" * 99, "x" * 60),
    (split_by(WORDS, models.Unigram(PIECES, None, False)), "a ab\nac", "c"),
  ],
)
def test_text_that_a_tokenizer_would_lose_is_refused(tmp_path, tokenizer, text, unknown):
  tokenizer.save(str(tmp_path / "t.json"))
  rows = [json.dumps({"text": row}) for row in ("a", "a", text)]
  (tmp_path / "x.jsonl").write_text("\n".join(rows))
  with pytest.raises(ValueError) as caught:
    data.load_corpus(
      config.Data(path=f"{tmp_path}/x.jsonl", tokenizer=f"{tmp_path}/t.json", **SMALL)
    )
  message = str(caught.value)
  assert message.startswith(
    f"{tmp_path}/x.jsonl, line 3: data.tokenizer='{tmp_path}/t.json' cannot encode {unknown!r} ("
  )
  assert "\n" not in message and "without a tokenizer any bytes will do" in message


def test_an_unknown_newline_cannot_end_documents(tmp_path):
  tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "t.json"))
  (tmp_path / "x.jsonl").write_text('{"text": "aaaa"}\n' * 20)
  with pytest.raises(ValueError, match=r"end of a document: .*t.json' cannot encode '\\n' \("):
    data.load_corpus(
      config.Data(path=f"{tmp_path}/x.jsonl", tokenizer=f"{tmp_path}/t.json", **SMALL)
    )


@pytest.mark.parametrize("model", [models.BPE, models.WordLevel, models.WordPiece])
def test_an_empty_vocabulary_is_refused(tmp_path, model):
  split_by(WORDS, model()).save(str(tmp_path / "t.json"))
  (tmp_path / "x.txt").write_text("a b\n" * 100)
  with pytest.raises(ValueError, match=r"data.tokenizer='.*t.json' has an empty vocabulary; "):
    data.load_corpus(config.Data(path=f"{tmp_path}/x.txt", tokenizer=f"{tmp_path}/t.json", **SMALL))
