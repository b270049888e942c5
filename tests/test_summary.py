"""The numbers of a comparison, by hand."""

import dataclasses
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from workdirs import log_of, make_workdir, rows_of, small_workdir, write_rows

from experiments import report, summary
from fp4jax import decompose, fake_quantize, formats


def test_losses_and_gaps_by_hand(tmp_path):
  # Paired by seed: +1, +2 and +3 %; every one above 0, though BF16's seeds lie 20 % apart.
  workdir = small_workdir(
    tmp_path,
    {"bf16": [2.0, 2.2, 2.4], "far": [2.02, 2.244, 2.472], "close": [2.0, 2.178, 2.448]},
  )
  found = summary.summarize(workdir)["recipes"]
  bf16, far, close = found["bf16"], found["far"], found["close"]
  assert bf16["validation_loss"] == {
    "step": 20,
    "seeds": 3,
    "mean": pytest.approx(2.2),
    "std": pytest.approx(0.2),
  }
  assert bf16["gap"]["verdict"] == "reference"
  # Student's t of 2 degrees of freedom: 4.303 for 95 %. The standard error is 1 / sqrt(3).
  half = 4.302653 / math.sqrt(3)
  assert far["gap"]["percent"] == pytest.approx(2.0)
  assert far["gap"]["interval_percent"] == pytest.approx([2 - half, 2 + half], abs=1e-5)
  assert (far["gap"]["seeds"], far["gap"]["verdict"]) == (3, "not told apart")
  # 0, -1 and +2 %.
  assert close["gap"]["verdict"] == "not told apart"
  # The last 10 % of 20 steps are 19 and 20.
  assert [run["train_loss"] for run in far["runs"]] == [19.5, 20.5, 21.5]
  assert far["train_loss"]["mean"] == 20.5
  assert (far["seeds_finished"], far["last_step"]) == (3, 20)


@pytest.mark.parametrize(
  ("percents", "verdict"),
  [
    ([2.0, 2.1, 2.2], "above BF16"),
    ([-2.0, -2.1, -2.2], "below BF16"),
    ([-0.1, 0.0, 0.1], "not told apart"),
    ([0.0, 0.0, 0.0], "not told apart"),
    ([1.0, 1.0, 1.0, 1.0, 4.0], "not told apart"),  # 1.6 +- 1.67
    ([1.0, 1.0, 1.0, 1.0, 3.5], "above BF16"),  # 1.5 +- 1.39
    ([2.0, 2.0], "too few seeds"),
    ([2.0], "too few seeds"),
  ],
)
def test_a_verdict_follows_the_interval(tmp_path, percents, verdict):
  bf16 = [2.0 + seed for seed in range(len(percents))]  # wide apart: no yardstick
  losses = [base * (1 + gap / 100) for base, gap in zip(bf16, percents, strict=True)]
  gap = summary.summarize(small_workdir(tmp_path, {"bf16": bf16, "r": losses}))["recipes"]["r"]
  gap = gap["gap"]
  assert gap["verdict"] == verdict
  assert gap["percent"] == pytest.approx(np.mean(percents), abs=1e-9)
  assert (gap["interval_percent"] is None) == (len(percents) < 3)


def test_what_did_not_finish_or_has_no_bf16_is_not_judged(tmp_path):
  three = {"bf16": [2.0, 2.1, 2.2], "r": [2.2, 2.31, 2.42]}
  workdir = small_workdir(tmp_path / "w", three)
  assert summary.summarize(workdir)["recipes"]["r"]["gap"]["verdict"] == "above BF16"
  rows = rows_of(log_of(workdir, "metrics"))
  for recipe in ("r", "bf16"):  # one seed of either stopped at step 19
    late = [r for r in rows if (r["recipe"], r["seed"], r["step"]) != (recipe, 2, 20)]
    early = [r | {"step": 10} for r in rows if r["split"] == "validation"]
    write_rows(log_of(workdir, "metrics"), early + late)
    gap = summary.summarize(workdir)["recipes"]["r"]["gap"]
    assert (gap["verdict"], gap["seeds"], gap["interval_percent"]) == ("not finished", 2, None)
  config = json.loads((workdir / "config.json").read_text()) | {"seeds": 4}
  write_rows(log_of(workdir, "metrics"), rows)
  (workdir / "config.json").write_text(json.dumps(config))  # grown, and not yet trained
  assert summary.summarize(workdir)["recipes"]["r"]["gap"]["verdict"] == "not finished"
  lone = small_workdir(tmp_path / "lone", {"r": [2.0, 2.1, 2.2]})
  gap = summary.summarize(lone)["recipes"]["r"]["gap"]
  assert (gap["verdict"], gap["percent"]) == (None, None)


def test_an_arm_may_have_other_seeds_than_bf16(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0, 2.1], "r": [2.2, 2.31, 2.42], "s": [2.1]})
  config = json.loads((workdir / "config.json").read_text())
  for seeds, verdict in ((2, "too few seeds"), (3, "not finished")):
    asked = config | {"seeds_by_arm": {"bf16": seeds, "r": 3, "s": 1}}
    (workdir / "config.json").write_text(json.dumps(asked))
    found = summary.summarize(workdir)["recipes"]
    assert (found["r"]["gap"]["seeds"], found["r"]["gap"]["verdict"]) == (2, verdict)
    assert (found["s"]["seeds"], found["s"]["gap"]["verdict"]) == (1, "too few seeds")


def test_memory_time_and_entropy_by_hand(tmp_path):
  environment = {
    "parameters": 7,
    "corpus": {"unigram_entropy_nats": 3.0},
    "saved_activation_bytes_per_token": {"bf16": 400.0, "r": 100.0},
    "gemm_seconds_at_peak": {"bf16": None, "r": 0.0066},
  }
  workdir = small_workdir(tmp_path, {"bf16": [2.0], "r": [2.5]}, environment=environment)
  times = {"bf16": [9000, 10, 11, 12], "r": [9000, 33, 22, 50]}
  timing = [
    {"recipe": recipe, "seed": 0, "step": step, "step_time_ms": ms}
    for recipe, own in times.items()
    for step, ms in enumerate(own, 1)
  ]
  write_rows(log_of(workdir, "timing"), timing)
  found = summary.summarize(workdir)
  recipe = found["recipes"]["r"]
  assert recipe["saved_activation_bytes_per_token"] == 100.0
  assert recipe["saved_activation_ratio"] == 0.25
  assert (recipe["step_time_ms"], recipe["step_time_ratio"]) == (33, 3.0)
  assert recipe["flops_utilization"] == pytest.approx(0.2)
  assert found["recipes"]["bf16"]["flops_utilization"] is None
  assert recipe["nats_below_unigram"] == 0.5
  facts = found["workdirs"][tmp_path.name]
  assert (facts["unigram_entropy_nats"], facts["parameters"]) == (3.0, 7)


def test_one_seed_has_no_spread(tmp_path):
  found = summary.summarize(small_workdir(tmp_path, {"bf16": [2.0], "r": [2.1]}))["recipes"]
  assert found["r"]["validation_loss"]["std"] is None
  assert found["r"]["gap"]["percent"] == pytest.approx(5.0)


def test_workdirs_side_by_side_keep_their_own_bf16(tmp_path):
  one = small_workdir(tmp_path / "one", {"bf16": [2.0], "r": [2.2]})
  two = small_workdir(tmp_path / "two", {"bf16": [4.0], "r": [4.1]})
  none = small_workdir(tmp_path / "none", {"r": [1.0]})
  found = summary.summarize(one, two, none)
  gaps = {name: own["gap"]["percent"] for name, own in found["recipes"].items()}
  expected = {"one/bf16": 0.0, "one/r": 10.0, "two/bf16": 0.0, "two/r": 2.5, "none/r": None}
  assert gaps == pytest.approx(expected)
  alone = summary.summarize(one)["recipes"]["r"]
  assert found["recipes"]["one/r"]["gap"] == alone["gap"]
  assert "No validation loss of bf16 in none, so there are no gaps to it." in found["notes"]
  twin = small_workdir(tmp_path / "sub" / "one", {"bf16": [3.0]})
  names = [f"{workdir}/bf16" for workdir in (one, twin)]
  assert [n for n in summary.summarize(one, twin)["recipes"] if n.endswith("bf16")] == names
  with pytest.raises(ValueError, match="names one workdir twice"):
    summary.summarize(one, one)


def test_a_workdir_of_the_earlier_layout_is_read(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0], "r": [2.2]})
  found = summary.summarize(workdir)
  log_of(workdir, "metrics").rename(workdir / "metrics.jsonl")
  assert summary.summarize(workdir) == found


def test_a_seed_that_lags_is_not_compared_at_another_step(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0, 2.0], "r": [2.2]})
  early = [
    {"recipe": recipe, "seed": 1, "step": 5, "split": "validation", "loss": loss}
    for recipe, loss in (("bf16", 4.0), ("r", 8.0))
  ]
  write_rows(log_of(workdir, "metrics"), rows_of(log_of(workdir, "metrics")) + early)
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
  write_rows(log_of(workdir, "metrics"), rows_of(log_of(workdir, "metrics")) + rows)
  found = summary.summarize(workdir)
  gap = found["recipes"]["r"]["gap"]
  assert (gap["percent"], gap["step"]) == (pytest.approx(10.0), 5)
  assert gap["verdict"] == "not finished"


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
  write_rows(log_of(workdir, "probes"), rows)
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


@pytest.mark.parametrize("name", ["metrics", "probes", "timing"])
def test_a_line_cut_off_at_the_end_is_ignored(tmp_path, name):
  workdir = make_workdir(tmp_path)
  whole = summary.summarize(workdir)
  with log_of(workdir, name).open("a") as file:
    file.write('{"recipe":"bf16","seed":0,"step":101,"sp')
  assert summary.summarize(workdir) == whole
  report.write_report(workdir)


def test_a_damaged_line_is_named(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0]})
  path = log_of(workdir, "metrics")
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
  lost = summary.lost_to_scale(pd.DataFrame([{k: float(value) for k, value in row.items()}]))
  assert lost == pytest.approx(1 - left / error, abs=1e-3)  # float32 sums of 16384 squares
  assert 0.2 < lost < 0.3
