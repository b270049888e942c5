"""The report of a run: a page that is safe, whole and offline."""

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from workdirs import (
  RECIPES,
  all_figures,
  make_workdir,
  operand_row,
  page_without_plotly,
  rows_of,
  small_workdir,
  write_rows,
)

from experiments import config as config_lib
from experiments import report, summary

ROOT = Path(__file__).parents[1]


class Elements(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.found = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))


def test_the_gap_before_training_is_shown_beside_the_last(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0, 2.1], "r": [2.2, 2.31]})
  assert summary.summarize(workdir)["recipes"]["r"]["gap"]["step_0_percent"] is None
  assert "Step 0 is before training" not in page_without_plotly(report.write_report(workdir))
  untrained = {"bf16": (4.0, 5.0), "r": (4.04, 5.15)}  # +1 % and +3 %
  rows = [
    {"recipe": recipe, "seed": seed, "step": 0, "split": "validation", "loss": loss}
    for recipe, losses in untrained.items()
    for seed, loss in enumerate(losses)
  ]
  write_rows(workdir / "metrics.jsonl", rows + rows_of(workdir / "metrics.jsonl"))
  gap = summary.summarize(workdir)["recipes"]["r"]["gap"]
  assert (gap["percent"], gap["step_0_percent"]) == (pytest.approx(10.0), pytest.approx(2.0))
  text = page_without_plotly(report.write_report(workdir)).replace("\N{NO-BREAK SPACE}", " ")
  assert "<small>+2.00 % at step 0</small>" in text
  assert "Step 0 is before training" in text
  table = text[text.index("<h2>Results</h2>") :]
  assert re.findall(r'<th scope="col">(.*?)</th>', table)[:2] == ["Recipe", "Gap to BF16"]
  assert re.search(r'</span>r</th>\s*<td class="clear">\+10\.00 %<small>', table)


def test_a_folder_that_is_no_workdir_is_an_error_without_traceback(tmp_path):
  command = [sys.executable, "-m", "experiments.report", f"--workdir={tmp_path}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1
  assert done.stderr == f"error: {tmp_path} holds no config.json: not the workdir of a run\n"
  make_workdir(tmp_path, recipes=("bf16", "fp8"), seeds=1)
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == f"{tmp_path / 'report.html'}\n"


VARIANTS = {
  "five recipes": {},
  "one seed": {"seeds": 1},
  "diverged": {"diverged": ("mxfp4", 1, 57)},
  "diverged at once": {"diverged": ("bf16", 0, 1), "seeds": 1},
  "no bf16": {"recipes": ("fp8", "mxfp4")},
  "only bf16": {"recipes": ("bf16",)},
  "stopped": {"stopped_at": 45},
  "stopped before the first validation": {"stopped_at": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_page_is_whole_offline_and_names_every_recipe(tmp_path, variant):
  workdir = make_workdir(tmp_path / variant, **VARIANTS[variant])
  path = report.write_report(workdir)
  assert path == workdir / "report.html"
  assert not list(workdir.glob(".*"))
  text = page_without_plotly(path)
  shown = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)
  assert not re.search(r"\b(nan|None|undefined)\b", shown)
  rows = re.findall(r'<th scope="row">(?:<span[^>]*></span>)?([^<]+)</th>', text)
  recipes = VARIANTS[variant].get("recipes", RECIPES)
  assert rows[: len(recipes)] == list(recipes)
  for tag, attributes in Elements(text).found:
    assert tag not in ("link", "img", "iframe", "object", "embed"), tag
    assert "src" not in attributes and "href" not in attributes, attributes
  assert not re.search(r"url\(|@import", text)
  assert "default-src 'none'" in text  # the browser refuses whatever plotly might load


@pytest.mark.parametrize("missing", ["environment", "metrics", "probes", "timing", "all"])
def test_page_without_some_file_says_what_is_missing(tmp_path, missing):
  workdir = make_workdir(tmp_path)
  for path in workdir.iterdir():
    if path.name != "config.json" and (missing == "all" or path.stem == missing):
      path.unlink()
  text = page_without_plotly(report.write_report(workdir))
  expected = {
    "environment": "No environment.json",
    "metrics": "No training steps yet.",
    "probes": "No probe rows, so there is no error decomposition.",
    "timing": "Step time",
    "all": "No training steps yet.",
  }
  assert expected[missing] in text
  assert ("By operand" in text) == (missing not in ("probes", "all"))


def test_page_without_bf16_says_why_there_are_no_gaps(tmp_path):
  workdir = make_workdir(tmp_path, recipes=("fp8", "mxfp4"))
  found = summary.summarize(workdir)
  assert found["recipes"]["mxfp4"]["gap"]["percent"] is None
  assert found["recipes"]["mxfp4"]["saved_activation_ratio"] is None
  text = page_without_plotly(report.write_report(workdir))
  assert "No bf16 validation loss in this workdir, so there are no gaps to it." in text
  assert "fp8 has the lowest validation loss" in text


def test_text_from_files_is_escaped(tmp_path):
  attack = """</script><script>alert(1)</script><img src=x onerror="alert(2)">"""
  workdir = make_workdir(tmp_path / "w")
  for path in workdir.iterdir():
    text = path.read_text().replace("mxfp4_rht_sr", json.dumps(attack)[1:-1])
    path.write_text(text.replace("experts.w13", "<b>w13</b>").replace("stdlib", "<i>corpus</i>"))
  text = page_without_plotly(report.write_report(workdir))
  elements = Elements(text).found
  tags = [tag for tag, _ in elements]
  assert tags.count("script") == 2
  assert not {"img", "b"} & set(tags)
  assert tags.count("i") == len(re.findall('<i class="part', text))
  assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
  # Plotly reads a little HTML in its texts.
  traces = [trace for figure in all_figures(tmp_path / "w") for trace in figure["data"]]
  texts = str([[trace.get(key) for key in ("name", "text", "x", "y")] for trace in traces])
  assert "&lt;img" in texts and "&lt;b&gt;w13" in texts and "<" not in texts
  assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text
  assert "<script>alert" not in text and 'onerror="' not in text


def test_a_gap_within_the_noise_reads_so(tmp_path):
  workdir = small_workdir(
    tmp_path, {"bf16": [2.0, 2.1], "close": [2.02, 2.163], "far": [2.2, 2.31]}
  )
  text = page_without_plotly(report.write_report(workdir)).replace("\N{NO-BREAK SPACE}", " ")
  assert re.search(
    r'<td class="noise">\+2\.00 %<small>within noise</small>\s*<small>± 1\.00 % over seeds', text
  )
  assert re.search(r'<td class="clear">\+10\.00 %<small>above noise</small>', text)


def headline(workdir):
  found = report.headline(summary.summarize(workdir))
  return [sentence.replace("\N{NO-BREAK SPACE}", " ") for sentence in found]


def test_headline_tells_apart_only_what_the_noise_allows(tmp_path):
  # BF16's seeds lie 0.02 / 2.01 = 0.995 % apart; b and c less, a and c more.
  gaps = {"a": 3.0, "d": -1.5, "c": 1.9, "e": 0.5, "b": 2.4}
  losses = {r: [2.0 * (1 + g / 100), 2.02 * (1 + g / 100)] for r, g in gaps.items()}
  assert headline(small_workdir(tmp_path, {"bf16": [2.0, 2.02]} | losses)) == [
    "a and b lie 2.40 to 3.00 % above BF16 in validation loss, closer together than the noise of"
    " 1.00 %; c lies 1.90 % above it; d lies 1.50 % below it.",
    "BF16's own seeds lie 1.00 % apart: e is within that noise.",
  ]
  assert headline(small_workdir(tmp_path, {"bf16": [2.0, 2.02], "a": losses["a"]}))[1] == (
    "BF16's own seeds lie 1.00 % apart: no recipe is within that noise."
  )
  close = {"e": losses["e"], "f": [2.0, 2.02]}
  assert headline(small_workdir(tmp_path, {"bf16": [2.0, 2.02]} | close)) == [
    "e and f can't be told from BF16 in validation loss.",
    "BF16's own seeds lie 1.00 % apart: e and f are within that noise.",
  ]
  assert headline(small_workdir(tmp_path, {"bf16": [2.0], "a": [2.1], "e": [2.0]})) == [
    "e is closest to BF16 in validation loss (0.00 %) and a farthest (+5.00 %).",
    "With one BF16 seed the noise between seeds is unknown.",
  ]


def test_headline_names_who_diverged_and_who_lags(tmp_path):
  found = headline(make_workdir(tmp_path, diverged=("fp8", 0, 9)))
  assert found[0].startswith("fp8 diverged. mxfp4 lies ")
  lagging = rows_of(tmp_path / "metrics.jsonl")
  lagging = [row for row in lagging if row["recipe"] != "hopper_fp4" or row["step"] < 50]
  write_rows(tmp_path / "metrics.jsonl", lagging)
  assert "Not there yet: hopper_fp4." in headline(tmp_path)


def test_what_is_lost_to_the_scale_by_hand(tmp_path):
  losses = {"bf16": [2.0, 2.02], "near": [2.0, 2.02], "far": [2.2, 2.22]}
  workdir = small_workdir(tmp_path, losses)
  rows = [
    operand_row("far", "fprop lhs", 10.0, (1.5, 0.25, 0.5, -1.25, 0.0)),  # of 0.1, a quarter
    operand_row("far", "dgrad lhs", 20.0, (1.5, 0.0, 0.5, -1.0, 0.0)),  # of 0.01, a half
    operand_row("far", "wgrad lhs", None, (0.0,) * 5),
    operand_row("near", "fprop lhs", 30.0, (2.0, 0.0, 1.02, -2.02, 0.0)),
  ]
  write_rows(workdir / "probes.jsonl", rows)
  lost = {
    name: own["decomposition"]["lost_to_scale"]
    for name, own in summary.summarize(workdir)["recipes"].items()
  }
  assert lost["bf16"] is None
  assert lost["far"] == pytest.approx(0.03 / 0.11)
  assert lost["near"] == pytest.approx(-0.02)
  sentence = "An ideal scale would remove 27 % of far's squared error; the rest is the grid's."
  assert headline(workdir)[-1] == sentence
  write_rows(workdir / "probes.jsonl", [rows[3] | {"recipe": "far"}])
  sentence = "An ideal scale would remove none of far's squared error: it is the grid's."
  assert headline(workdir)[-1] == sentence
  write_rows(workdir / "probes.jsonl", [rows[2]])
  assert len(headline(workdir)) == 2  # far lost nothing


def test_settings_list_every_field_and_the_command(tmp_path):
  text = page_without_plotly(report.write_report(make_workdir(tmp_path / "w")))
  for path in config_lib.field_paths():
    assert f'<th scope="row">{path}</th>' in text
  assert f"run.py --config=configs/demo.py --workdir={tmp_path / 'w'}" in text
  nested = report.flatten({"resumed": [{"argv": ["a", "b c"]}], "empty": {}, "none": None})
  assert nested == {"resumed.0.argv": "a 'b c'", "empty": "{}", "none": "none"}


def test_an_old_report_survives_a_failing_one(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0]})
  old = report.write_report(workdir).read_text()
  (workdir / "metrics.jsonl").write_text("{\n{\n")
  with pytest.raises(ValueError, match="line 1"):
    report.write_report(workdir)
  assert (workdir / "report.html").read_text() == old


def test_numbers_read_well():
  assert report.fixed(-0.0004) == "0.000"
  assert report.fixed(-1.5, 1) == "\N{MINUS SIGN}1.5"
  assert report.signed(0.004) == "0.00"
  assert report.signed(0.5, unit="%") == "+0.50\N{NO-BREAK SPACE}%"
  assert report.fixed(None) == report.signed(None, unit="%") == "\N{EN DASH}"
