"""The README's numbers, from committed rows: `make tables` rebuilds its tables and its picture.

python -m experiments.tables --collect=runs/demo    # a finished run becomes results/demo.jsonl,
                                                    # one of configs/moe_1b.py results/moe_1b.jsonl
python -m experiments.tables                        # results/*.jsonl become README and docs/
"""

import re
from pathlib import Path

import matplotlib
from absl import app, flags

matplotlib.use("svg")
from matplotlib import pyplot as plt

from experiments import command_line, kernel_tables, logs
from experiments.summary import read_records, summarize_records

_COLLECT = flags.DEFINE_string(
  "collect", None, "Workdir of a finished run: its name is the results'."
)
_ROOT = Path(__file__).parent.parent
_GREY, _ORANGE, _SKY = "#808080", "#e69f00", "#56b4e9"
_COLOURS = dict(
  bf16=_GREY, fp8="#0072b2", mxfp4="#d55e00", mxfp4_rht_sr="#009e73", hopper_fp4="#cc79a7"
)
_PARTS = {"grid noise": "#b0b0b0", "deadzone": _SKY, "lost to the scale": _ORANGE}
_ENVIRONMENT = ("versions", "device", "git_commit", "git_dirty", "corpus")
_STRETCHES = (500, 1100), (1200, 2000)  # steps of validation, both included
RUNS_OF_1B = ("moe_1b", "moe_1b_again", "moe_1b_seeds")  # names of results
Row = dict


def collect(workdir: Path, out: Path) -> None:
  """Writes what the README shows of a run: its environment, validation losses and summary."""
  records = read_records(workdir)
  summary = summarize_records(records)
  log = logs.JsonLines(out, 0)
  environment = {k: records.environment[k] for k in _ENVIRONMENT}
  log.write({"kind": "environment"} | environment)
  log.write({"kind": "entropy", "unigram_entropy_nats": summary["unigram_entropy_nats"]})
  for row in records.metrics:
    if row["split"] == "validation":
      log.write({"kind": "validation"} | {k: row[k] for k in ("recipe", "seed", "step", "loss")})
  for name, recipe in summary["recipes"].items():
    log.write({"kind": "recipe", "recipe": name} | recipe)
  log.close()


def losses_table(rows: list[Row]) -> str:
  lines = [
    "| recipe | validation loss, nats/token | gap to BF16 | BF16 seed spread | reads as |"
    " saved activations, bytes/token |",
    "|---|---|---|---|---|---|",
  ]
  for row in rows:
    if row["kind"] != "recipe":
      continue
    gap = row["gap"]
    if row["recipe"] == "bf16":
      difference, noise, verdict = "reference", "", ""
    else:
      difference, verdict = f"{gap['percent']:+.2f} %", gap["verdict"]
      noise = "" if gap["noise_percent"] is None else f"{gap['noise_percent']:.2f} %"
    lines.append(
      f"| `{row['recipe']}` | {row['validation_loss']['mean']:.4f} | {difference} | {noise} |"
      f" {verdict} | {row['saved_activation_bytes_per_token']:,.0f} |"
    )
  entropy = next(r for r in rows if r["kind"] == "entropy")["unigram_entropy_nats"]
  lines.append(f"\nUnigram entropy of the validation bytes: {entropy:.3f} nats. {_source(rows[0])}")
  return "\n".join(lines)


def gaps_of_runs_table(runs: dict[str, list[Row]]) -> str:
  """Every run beside the mean of its seed's BF16 runs, over stretches of steps; by name of results.

  A stretch is blank where a run, or every BF16 run of its seed, ended before it did.
  """
  losses: dict[tuple, dict[int, float]] = {}
  for name, rows in runs.items():
    for row in (r for r in rows if r["kind"] == "validation"):
      run = row["seed"], row["recipe"], row.get("implementation", "mosaic"), name
      losses.setdefault(run, {})[row["step"]] = row["loss"]

  def gap(run, first, last):
    steps = [s for s in losses[run] if first <= s <= last]
    complete = [
      own
      for (seed, recipe, *_), own in losses.items()
      if (seed, recipe) == (run[0], "bf16") and last in own
    ]
    if last not in losses[run] or not complete:
      return ""
    means = {s: sum(own[s] for own in complete) / len(complete) for s in steps}
    return f"{sum(100 * (losses[run][s] / means[s] - 1) for s in steps) / len(steps):+.1f} %"

  heads = " | ".join(f"steps {first} to {last}" for first, last in _STRETCHES)
  lines = [f"| seed | recipe | implementation | rows | {heads} |", "|---|---|---|---|---|---|"]
  for run in sorted(losses):
    seed, recipe, implementation, name = run
    gaps = " | ".join(gap(run, *stretch) for stretch in _STRETCHES)
    lines.append(f"| {seed} | `{recipe}` | {implementation} | `{name}` | {gaps} |")
  sources = [f"`{name}`: {_source(rows[0])}" for name, rows in runs.items()]
  return "\n".join(lines) + "\n\n" + "  \n".join(sources)


def gradients_table(rows: list[Row]) -> str:
  """Of the experts and their router, by the mean of the most batches."""
  lines = [
    "| gradient of | recipe | error, of BF16's | projection on BF16's |",
    "|---|---|---|---|",
  ]
  gradients = [r for r in rows if r["kind"] == "gradient" and "feed_forward/" in r["tensor"]]
  most = max(r["batches"] for r in gradients)
  for row in sorted(gradients, key=lambda r: r["tensor"]):
    if row["batches"] == most:
      lines.append(
        f"| `{row['tensor'].split('/')[-1]}` | `{row['recipe']}` | {row['relative_error']:.1%} |"
        f" {row['projection']:.3f} |"
      )
  return "\n".join(lines) + f"\n\nMean gradients of {most} batches. {_source(rows[0])}"


def step_time_table(rows: list[Row]) -> str:
  lines = ["| recipe | step time, BF16 = 1 | quartiles |", "|---|---|---|"]
  for row in rows:
    low, high = row["ratio_quartiles"]
    lines.append(f"| `{row['recipe']}` | {row['ratio_to_bf16']:.2f} | {low:.2f} to {high:.2f} |")
  return "\n".join(lines) + f"\n\n{rows[0]['rounds']} rounds. {_source(rows[0])}"


def cost_table(times: list[Row], memory: list[Row]) -> str:
  """Speed and memory of a training step, side by side."""
  peak = {row["recipe"]: row["peak_bytes"] for row in memory}
  lines = ["| recipe | tokens/s | step time, BF16 = 1 | peak memory, GB |", "|---|---|---|---|"]
  for row in times:
    lines.append(
      f"| `{row['recipe']}` | {row['tokens_per_s']:,.0f} | {row['ratio_to_bf16']:.2f} |"
      f" {peak[row['recipe']] / 1e9:.1f} |"
    )
  tokens = times[0]["tokens_per_step"]
  return "\n".join(lines) + f"\n\n{tokens} tokens a step. {_source(times[0])}"


def _source(row: Row) -> str:
  dirty = ", with uncommitted changes" if row["git_dirty"] else ""
  return f"Device: {row['device']}. Commit {row['git_commit'][:9]}{dirty}."


def gaps_to_bf16(rows: list[Row]) -> dict[str, dict[int, list[float]]]:
  """In percent, by recipe and step, one for each seed; from step 0, before training."""
  loss: dict[str, dict[int, dict[int, float]]] = {}
  for row in rows:
    if row["kind"] == "validation":
      loss.setdefault(row["recipe"], {}).setdefault(row["step"], {})[row["seed"]] = row["loss"]
  return {
    name: {
      step: [100 * (own[seed] / loss["bf16"][step][seed] - 1) for seed in own]
      for step, own in by_step.items()
    }
    for name, by_step in loss.items()
  }


def demo_picture(rows: list[Row], path: Path) -> None:
  """Gaps to BF16 over the run, and what an ideal scale would leave of MXFP4's error."""
  plt.rcParams |= {"svg.hashsalt": "fp4jax", "font.size": 9, "axes.spines.right": False}
  plt.rcParams |= {"axes.spines.top": False, "svg.fonttype": "none"}
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
  for name, gaps in gaps_to_bf16(rows).items():
    means = [sum(own) / len(own) for own in gaps.values()]
    colour = _COLOURS[name]
    left.plot(list(gaps), means, color=colour, label=name, linewidth=1.8)
    low, high = map(min, gaps.values()), map(max, gaps.values())
    left.fill_between(list(gaps), list(low), list(high), color=colour, alpha=0.15)
  left.set(xlabel="step (0: before training)", ylabel="validation loss above BF16, %")
  left.set(xlim=(min(gaps), max(gaps)))
  above = dict(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.45, 1))
  left.legend(ncols=5, columnspacing=1, **above)
  operands = next(r for r in rows if r.get("recipe") == "mxfp4" and r["kind"] == "recipe")
  operands = operands["decomposition"]["operands"]
  names = [f"{o['gemm']} {o['operand']}" for o in operands]
  stacks = [(o["grid_noise"], o["deadzone"], 1 - o["grid_noise"] - o["deadzone"]) for o in operands]
  base = [0.0] * len(operands)
  for shares, (label, colour) in zip(zip(*stacks, strict=True), _PARTS.items(), strict=True):
    right.barh(names, shares, left=base, color=colour, label=label)
    base = [b + s for b, s in zip(base, shares, strict=True)]
  for i, operand in enumerate(operands):
    right.text(1.02, i, f"{operand['sqnr_db']:.1f} dB", va="center", fontsize=8)
  right.invert_yaxis()
  right.set(xlabel="MXFP4: share of the squared error, and SQNR")
  right.set(xlim=(0, 1))
  right.legend(ncols=3, columnspacing=1, **above)
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)


def fill(text: str, name: str, content: str) -> str:
  """Replaces what stands between `<!-- name -->` and `<!-- /name -->`."""
  pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
  filled, count = re.subn(pattern, lambda m: m[1] + content + "\n" + m[2], text, flags=re.DOTALL)
  if count != 1:
    raise ValueError(f"the README has {count} places marked {name!r}, not one")
  return filled


def main(_) -> None:
  results = _ROOT / "results"
  if _COLLECT.value:
    workdir = Path(_COLLECT.value)
    collect(workdir, results / f"{workdir.name}.jsonl")
  demo = logs.read_rows(results / "demo.jsonl")
  readme = _ROOT / "README.md"
  text = fill(readme.read_text(), "demo", losses_table(demo))
  text = fill(text, "step_time", step_time_table(logs.read_rows(results / "step_time.jsonl")))
  for name in ("moe_1b", "moe_1b_again"):
    text = fill(text, name, losses_table(logs.read_rows(results / f"{name}.jsonl")))
  text = fill(
    text,
    "moe_1b_seeds",
    gaps_of_runs_table({n: logs.read_rows(results / f"{n}.jsonl") for n in RUNS_OF_1B}),
  )
  gradients = gradients_table(logs.read_rows(results / "moe_1b_gradients.jsonl"))
  text = fill(text, "moe_1b_gradients", gradients)
  times, memory = (logs.read_rows(results / f"moe_1b_{n}.jsonl") for n in ("step_time", "memory"))
  text = fill(text, "moe_1b_step", cost_table(times, memory))
  readme.write_text(text)
  demo_picture(demo, _ROOT / "docs" / "demo.svg")

  bench, moe_ffn = (logs.read_rows(results / f"{n}.jsonl") for n in ("kernel_bench", "moe_ffn"))
  readme = _ROOT / "pallas_kernels" / "README.md"
  text = readme.read_text()
  for name, content in (
    ("elementwise", kernel_tables.elementwise_table(bench)),
    ("matmul", kernel_tables.matmul_table(bench)),
    ("source", _source(bench[0])),
    ("moe_ffn", kernel_tables.moe_ffn_table(moe_ffn)),
    ("moe_ffn_source", _source(moe_ffn[0])),
  ):
    text = fill(text, name, content)
  readme.write_text(text)


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
