"""The report of a run: a page that is safe, whole and offline."""

import base64
import gzip
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from workdirs import (
  RECIPES,
  all_figures,
  log_of,
  make_workdir,
  operand_row,
  page_without_plotly,
  rows_of,
  small_workdir,
  write_rows,
)

from experiments import config as config_lib
from experiments import numbers, report, report_page, summary

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
  write_rows(log_of(workdir, "metrics"), rows + rows_of(log_of(workdir, "metrics")))
  gap = summary.summarize(workdir)["recipes"]["r"]["gap"]
  assert (gap["percent"], gap["step_0_percent"]) == (pytest.approx(10.0), pytest.approx(2.0))
  text = page_without_plotly(report.write_report(workdir)).replace("\N{NO-BREAK SPACE}", " ")
  assert "<small>+2.00 % at step 0</small>" in text
  assert "Step 0 is before training" in text
  table = text[text.index("<h2>Results</h2>") :]
  assert re.findall(r'<th scope="col">(.*?)</th>', table)[:2] == ["Recipe", "Gap to BF16"]
  assert re.search(r'</span>r</th>\s*<td data-label="Gap to BF16" class="noise">\+10\.00 %', table)


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
  for path in [*workdir.glob("*.json"), *log_of(workdir, "").parent.iterdir()]:
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
  assert "No validation loss of bf16, so there are no gaps to it." in text
  assert headline(workdir)[0] == "There is no run of bf16 to compare fp8 and mxfp4 with."


def test_text_from_files_is_escaped(tmp_path):
  attack = """</script><script>alert(1)</script><img src=x onerror="alert(2)">"""
  workdir = make_workdir(tmp_path / "w")
  for path in (*workdir.glob("*.json"), *log_of(workdir, "").parent.iterdir()):
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


def test_a_gap_is_shown_with_its_interval_and_its_seeds(tmp_path):
  losses = {"bf16": [2.0, 2.1, 2.2], "close": [2.02, 2.1, 2.178], "far": [2.2, 2.31, 2.42]}
  text = page_without_plotly(report.write_report(small_workdir(tmp_path, losses)))
  text = re.sub(r"\s*\n\s*", "", text).replace("\N{NO-BREAK SPACE}", " ")
  text = text.replace(numbers.MINUS, "-")
  # 1, 0 and -1 %: t is 4.303, the standard error 1 / sqrt(3).
  assert (
    'class="noise">0.00 %<small>-2.48 % to +2.48 %</small><small>3 seeds</small></td>'
    '<td class="text" data-label="Against BF16">not told apart</td>'
  ) in text
  assert 'class="clear">+10.00 %<small>' in text and ">above BF16</td>" in text


def headline(workdir):
  found = report.headline(summary.summarize(workdir))
  return [s.replace("\N{NO-BREAK SPACE}", " ").replace(numbers.MINUS, "-") for s in found]


def test_headline_ranks_what_the_seeds_tell_apart(tmp_path):
  gaps = {"a": (3.0, 3.1, 2.9), "d": (-1.5, -1.4, -1.6), "e": (0.5, -0.5, 0.1), "b": (4, 4.1, 4.2)}
  bf16 = [2.0, 2.5, 3.0]
  losses = {r: [x * (1 + g / 100) for x, g in zip(bf16, own)] for r, own in gaps.items()}  # noqa: B905
  assert headline(small_workdir(tmp_path, {"bf16": bf16} | losses)) == [
    "b (+4.10 %) and a (+3.00 %) end above BF16 in validation loss.",
    "d (-1.50 %) ends below BF16 in validation loss.",
    "e can't be told from BF16.",
    "By 95 % intervals of the gaps, paired over 3 seeds.",
  ]
  two = {name: own[:2] for name, own in ({"bf16": bf16} | losses).items() if name != "e"}
  assert headline(small_workdir(tmp_path, two)) == [
    "Two seeds are too few to tell b, a and d from BF16; with 3 there is an interval.",
    "Mean gap in validation loss: b +4.05 %, a +3.05 % and d -1.45 %.",
  ]
  assert headline(small_workdir(tmp_path, {"bf16": bf16})) == [
    "bf16 alone: there is nothing to compare."
  ]


def test_headline_names_who_diverged_and_who_lags(tmp_path):
  workdir = make_workdir(tmp_path, seeds=3, diverged=("fp8", 0, 9))
  assert headline(workdir)[0] == "fp8 diverged."
  lagging = rows_of(log_of(tmp_path, "metrics"))
  lagging = [row for row in lagging if row["recipe"] != "hopper_fp4" or row["step"] < 50]
  write_rows(log_of(tmp_path, "metrics"), lagging)
  assert "Not finished, so not compared: hopper_fp4." in headline(tmp_path)
  assert not any("hopper_fp4 (" in sentence for sentence in headline(tmp_path))


def test_what_is_lost_to_the_scale_by_hand(tmp_path):
  losses = {"bf16": [2.0, 2.02], "near": [2.0, 2.02], "far": [2.2, 2.22]}
  workdir = small_workdir(tmp_path, losses)
  rows = [
    operand_row("far", "fprop lhs", 10.0, (1.5, 0.25, 0.5, -1.25, 0.0)),  # of 0.1, a quarter
    operand_row("far", "dgrad lhs", 20.0, (1.5, 0.0, 0.5, -1.0, 0.0)),  # of 0.01, a half
    operand_row("far", "wgrad lhs", None, (0.0,) * 5),
    operand_row("near", "fprop lhs", 30.0, (2.0, 0.0, 1.02, -2.02, 0.0)),
  ]
  write_rows(log_of(workdir, "probes"), rows)
  lost = {
    name: own["decomposition"]["lost_to_scale"]
    for name, own in summary.summarize(workdir)["recipes"].items()
  }
  assert lost["bf16"] is None
  assert lost["far"] == pytest.approx(0.03 / 0.11)
  assert lost["near"] == pytest.approx(-0.02)
  sentence = "An ideal scale would remove 27 % of far's squared error; the rest is the grid's."
  assert headline(workdir)[-1] == sentence
  write_rows(log_of(workdir, "probes"), [rows[3] | {"recipe": "far"}])
  sentence = "An ideal scale would remove none of far's squared error: it is the grid's."
  assert headline(workdir)[-1] == sentence
  write_rows(log_of(workdir, "probes"), [rows[2]])
  assert not any("ideal scale" in sentence for sentence in headline(workdir))  # far lost nothing


def test_settings_list_every_field_and_the_command(tmp_path):
  text = page_without_plotly(report.write_report(make_workdir(tmp_path / "w")))
  for path in report_page.flatten(config_lib.Experiment().to_dict()):
    assert f'<th scope="row">{path}</th>' in text
  assert f"run.py --config=configs/demo.py --workdir={tmp_path / 'w'}" in text
  nested = report_page.flatten({"resumed": [{"argv": ["a", "b c"]}], "empty": {}, "none": None})
  assert nested == {"resumed.0.argv": "a 'b c'", "empty": "{}", "none": "none"}


def test_what_workdirs_differ_in():
  """Not in what was asked of each arm, which its table says, and older ones do not tell."""
  configs = {"a": {"seeds": 3, "seeds_by_arm": {"bf16": 3}}, "b": {"seeds": 3}, "c": {"seeds": 2}}
  assert report_page.differences(configs) == {"seeds": ["3", "3", "2"]}


def test_an_old_report_survives_a_failing_one(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0]})
  old = report.write_report(workdir).read_text()
  (log_of(workdir, "metrics")).write_text("{\n{\n")
  with pytest.raises(ValueError, match="line 1"):
    report.write_report(workdir)
  assert (workdir / "report.html").read_text() == old


def test_workdirs_side_by_side(tmp_path):
  one, two = make_workdir(tmp_path / "one"), make_workdir(tmp_path / "two", layers=3)
  path = report.write_report(one, two, out=tmp_path / "both.html")
  text = page_without_plotly(path)
  for arm in ("one/mxfp4", "two/mxfp4"):
    assert f">{arm}</th>" in text
  differing = text[text.index("What differs") : text.index("Configuration and environment")]
  cells = re.findall(r"<(?:th|td)\b[^>]*>([^<]*)<", differing)
  assert cells == ["", "one", "two", "model.num_layers", "2", "3"]
  command = [sys.executable, "-m", "experiments.report", f"--workdir={one},{two}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.stderr == "error: several workdirs need --out, the page to write\n"


def test_the_page_is_under_3_mb_and_holds_all_of_plotly(tmp_path):
  path = report.write_report(make_workdir(tmp_path))
  assert path.stat().st_size < 3e6
  packed = re.search(r'id="plotly">([^<]*)<', path.read_text()).group(1)
  assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()


def test_numbers_read_well():
  assert numbers.fixed(-0.0004) == "0.000"
  assert numbers.fixed(-1.5, 1) == "\N{MINUS SIGN}1.5"
  assert numbers.signed(0.004) == "0.00"
  assert numbers.signed(0.5, unit="%") == "+0.50\N{NO-BREAK SPACE}%"
  assert numbers.fixed(None) == numbers.signed(None, unit="%") == "\N{EN DASH}"
