"""The report of reinforcement learning: its numbers by hand, its sentences, its page."""

import html.parser
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import plotly.graph_objects as go
import pytest
from rl_workdirs import ARMS, make_rl_workdir
from workdirs import log_of, operand_row, page_without_plotly, rows_of, write_rows

from experiments import numbers, report_charts
from experiments.report_charts import ALL
from experiments.rl import headline, report, summary
from experiments.rl.report_charts import constants, curve_charts

ROOT = Path(__file__).parents[1]
DEADZONE = ARMS[2]
AT_END = {
  "bf16": [0.7, 0.8, 0.9],
  "mxfp4": [0.6, 0.71, 0.79],  # lower by 0.1, 0.09 and 0.11
  DEADZONE: [0.71, 0.8, 0.89],
}


def plain(text):
  return text.replace("\N{NO-BREAK SPACE}", " ").replace(numbers.MINUS, "-")


def page_of(*workdirs, **options):
  return plain(page_without_plotly(report.write_report(*workdirs, **options)))


def sentences(workdir):
  return [plain(sentence) for sentence in headline.headline(summary.summarize(workdir))]


def test_the_numbers_of_an_arm_by_hand(tmp_path):
  found = summary.summarize(make_rl_workdir(tmp_path / "w", at_end=AT_END))
  own = found["recipes"]["mxfp4"]
  gap = own["gap"]
  assert gap["mean"] == pytest.approx(-0.1) and gap["step_0"] == 0
  # Student's t of 2 degrees of freedom is 4.303, the standard error 0.01 / sqrt(3).
  assert gap["interval"] == pytest.approx((-0.1 - 0.02484, -0.1 + 0.02484), abs=1e-5)
  assert (gap["verdict"], gap["seeds"], gap["step"]) == ("below BF16", 3, 20)
  assert found["recipes"][DEADZONE]["gap"]["verdict"] == "not told apart"
  assert own["start_reward"]["mean"] == 0.25
  assert own["held_out_reward"]["mean"] == pytest.approx(0.7)
  assert own["held_out_reward"]["std"] == pytest.approx(statistics.stdev([0.6, 0.71, 0.79]))
  # Of steps 19 and 20: a tenth of 20. The seeds add 0, 0.001 and 0.002.
  assert own["train_reward"]["mean"] == pytest.approx(0.195 + 0.1 + 0.001)
  assert own["entropy"]["mean"] == pytest.approx(2 - 0.195)
  assert own["ppo_kl"]["mean"] == pytest.approx(0.01)
  assert own["rollout_kl"]["mean"] == pytest.approx(0.02)  # whatever step 3 was
  assert own["token_mult_prob_error"]["mean"] == pytest.approx(1.1)
  assert own["largest_token_mult_prob_error"] == 2.5
  assert own["router_flips"] == pytest.approx({"step": 10, "tokens": 0.1, "choices": 0.025})
  assert (own["step_time_ms"], own["step_time_ratio"]) == (20, 2)
  assert (own["rollout_ms"], own["update_ms"]) == (8, 12)
  assert (own["rollout_tokens_per_s"], own["rollout_tokens_per_s_ratio"]) == (2000, 0.5)
  assert (own["seeds_finished"], own["last_step"]) == (3, 20)
  assert own["runs"][1]["token_mult_prob_error"] == pytest.approx(1.1)
  facts = found["workdirs"]["w"]
  assert (facts["held_out"], facts["task"], facts["prompts"]) == (64, "toys:largest", 4)


def test_written_numbers_are_those_of_the_summary(tmp_path):
  workdir = make_rl_workdir(tmp_path / "w")
  path = summary.write_summary(workdir)
  assert path == workdir / "summary.json"
  assert json.loads(path.read_text()) == json.loads(json.dumps(summary.summarize(workdir)))


def test_standard_error_of_a_mean_of_problems():
  rewards = [1.0] * 48 + [0.0] * 16
  expected = statistics.pstdev(rewards) / math.sqrt(64)
  assert summary.standard_error(0.75, 64) == pytest.approx(expected)
  graded = [0.5, 1.0] * 32  # of the same mean, worth between: less
  assert statistics.pstdev(graded) / math.sqrt(64) < summary.standard_error(0.75, 64)
  assert summary.standard_error(1.0, 64) == 0
  assert summary.standard_error(None, 64) is None and summary.standard_error(0.5, None) is None


def test_the_page_says_once_what_a_standard_error_is(tmp_path):
  text = page_of(make_rl_workdir(tmp_path / "w"))
  told = (
    "Held-out reward is the mean over 64 problems, the same for all arms and seeds: at 0.750"
    " another draw of problems would move it by a standard error of up to 0.054"
  )
  assert text.count(told) == 1 and text.count("standard error") == 1


def test_the_headline_tells_the_rise_the_gaps_and_the_furthest_arm(tmp_path):
  assert sentences(make_rl_workdir(tmp_path / "w", at_end=AT_END)) == [
    "Held-out reward of bf16 rises from 0.250 to 0.800.",
    "mxfp4 (-0.100) ends below BF16 in held-out reward.",
    f"{DEADZONE} can't be told from BF16.",
    "By 95 % intervals of the gaps, paired over 3 seeds.",
    f"Rollout and trainer lie furthest apart in {DEADZONE}: token_mult_prob_error is 1.200 over"
    " the last steps and 3.500 in the worst one; up to 1.05 counts as healthy.",
  ]


def test_the_headline_of_runs_that_can_not_be_compared(tmp_path):
  first = lambda name, **options: sentences(make_rl_workdir(tmp_path / name, **options))  # noqa: E731
  running = first("running", stopped_at=15)
  assert running[0] == "Held-out reward of bf16 rises from 0.250 to 0.500 by step 10."
  assert running[1] == f"Not finished, so not compared: mxfp4 and {DEADZONE}."
  begun = first("begun", stopped_at=7)
  assert begun[0] == "Held-out reward of bf16 is 0.250 before training."
  assert first("nothing yet", stopped_at=-1) == ["No training steps yet."]
  lone = first("no bf16", arms=("mxfp4",))
  assert lone[0] == "Held-out reward of mxfp4 rises from 0.250 to 0.750."
  assert lone[1] == "There is no run of bf16 to compare mxfp4 with."
  diverged = first("diverged", diverged=("mxfp4", 1, 12))
  assert diverged[1] == "mxfp4 diverged."
  one = first("one", seeds=1, arms=("bf16", "mxfp4"), at_end={"bf16": [0.2], "mxfp4": [0.25]})
  assert one[0] == "Held-out reward of bf16 falls from 0.250 to 0.200."
  assert "Mean gap in held-out reward: mxfp4 +0.050." in one


def test_arms_whose_rollout_is_their_trainer_agree(tmp_path):
  workdir = make_rl_workdir(tmp_path / "w", arms=("bf16",))
  rows = rows_of(log_of(workdir, "metrics"))
  same = [row | {"token_mult_prob_error": 1.0} if row["split"] == "train" else row for row in rows]
  write_rows(log_of(workdir, "metrics"), same)
  assert sentences(workdir)[-1] == (
    "Rollout and trainer agree in every arm: token_mult_prob_error is 1.000 in all steps."
  )


def test_what_diverged_has_no_numbers_at_its_end(tmp_path):
  workdir = make_rl_workdir(tmp_path / "w", diverged=("mxfp4", 1, 12))
  own = summary.summarize(workdir)["recipes"]["mxfp4"]
  assert own["runs"][1]["entropy"] is None and own["runs"][1]["held_out_reward"] is None
  assert own["runs"][0]["entropy"] == pytest.approx(1.805)
  assert own["gap"]["verdict"] == "diverged" and own["gap"]["seeds"] == 2
  assert own["seeds_finished"] == 2
  text = page_of(workdir)
  assert "mxfp4, seed 1, diverged at step 12.</strong>" in text
  assert "The update was not finite and was not applied" in text
  assert "No probed operand was non-finite" not in text
  crosses = [
    trace
    for chart in curve_charts(summary.read_records(workdir)).values()
    for trace in chart["figures"][ALL]["data"]
    if trace.get("meta") == "mark"
  ]
  # Of held-out reward at step 10 and of training reward at step 12, seed 1.
  assert [(c["x"], c["y"]) for c in crosses] == [([10], [0.5]), ([12], [pytest.approx(0.221)])]


def charts_of(workdir):
  records = summary.read_records(workdir)
  return {name: own["figures"][ALL] for name, own in curve_charts(records).items()}, records


def line_of(figure, arm):
  (found,) = [trace for trace in figure["data"] if trace.get("name") == arm]
  return dict(zip(found["x"], found["y"], strict=True))


def test_answers_worth_a_part_have_a_chart_of_those_worth_all(tmp_path):
  charts, _ = charts_of(make_rl_workdir(tmp_path / "w", share_right=0.5))
  assert line_of(charts["accuracy"], "mxfp4") == {0: 0.125, 10: 0.25, 20: 0.375}


def test_charts_show_what_the_rows_hold_and_leave_out_what_never_changes(tmp_path):
  charts, records = charts_of(make_rl_workdir(tmp_path / "w"))
  drawn = ["held_out", "gap", "reward", "entropy", "gradients", "mixed", "length"]
  drawn += ["error", "divergence", "k3", "distance", "furthest", "weights", "least"]
  assert list(charts) == [*drawn, "tokens", "choices", "noise"]
  assert constants(records) == {"truncated": 0, "clipped_tokens": 0, "ratio": 1, "rate": 1e-3}
  assert line_of(charts["held_out"], "mxfp4") == {0: 0.25, 10: 0.5, 20: 0.75}
  assert line_of(charts["gap"], "mxfp4") == {0: 0, 10: 0, 20: 0}
  assert line_of(charts["error"], DEADZONE)[3] == 3.5
  assert line_of(charts["error"], DEADZONE)[4] == 1.2
  assert line_of(charts["furthest"], "mxfp4")[7] == 3.5
  assert line_of(charts["least"], DEADZONE)[7] == 0.8
  assert line_of(charts["tokens"], "mxfp4") == {0: 0.1, 10: 0.1}
  assert line_of(charts["choices"], "mxfp4") == {0: 0.025, 10: 0.025}
  assert [t["name"] for t in charts["noise"]["data"] if "name" in t] == ["mxfp4"]
  text = page_of(tmp_path / "w")
  told = (
    "truncated answers 0, clipped tokens 0, largest ratio to the old policy 1, learning rate 0.001."
  )
  assert f"not drawn: {told}" in re.sub(r"\s+", " ", text)
  assert set(re.findall(r'<div class="chart" id="(\w+)"', text)) == {
    *charts,
    *report_charts.OVER_TIME,
  }


def test_the_error_has_a_rule_at_what_is_healthy(tmp_path):
  charts, _ = charts_of(make_rl_workdir(tmp_path / "w"))
  layout = charts["error"]["layout"]
  assert layout["yaxis"]["type"] == "log"
  assert [(s["y0"], s["y1"]) for s in layout["shapes"]] == [(1.05, 1.05)]
  low, high = layout["yaxis"]["range"]
  assert low < 0 < math.log10(3.5) < high
  assert "annotations" not in layout


def test_gaps_without_replay_are_drawn_where_routing_is_replayed(tmp_path):
  charts, _ = charts_of(make_rl_workdir(tmp_path / "w", replays=True))
  assert line_of(charts["unreplayed_error"], "mxfp4") == {0: 2, 10: 2}
  assert line_of(charts["unreplayed_divergence"], DEADZONE) == {0: 2, 10: 2}
  assert charts["unreplayed_error"]["layout"]["shapes"][0]["y0"] == 1.05
  text = page_of(tmp_path / "w")
  assert "<span>routing replayed</span>" in text and "ppo_kl without replay" in text


def test_a_dense_model_has_no_flips(tmp_path):
  charts, _ = charts_of(make_rl_workdir(tmp_path / "w", is_dense=True))
  assert not {"tokens", "choices"} & set(charts)
  own = summary.summarize(tmp_path / "w")["recipes"]["mxfp4"]
  assert own["router_flips"] == {"step": None, "tokens": None, "choices": None}
  text = page_of(tmp_path / "w")
  assert "Router" not in text and "<h2>Routing</h2>" not in text


def test_errors_are_told_by_path(tmp_path):
  workdir = make_rl_workdir(tmp_path / "w")
  recipes = summary.summarize(workdir)["recipes"]
  found = [
    (o["path"], o["gemm"], o["operand"], o["sqnr_db"])
    for o in recipes["mxfp4"]["decomposition"]["operands"]
  ]
  sides = ("lhs", "rhs")
  expected = [("rollout", "fprop", side, 20.0) for side in sides]
  assert found == expected + [("forward", "fprop", side, 16.0) for side in sides]
  charts = report_charts.probe_charts(summary.read_records(workdir))
  keys = [
    *(f"{path} fprop {side}" for path in ("rollout", "forward") for side in sides),
    *(f"backward {gemm} {side}" for gemm in ("dgrad", "wgrad") for side in sides),
  ]
  assert list(charts["sqnr"][0]["figures"]) == [ALL, *keys]
  mxfp4, deadzone = (chart["figures"][ALL] for chart in charts["operands"])
  assert mxfp4["data"][0]["y"] == keys[:4] and deadzone["data"][0]["y"] == keys[4:]
  assert [a["text"] for a in mxfp4["layout"]["annotations"]] == ["20.0 dB"] * 2 + ["16.0 dB"] * 2
  for stack in zip(*(trace["x"] for trace in mxfp4["data"]), strict=True):
    assert sum(stack) == pytest.approx(1)
  assert line_of(charts["sqnr"][0]["figures"]["rollout fprop lhs"], "mxfp4") == {0: 20, 10: 20}
  text = page_of(workdir)
  assert '<td class="text">backward wgrad rhs</td>' in text
  assert "rollout is the pass that samples" in text


def test_a_backward_pass_reads_the_residual_of_the_forward_pass(tmp_path):
  workdir = make_rl_workdir(tmp_path / "w", arms=("bf16", "hopper_fp4"), seeds=1)
  sqnr = {"rollout residual": 11.0, "forward residual": 12.0, "backward wgrad": 13.0}
  rows = [
    operand_row("hopper_fp4", f"{place.split(' ')[1]} lhs", value) | {"path": place.split(" ")[0]}
    for place, value in sqnr.items()
  ]
  write_rows(log_of(workdir, "probes"), rows)
  charts = report_charts.probe_charts(summary.read_records(workdir))
  figure = charts["sqnr"][0]["figures"]["backward wgrad lhs"]
  assert line_of(figure, "hopper_fp4 residual") == {20: 12}
  assert line_of(figure, "hopper_fp4 on top") == {20: 13}


def test_answers_are_the_first_and_the_last_of_the_lowest_seed(tmp_path):
  workdir = make_rl_workdir(tmp_path / "w", arms=("mxfp4", "bf16"))
  (found,) = summary.samples(summary.read_records(workdir))
  assert (found["question"], found["expected"]) == ("7 & 9?", "<9>")
  assert list(found["arms"]) == ["mxfp4", "bf16"]
  told = found["arms"]["bf16"]
  assert [(told[at]["answer"], told[at]["step"]) for at in ("first", "last")] == [
    ("100\n", 0),
    ("1020\n", 20),
  ]
  begun = make_rl_workdir(tmp_path / "begun", stopped_at=5)
  assert summary.samples(summary.read_records(begun))[0]["arms"]["bf16"]["last"] is None
  write_rows(log_of(begun, "samples"), [])
  assert "Answers to read" not in page_of(begun)


def test_what_a_policy_says_is_shown_as_text(tmp_path):
  workdir = make_rl_workdir(tmp_path / "w", arms=("bf16",), seeds=1, steps=10)
  said = ["<script>alert(1)</script>\n a\x00b\x1b[0m", ""]
  rows = [row | {"answer": a} for row, a in zip(rows_of(log_of(workdir, "samples")), said)]  # noqa: B905
  write_rows(log_of(workdir, "samples"), rows)
  text = page_of(workdir)
  assert "7 &amp; 9?</div>" in text and "&lt;9&gt;</div>" in text
  shown = '<div class="said">&lt;script&gt;alert(1)&lt;/script&gt;\n a\u2400b\u241b[0m</div>'
  assert shown in text and "<script>alert" not in text
  assert '<div class="said"><i>nothing</i></div>' in text


class Tags(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.found = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))


def test_text_from_files_is_escaped(tmp_path):
  attack = """</script><script>alert(1)</script><img src=x onerror="alert(2)">"""
  workdir = make_rl_workdir(tmp_path / "w")
  for path in (*workdir.glob("*.json"), *log_of(workdir, "").parent.iterdir()):
    text = path.read_text().replace(DEADZONE, json.dumps(attack)[1:-1])
    path.write_text(text.replace("toys:largest", "<img src=y>"))
  text = page_without_plotly(report.write_report(workdir))
  assert "<script>alert" not in text and 'onerror="' not in text
  tags = Tags(text).found
  assert [tag for tag, _ in tags].count("script") == 2
  assert "img" not in {tag for tag, _ in tags}
  assert not any(name.startswith("on") for _, attributes in tags for name in attributes)


VARIANTS = {
  "three arms": {},
  "one seed": {"seeds": 1},
  "diverged": {"diverged": ("mxfp4", 1, 12)},
  "diverged at once": {"diverged": ("bf16", 0, 0), "seeds": 1},
  "no bf16": {"arms": ARMS[1:]},
  "only bf16": {"arms": ("bf16",)},
  "no probes": {"probes": False},
  "dense": {"is_dense": True},
  "replayed": {"replays": True, "arms": ("bf16", "mxfp4+aqn@rollout")},
  "running": {"stopped_at": 7},
  "one step": {"stopped_at": 1},
  "nothing yet": {"stopped_at": -1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_page_is_whole_offline_and_names_every_arm(tmp_path, variant):
  workdir = make_rl_workdir(tmp_path / variant, **VARIANTS[variant])
  text = page_without_plotly(report.write_report(workdir))
  shown = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)
  assert not re.search(r"\b(nan|inf|None|undefined)\b", shown)
  rows = re.findall(r'<th scope="row"><span[^>]*></span>(.+?)</th>', text)
  arms = VARIANTS[variant].get("arms", ARMS)
  assert [row.replace("<wbr>", "") for row in rows[: len(arms)]] == list(arms)
  for tag, attributes in Tags(text).found:
    assert tag not in ("link", "img", "iframe", "object", "embed"), tag
    assert "src" not in attributes and "href" not in attributes, attributes
  places = re.findall(r'<div class="chart" id="([\w-]+)"', text)
  assert len(set(places)) == len(places)
  assert set(places) == set(re.findall(r'charts\.set\("([\w-]+)"', text))


def test_figures_are_ones_that_plotly_knows(tmp_path):
  options = {"arms": ("bf16", "mxfp4+aqn@rollout", "mxfp4"), "replays": True}
  charts, _ = charts_of(make_rl_workdir(tmp_path / "w", **options))
  for figure in charts.values():
    text = re.sub(r'"--[\w-]+(/\w\w)?"', '"#123456"', json.dumps(figure, allow_nan=False))
    go.Figure(json.loads(text))


def test_several_workdirs_lie_side_by_side(tmp_path):
  one = make_rl_workdir(tmp_path / "one", at_end=AT_END)
  two = make_rl_workdir(tmp_path / "two", steps=40, is_dense=True, probes=False)
  found = summary.summarize(one, two)["recipes"]
  assert found["one/mxfp4"]["gap"]["mean"] == pytest.approx(-0.1)
  assert found["two/mxfp4"]["gap"]["mean"] == 0
  text = page_of(one, two, out=tmp_path / "both.html")
  assert "Held-out reward of one/bf16 rises from 0.250 to 0.800 and of two/bf16 rises" in text
  assert "18 of 18 runs finished" in text
  assert '<tr><th scope="row">steps</th><td>20</td><td>40</td></tr>' in text
  assert "Held-out reward in two is the mean over 64 problems" in text


@pytest.mark.slow
def test_the_command_writes_the_page_and_refuses_another_workdir(tmp_path):
  workdir = make_rl_workdir(tmp_path / "w")
  command = [sys.executable, "-m", "experiments.rl.report", f"--workdir={workdir}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == f"{workdir / 'report.html'}\n"
  command[-1] += f",{workdir}"
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr.count("\n")) == (1, 1)
  assert "several workdirs need --out" in done.stderr


def test_names_break_where_their_parts_meet(tmp_path):
  text = page_of(make_rl_workdir(tmp_path / "w"))
  assert "mxfp4.<wbr>deadzone@<wbr>backward</th>" in text
  pairs = itertools.pairwise(["Results", "Training", "Rollout against trainer", "Routing"])
  assert all(text.index(f"<h2>{a}</h2>") < text.index(f"<h2>{b}</h2>") for a, b in pairs)
