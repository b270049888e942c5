"""The tables in the pages are what the committed rows say."""

import collections
import re
from pathlib import Path
from unittest import mock

import pytest
from matplotlib import pyplot as plt
from workdirs import make_workdir

from configs import demo, moe_wide
from experiments import kernel_tables, logs, pictures, tables
from experiments.train import make_trainer, policy_of, saved_activation_bytes
from fp4jax import recipes

ROOT = Path(__file__).parents[1]


def rows(name):
  return logs.read_rows(ROOT / "results" / f"{name}.jsonl")


PAGES = tables.pages(ROOT / "results")


@pytest.mark.parametrize("page", PAGES)
def test_pages_hold_the_tables_of_the_rows(page):
  text = (ROOT / page).read_text()
  for name, content in PAGES[page].items():
    assert tables.fill(text, name, content) == text
    assert tables.fill(text, name, "something else") != text


@pytest.mark.parametrize("page", PAGES)
def test_no_place_of_a_page_is_left_by_hand(page):
  places = re.findall(r"<!-- (\w+) -->", (ROOT / page).read_text())
  assert sorted(places) == sorted(PAGES[page])


def test_the_page_says_how_balanced_the_wide_model_ends():
  ends = [row for row in rows("moe_wide") if row["kind"] == "routing" and row["step"] == 900]
  top_k = moe_wide.get_config().model.top_k
  busiest = [100 * top_k * max(map(max, row["load"])) for row in ends]
  assert len(ends) == 9
  words = f"is the choice of {min(busiest):.0f} to {max(busiest):.0f} % of the tokens (evenly 25 %)"
  assert words in " ".join((ROOT / "docs/results.md").read_text().split())


def test_collected_are_losses_routing_and_summary(tmp_path):
  records = make_workdir(tmp_path / "run", recipes=("bf16", "mxfp4"), steps=40)
  tables.collect(records, tmp_path / "rows.jsonl")
  found = collections.Counter(row["kind"] for row in logs.read_rows(tmp_path / "rows.jsonl"))
  assert found == {"environment": 1, "entropy": 1, "validation": 8, "routing": 8, "recipe": 2}


def losses(runs):
  """Rows of {(recipe, seed): {step: loss}}."""
  return [
    {"kind": "validation", "recipe": recipe, "seed": seed, "step": step, "loss": loss}
    for (recipe, seed), own in runs.items()
    for step, loss in own.items()
  ]


def test_the_pictures_gaps_begin_before_training():
  runs = {("bf16", 0): {0: 4.0, 2: 2.0}, ("bf16", 1): {0: 5.0, 2: 2.5}}
  runs |= {("r", 0): {0: 4.04, 2: 2.2}, ("r", 1): {0: 5.1, 2: 2.5}}
  found = pictures.gaps_to_bf16([{"kind": "environment"}, *losses(runs)])
  assert found["bf16"] == {0: [0.0, 0.0], 2: [0.0, 0.0]}
  assert found["r"] == {0: pytest.approx([1.0, 2.0]), 2: pytest.approx([10.0, 0.0])}


def test_a_gap_has_its_interval_if_there_is_one():
  gap = {"percent": 2.0, "seeds": 3, "interval_percent": [-0.5, 4.5], "verdict": "not told apart"}
  few = gap | {"seeds": 2, "interval_percent": None, "verdict": "too few seeds"}
  recipe = {"kind": "recipe", "recipe": "r", "validation_loss": {"mean": 3.0}}
  recipe |= {"saved_activation_bytes_per_token": 1000}
  environment = {"kind": "environment", "git_dirty": None, "git_commit": "0" * 40, "device": "d"}
  rows = [environment, {"kind": "entropy", "unigram_entropy_nats": 3.0}]
  rows += [recipe | {"gap": own} for own in (gap, few, gap | {"verdict": "reference"})]
  assert tables.losses_table(rows).splitlines()[2:5] == [
    "| `r` | 3.0000 | +2.00 | -0.50 to +4.50 | 3 | not told apart | 1,000 |",
    "| `r` | 3.0000 | +2.00 |  | 2 | too few seeds | 1,000 |",
    "| `r` | 3.0000 |  |  | 3 | reference | 1,000 |",
  ]


def test_a_profile_is_a_column_per_recipe_and_sums_up():
  environment = {"git_dirty": None, "git_commit": "0" * 40, "device": "d"}
  rows = [
    {"recipe": "bf16", "part": "feed_forward", "kind": "kernels", "ms_per_step": 5.0},
    {"recipe": "bf16", "part": "attention", "kind": "gemm", "ms_per_step": 7.0},
    {"recipe": "fp8", "part": "feed_forward", "kind": "kernels", "ms_per_step": 3.04},
  ]
  assert tables.profile_table([row | environment for row in rows]).splitlines()[:5] == [
    "| ms per step | `bf16` | `fp8` |",
    "|---|---|---|",
    "| attention, XLA's products | 7.0 | 0.0 |",
    "| feed-forward, our kernels | 5.0 | 3.0 |",
    "| sum | 12.0 | 3.0 |",
  ]


def test_scaling_is_to_the_same_recipe_on_one_gpu():
  environment = {"git_dirty": None, "git_commit": "0" * 40, "device": "d"}

  def row(devices, recipe, tokens, ratio, **mesh):
    own = {"devices": devices, "recipe": recipe, "ratio_to_bf16": ratio, "capacity_factor": 1.25}
    own |= {"tokens_per_gpu_s": tokens, "tokens_per_step": 4096 * devices}
    return own | {"mesh": {"data": 1, "fsdp": 1, "expert": 1} | mesh} | environment

  found = tables.scaling_table(
    [
      row(4, "fp8", 90_000.0, 0.8, data=2, expert=2),
      row(1, "bf16", 80_000.0, 1.0),
      row(1, "fp8", 120_000.0, 2 / 3),
      row(4, "bf16", 60_000.0, 1.0, data=4),
      row(4, "mxfp4", 30_000.0, 2.0, data=4),
    ]
  )
  assert found.splitlines() == [
    "| GPUs | mesh | recipe | tokens/GPU/s | of one GPU's | speed, BF16 = 1 |",
    "|---|---|---|---|---|---|",
    "| 1 |  | `bf16` | 80,000 | 1.00 | 1.00 |",
    "| 1 |  | `fp8` | 120,000 | 1.00 | 1.50 |",
    "| 4 | data 4 | `bf16` | 60,000 | 0.75 | 1.00 |",
    "| 4 | data 4 | `mxfp4` | 30,000 |  | 0.50 |",
    "| 4 | data 2, expert 2 | `fp8` | 90,000 | 0.75 | 1.25 |",
    "",
    "4,096 tokens per GPU and step; capacity factor of experts sent between GPUs 1.25."
    " Device: d. Commit 000000000.",
  ]


def test_what_is_computed_again_by_recipe():
  row = {"git_dirty": None, "git_commit": "0" * 40, "device": "d", "oom": False, "dropped": 0.0312}
  row |= {"tokens_per_gpu_s": 12_345.6, "peak_bytes": 54_680_000_000, "limit_bytes": 78_600_000_000}
  rows = [
    row | {"remat": "everything", "recipe": "bf16"},
    row | {"remat": "everything", "recipe": "fp8", "dropped": 0.0296},
    {k: v for k, v in row.items() if k in ("git_dirty", "git_commit", "device", "limit_bytes")}
    | {"remat": "none", "recipe": "bf16", "oom": True, "oom_bytes": 5}
    | {"argument_bytes": 30_000_000_000, "temp_bytes": 61_200_000_000},
    row | {"remat": "none", "recipe": "fp8", "peak_bytes": 68_750_000_000},
  ]
  assert tables.recompute_table(rows).splitlines() == [
    "| computed again | `bf16` | `fp8` |",
    "|---|---|---|",
    "| everything | 12,346 / 54.7 | 12,346 / 54.7 |",
    "| none | OOM / 91.2 | 12,346 / 68.8 |",
    "",
    "Tokens per GPU and second / peak memory in GB; OOM: what the compiler planned."
    " A process may have 78.6 GB. Dropped: 3.0 to 3.1 % of the choices."
    " Device: d. Commit 000000000.",
  ]
  unknown = {"argument_bytes": None, "temp_bytes": None, "limit_bytes": None}
  found = tables.recompute_table([row | rows[0], rows[2] | unknown])
  assert "| none | OOM |" in found and "may have" not in found


def test_rows_sent_to_experts_stand_by_experts_and_gpus():
  """Each beside bf16's by NCCL of its own run."""
  source = {"git_dirty": None, "git_commit": "0" * 40, "device": "d"}
  shape = {"tokens": 16384, "d": 7168, "top_k": 8}

  def run(experts, devices, bf16):
    own = {"experts": experts, "devices": devices, "exchange": "xla"} | shape | source
    parts = [("exchange", part) for part in ("dispatch", "wire", "combine")] + [("layer", None)]
    for kind, part in parts:
      payloads = ["bfloat16"] if part == "combine" else ["bf16", "fp8", "mxfp4"]
      for i, payload in enumerate(payloads):
        yield own | {"kind": kind, "part": part, "payload": payload, "time_us": bf16 / 2**i}

  lines = tables.dispatch_table([*run(64, 4, 4000.0), *run(256, 2, 1000.0)]).splitlines()
  assert lines[0] == "| experts | GPUs | | by | bf16 | FP8 | MXFP4 |"
  sent = [line for line in lines if "sent alone" in line]
  assert sent == [
    "| 64 | 4 | sent alone | NCCL | 4,000 us, 1.00 | 2,000 us, 0.50 | 1,000 us, 0.25 |",
    "| 256 | 2 | sent alone | NCCL | 1,000 us, 1.00 | 500 us, 0.50 | 250 us, 0.25 |",
  ]
  assert len(lines) == 2 + 2 * 4 + 2


def test_a_picture_of_seeds_has_a_line_for_each_and_one_for_their_mean(tmp_path):
  curve = {0: 2.0, 10: 1.0, 20: 0.9}
  runs = {(recipe, seed): curve for recipe in ("bf16", "fp8", "mxfp4") for seed in (0, 1, 2)}
  drawn = []
  with mock.patch.object(pictures, "_save", lambda figure, path: drawn.append(figure)):
    pictures.seeds_picture(losses(runs), tmp_path / "seeds.svg")
  (figure,) = drawn
  assert [axes.get_title("left") for axes in figure.axes] == ["fp8", "mxfp4"]
  assert [len(axes.lines) for axes in figure.axes] == [1 + 3 + 1] * 2  # beside that of no gap
  plt.close(figure)


def test_gradients_of_the_experts_are_of_the_most_batches():
  row = {"kind": "gradient", "recipe": "fp8", "relative_error": 0.0326, "projection": 0.99551}
  found = tables.gradients_table(
    [
      {"kind": "environment", "git_dirty": None, "git_commit": "0123456789", "device": "d"},
      row | {"tensor": "blocks/feed_forward/w2", "batches": 6},
      row | {"tensor": "blocks/feed_forward/w13", "batches": 6},
      row | {"tensor": "blocks/feed_forward/w13", "batches": 1},
      row | {"tensor": "blocks/attention/w_out", "batches": 6},
    ]
  )
  assert found.splitlines()[2:] == [
    "| `w13` | `fp8` | 3.3% | 0.996 |",
    "| `w2` | `fp8` | 3.3% | 0.996 |",
    "",
    "Mean gradients of 6 batches. Device: d. Commit 012345678.",
  ]


def test_the_demo_keeps_the_bytes_that_its_rows_say():
  """Rows of an earlier design would go on to be shown."""
  config = demo.get_config()
  for row in rows("demo"):
    if row["kind"] != "recipe":
      continue
    policy = policy_of(recipes.by_name(row["recipe"]), config)
    trainer = make_trainer(config, 256, policy)
    kept = saved_activation_bytes(trainer, config.data.batch_size, config.data.sequence_length)
    assert kept == row["saved_activation_bytes_per_token"], row["recipe"]


def test_table_of_the_moe_ffn():
  row = {"kind": "moe_ffn", "recipe": "fp8", "experts": 8, "top_k": 2, "forward_us": 9000.0}
  row |= {"time_us": 21000.0, "speed_to_bf16": 1.456, "saved_bytes": 2 * 10**9}
  row |= {"saved_bytes_to_bf16": 1.0, "saved_on_device_bytes_to_bf16": 0.998}
  table = kernel_tables.moe_ffn_table([{"kind": "copy"}, row])
  line = "| `fp8` | 8, top-2 | 9.00 | 21.00 | 1.46 | 2.000 | 1.000 | 0.998 |"
  assert line in table.splitlines()
