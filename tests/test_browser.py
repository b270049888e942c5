"""The report in a real browser: what its script draws, and what a reader can do with it."""

import csv
import itertools
import math
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright import sync_api as playwright
from rl_workdirs import make_rl_workdir
from workdirs import make_workdir

from experiments import numbers, report, report_charts, summary
from experiments.report_charts import ALL
from experiments.rl import report as rl_report

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = [(name, width) for name in ("one", "two") for width in (390, 1280)]
HEIGHT = 900
HIDDEN = ("mxfp4", "hopper_fp4")  # one with a cross where it diverged, one of several lines


class Report(NamedTuple):
  path: Path
  records: summary.Records
  charts: dict[str, dict[str, Any]]  # by the id that the page gives them: figures by operand


class Opened(NamedTuple):
  page: playwright.Page
  report: Report
  scheme: str
  problems: list[str]


@pytest.fixture(scope="module")
def browser():
  path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
  if not path:
    pytest.skip("needs Chromium: apt-get install chromium, or its path in CHROMIUM")
  with playwright.sync_playwright() as driver:
    arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
    chromium = driver.chromium.launch(executable_path=path, args=arguments)
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
  folder = tmp_path_factory.mktemp("reports")
  one = make_workdir(folder / "one", steps=60, diverged=("mxfp4", 1, 57))
  two = [
    make_workdir(folder / name, recipes=("bf16", *HIDDEN), steps=60, layers=layers)
    for name, layers in (("shallow", 1), ("deep", 2))
  ]
  return {
    "one": report_of(report.write_report(one), one),
    "two": report_of(report.write_report(*two, out=folder / "two.html"), *two),
  }


def report_of(path, *workdirs):
  records = summary.read_records(*workdirs)
  panels = report_charts.probe_charts(records) | {"load": report_charts.load_charts(records)}
  charts = {id: chart["figures"] for id, chart in report_charts.curve_charts(records).items()}
  for group, members in panels.items():
    for i, chart in enumerate(members):
      charts[group if group in report_charts.OVER_TIME else f"{group}-{i}"] = chart["figures"]
  return Report(path, records, charts)


def page_name(param):
  return f"{param[0]}-{param[1]}"


# A page takes seconds to open, so that all tests share it and leave it as they found it.
@pytest.fixture(scope="module", params=PAGES, ids=page_name)
def opened(request, browser, reports):
  name, width = request.param
  scheme = "light" if width == 390 else "dark"
  viewport = {"width": width, "height": HEIGHT}
  page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
  url, problems = reports[name].path.as_uri(), []

  def listen(event, problem):
    page.on(event, lambda happened: problems.extend(filter(None, [problem(happened)])))

  listen("console", lambda said: said.text if said.type in ("error", "warning") else "")
  listen("pageerror", str)
  listen("request", lambda asked: "" if asked.url == url else asked.url)
  page.goto(url)
  page.locator("#validation .main-svg").first.wait_for()
  yield Opened(page, reports[name], scheme, problems)
  page.context.close()


@pytest.fixture
def page(opened):
  yield opened.page
  assert opened.problems == []


@pytest.fixture
def charts(opened):
  return opened.report.charts


# What depends on neither is tested once at each width, once with each number of workdirs.
on_two_pages = pytest.mark.parametrize("opened", PAGES[1:3], ids=page_name, indirect=True)


def settle(page):
  """Until the page has answered to what happened: its listeners run before the next frame."""
  page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")


def is_wider_than_its_place(page, selector):
  """Of all that match; a page's own place is the window."""
  return page.locator(selector).evaluate_all(
    """(all) => all.map((one) => one.scrollWidth >
      (one === document.documentElement ? innerWidth : one.clientWidth))"""
  )


def drawn(page):
  return set(page.locator(".chart:has(.main-svg)").evaluate_all("(all) => all.map((c) => c.id)"))


def in_a_fold(charts):
  return {id for id in charts if id.startswith("load-")}


def test_every_visible_chart_is_drawn_and_nothing_is_wider_than_the_window(page, charts):
  assert drawn(page) == charts.keys() - in_a_fold(charts)
  assert is_wider_than_its_place(page, "html") == [False]
  assert is_wider_than_its_place(page, ".scroll:has(.cards)") == [False]
  # It stays at the top of the window, where it may take little of the height.
  assert page.locator(".legend").bounding_box()["height"] < 0.1 * HEIGHT


def test_hovering_shows_the_values_of_the_recipes(page, charts):
  middle_step = 40
  expected = {
    f"{line['name']} : {line['y'][line['x'].index(middle_step)]:.5g}"
    for line in charts["validation"][ALL]["data"]
    if "name" in line
  }
  page.locator("#validation .nsewdrag").hover()
  label = page.locator("#validation .hoverlayer .legend")
  label.wait_for()
  assert label.locator(".legendtitletext").text_content() == str(middle_step)
  assert set(label.locator(".legendtext").all_text_contents()) == expected
  box = label.locator(".bg").bounding_box()
  assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
  page.mouse.move(0, 0)
  label.wait_for(state="detached")


def test_folds_open_and_charts_in_them_are_drawn_then(page, opened, charts):
  recipes = summary.summarize_records(opened.report.records)["recipes"].values()
  rows = {
    "Every seed": sum(len(own["runs"]) for own in recipes),
    "The numbers": sum(len(own["decomposition"]["operands"]) for own in recipes),
  }
  for title in (*rows, "Load of each expert", "Configuration and environment"):
    fold = page.locator("details", has=page.get_by_text(title, exact=True))
    inside = fold.locator("table, .chart").first
    assert not inside.is_visible(), title
    fold.locator("summary").click()
    inside.wait_for()
    if title in rows:
      assert fold.locator("tbody tr").count() == rows[title]
  settle(page)
  assert drawn(page) == charts.keys()
  assert is_wider_than_its_place(page, "html") == [False]
  assert not any(is_wider_than_its_place(page, ".scroll:has(.settings)"))
  for fold in page.locator("details > summary").all():
    fold.click()


def lines_drawn(page):
  """By line chart, the names at the ends of lines, and how many lines, bands, names and crosses."""
  return page.evaluate("""() => Object.fromEntries(
    [...document.querySelectorAll(".chart:has(.textpoint)")].map((div) => [div.id, [
      [...div.querySelectorAll(".textpoint")].map((name) => name.textContent.trim()),
      div.querySelectorAll(".scatterlayer .trace").length,
    ]]))""")


@on_two_pages
def test_the_legend_hides_and_shows_a_recipe_in_all_line_charts(page, charts):
  def expected(hidden):
    lines = {}
    for id, figures in charts.items():
      traces = [t for t in figures[ALL]["data"] if t.get("legendgroup") not in hidden]
      names = [t["text"][0].strip() for t in traces if t.get("meta") == "label"]
      if names:
        lines[id] = [names, len(traces)]
    return lines

  buttons = page.locator(".legend button").filter(has_text=re.compile(f"({'|'.join(HIDDEN)})$"))
  hidden = [button.get_attribute("data-recipe") for button in buttons.all()]
  assert len(hidden) >= 2
  for button in buttons.all():
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
  assert lines_drawn(page) == expected(hidden)
  for button in buttons.all():
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
  shown = lines_drawn(page)
  assert shown == expected([])
  assert {*report_charts.OVER_TIME, "validation", "gap", "train", "gradients"} < shown.keys()


@on_two_pages
def test_the_select_of_the_operand_changes_the_panels(page, charts):
  def expected(operand):
    chosen = {id: figures.get(operand) or figures[ALL] for id, figures in charts.items()}
    return {
      id: [[trace.get(axis) for axis in "xyz"] for trace in figure["data"]]
      for id, figure in chosen.items()
      if id not in in_a_fold(charts)
    }

  def bars():
    paths = page.locator("#layers-2 .bars path")
    return paths.evaluate_all("(all) => all.map((bar) => bar.getAttribute('d'))")

  select, before = page.locator("#operand"), bars()
  for operand in ("wgrad lhs", ALL):
    select.select_option(operand)
    shown = page.locator(".chart:visible").evaluate_all(
      """(all) => Object.fromEntries(all.map((div) => [
        div.id, div.data.map((trace) => [trace.x, trace.y, trace.z ?? null])]))"""
    )
    assert shown == expected(operand)
    assert (bars() == before) == (operand == ALL)


def boxes(page, selector):
  """Text, top and height of all that match, in pixels of the window."""
  return page.locator(selector).evaluate_all("""(all) => all.map((element) => {
    const {top, height} = element.getBoundingClientRect();
    return [element.textContent, top, height];
  })""")


def tick_labels(page, id, scale):
  """Each is a number that stands where it belongs on an axis of that scale."""
  kind, ends = page.locator(f"#{id}").evaluate(
    "(div) => [div._fullLayout.yaxis.type, div._fullLayout.yaxis.range]"
  )
  assert kind == scale, id
  ((_, plot_top, plot_height),) = boxes(page, f"#{id} .nsewdrag")
  labels = {}
  for text, top, height in boxes(page, f"#{id} .ytick text"):
    value = float(text.replace(numbers.MINUS, "-"))
    share = ((math.log10(value) if scale == "log" else value) - ends[0]) / (ends[1] - ends[0])
    assert abs(plot_top + (1 - share) * plot_height - (top + height / 2)) < 2, (id, text)
    labels[text] = value
  return labels


@on_two_pages
def test_labels_of_logarithmic_axes_read_as_whole_numbers(page):
  assert {"0.5", "1"} <= tick_labels(page, "gradients", "log").keys()
  for id in ("validation", "train", "balance", "z"):
    box = page.locator(f"[data-for={id}] .log")
    linear = tick_labels(page, id, "linear")
    box.check()
    assert len(tick_labels(page, id, "log")) > 1, id
    tops = sorted(top for _, top, _ in boxes(page, f"#{id} .textpoint"))
    assert all(below - above > 12 for above, below in itertools.pairwise(tops)), id
    if id == "validation":
      ((_, level, height),) = boxes(page, f"#{id} .annotation")
      ((_, rule, _),) = boxes(page, f"#{id} .shapelayer path")
      ((_, top, _),) = boxes(page, f"#{id}")
      assert top <= level < rule < level + 2 * height
    box.uncheck()
    assert tick_labels(page, id, "linear") == linear


def as_number(cell):
  return float(cell) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", str(cell)) else cell


def points(figure):
  """Of all but bands, names and crosses; each is of a series."""
  for trace in figure["data"]:
    if trace.get("fill") or trace.get("meta"):
      continue
    name = trace["name"] if trace["type"] == "scatter" else trace.get("name", "")
    if trace["type"] == "heatmap":
      for y, row in zip(trace["y"], trace["z"], strict=True):
        yield from ([name, x, y, z] for x, z in zip(trace["x"], row, strict=True))
    else:
      yield from ([name, x, y, ""] for x, y in zip(trace["x"], trace["y"], strict=True))


@on_two_pages
@pytest.mark.parametrize("id", ["validation", "operands-1", "depth-3", "gradients"])
def test_data_and_picture_of_a_chart(page, charts, id):
  tools = page.locator(f"[data-for={id}]")
  with page.expect_download() as data:
    tools.get_by_text("data", exact=True).click()
  assert data.value.suggested_filename == f"{id}.csv"
  with Path(data.value.path()).open(newline="") as file:
    header, *rows = csv.reader(file)
  assert header == ["series", "x", "y", "z"]
  assert [list(map(as_number, row)) for row in rows] == [
    list(map(as_number, point)) for point in points(charts[id][ALL])
  ]
  with page.expect_download() as picture:
    tools.get_by_text("picture", exact=True).click()
  assert picture.value.suggested_filename == f"{id}.svg"
  svg = ElementTree.fromstring(Path(picture.value.path()).read_text())
  assert svg.tag == "{http://www.w3.org/2000/svg}svg"
  unit = charts[id][ALL]["layout"]["xaxis"]["title"]["text"]
  assert unit in {text.strip() for text in svg.itertext()}


def brightness(colour):
  return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def colours(page):
  """Backgrounds of the page and of its charts, and the colours of their texts."""
  return page.evaluate("""() => {
    const all = (selector, property) => [...document.querySelectorAll(selector)].map(
      (element) => getComputedStyle(element)[property]);
    return [
      [...all("body", "backgroundColor"), ...all(".main-svg:first-child", "backgroundColor"),
       ...all(".bglayer .bg", "fill")],
      [...all("body", "color"), ...all(".xtick text, .ytick text", "fill")],
    ];
  }""")


def test_colours_follow_the_scheme(page, opened):
  fold = page.locator("details.charts > summary")  # the scheme changes while it is shut
  for scheme in sorted(("light", "dark"), key=opened.scheme.__eq__):  # to the other and back
    page.emulate_media(color_scheme=scheme)
    fold.click()
    settle(page)
    backgrounds, texts = (set(map(brightness, own)) for own in colours(page))
    assert len(backgrounds) == len(texts) == 1
    if scheme == "light":
      assert min(backgrounds) > 230 and max(texts) < 60
    else:
      assert max(backgrounds) < 40 and min(texts) > 200
    fold.click()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_a_report_of_reinforcement_learning_fits_its_window(browser, tmp_path, width, scheme):
  arms = ("bf16", "mxfp4", "mxfp4.scale_bias.deadzone@backward")
  path = rl_report.write_report(make_rl_workdir(tmp_path / "w", arms=arms, replays=True))
  viewport = {"width": width, "height": HEIGHT}
  page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
  problems = []
  page.on("console", lambda said: problems.append(said.text))
  page.on("pageerror", lambda error: problems.append(str(error)))
  page.goto(path.as_uri())
  page.locator("#held_out .main-svg").first.wait_for()
  settle(page)
  places = set(page.locator(".chart").evaluate_all("(all) => all.map((c) => c.id)"))
  assert drawn(page) == places > {"held_out", "gap", "error", "unreplayed_error", "operands-0"}
  for selector in ("html", ".scroll:has(.cards)", ".sample"):
    assert not any(is_wider_than_its_place(page, selector)), selector
  for one in page.locator("input.log").all():
    one.check()
  settle(page)
  assert problems == []
  page.context.close()
