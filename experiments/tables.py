"""The README's numbers, from committed rows: `make tables` rebuilds its tables and its pictures.

python -m experiments.tables --collect=runs/demo    # a finished run becomes results/demo.jsonl,
                                                    # one of configs/moe_1b.py results/moe_1b.jsonl
python -m experiments.tables                        # results/*.jsonl become README and docs/
"""

import re
from pathlib import Path

from absl import app, flags

from experiments import command_line, kernel_tables, logs, pictures
from experiments.summary import read_records, summarize_records

_COLLECT = flags.DEFINE_string(
  "collect", None, "Workdir of a finished run: its name is the results'."
)
_ROOT = Path(__file__).parent.parent
_ENVIRONMENT = ("versions", "device", "git_commit", "git_dirty", "corpus")
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
      error, verdict = gap["standard_error_percent"], gap["verdict"]
      difference = f"{gap['percent']:+.2f}" + ("" if error is None else f" ± {error:.2f}") + " %"
      noise = "" if gap["noise_percent"] is None else f"{gap['noise_percent']:.2f} %"
    lines.append(
      f"| `{row['recipe']}` | {row['validation_loss']['mean']:.4f} | {difference} | {noise} |"
      f" {verdict} | {row['saved_activation_bytes_per_token']:,.0f} |"
    )
  entropy = next(r for r in rows if r["kind"] == "entropy")["unigram_entropy_nats"]
  lines.append(f"\nUnigram entropy of the validation bytes: {entropy:.3f} nats. {_source(rows[0])}")
  return "\n".join(lines)


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
  moe_1b = logs.read_rows(results / "moe_1b.jsonl")
  text = fill(text, "moe_1b", losses_table(moe_1b))
  gradients = gradients_table(logs.read_rows(results / "moe_1b_gradients.jsonl"))
  text = fill(text, "moe_1b_gradients", gradients)
  times, memory = (logs.read_rows(results / f"moe_1b_{n}.jsonl") for n in ("step_time", "memory"))
  text = fill(text, "moe_1b_step", cost_table(times, memory))
  readme.write_text(text)
  pictures.demo_picture(demo, _ROOT / "docs" / "demo.svg")
  pictures.seeds_picture(moe_1b, _ROOT / "docs" / "moe_1b.svg")

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
