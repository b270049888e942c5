"""A report of runs that are no pre-training: rows with other columns, a page of its own."""

import json
import re

import pytest
from workdirs import log_of, write_rows

from experiments import gaps, headline, report_page, summary
from experiments.records import RUN, Columns, read
from experiments.report_lines import (
  curves_of,
  gap_curves,
  last_points,
  line_figure,
  styles_of,
)

REWARD = gaps.Measure("held_out", "reward", gaps.difference)
LOGS = {
  "metrics": Columns((*RUN, "split"), numbers=("reward", "kl"), words=("event", "probe")),
  "timing": Columns(numbers=("step_time_ms",)),
  "probes": summary.PROBES,
  "samples": Columns((*RUN, "answer")),
}
PAGE = """{% extends "report_base.html.jinja" %}
{% from "report_macros.html.jinja" import chart, swatch with context %}
{% block page %}
{% call chart("reward", log=true) %}<figcaption>{{ over_seeds }}</figcaption>{% endcall %}
{{ chart("gap") }}
{% for arm, own in summary.recipes.items() %}
<p>{{ swatch(arm) }}{{ arm }}: {{ own.gap.mean | signed(3) }}, {{ own.gap.verdict }}</p>
{% endfor %}
{% for sample in samples %}<pre>{{ sample }}</pre>{% endfor %}
{% endblock %}
"""


def make_workdir(path, rewards, steps=20):
  """`rewards`: {arm: held-out rewards by seed at the last step}; 0.5 before and in training."""
  config = {"arms": list(rewards), "seeds": max(map(len, rewards.values())), "steps": steps}
  path.mkdir()
  (path / "config.json").write_text(json.dumps(config))
  (path / "environment.json").write_text(json.dumps({"parameters": 7}))
  metrics, samples = [], []
  for arm, of_seeds in rewards.items():
    for seed, last in enumerate(of_seeds):
      run = {"recipe": arm, "seed": seed}
      for step in range(1, steps + 1):
        metrics.append(run | {"step": step, "split": "train", "reward": 0.5, "kl": 0.1})
      for step, reward in ((0, 0.5), (steps, last)):
        metrics.append(run | {"step": step, "split": "held_out", "reward": reward})
      samples.append(run | {"step": steps, "answer": "<b>4</b>"})
  write_rows(log_of(path, "metrics"), metrics)
  write_rows(log_of(path, "samples"), samples)
  return path


def read_records(*workdirs):
  return read(LOGS, "arms", *workdirs)


def summarize(records):
  runs = {name: gaps.runs_of(records, arm, REWARD) for name, arm in records.arms.items()}
  recipes = {
    name: {
      "workdir": arm.workdir,
      "steps": arm.steps,
      "seeds": arm.seeds,
      "seeds_finished": sum(run["finished"] for run in runs[name]),
      "runs": runs[name],
      "reward": gaps.mean_of_runs(runs[name], REWARD.value, REWARD.step),
      "gap": gaps.gap_of(records, arm, runs, REWARD),
    }
    for name, arm in records.arms.items()
  }
  workdirs = {
    name: summary.facts_of(config, records.environments[name])
    for name, config in records.configs.items()
  }
  notes = summary.notes(records, runs, REWARD, "held-out reward")
  return {"workdirs": workdirs, "notes": notes, "recipes": recipes}


REWARDS = {"bf16": [0.6, 0.7, 0.8], "mxfp4": [0.5, 0.6, 0.7], "mxfp4+mbs": [0.61, 0.7, 0.79]}


def test_gaps_of_another_measure_by_hand(tmp_path):
  found = summarize(read_records(make_workdir(tmp_path / "w", REWARDS)))["recipes"]
  gap = found["mxfp4"]["gap"]
  assert gap["mean"] == pytest.approx(-0.1) and gap["interval"] == pytest.approx((-0.1, -0.1))
  assert (gap["verdict"], gap["seeds"], gap["step"]) == ("below BF16", 3, 20)
  assert gap["step_0"] == 0.0
  assert found["mxfp4+mbs"]["gap"]["verdict"] == "not told apart"
  assert found["bf16"]["reward"]["mean"] == pytest.approx(0.7)
  assert found["bf16"]["runs"][1] == {
    "seed": 1,
    "last_step": 20,
    "finished": True,
    "train_reward": 0.5,
    "held_out_reward": 0.7,
    "held_out_step": 20,
    "diverged": None,
  }


def test_what_diverged_has_a_cross_and_no_reward(tmp_path):
  workdir = make_workdir(tmp_path / "w", REWARDS)
  event = {"recipe": "mxfp4", "seed": 2, "step": 20, "split": "event", "event": "diverged"}
  rows = [json.loads(line) for line in log_of(workdir, "metrics").read_text().splitlines()]
  write_rows(log_of(workdir, "metrics"), [*rows, event])
  records = read_records(workdir)
  found = summarize(records)["recipes"]["mxfp4"]
  assert found["gap"]["verdict"] == "diverged" and found["runs"][2]["held_out_reward"] is None
  for split, reward in (("held_out", 0.7), ("train", 0.5)):
    (cross,) = last_points(records, split, "reward", styles_of(records.arms.values()))
    assert (cross["x"], cross["y"], cross["legendgroup"]) == ([20], [reward], "mxfp4")


def test_sentences_name_the_measure(tmp_path):
  found = summarize(read_records(make_workdir(tmp_path / "w", REWARDS)))
  said = headline.compared(found, "held-out reward", "mean", lambda gap: f"{gap['mean']:.2f}")
  assert said[:2] == [
    "mxfp4 (-0.10) ends below BF16 in held-out reward.",
    "mxfp4+mbs can't be told from BF16.",
  ]
  few = make_workdir(tmp_path / "few", {"mxfp4": [0.5]})
  found = summarize(read_records(few))
  assert "No held-out reward of bf16, so there are no gaps to it." in found["notes"]


def test_lines_of_another_column_and_another_gap(tmp_path):
  records = read_records(make_workdir(tmp_path / "w", REWARDS))
  styles = styles_of(records.arms.values())
  assert styles["bf16"]["color"] == "--baseline"
  curves = curves_of(records, "held_out", "reward")
  assert curves["bf16"]["mean"].tolist() == pytest.approx([0.5, 0.7])
  gap = gap_curves(records, REWARD)
  assert list(gap) == ["mxfp4", "mxfp4+mbs"]
  assert gap["mxfp4"]["mean"].tolist() == pytest.approx([0.0, -0.1])
  figure = line_figure(curves, styles, "reward", level=("chance <1>", 0.25))
  assert figure["layout"]["annotations"][0]["text"] == "chance &lt;1&gt; 0.25"
  assert figure["layout"]["shapes"][0]["y0"] == 0.25
  assert figure["layout"]["yaxis"]["range"][0] < 0.25


def test_a_page_of_its_own_has_the_frame_of_all_reports(tmp_path):
  one = make_workdir(tmp_path / "one", REWARDS)
  two = make_workdir(tmp_path / "two", REWARDS, steps=40)
  records = read_records(one, two)
  found, styles = summarize(records), styles_of(records.arms.values())
  figures = {
    "reward": line_figure(curves_of(records, "held_out", "reward"), styles, "reward"),
    "gap": line_figure(gap_curves(records, REWARD), styles, "gap", zero=True),
  }
  (tmp_path / "page.html.jinja").write_text(PAGE)
  text = report_page.render(
    tmp_path / "page.html.jinja",
    records,
    found,
    name="one, two",
    headline=["The <first> sentence."],
    charts={id: {"title": id, "figures": {"all operands": own}} for id, own in figures.items()},
    panels={},
    samples=records.tables["samples"].answer.tolist(),
  )
  assert re.findall(r'<div class="chart" id="(.*?)"', text) == ["reward", "gap"]
  assert [text.count(f'charts.set("{id}"') for id in figures] == [1, 1]
  assert text.count('<input type="checkbox" class="log">') == 1
  assert 'data-recipe="one/mxfp4+mbs"' in text and "12 of 18 runs finished" not in text
  assert "18 of 18 runs finished" in text and "40 steps" in text and "7 parameters" in text
  assert "The &lt;first&gt; sentence." in text and "<pre>&lt;b&gt;4&lt;/b&gt;</pre>" in text
  assert "one/mxfp4: \N{MINUS SIGN}0.100, below BF16</p>" in text
  assert '<tr><th scope="row">steps</th><td>20</td><td>40</td></tr>' in text
  assert "Where the quantization error comes from" not in text


def test_the_workdir_of_another_kind_of_experiment_is_refused(tmp_path):
  workdir = make_workdir(tmp_path / "w", REWARDS)
  with pytest.raises(ValueError, match=r"has no recipes; try python -m experiments\.rl\.report"):
    summary.summarize(workdir)
