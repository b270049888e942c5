"""The tables in the READMEs are what the committed rows say."""

from pathlib import Path

import pytest

from configs import demo
from experiments import kernel_tables, logs, tables
from experiments.train import make_trainer, policy_of, saved_activation_bytes
from fp4jax import recipes

ROOT = Path(__file__).parents[1]


def rows(name):
  return logs.read_rows(ROOT / "results" / f"{name}.jsonl")


@pytest.mark.parametrize(
  "readme, name, content",
  [
    ("README.md", "demo", lambda: tables.losses_table(rows("demo"))),
    ("README.md", "step_time", lambda: tables.step_time_table(rows("step_time"))),
    ("README.md", "moe_1b", lambda: tables.losses_table(rows("moe_1b"))),
    ("README.md", "moe_1b_again", lambda: tables.losses_table(rows("moe_1b_again"))),
    (
      "README.md",
      "moe_1b_seeds",
      lambda: tables.gaps_of_runs_table({name: rows(name) for name in tables.RUNS_OF_1B}),
    ),
    ("README.md", "moe_1b_gradients", lambda: tables.gradients_table(rows("moe_1b_gradients"))),
    (
      "README.md",
      "moe_1b_step",
      lambda: tables.cost_table(rows("moe_1b_step_time"), rows("moe_1b_memory")),
    ),
    (
      "pallas_kernels/README.md",
      "elementwise",
      lambda: kernel_tables.elementwise_table(rows("kernel_bench")),
    ),
    (
      "pallas_kernels/README.md",
      "matmul",
      lambda: kernel_tables.matmul_table(rows("kernel_bench")),
    ),
    (
      "pallas_kernels/README.md",
      "moe_ffn",
      lambda: kernel_tables.moe_ffn_table(rows("moe_ffn")),
    ),
  ],
)
def test_readmes_hold_the_tables_of_the_rows(readme, name, content):
  text = (ROOT / readme).read_text()
  assert tables.fill(text, name, content()) == text
  assert tables.fill(text, name, "something else") != text


def test_the_pictures_gaps_begin_before_training():
  losses = {("bf16", 0): (4.0, 5.0), ("bf16", 2): (2.0, 2.5)}
  losses |= {("r", 0): (4.04, 5.1), ("r", 2): (2.2, 2.5)}
  found = tables.gaps_to_bf16(
    [{"kind": "environment"}]
    + [
      {"kind": "validation", "recipe": recipe, "seed": seed, "step": step, "loss": loss}
      for (recipe, step), own in losses.items()
      for seed, loss in enumerate(own)
    ]
  )
  assert found["bf16"] == {0: [0.0, 0.0], 2: [0.0, 0.0]}
  assert found["r"] == {0: pytest.approx([1.0, 2.0]), 2: pytest.approx([10.0, 0.0])}


def test_gaps_of_runs_are_to_the_mean_of_their_seeds_bf16_runs():
  losses = {
    ("a", 0, "bf16"): {500: 1.0, 1100: 2.0, 1200: 1.0, 2000: 1.0},
    ("b", 0, "bf16"): {500: 3.0, 1100: 2.0},
    ("b", 0, "fp8"): {400: 9.0, 500: 2.2, 1100: 2.0, 1200: 1.1, 2000: 1.3},
    ("b", 1, "fp8"): {500: 2.2, 1100: 2.0},
  }
  environment = {"kind": "environment", "git_dirty": None, "git_commit": "0" * 40, "device": "d"}
  runs = {"a": [environment], "b": [environment | {"git_dirty": True}]}
  for (name, seed, recipe), own in losses.items():
    row = {"kind": "validation", "seed": seed, "recipe": recipe}
    runs[name] += [row | {"step": step, "loss": loss} for step, loss in own.items()]
  assert tables.gaps_of_runs_table(runs).splitlines()[2:] == [
    "| 0 | `bf16` | mosaic | `a` | -25.0 % | +0.0 % |",
    "| 0 | `bf16` | mosaic | `b` | +25.0 % |  |",
    "| 0 | `fp8` | mosaic | `b` | +5.0 % | +20.0 % |",
    "| 1 | `fp8` | mosaic | `b` |  |  |",
    "",
    "`a`: Device: d. Commit 000000000.  ",
    "`b`: Device: d. Commit 000000000, with uncommitted changes.",
  ]


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
    policy = policy_of(recipes.by_name(row["recipe"]), config.quantize)
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
