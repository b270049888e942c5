"""The numbers of a comparison in reinforcement learning, from the files that runs leave.

Works on a run that is still going or was killed: what can't be known yet is None.
"""

import os
from pathlib import Path
from typing import Any

from experiments import gaps, logs
from experiments.records import RUN, Arm, Columns, Records, Row, read
from experiments.rl.grpo import DIVERGENCE
from experiments.summary import PROBES, decomposition, facts_of, notes, ratio

ERROR = "token_mult_prob_error"
HEALTHY = 1.05  # the most that `grpo.divergence` calls healthy
UNREPLAYED = "unreplayed/"
# Of the rows of a training step.
STEP = (
  *(
    "reward",
    "accuracy",
    "entropy",
    "length",
    "truncated",
    "groups/mixed",
    "noise",
    "learning_rate",
  ),
  *("loss", "grad_norm", "pg_clipfrac", "is_ratio/max", "kl"),
  *("sampler_is/weight_mean", "sampler_is/weight_min", *DIVERGENCE),
)
FLIPS = ("router_flips/tokens", "router_flips/choices")
LOGS = {
  "metrics": Columns(
    needed=(*RUN, "split"),
    numbers=(*STEP, *FLIPS, *(UNREPLAYED + name for name in DIVERGENCE)),
    words=("event", "probe"),
  ),
  "probes": Columns((*RUN, "path", *PROBES.needed[len(RUN) :]), PROBES.numbers, PROBES.words),
  "timing": Columns(numbers=("step_time_ms", "rollout_ms", "update_ms", "rollout_tokens_per_s")),
  "samples": Columns((*RUN, "question", "expected", "answer"), numbers=("reward",)),
}
REWARD = gaps.Measure("held_out", "reward", gaps.difference)
RIGHT = "held_out_accuracy"  # of a run: of its last evaluation
# Of a run at its end: means over the last tenth of its steps.
AT_END = ("entropy", "ppo_kl", ERROR)
# Of a whole run: medians over its steps, of what single answers of low probability make large.
OVER_RUN = ("rollout_kl",)


def read_records(*workdirs: str | os.PathLike) -> Records:
  """Raises FileNotFoundError without a config.json, ValueError at a damaged file or line."""
  return read(LOGS, "arms", *workdirs)


def summarize(*workdirs: str | os.PathLike) -> dict[str, Any]:
  """What summary.json holds: plain values, entropies and divergences in nats, by arm and by
  workdir."""
  return summarize_records(read_records(*workdirs))


def summarize_records(records: Records) -> dict[str, Any]:
  arms = records.arms
  runs = {name: _runs(records, arm) for name, arm in arms.items()}
  step_times = {name: gaps.median_time(records.timing, name) for name in arms}
  speeds = {name: gaps.median_time(records.timing, name, "rollout_tokens_per_s") for name in arms}
  recipes = {}
  for name, arm in arms.items():
    held_out = gaps.mean_of_runs(runs[name], REWARD.value, REWARD.step)
    recipes[name] = {
      "workdir": arm.workdir,
      "steps": arm.steps,
      "seeds": arm.seeds,
      "seeds_finished": sum(run["finished"] for run in runs[name]),
      "last_step": max((run["last_step"] for run in runs[name]), default=None),
      "runs": runs[name],
      "start_reward": gaps.mean_of_runs(runs[name], "start_reward", "start_step"),
      "held_out_reward": held_out,
      RIGHT: gaps.mean_of_runs(runs[name], RIGHT, REWARD.step),
      "gap": gaps.gap_of(records, arm, runs, REWARD),
      "train_reward": gaps.mean_of_runs(runs[name], REWARD.train, "last_step"),
      **{c: gaps.mean_of_runs(runs[name], c, "last_step") for c in (*AT_END, *OVER_RUN)},
      f"largest_{ERROR}": records.metrics[records.metrics.recipe == name][ERROR].max(),
      "router_flips": _flips(records, name),
      "step_time_ms": step_times[name],
      "step_time_ratio": ratio(step_times[name], step_times.get(arm.baseline)),
      "rollout_ms": gaps.median_time(records.timing, name, "rollout_ms"),
      "update_ms": gaps.median_time(records.timing, name, "update_ms"),
      "rollout_tokens_per_s": speeds[name],
      "rollout_tokens_per_s_ratio": ratio(speeds[name], speeds.get(arm.baseline)),
      "decomposition": decomposition(records.probes, name),
    }
  facts = {name: _facts(own, records.environments[name]) for name, own in records.configs.items()}
  told = notes(records, runs, REWARD, "held-out reward")
  return logs.plain({"workdirs": facts, "notes": told, "recipes": recipes})


def write_summary(workdir: str | os.PathLike) -> Path:
  path = Path(workdir) / "summary.json"
  logs.write_json(path, summarize(workdir))
  return path


def _runs(records: Records, arm: Arm) -> list[Row]:
  """As `gaps.runs_of`, with the held-out reward before training, RIGHT, AT_END and OVER_RUN."""
  own = records.metrics[records.metrics.recipe == arm.name]
  runs = gaps.runs_of(records, arm, REWARD)
  for run in runs:
    rows = own[own.seed == run["seed"]]
    train = rows[rows.split == "train"].set_index("step")
    start = rows[(rows.split == REWARD.split) & (rows.step == 0)]
    run |= {"start_reward": start.reward.mean(), "start_step": 0 if len(start) else None}
    held_out = rows[(rows.split == REWARD.split) & (rows.step == run[REWARD.step])]
    run[RIGHT] = None if run["diverged"] else held_out.accuracy.mean()
    for column in AT_END:
      run[column] = None if run["diverged"] else gaps.mean_at_end(train[column], arm)
    for column in OVER_RUN:
      run[column] = None if run["diverged"] else train[column].median()
  return logs.plain(runs)


def _flips(records: Records, name: str) -> Row:
  """Shares of the tokens and of the choices, at the last probe, mean over the seeds that have it;
  None for a model without a router."""
  rows = records.metrics[(records.metrics.recipe == name) & (records.metrics.split == "gap")]
  rows = rows.dropna(subset=list(FLIPS))
  last = rows[rows.step == rows.step.max()]
  step = last.step.max() if len(last) else None
  return {"step": step} | {flip.partition("/")[2]: last[flip].mean() for flip in FLIPS}


def _facts(config: dict[str, Any], environment: dict[str, Any]) -> Row:
  task, rollout = config.get("task") or {}, config.get("rollout") or {}
  return facts_of(config, environment) | {
    "task": task.get("name"),
    "held_out": task.get("held_out"),
    "prompts": rollout.get("prompts"),
    "group": rollout.get("group"),
    "replays_routing": rollout.get("replay_routing"),
  }


def standard_error(reward: float | None, problems: int | None) -> float | None:
  """The most that it can be of a mean over so many problems, each worth 0 to 1: where each is worth
  one or the other."""
  if None in (reward, problems):
    return None
  return (max(reward * (1 - reward), 0.0) / problems) ** 0.5


def samples(records: Records) -> list[Row]:
  """By question: what each arm answered at its first evaluation and at its last.

  Of the lowest seed of each arm.
  """
  found: dict[tuple[str, str], Row] = {}
  rows = records.tables["samples"]
  for arm in records.arms:
    own = rows[rows.recipe == arm]
    own = own[own.seed == own.seed.min()]
    first, last = own.step.min(), own.step.max()
    for (question, expected), told in own.groupby(["question", "expected"], sort=False):
      by_step = {row["step"]: row for row in told.to_dict("records")}
      of_question = found.setdefault(
        (question, expected), {"question": question, "expected": expected, "arms": {}}
      )
      of_question["arms"][arm] = {
        "first": by_step.get(first),
        "last": by_step.get(last) if last > first else None,
      }
  return logs.plain(list(found.values()))
