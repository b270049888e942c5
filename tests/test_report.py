"""The report of a run: numbers by hand, a page that is safe, whole and offline."""

import dataclasses
import html.parser
import itertools
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from experiments import config as config_lib
from experiments import report, report_charts, report_lines, summary
from fp4jax import decompose, fake_quantize, formats

ROOT = Path(__file__).parents[1]
RECIPES = ("bf16", "fp8", "mxfp4", "mxfp4_rht_sr", "hopper_fp4")
ENTROPY = 3.25


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_workdir(
  path: Path,
  *,
  recipes=RECIPES,
  seeds=2,
  steps=100,
  layers=2,
  diverged=None,
  stopped_at=None,
) -> Path:
  """A plausible run; `diverged` (recipe, seed, step) ends that run in NaN."""
  path.mkdir(parents=True, exist_ok=True)
  config = config_lib.Experiment(recipes=config_lib.Names(recipes), seeds=seeds, steps=steps)
  config.model.num_layers = layers
  (path / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
  penalty = dict(zip(RECIPES, (0.0, 0.001, 0.03, 0.012, 0.006), strict=True))
  saved = dict(zip(RECIPES, (36864.0, 20480.0, 11264.0, 11264.0, 14336.0), strict=True))
  speed = dict(zip(RECIPES, (41.0, 48.0, 77.0, 92.0, 60.0), strict=True))
  environment = {
    "argv": ["run.py", "--config=configs/demo.py", f"--workdir={path}"],
    "versions": {"python": "3.12.11", "jax": "0.11.2"},
    "device": "NVIDIA H100",
    "git_commit": "0123abc",
    "git_dirty": True,
    "corpus": {"name": "stdlib", "files": 800, "unigram_entropy_nats": ENTROPY},
    "parameters": 1_234_567,
    "saved_activation_bytes_per_token": {r: saved[r] for r in recipes},
  }
  (path / "environment.json").write_text(json.dumps(environment))

  metrics, probes, timing = [], [], []
  for recipe in recipes:
    for seed in range(seeds):
      noise = random.Random(f"{recipe} {seed}")
      shift = random.Random(seed).gauss(0, 0.008)

      def loss_at(step, recipe=recipe, shift=shift):
        at = step / steps
        fit = 1.75 + 3.8 * math.exp(-11 * at) + 0.35 * math.exp(-3 * at)
        return fit + shift + penalty[recipe] * (0.5 + at)

      for step in range(1, (stopped_at or steps) + 1):
        run = {"recipe": recipe, "seed": seed, "step": step}
        nan = diverged is not None and diverged[:2] == (recipe, seed) and step >= diverged[2]
        loss = None if nan else loss_at(step) + noise.gauss(0, 0.06)
        norm = None if nan else math.exp(noise.gauss(0, 0.2)) * (0.4 + 3 * math.exp(-step / 10))
        metrics.append(run | {"split": "train", "loss": loss, "grad_norm": norm})
        timing.append(run | {"step_time_ms": speed[recipe] + noise.random() + 9000 * (step == 1)})
        if nan:
          probe = {"step": step, "layer": 1, "module": "experts.w13", "gemm": "dgrad"}
          event = {"event": "diverged", "probe": probe | {"operand": "lhs"}}
          metrics.append(run | {"split": "event"} | event)
          break
        if step % 20 == 0:
          score = loss_at(step) + noise.gauss(0, 0.002)
          metrics.append(run | {"split": "validation", "loss": score})
          if recipe != "bf16":
            probes += probe_rows(run, noise, layers, step / steps)
  write_rows(path / "metrics.jsonl", metrics)
  write_rows(path / "probes.jsonl", probes)
  write_rows(path / "timing.jsonl", timing)
  return path


def probe_rows(run, noise, layers, progress):
  """Rows of every quantization at one step; FP8 scales are exact, MXFP4's are powers of two."""
  modules = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "experts.w13",
    "experts.w2",
  )
  gemms = [(gemm, side) for gemm in ("fprop", "dgrad", "wgrad") for side in ("lhs", "rhs")]
  if run["recipe"] == "hopper_fp4":
    gemms.append(("residual", "lhs"))
  rows = []
  for layer in range(layers):
    for module in modules:
      for gemm, operand in gemms:
        fp8 = run["recipe"] == "fp8" or (run["recipe"] == "hopper_fp4" and gemm == "wgrad")
        heavy = (gemm == "dgrad") + layer / layers + (module == "experts.w2") + progress
        scale = 0.0 if fp8 else 1.7 + 0.05 * noise.gauss(0, 1) - 0.15 * heavy
        deadzone = 0.002 if fp8 else 0.03 + 0.05 * heavy
        grid = 0.998 if fp8 else 0.7 - 0.05 * heavy
        cross = 1 - scale - deadzone - grid
        rows.append(
          run
          | {"layer": layer, "module": module, "gemm": gemm, "operand": operand}
          | {"format": "FP8 E4M3" if fp8 else "MXFP4", "scale_bias": scale}
          | {"source": source_of(run["recipe"], gemm, operand)}
          | {"deadzone": deadzone, "grid_noise": grid, "cross_scale_grid": cross}
          | {"cross_scale_deadzone": 0.0, "cosine": -0.65, "gain": 1.01}
          | {"sqnr_db": (31 if fp8 else 17) - 1.5 * heavy + 0.2 * noise.gauss(0, 1)}
          | {"flushed": deadzone / 4, "clipped": 0.0}
        )
  return rows


def small_workdir(path, losses, steps=20, environment=None):
  """`losses`: {recipe: validation losses by seed at the last step}; train loss = step number."""
  path.mkdir(exist_ok=True)
  seeds = max(map(len, losses.values()))
  config = {"recipes": list(losses), "seeds": seeds, "steps": steps}
  (path / "config.json").write_text(json.dumps(config))
  (path / "environment.json").write_text(json.dumps(environment or {}))
  metrics = []
  for recipe, by_seed in losses.items():
    for seed, loss in enumerate(by_seed):
      run = {"recipe": recipe, "seed": seed}
      for step in range(1, steps + 1):
        metrics.append(run | {"step": step, "split": "train", "loss": step + seed})
      metrics.append(run | {"step": steps, "split": "validation", "loss": loss})
  write_rows(path / "metrics.jsonl", metrics)
  return path


def source_of(recipe, gemm, operand):
  kept = recipe == "hopper_fp4" and operand == "lhs" and gemm in ("fprop", "wgrad")
  return "residual" if kept else "original"


def operand_row(recipe, operand, sqnr_db, shares=(1.5, 0.25, 0.5, -1.25, 0.0), layer=0):
  gemm, side = operand.split(" ")
  row = {"recipe": recipe, "seed": 0, "step": 20, "layer": layer, "module": "m", "gemm": gemm}
  row |= {"operand": side, "sqnr_db": sqnr_db, "source": source_of(recipe, gemm, side)}
  return row | dict(zip(summary.SHARES, shares, strict=True))


def rows_of(path):
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def page_without_plotly(path):
  """The page and its own script, without plotly's source, which no test is about."""
  text = path.read_text()
  return text.replace(report.get_plotlyjs(), "")


class Elements(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.found = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))


def test_losses_gaps_and_noise_by_hand(tmp_path):
  workdir = small_workdir(
    tmp_path, {"bf16": [2.0, 2.1], "close": [2.02, 2.163], "far": [2.2, 2.31]}
  )
  found = summary.summarize(workdir)["recipes"]
  bf16, close, far = found["bf16"], found["close"], found["far"]
  assert bf16["validation_loss"] == {
    "step": 20,
    "seeds": 2,
    "mean": pytest.approx(2.05),
    "spread": pytest.approx(0.1),
    "std": pytest.approx(0.1 / math.sqrt(2)),
  }
  assert bf16["gap"]["verdict"] == "reference"
  # Paired by seed: +1 % and +3 %. BF16's spread: 0.1 / 2.05 = 4.878 %.
  assert close["gap"]["percent"] == pytest.approx(2.0)
  assert close["gap"]["standard_error_percent"] == pytest.approx(1.0)
  assert close["gap"]["noise_percent"] == pytest.approx(4.8780488)
  assert close["gap"]["verdict"] == "within noise"
  assert far["gap"]["percent"] == pytest.approx(10.0)
  assert far["gap"]["verdict"] == "above noise"
  # The last 10 % of 20 steps are 19 and 20.
  assert [run["train_loss"] for run in far["runs"]] == [19.5, 20.5]
  assert far["train_loss"]["mean"] == 20.0
  assert (far["seeds_finished"], far["last_step"]) == (2, 20)


def test_a_recipe_better_than_bf16_by_more_than_the_noise_is_above_noise(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0, 2.002], "r": [1.9, 1.9]})
  gap = summary.summarize(workdir)["recipes"]["r"]["gap"]
  assert gap["percent"] == pytest.approx(-5.05, abs=0.01)
  assert gap["verdict"] == "above noise"


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


def test_memory_time_and_entropy_by_hand(tmp_path):
  environment = {
    "parameters": 7,
    "corpus": {"unigram_entropy_nats": 3.0},
    "saved_activation_bytes_per_token": {"bf16": 400.0, "r": 100.0},
  }
  workdir = small_workdir(tmp_path, {"bf16": [2.0], "r": [2.5]}, environment=environment)
  times = {"bf16": [9000, 10, 11, 12], "r": [9000, 33, 22, 50]}
  timing = [
    {"recipe": recipe, "seed": 0, "step": step, "step_time_ms": ms}
    for recipe, own in times.items()
    for step, ms in enumerate(own, 1)
  ]
  write_rows(workdir / "timing.jsonl", timing)
  found = summary.summarize(workdir)
  recipe = found["recipes"]["r"]
  assert recipe["saved_activation_bytes_per_token"] == 100.0
  assert recipe["saved_activation_ratio"] == 0.25
  assert (recipe["step_time_ms"], recipe["step_time_ratio"]) == (33, 3.0)
  assert recipe["nats_below_unigram"] == 0.5
  assert (found["unigram_entropy_nats"], found["parameters"]) == (3.0, 7)


def test_one_seed_has_no_spread_and_unknown_noise(tmp_path):
  found = summary.summarize(small_workdir(tmp_path, {"bf16": [2.0], "r": [2.1]}))["recipes"]
  assert found["r"]["validation_loss"]["std"] is None
  assert found["r"]["validation_loss"]["spread"] is None
  assert found["r"]["gap"]["percent"] == pytest.approx(5.0)
  assert found["r"]["gap"]["noise_percent"] is None
  assert found["r"]["gap"]["standard_error_percent"] is None
  assert found["r"]["gap"]["verdict"] == "one seed: noise unknown"


def test_a_seed_that_lags_is_not_compared_at_another_step(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0, 2.0], "r": [2.2]})
  early = [
    {"recipe": recipe, "seed": 1, "step": 5, "split": "validation", "loss": loss}
    for recipe, loss in (("bf16", 4.0), ("r", 8.0))
  ]
  write_rows(workdir / "metrics.jsonl", rows_of(workdir / "metrics.jsonl") + early)
  recipe = summary.summarize(workdir)["recipes"]["r"]
  assert recipe["gap"]["percent"] == pytest.approx(10.0)
  assert (recipe["gap"]["step"], recipe["gap"]["seeds"]) == (20, 1)
  assert recipe["validation_loss"]["mean"] == 2.2
  assert recipe["seeds_finished"] == 1


def test_a_run_in_progress_is_compared_at_the_step_it_reached(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0]})
  rows = [
    {"recipe": recipe, "seed": 0, "step": 5, "split": "validation", "loss": loss}
    for recipe, loss in (("bf16", 4.0), ("r", 4.4))
  ]
  write_rows(workdir / "metrics.jsonl", rows_of(workdir / "metrics.jsonl") + rows)
  found = summary.summarize(workdir)
  gap = found["recipes"]["r"]["gap"]
  assert (gap["percent"], gap["step"]) == (pytest.approx(10.0), 5)
  assert report.headline(found)[0].startswith("At step 5 of 20, r differs from BF16 by +10.00")


def test_a_diverged_run_has_no_final_loss_and_names_its_probe(tmp_path):
  workdir = make_workdir(tmp_path, diverged=("mxfp4", 1, 57))
  found = summary.summarize(workdir)["recipes"]["mxfp4"]
  survivor, lost = found["runs"]
  assert survivor["diverged"] is None
  assert (lost["validation_loss"], lost["train_loss"]) == (None, None)
  assert not lost["finished"]
  assert lost["diverged"]["step"] == 57
  assert lost["diverged"]["probe"]["module"] == "experts.w13"
  assert found["validation_loss"]["mean"] == survivor["validation_loss"]
  assert (found["gap"]["verdict"], found["gap"]["seeds"]) == ("diverged", 1)


def test_decomposition_means_leave_out_what_has_no_shares(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0], "r": [2.0]})

  def row(step, layer, shares, gemm="fprop", **rates):
    place = {"recipe": "r", "seed": 0, "step": step, "layer": layer, "module": "experts.w2"}
    names = dict(zip(summary.SHARES, shares, strict=True))
    return place | {"gemm": gemm, "operand": "lhs", "format": "MXFP4"} | names | rates

  rows = [
    row(0, 0, (9.0, 0.0, 0.0, -8.0, 0.0)),
    row(20, 0, (1.0, 0.25, 0.75, -1.0, 0.0), sqnr_db=16.0, flushed=0.5),
    row(20, 1, (2.0, 0.25, 0.25, -1.25, -0.25), sqnr_db=20.0, flushed=0.0),
    row(20, 2, (None, 0.5, 0.5, 0.0, 0.0), sqnr_db=None),
    row(20, 3, (0.0,) * 5, sqnr_db=None),
    row(20, 0, (0.0,) * 5, gemm="dgrad", sqnr_db=None),
    row(21, 0, (None,) * 5),
  ]
  write_rows(workdir / "probes.jsonl", rows)
  found = summary.summarize(workdir)["recipes"]["r"]["decomposition"]
  assert found["step"] == 20
  fprop, dgrad = found["operands"]
  assert [fprop[name] for name in summary.SHARES] == [1.5, 0.25, 0.5, -1.125, -0.125]
  assert sum(fprop[name] for name in summary.SHARES) == 1.0
  assert (fprop["sqnr_db"], fprop["flushed"], fprop["lossless"]) == (18.0, 0.25, False)
  assert (dgrad["lossless"], dgrad["scale_bias"], dgrad["sqnr_db"]) == (True, None, None)


def test_summary_json_is_the_summary_and_replaces_the_old_one(tmp_path):
  workdir = make_workdir(tmp_path, diverged=("mxfp4", 0, 5))
  (workdir / "summary.json").write_text("old")
  path = summary.write_summary(workdir)
  assert json.loads(path.read_text()) == summary.summarize(workdir)
  assert not list(workdir.glob(".*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "probes.jsonl", "timing.jsonl"])
def test_a_line_cut_off_at_the_end_is_ignored(tmp_path, name):
  workdir = make_workdir(tmp_path)
  whole = summary.summarize(workdir)
  with (workdir / name).open("a") as file:
    file.write('{"recipe":"bf16","seed":0,"step":101,"sp')
  assert summary.summarize(workdir) == whole
  report.write_report(workdir)


def test_a_damaged_line_is_named(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0]})
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([*lines[:2], lines[2][:20] + "\n", *lines[3:]]))
  with pytest.raises(ValueError, match=re.escape(f"{path}, line 3 is damaged")):
    summary.summarize(workdir)
  path.write_text("".join([*lines[:4], '{"recipe":"bf16","step":5,"split":"train"}\n']))
  with pytest.raises(ValueError, match=re.escape(f"{path}, line 5 has no seed")):
    summary.summarize(workdir)
  (workdir / "environment.json").write_text('{"argv": [')
  with pytest.raises(ValueError, match=re.escape(f"{workdir / 'environment.json'} is damaged")):
    summary.summarize(workdir)


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


@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_an_ideal_scale_would_remove_what_is_lost_to_the_scale(rule):
  x = np.random.default_rng(0).normal(size=(512, 32)).astype(np.float32)
  fmt = dataclasses.replace(formats.MXFP4, scale_rule=rule)
  grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
  ideal = np.max(np.abs(x), axis=1, keepdims=True) / 6
  nearest = grid[np.argmin(np.abs(np.abs(x / ideal)[..., None] - grid), axis=-1)]
  left = np.sum(np.square(np.abs(x) - nearest * ideal))
  error = np.sum(np.square(np.asarray(fake_quantize(x, fmt)) - x))
  row = dataclasses.asdict(decompose(x, fmt).summary())
  lost = summary.lost_to_scale([{name: float(value) for name, value in row.items()}])
  assert lost == pytest.approx(1 - left / error, abs=1e-3)  # float32 sums of 16384 squares
  assert 0.2 < lost < 0.3


def all_figures(workdir):
  records = summary.read_records(workdir)
  charts = list(report_charts.curve_charts(records, ENTROPY).values())
  charts += [chart for group in report_charts.probe_charts(records).values() for chart in group]
  return [figure for chart in charts for figure in chart["figures"].values()]


def colours(value, key=""):
  match value:
    case dict():
      return {c for name, item in value.items() for c in colours(item, name)}
    case list():
      return {c for item in value for c in colours(item)}
    case str() if key.endswith("color"):
      return {value}
  return set()


def test_figures_are_valid_and_their_colours_are_defined_in_both_schemes(tmp_path):
  figures = all_figures(make_workdir(tmp_path, diverged=("mxfp4", 1, 57)))
  assert len(figures) > 20
  template = (ROOT / "experiments" / "report.html.jinja").read_text()
  light, dark = re.findall(r":root \{(.*?)\}", template, re.DOTALL)
  found = set()
  for figure in figures:
    found |= colours(figure)
    text = re.sub(r'"--[\w-]+(/\w\w)?"', '"#123456"', json.dumps(figure, allow_nan=False))
    go.Figure(json.loads(text))  # raises for what plotly doesn't know
  assert "--recipe-3" in found and "--part-cross" in found
  for colour in found:
    name = re.fullmatch(r"(--[\w-]+)(/[0-9a-f]{2})?", colour).group(1)
    assert re.search(rf"{name}: #[0-9a-f]{{6}};", light), name
    assert re.search(rf"{name}: #[0-9a-f]{{6}};", dark), name


def test_every_stack_sums_to_one_with_its_negative_bar(tmp_path):
  records = summary.read_records(make_workdir(tmp_path))
  charts = report_charts.probe_charts(records)
  for group, along in (("operands", "x"), ("layers", "y"), ("modules", "x")):
    for chart in charts[group]:
      for figure in chart["figures"].values():
        parts = [trace[along] for trace in figure["data"]]
        assert not parts or len(parts) == len(report_charts.PARTS)
        for stack in zip(*parts, strict=True):
          assert sum(stack) == pytest.approx(1, abs=1e-5)
  mxfp4 = charts["operands"][1]["figures"][report_charts.ALL]
  assert mxfp4["data"][0]["y"] == [
    "fprop lhs", "fprop rhs", "dgrad lhs", "dgrad rhs", "wgrad lhs", "wgrad rhs",
  ]  # fmt: skip
  assert max(mxfp4["data"][3]["x"]) < 0
  assert mxfp4["layout"]["barmode"] == "relative"


def test_every_bar_has_its_sqnr_at_its_end(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0], "hopper_fp4": [2.0], "mxfp4": [2.0]})
  lossless = (None, (0.0,) * 5)
  rows = [
    operand_row("mxfp4", "fprop lhs", 18.0),
    operand_row("mxfp4", "fprop lhs", 19.0, layer=1),
    operand_row("mxfp4", "fprop lhs", *lossless, layer=2),
    operand_row("hopper_fp4", "fprop lhs", 29.0),
    operand_row("hopper_fp4", "fprop rhs", *lossless),
    operand_row("hopper_fp4", "wgrad lhs", *lossless),
    operand_row("hopper_fp4", "residual lhs", 18.75),
  ]
  write_rows(workdir / "probes.jsonl", rows)
  charts = report_charts.probe_charts(summary.read_records(workdir))

  def ends(group, recipe, operand=report_charts.ALL):
    figures = next(chart["figures"] for chart in charts[group] if chart["title"] == recipe)
    notes = figures[operand]["layout"]["annotations"]
    return {note["y"]: note["text"] for note in notes}

  assert ends("operands", "mxfp4") == {"fprop lhs": "18.5 dB"}
  assert ends("operands", "hopper_fp4") == {
    "fprop lhs": "29.0 dB*",
    "fprop rhs": "no error",
    "wgrad lhs": "no error*",
    "residual lhs": "18.8 dB",
  }
  # Decibels of FP8 and of the MXFP4 below it have no mean.
  assert ends("modules", "hopper_fp4") == {"m": ""}
  assert ends("modules", "hopper_fp4", "fprop lhs") == {"m": "29.0 dB*"}
  text = page_without_plotly(report.write_report(workdir))
  assert "*: fprop lhs and wgrad lhs of hopper_fp4, read from the residual:" in text
  assert "<td>29.0*</td>" in text and "<td>no error*</td>" in text


def test_a_residual_stands_beside_what_is_read_from_it(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0], "hopper_fp4": [2.0], "mxfp4": [2.0]})
  sqnr = {"fprop lhs": 29.0, "fprop rhs": 31.0, "wgrad lhs": 27.0, "residual lhs": 18.0}
  rows = [operand_row("hopper_fp4", operand, value) for operand, value in sqnr.items()]
  rows += [operand_row("mxfp4", operand, 19.0) for operand in ("fprop lhs", "fprop rhs")]
  write_rows(workdir / "probes.jsonl", rows)
  (chart,) = report_charts.probe_charts(summary.read_records(workdir))["sqnr"]

  def lines(operand):
    traces = chart["figures"][operand]["data"]
    assert {t["legendgroup"] for t in traces} <= {"hopper_fp4", "mxfp4"}  # hidden with its recipe
    return {t["name"]: t["y"] for t in traces if t.get("name")}

  residual = {"hopper_fp4 residual": [18.0]}
  every = {"hopper_fp4": [31.0], "hopper_fp4 on top": [28.0], "mxfp4": [19.0]}
  assert lines(report_charts.ALL) == every | residual
  assert lines("fprop lhs") == {"hopper_fp4 on top": [29.0], "mxfp4": [19.0]} | residual
  assert lines("fprop rhs") == {"hopper_fp4": [31.0], "mxfp4": [19.0]}
  assert lines("residual lhs") == residual


def test_formats_are_named_with_their_scale_rule(tmp_path):
  named = {"mxfp4": {"scale_rule": "floor"}, "mxfp4_rht_sr": {"scale_rule": "rceil"}, "old": {}}
  workdir = small_workdir(tmp_path, {recipe: [2.0] for recipe in ("bf16", *named)})
  rows = [operand_row(r, "fprop lhs", 18.0) | {"format": "MXFP4"} | own for r, own in named.items()]
  write_rows(workdir / "probes.jsonl", rows)
  found = summary.summarize(workdir)["recipes"]
  rules = {
    name: [o["scale_rule"] for o in own["decomposition"]["operands"]] for name, own in found.items()
  }
  assert rules == {"bf16": [], "mxfp4": ["floor"], "mxfp4_rht_sr": ["rceil"], "old": [""]}
  text = page_without_plotly(report.write_report(workdir))
  assert re.findall(r'<p class="small">(MXFP4.*?)</p>', text) == [
    "MXFP4 floor",
    "MXFP4 rceil",
    "MXFP4",
  ]
  assert '<td class="text">MXFP4</td><td class="text">rceil</td>' in text


def test_panels_of_one_group_share_their_range(tmp_path):
  charts = report_charts.probe_charts(summary.read_records(make_workdir(tmp_path)))
  for group, axis in (("operands", "xaxis"), ("layers", "yaxis"), ("time", "yaxis")):
    ranges = {
      tuple(c["figures"][report_charts.ALL]["layout"][axis]["range"]) for c in charts[group]
    }
    assert len(ranges) == 1, group


def test_recipes_keep_their_colour_in_every_line_chart(tmp_path):
  records = summary.read_records(make_workdir(tmp_path))
  charts = report_charts.curve_charts(records, ENTROPY)
  charts["sqnr"] = report_charts.probe_charts(records)["sqnr"][0]
  seen = {}
  for chart in charts.values():
    for trace in chart["figures"][report_charts.ALL]["data"]:
      if trace["mode"].startswith("lines") and trace.get("name"):
        seen.setdefault(trace["name"], set()).add(trace["line"]["color"])
  assert seen.pop("hopper_fp4 on top") == seen.pop("hopper_fp4 residual") == seen["hopper_fp4"]
  assert {name: len(found) for name, found in seen.items()} == dict.fromkeys(RECIPES, 1)
  assert len(set.union(*seen.values())) == len(RECIPES)
  many = report_lines.recipe_styles(["bf16", *"abcdefgh"])
  assert len({tuple(style.values()) for style in many.values()}) == 9
  palette = {f"--recipe-{i}" for i in range(report_lines.RECIPE_COLOURS)} | {"--baseline"}
  assert {style["color"] for style in many.values()} == palette


def test_curves_are_the_mean_and_range_over_seeds(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0, 2.2], "r": [2.1, 2.2]}, steps=100)
  records = summary.read_records(workdir)
  charts = report_charts.curve_charts(records, unigram_entropy=3.0)
  assert report_charts.smoothing_window(records) == 3
  band, *_ = charts["train"]["figures"][report_charts.ALL]["data"]
  line = next(t for t in charts["train"]["figures"][report_charts.ALL]["data"] if t.get("name"))
  # Seed 0 has the loss `step`, seed 1 has `step + 1`; a centred mean keeps a straight line.
  assert line["y"][1:-1] == [step + 0.5 for step in range(2, 100)]
  assert (band["y"][1], band["y"][-2]) == (3.0, 2.0)
  validation = charts["validation"]["figures"][report_charts.ALL]
  assert [t["y"] for t in validation["data"] if t.get("name")] == [[2.1], [2.15]]
  assert validation["layout"]["shapes"][0]["y0"] == 3.0
  low, high = validation["layout"]["yaxis"]["range"]
  assert low < 2.0 and high > 3.0
  gap = charts["gap"]["figures"][report_charts.ALL]["data"]
  assert [t["y"] for t in gap if t.get("name")] == [[2.5], [0.0]]
  noise = next(t for t in gap if t.get("fill") and t["legendgroup"] == "bf16")
  assert noise["y"] == pytest.approx([9.52381, -9.52381])  # 0.2 / 2.1


def test_a_smoothed_curve_stops_at_the_first_loss_that_is_not_finite(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0]}, steps=100)
  rows = rows_of(workdir / "metrics.jsonl")
  rows = [row | {"loss": None} if row["step"] == 50 else row for row in rows]
  write_rows(workdir / "metrics.jsonl", [row for row in rows if row["step"] <= 50])
  charts = report_charts.curve_charts(summary.read_records(workdir), None)
  line = next(t for t in charts["train"]["figures"][report_charts.ALL]["data"] if t.get("name"))
  assert line["x"][-1] <= 49
  assert line["y"][-1] < 50


def test_names_at_the_ends_of_lines_do_not_overlap(tmp_path):
  for figure in all_figures(make_workdir(tmp_path)):
    labels = [trace for trace in figure["data"] if trace.get("meta") == "label"]
    if not labels:
      continue
    axis = figure["layout"]["yaxis"]
    places = [trace["y"][0] for trace in labels]
    places = sorted(map(math.log10, places) if axis.get("type") == "log" else places)
    low, high = axis["range"]
    # A plot is the figure less about 60 pixels of axis; a line of text is about 12 high.
    pixels = (figure["layout"]["height"] - 60) / (high - low)
    assert low < places[0] and places[-1] < high
    assert all((b - a) * pixels > 12 for a, b in itertools.pairwise(places))


def test_long_runs_are_thinned_but_keep_their_last_step(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0]}, steps=1000)
  charts = report_charts.curve_charts(summary.read_records(workdir), None)
  line = next(t for t in charts["train"]["figures"][report_charts.ALL]["data"] if t.get("name"))
  assert len(line["x"]) <= report_lines.MAX_POINTS
  assert line["x"][-1] == 1000


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
