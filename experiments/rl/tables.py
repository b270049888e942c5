"""The tables of docs/reinforcement_learning.md, from committed rows: `make tables`."""

import contextlib
import statistics
from pathlib import Path

from experiments import logs
from experiments.environment import told_source
from experiments.qat.table import qat_table
from experiments.rl.microscope import PARTS, SUBSETS
from experiments.rl.summary import RIGHT, read_records, standard_error, summarize_records

Row = dict
_ENVIRONMENT = ("versions", "device", "git_commit", "git_dirty")
_NAMES = {"scale_bias": "scale bias", "deadzone": "deadzone", "grid_noise": "grid noise"}


def collect(workdir: Path, out: Path) -> None:
  """Writes what the page shows of a finished run: its environment and a row for each arm."""
  records = read_records(workdir)
  summary = summarize_records(records)
  (environment,) = records.environments.values()
  (facts,) = summary["workdirs"].values()
  first = {"kind": "environment"} | {k: environment[k] for k in _ENVIRONMENT} | facts
  with contextlib.closing(logs.JsonLines(out, 0)) as log:
    log.write(first)
    for name, own in summary["recipes"].items():
      decomposition = {"decomposition": None}  # the report has it
      log.write({"kind": "arm", "arm": name} | own | decomposition)


def arms_table(rows: list[Row]) -> str:
  environment, *arms = rows
  # Rows collected at an earlier commit lack the median.
  medians = "`rollout_kl`, median, nats | " if all("rollout_kl" in row for row in arms) else ""
  # Where answers may be worth a part; rows collected at an earlier commit do not tell.
  whole = [row.get(RIGHT, {}).get("mean") for row in arms]
  is_graded = None not in whole and whole != [row["held_out_reward"]["mean"] for row in arms]
  right = "answers worth 1, after | " if is_graded else ""
  lines = [
    f"| arm | seeds | held-out reward before | after | {right}in training, at the end |"
    " less BF16's |"
    f" 95 % interval | against BF16 | entropy, nats | {medians}`ppo_kl`, nats |"
    " `token_mult_prob_error` | router flips, % of tokens |",
  ]
  lines.append("|---" * (lines[0].count("|") - 1) + "|")
  problems = environment["held_out"]
  for row in arms:
    gap = row["gap"]
    less = interval = ""
    if gap["verdict"] != "reference" and gap["mean"] is not None:
      less = f"{gap['mean']:+.3f}"
      bounds = gap["interval"]
      interval = "" if bounds is None else f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"
    flips = (row["router_flips"] or {}).get("tokens")
    measures = "start_reward held_out_reward train_reward entropy ppo_kl token_mult_prob_error"
    means = {name: row[name]["mean"] for name in measures.split()}
    after = means["held_out_reward"]  # None, as others, of an arm that diverged in every seed
    error = None if after is None else standard_error(after, problems)
    cells = (
      f"`{row['arm']}`",
      f"{row['seeds']}",
      _number(means["start_reward"], ".3f"),
      "" if error is None else f"{after:.3f} ± {error:.3f}",
      *([f"{row[RIGHT]['mean']:.0%}"] if is_graded else []),
      _number(means["train_reward"], ".3f"),
      less,
      interval,
      gap["verdict"] or "",
      _number(means["entropy"], ".3f"),
      *([_number(row["rollout_kl"]["mean"], ".1e")] if medians else []),
      _number(means["ppo_kl"], ".1e"),
      _number(means["token_mult_prob_error"], ".3f"),
      "" if flips is None else f"{100 * flips:.0f}",
    )
    lines.append(f"| {' | '.join(cells)} |")
  replayed = ", routing replayed" if environment["replays_routing"] else ""
  lines.append(
    f"\n{environment['steps']} steps of {environment['prompts']} questions with"
    f" {environment['group']} answers each{replayed}; {problems} held-out problems, ± one standard"
    f" error of a mean over them. {told_source(environment)}"
  )
  return "\n".join(lines)


def parts_table(rows: list[Row]) -> str:
  """Each subset of the parts on each path; with a free router, and with its choices replayed."""
  lines = [
    "| parts | rollout: KL to BF16, nats | tokens with a flip, % | KL, experts replayed |"
    " entropy less BF16's, nats | the same, replayed | forward: gradient error | its norm |"
    " forward, replayed | backward: gradient error | its norm |",
  ]
  lines.append("|---" * (lines[0].count("|") - 1) + "|")
  columns = (
    ("rollout", False, "kl", ".4f"),
    ("rollout", False, "router_flips/tokens", ".0%"),
    ("rollout", True, "kl", ".4f"),
    ("rollout", False, "entropy_gap", "+.4f"),
    ("rollout", True, "entropy_gap", "+.4f"),
    ("forward", False, "gradient_error", ".3f"),
    ("forward", False, "gradient_ratio", ".3f"),
    ("forward", True, "gradient_error", ".3f"),
    ("backward", False, "gradient_error", ".3f"),
    ("backward", False, "gradient_ratio", ".3f"),
  )
  sampled = [row for row in rows if row["path"] == "sampled"]
  for parts in SUBSETS:
    found = [row for row in rows if row.get("parts") == list(parts)]
    if not found:
      continue
    name = "all" if len(parts) == len(PARTS) else " + ".join(_NAMES[part] for part in parts)
    cells = [
      _mean(
        [r[of] for r in found if r["path"] == path and bool(r["replay"]) == replay and of in r],
        form,
      )
      for path, replay, of, form in columns
    ]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  answers = sum(row["answers"] for row in sampled)
  seeds = ""
  if len(sampled) > 1:
    seeds = f" with {len(sampled)} seeds, ± one standard error of a mean over those"
  lines.append(f"\nOver {answers} answers sampled in BF16{seeds}. {told_source(sampled[0])}")
  return "\n".join(lines)


def _mean(values: list[float], form: str) -> str:
  """With its standard error where there are several; a share as a number of percent."""
  if not values:
    return ""
  numbers = [statistics.mean(values)]
  if len(values) > 1:
    numbers.append(statistics.stdev(values) / len(values) ** 0.5)
  told = [format(n, f) for n, f in zip(numbers, (form, form.lstrip("+")), strict=False)]
  return " ± ".join(told).replace("%", "")


def rounding_table(rows: list[Row]) -> str:
  """The same numerics on both sides, compiled in two ways; and with a last bit that differs."""
  lines = [
    "| arm, on both sides | compared | `rollout_kl`, nats | `logp_diff_mean`, nats |"
    " `token_mult_prob_error` | tokens with a flip, % |",
    "|---|---|---|---|---|---|",
  ]
  for row in rows:
    where = "rollout and trainer, rounded where the code does"
    if row["nudged"]:
      where = "trainer and trainer, an ulp apart in the embedding"
    elif row["excess_precision"]:
      where = "rollout and trainer, rounded as XLA likes"
    lines.append(
      f"| `{row['arm']}` | {where} | {row['rollout_kl']:.1e} |"
      f" {row['sampler_trainer/logp_diff_mean']:.1e} | {row['token_mult_prob_error']:.3f} |"
      f" {_percent(row.get('router_flips/tokens'))} |"
    )
  return "\n".join(lines) + f"\n\n{told_source(rows[0])}"


def rollout_table(rows: list[Row]) -> str:
  """Tokens per second of each way to hold weights, by how many answers are sampled at once."""
  lines = [
    "| answers at once | weights | tokens/s | speed, BF16 = 1 | quartiles | weights, MB |",
    "|---" * 6 + "|",
  ]
  for row in rows:
    low, high = row["speed_quartiles"]
    lines.append(
      f"| {row['batch']} | {row['numerics']} | {row['tokens_per_s']:,.0f} |"
      f" {row['speed_of_bf16']:.2f} | {low:.2f} to {high:.2f} | {row['weight_bytes'] / 1e6:,.0f} |"
    )
  first = rows[0]
  return "\n".join(lines) + (
    f"\n\n{first['new']} tokens after prompts of {first['prompt']}, {first['rounds']} rounds."
    f" {told_source(first)}"
  )


def _number(x: float | None, form: str) -> str:
  return "" if x is None else format(x, form)


_TABLES = {
  "rl_demo": arms_table,
  "rl_demo_again": arms_table,
  "rl_demo_parts": parts_table,
  "rl_demo_part_arms": arms_table,
  "rl_rounding": rounding_table,
  "rl_rounding_smollm2": rounding_table,
  "rl_smollm2": arms_table,
  "rl_smollm2_parts": parts_table,
  "rl_moe": arms_table,
  "rl_moe_replay": arms_table,
  "rl_moe_parts": parts_table,
  "rl_rollout": rollout_table,
  "rl_rollout_moe": rollout_table,
  "qat": qat_table,
}


def page_tables(results: Path) -> dict[str, str]:
  """By the name of their place, which is that of their rows; those alone whose rows are there."""
  rows = {name: logs.read_rows(results / f"{name}.jsonl") for name in _TABLES}
  return {name: table(rows[name]) for name, table in _TABLES.items() if rows[name]}


def _percent(share: float | None) -> str:
  return "" if share is None else f"{100 * share:.0f}"
