"""The tables of the page of reinforcement learning, from rows made by hand."""

from rl_workdirs import ARMS, make_rl_workdir

from experiments import logs
from experiments.rl import tables

SOURCE = {"device": "cpu", "git_commit": "0123456789abcdef", "git_dirty": False}


def row(path, parts, replay, **values):
  return {"path": path, "parts": parts, "replay": replay} | values | SOURCE


def test_parts_are_a_row_with_the_router_free_and_replayed():
  alone = ["deadzone"]
  gap = {"kl": 0.012, "entropy_gap": -0.25, "router_flips/tokens": 0.5}
  rows = [
    {"path": "sampled", "answers": 7} | SOURCE,
    row("rollout", alone, False, **gap),
    row("forward", alone, False, gradient_error=0.3, gradient_ratio=1.5),
    row("backward", alone, False, gradient_error=0.125, gradient_ratio=0.75),
    row("rollout", alone, True, kl=0.008, entropy_gap=-0.125),
    row("forward", alone, True, gradient_error=0.25, gradient_ratio=1.25),
  ]
  *_, line, _, told = tables.parts_table(rows).splitlines()
  cells = "0.0120 | 50 | 0.0080 | -0.2500 | -0.1250 | 0.300 | 1.500 | 0.250 | 0.125 | 0.750"
  assert line == f"| deadzone | {cells} |"
  assert told == "Over 7 answers sampled in BF16. Device: cpu. Commit 012345678."


def test_several_seeds_have_a_standard_error():
  rows = []
  for kl, error in ((0.01, 0.5), (0.02, 0.5), (0.03, 0.8)):
    rows += [
      {"path": "sampled", "answers": 7} | SOURCE,
      row("rollout", ["deadzone"], None, kl=kl, entropy_gap=-kl),
      row("forward", ["deadzone"], None, gradient_error=error, gradient_ratio=1.0),
      row("backward", ["deadzone"], None, gradient_error=0.1, gradient_ratio=1.0),
    ]
  *_, line, _, told = tables.parts_table(rows).splitlines()
  cells = [cell.strip() for cell in line.split("|")[2:]]
  assert cells[0] == "0.0200 ± 0.0058"  # 0.01 / sqrt(3)
  assert cells[3] == "-0.0200 ± 0.0058"
  assert cells[5] == "0.600 ± 0.100"  # 0.3 / sqrt(3) / sqrt(3)
  assert told.startswith("Over 21 answers sampled in BF16 with 3 seeds, ± one standard error")


def test_a_dense_policy_has_no_router():
  rows = [
    {"path": "sampled", "answers": 7} | SOURCE,
    row("rollout", ["deadzone"], None, kl=0.012, entropy_gap=0.25),
    row("forward", ["deadzone"], None, gradient_error=0.3, gradient_ratio=1.0),
    row("backward", ["deadzone"], None, gradient_error=0.1, gradient_ratio=1.0),
  ]
  line = tables.parts_table(rows).splitlines()[2]
  assert line == "| deadzone | 0.0120 |  |  | +0.2500 |  | 0.300 | 1.000 |  | 0.100 | 1.000 |"


def test_collected_are_a_row_for_each_arm_and_where_they_ran(tmp_path):
  folder = make_rl_workdir(tmp_path / "run", at_end=dict.fromkeys(ARMS, (0.9, 0.9, 0.9)))
  logs.write_json(folder / "environment.json", SOURCE | {"parameters": 7, "versions": {}})
  tables.collect(folder, tmp_path / "rows.jsonl")
  environment, *arms = logs.read_rows(tmp_path / "rows.jsonl")
  assert environment["kind"] == "environment" and environment["device"]
  table = tables.arms_table([environment, *arms]).splitlines()
  assert [line.split("|")[1].strip() for line in table[2 : 2 + len(arms)]] == [
    f"`{row['arm']}`" for row in arms
  ]
  held_out, reward = environment["held_out"], arms[0]["held_out_reward"]["mean"]
  error = (reward * (1 - reward) / held_out) ** 0.5
  cells = [cell.strip() for cell in table[2].split("|")]
  assert cells[2] == str(arms[0]["seeds"])
  assert cells[4] == f"{reward:.3f} ± {error:.3f}"
  assert f"{held_out} held-out problems" in table[-1] and "replayed" not in table[-1]
  names = [cell.strip() for cell in table[0].split("|")]
  assert cells[names.index("`rollout_kl`, median, nats")] == "0.0e+00"
  earlier = [{k: v for k, v in row.items() if k != "rollout_kl"} for row in arms]  # had none
  without = tables.arms_table([environment, *earlier]).splitlines()
  assert "rollout_kl" not in without[0]
  assert without[1].count("---") == without[0].count("|") - 1 == without[2].count("|") - 1
  assert table[1].count("---") == without[1].count("---") + 1
  assert not any("worth 1" in name for name in names)
  replayed = tables.arms_table([environment | {"replays_routing": True}, *arms])
  assert ", routing replayed; " in replayed


def test_answers_may_be_worth_a_part(tmp_path):
  at_end = dict.fromkeys(ARMS, (0.9, 0.9, 0.9))
  folder = make_rl_workdir(tmp_path / "run", at_end=at_end, share_right=0.8)
  logs.write_json(folder / "environment.json", SOURCE | {"parameters": 7, "versions": {}})
  tables.collect(folder, tmp_path / "rows.jsonl")
  names, _, first, *_ = tables.arms_table(logs.read_rows(tmp_path / "rows.jsonl")).splitlines()
  told = dict(zip(*(map(str.strip, line.split("|")) for line in (names, first)), strict=True))
  assert told["answers worth 1, after"] == "72%"


def test_an_arm_that_diverged_has_no_numbers_and_rows_may_have_no_commit(tmp_path):
  folder = make_rl_workdir(tmp_path / "run", at_end=dict.fromkeys(ARMS, (0.9, 0.9, 0.9)))
  nowhere = {"device": "cpu", "git_commit": None, "git_dirty": None}
  logs.write_json(folder / "environment.json", nowhere | {"parameters": 7, "versions": {}})
  tables.collect(folder, tmp_path / "rows.jsonl")
  environment, arm, *_ = logs.read_rows(tmp_path / "rows.jsonl")
  measures = [name for name, value in arm.items() if isinstance(value, dict) and "mean" in value]
  assert {"held_out_reward", "entropy", "ppo_kl"} <= {*measures}
  diverged = arm | {name: arm[name] | {"mean": None} for name in measures} | {"router_flips": None}
  table = tables.arms_table([environment, diverged]).splitlines()
  assert {cell.strip() for cell in table[2].split("|")[3:7]} == {""}
  assert table[-1].endswith("Device: cpu. Commit unknown.")


def test_a_rollout_is_a_row_for_each_batch_and_way_to_hold_weights():
  row = {
    "batch": 8,
    "numerics": "w4a16 packed",
    "tokens_per_s": 1234.5,
    "speed_of_bf16": 1.504,
    "speed_quartiles": [1.4, 1.6],
    "weight_bytes": 258e6,
    "prompt": 64,
    "new": 128,
    "rounds": 5,
  }
  *_, line, _, told = tables.rollout_table([row | SOURCE]).splitlines()
  assert line == "| 8 | w4a16 packed | 1,234 | 1.50 | 1.40 to 1.60 | 258 |"
  assert told.startswith("128 tokens after prompts of 64, 5 rounds. Device: cpu.")


def test_a_page_has_the_tables_whose_rows_are_there(tmp_path):
  assert tables.page_tables(tmp_path) == {}
  row = {
    "arm": "mxfp4",
    "excess_precision": True,
    "nudged": False,
    "rollout_kl": 0.0,
    "sampler_trainer/logp_diff_mean": 0.0,
    "token_mult_prob_error": 1.0,
  }
  log = logs.JsonLines(tmp_path / "rl_rounding.jsonl")
  log.write(row | SOURCE)
  log.close()
  assert list(tables.page_tables(tmp_path)) == ["rl_rounding"]


def test_the_same_numerics_compiled_in_two_ways_are_two_rows():
  row = {
    "arm": "mxfp4",
    "excess_precision": True,
    "nudged": False,
    "rollout_kl": 0.0321,
    "sampler_trainer/logp_diff_mean": 0.12,
    "token_mult_prob_error": 1.1982,
    "router_flips/tokens": 0.216,
  }
  rows = [row | SOURCE, row | {"excess_precision": False, "rollout_kl": 2.6e-15} | SOURCE]
  rows.append(rows[1] | {"nudged": True})
  first, second, third = tables.rounding_table(rows).splitlines()[2:5]
  both = "rollout and trainer, rounded"
  assert first == f"| `mxfp4` | {both} as XLA likes | 3.2e-02 | 1.2e-01 | 1.198 | 22 |"
  assert second.startswith(f"| `mxfp4` | {both} where the code does | 2.6e-15 |")
  assert third.startswith("| `mxfp4` | trainer and trainer, an ulp apart in the embedding |")
