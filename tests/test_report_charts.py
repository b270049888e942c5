"""What the report draws."""

import itertools
import json
import math
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
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

from experiments import report, report_charts, report_lines, report_stacks, summary


def colours(value, key=""):
  match value:
    case dict():
      return {c for name, item in value.items() for c in colours(item, name)}
    case list():
      return {c for item in value for c in colours(item, key)}
    case str() if key.endswith(("color", "colorscale")):
      return {value}
  return set()


def test_figures_are_valid_and_their_colours_are_defined_in_both_schemes(tmp_path):
  figures = all_figures(make_workdir(tmp_path, diverged=("mxfp4", 1, 57)))
  assert len(figures) > 20
  template = Path(report.__file__).with_name("report_base.html.jinja").read_text()
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
        assert not parts or len(parts) == len(report_stacks.PARTS)
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
  write_rows(log_of(workdir, "probes"), rows)
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
  write_rows(log_of(workdir, "probes"), rows)
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
  write_rows(log_of(workdir, "probes"), rows)
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
  charts = report_charts.curve_charts(records)
  del charts["rate"]  # one line for all recipes
  charts["sqnr"] = report_charts.probe_charts(records)["sqnr"][0]
  seen = {}
  for chart in charts.values():
    for trace in chart["figures"][report_charts.ALL]["data"]:
      if trace["mode"].startswith("lines") and trace.get("name"):
        seen.setdefault(trace["name"], set()).add(trace["line"]["color"])
  assert seen.pop("hopper_fp4 on top") == seen.pop("hopper_fp4 residual") == seen["hopper_fp4"]
  assert {name: len(found) for name, found in seen.items()} == dict.fromkeys(RECIPES, 1)
  assert len(set.union(*seen.values())) == len(RECIPES)
  arms = [summary.Arm(recipe, recipe, "w", "bf16", 1, 1) for recipe in ("bf16", *"abcdefgh")]
  many = report_lines.styles_of(arms)
  assert len({(style["color"], style["dash"]) for style in many.values()}) == 9
  palette = {f"--recipe-{i}" for i in range(report_lines.RECIPE_COLOURS)} | {"--baseline"}
  assert {style["color"] for style in many.values()} == palette


def test_curves_are_the_mean_and_range_over_seeds(tmp_path):
  losses = {"bf16": [2.0, 2.2], "r": [2.1, 2.2]}
  environment = {"corpus": {"unigram_entropy_nats": 3.0}}
  workdir = small_workdir(tmp_path, losses, steps=100, environment=environment)
  records = summary.read_records(workdir)
  charts = report_charts.curve_charts(records)
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
  gap = charts["gap"]["figures"][report_charts.ALL]
  band, line = gap["data"][:2]
  assert line["y"] == [2.5] and band["y"] == [5.0, 0.0]  # 5 and 0 %: their range
  assert gap["layout"]["shapes"][0]["y0"] == 0.0


def test_the_band_of_a_gap_is_its_interval_from_three_seeds_on(tmp_path):
  losses = {"bf16": [2.0, 2.0, 2.0], "r": [2.02, 2.04, 2.06]}
  charts = report_charts.curve_charts(summary.read_records(small_workdir(tmp_path, losses)))
  band = charts["gap"]["figures"][report_charts.ALL]["data"][0]
  half = 4.302653 / 3**0.5  # Student's t of 2 degrees of freedom
  assert band["y"] == pytest.approx([2 + half, 2 - half], abs=1e-5)


def test_load_of_the_experts(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0], "r": [2.0]})
  loads = {0: [[0.5, 0.5], [0.25, 0.75]], 1: [[0.7, 0.3], [0.25, 0.75]]}
  rows = rows_of(log_of(workdir, "metrics"))
  rows += [
    {"recipe": "r", "seed": seed, "step": step, "split": "routing", "load": load}
    for seed, load in loads.items()
    for step in (10, 20)
  ]
  write_rows(log_of(workdir, "metrics"), rows)
  records = summary.read_records(workdir)
  (panel,) = report_charts.load_charts(records)
  trace = panel["figures"][report_charts.ALL]["data"][0]
  assert trace["z"] == [[60.0, 40.0], [25.0, 75.0]] and trace["zmax"] == 75.0
  busiest = report_charts.curve_charts(records)["busiest"]["figures"][report_charts.ALL]["data"]
  line = next(t for t in busiest if t.get("name"))
  # Twice the larger share, mean over layers: 1.25 and 1.45 of the two seeds.
  assert line["x"] == [10, 20] and line["y"] == pytest.approx([1.35, 1.35])


def test_what_was_dropped_has_a_line_where_experts_are_bounded(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0], "r": [2.0]})
  assert "dropped" not in report_charts.curve_charts(summary.read_records(workdir))
  rows = rows_of(log_of(workdir, "metrics"))
  rows += [
    {"recipe": "r", "seed": 0, "step": step, "split": "train", "loss": 2.0, "dropped": 0.1 * step}
    for step in (1, 2)
  ]
  write_rows(log_of(workdir, "metrics"), rows)
  charts = report_charts.curve_charts(summary.read_records(workdir))
  data = charts["dropped"]["figures"][report_charts.ALL]["data"]
  assert [t["y"] for t in data if t.get("name")] == [pytest.approx([0.1, 0.2])]


def test_layers_over_time(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0], "r": [2.0]})
  rows = [
    operand_row("r", "fprop lhs", 10.0 * step + layer, layer=layer) | {"step": step}
    for step in (0, 1)
    for layer in (0, 1)
  ]
  rows += [operand_row("r", "dgrad lhs", 3.0, layer=1) | {"step": 1}]
  write_rows(log_of(workdir, "probes"), rows)
  (panel,) = report_charts.probe_charts(summary.read_records(workdir))["depth"]
  found = {name: figure["data"][0]["z"] for name, figure in panel["figures"].items()}
  assert found == {
    "all operands": [[0.0, 10.0], [1.0, 7.0]],
    "fprop lhs": [[0.0, 10.0], [1.0, 11.0]],
    "dgrad lhs": [[3.0]],
  }


def test_a_smoothed_curve_stops_at_the_first_loss_that_is_not_finite(tmp_path):
  workdir = small_workdir(tmp_path, {"bf16": [2.0]}, steps=100)
  rows = rows_of(log_of(workdir, "metrics"))
  rows = [row | {"loss": None} if row["step"] == 50 else row for row in rows]
  write_rows(log_of(workdir, "metrics"), [row for row in rows if row["step"] <= 50])
  charts = report_charts.curve_charts(summary.read_records(workdir))
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
  charts = report_charts.curve_charts(summary.read_records(workdir))
  line = next(t for t in charts["train"]["figures"][report_charts.ALL]["data"] if t.get("name"))
  assert len(line["x"]) <= report_lines.MAX_POINTS
  assert line["x"][-1] == 1000
