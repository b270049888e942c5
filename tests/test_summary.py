"""The numbers of a comparison, by hand."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from workdirs import make_workdir, rows_of, small_workdir, write_rows

from experiments import report, summary
from fp4jax import decompose, fake_quantize, formats


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
