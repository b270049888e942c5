"""The pages' numbers, from committed rows: `make tables` rebuilds every table and picture.

python -m experiments.tables --collect=runs/demo    # a finished run becomes results/demo.jsonl,
                                                    # one of configs/moe_1b.py results/moe_1b.jsonl
python -m experiments.tables                        # results/*.jsonl become README and docs/
"""

import re
from pathlib import Path
from typing import get_args

from absl import app, flags

from experiments import command_line, cost_tables, kernel_tables, logs, pictures
from experiments.environment import told_source
from experiments.rl import tables as rl_tables
from experiments.summary import read_records, summarize_records
from fp4jax.models.remat import Remat

_COLLECT = flags.DEFINE_string(
  "collect", None, "Workdir of a finished run: its name is the results'."
)
_ROOT = Path(__file__).parent.parent
_ENVIRONMENT = ("versions", "device", "git_commit", "git_dirty", "corpus")
Row = dict


def collect(workdir: Path, out: Path) -> None:
  """Writes what the pages show of a run: its environment, losses, routing and summary."""
  records = read_records(workdir)
  summary = summarize_records(records)
  log = logs.JsonLines(out, 0)
  (environment,) = records.environments.values()
  environment = {k: environment[k] for k in _ENVIRONMENT}
  log.write({"kind": "environment"} | environment)
  (facts,) = summary["workdirs"].values()
  log.write({"kind": "entropy", "unigram_entropy_nats": facts["unigram_entropy_nats"]})
  validation = records.metrics[records.metrics.split == "validation"]
  for row in validation[["recipe", "seed", "step", "loss"]].to_dict("records"):
    log.write({"kind": "validation"} | row)
  routing = records.metrics[records.metrics.split == "routing"]
  for row in routing.reindex(columns=["recipe", "seed", "step", "load"]).to_dict("records"):
    log.write({"kind": "routing"} | row)
  for name, recipe in summary["recipes"].items():
    log.write({"kind": "recipe", "recipe": name} | recipe)
  log.close()


def losses_table(rows: list[Row]) -> str:
  lines = [
    "| recipe | validation loss, nats/token | gap to BF16, % | 95 % interval | seeds |"
    " against BF16 | saved activations, bytes/token |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    if row["kind"] != "recipe":
      continue
    gap, bounds = row["gap"], row["gap"]["interval_percent"]
    percent = interval = ""
    if gap["verdict"] != "reference":
      percent = f"{gap['percent']:+.2f}"
      interval = "" if bounds is None else f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"
    lines.append(
      f"| `{row['recipe']}` | {row['validation_loss']['mean']:.4f} | {percent} | {interval} |"
      f" {gap['seeds']} | {gap['verdict']} | {row['saved_activation_bytes_per_token']:,.0f} |"
    )
  entropy = next(r for r in rows if r["kind"] == "entropy")["unigram_entropy_nats"]
  lines.append(
    f"\nUnigram entropy of the validation bytes: {entropy:.3f} nats. {told_source(rows[0])}"
  )
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
  return "\n".join(lines) + f"\n\nMean gradients of {most} batches. {told_source(rows[0])}"


def step_time_table(rows: list[Row]) -> str:
  lines = ["| recipe | step time, BF16 = 1 | quartiles |", "|---|---|---|"]
  for row in rows:
    low, high = row["ratio_quartiles"]
    lines.append(f"| `{row['recipe']}` | {row['ratio_to_bf16']:.2f} | {low:.2f} to {high:.2f} |")
  return "\n".join(lines) + f"\n\n{rows[0]['rounds']} rounds. {told_source(rows[0])}"


def profile_table(rows: list[Row]) -> str:
  """Milliseconds of a step by part of the model and kind of kernel, a column per recipe."""
  recipes = list(dict.fromkeys(row["recipe"] for row in rows))
  times: dict[tuple[str, str], Row] = {}
  for row in rows:
    times.setdefault((row["part"], row["kind"]), {})[row["recipe"]] = row["ms_per_step"]
  totals = {recipe: sum(own.get(recipe, 0.0) for own in times.values()) for recipe in recipes}
  kinds = {"kernels": "our kernels", "gemm": "XLA's products", "rest": "everything else"}
  named = {
    f"{part.replace('_', '-')}, {kinds[kind]}": own
    for (part, kind), own in sorted(times.items(), key=lambda item: -max(item[1].values()))
  }
  lines = [
    "| ms per step | " + " | ".join(f"`{recipe}`" for recipe in recipes) + " |",
    "|---" * (1 + len(recipes)) + "|",
  ]
  for name, own in (named | {"sum": totals}).items():
    lines.append(f"| {name} | " + " | ".join(f"{own.get(r, 0.0):.1f}" for r in recipes) + " |")
  return "\n".join(lines) + f"\n\n{told_source(rows[0])}"


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
  return "\n".join(lines) + f"\n\n{tokens} tokens per step. {told_source(times[0])}"


def lengths_table(
  peaks: list[Row], times: dict[int, list[Row]], memory: dict[int, list[Row]]
) -> str:
  """Steps of as many tokens in sequences of several lengths; `peaks` are their GEMMs' seconds."""
  lines = [
    "| sequence | recipe | tokens/s | step time, BF16 = 1 | GEMMs at the peak, of a step |"
    " peak memory, GB |",
    "|---" * 6 + "|",
  ]
  for length, rows in times.items():
    (peak,) = (row["gemm_seconds_at_peak"] for row in peaks if row["length"] == length)
    bytes_of = {row["recipe"]: f"{row['peak_bytes'] / 1e9:.1f}" for row in memory.get(length, [])}
    for row in rows:
      share = peak[row["recipe"]] * 1e3 / row["step_time_ms"]
      lines.append(
        f"| {length} | `{row['recipe']}` | {row['tokens_per_s']:,.0f} |"
        f" {row['ratio_to_bf16']:.2f} | {share:.2f} | {bytes_of.get(row['recipe'], '')} |"
      )
  sources = dict.fromkeys(
    told_source(rows[0]) for rows in (*times.values(), *memory.values(), peaks)
  )
  return "\n".join(lines) + f"\n\n{' '.join(sources)}"


def scaling_table(rows: list[Row]) -> str:
  """Whole steps over more and more GPUs, of the same tokens for each: rows of `step_time`."""
  alone = {row["recipe"]: row["tokens_per_gpu_s"] for row in rows if row["devices"] == 1}
  lines = [
    "| GPUs | mesh | recipe | tokens/GPU/s | of one GPU's | speed, BF16 = 1 |",
    "|---" * 6 + "|",
  ]
  for row in sorted(rows, key=lambda row: (row["devices"], row["mesh"]["expert"])):
    axes = [f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1]
    own, one = row["tokens_per_gpu_s"], alone.get(row["recipe"])
    lines.append(
      f"| {row['devices']} | {', '.join(axes)} | `{row['recipe']}` | {own:,.0f} |"
      f" {'' if one is None else f'{own / one:.2f}'} | {1 / row['ratio_to_bf16']:.2f} |"
    )
  told = {f"{row['tokens_per_step'] // row['devices']:,} tokens per GPU and step" for row in rows}
  factors = dict.fromkeys(row["capacity_factor"] for row in rows if row["mesh"]["expert"] > 1)
  told |= {f"capacity factor of experts sent between GPUs {factor}" for factor in factors}
  sources = dict.fromkeys(told_source(row) for row in rows)
  return "\n".join(lines) + f"\n\n{'; '.join(sorted(told))}. {' '.join(sources)}"


def recompute_table(rows: list[Row]) -> str:
  """Speed and memory by what is computed again and by recipe, as in arXiv 2603.02731."""
  recipes = list(dict.fromkeys(row["recipe"] for row in rows))
  cells = {(row["remat"], row["recipe"]): _recompute_cell(row) for row in rows}
  lines = [
    "| computed again | " + " | ".join(f"`{recipe}`" for recipe in recipes) + " |",
    "|---" * (1 + len(recipes)) + "|",
  ]
  measured = {row["remat"] for row in rows}
  for remat in (policy for policy in reversed(get_args(Remat)) if policy in measured):
    own = [cells.get((remat, recipe), "") for recipe in recipes]
    lines.append(f"| {remat} | " + " | ".join(own) + " |")
  dropped = [100 * row["dropped"] for row in rows if row.get("dropped") is not None]
  limit = min(row["limit_bytes"] or 0 for row in rows) / 1e9
  told = "Tokens per GPU and second / peak memory in GB; OOM: what the compiler planned."
  told += f" A process may have {limit:.1f} GB." if limit else ""
  if dropped:
    told += f" Dropped: {min(dropped):.1f} to {max(dropped):.1f} % of the choices."
  sources = " ".join(dict.fromkeys(map(told_source, rows)))
  return "\n".join(lines) + f"\n\n{told} {sources}"


def _recompute_cell(row):
  if row["oom"]:
    planned = row["argument_bytes"], row["temp_bytes"]
    return "OOM" if None in planned else f"OOM / {sum(planned) / 1e9:.1f}"
  return f"{row['tokens_per_gpu_s']:,.0f} / {row['peak_bytes'] / 1e9:.1f}"


def dispatch_table(rows: list[Row]) -> str:
  """What rows to their experts and back cost, and a whole layer: each beside bf16's by NCCL."""
  lines = [
    "| experts | GPUs | | by | bf16 | FP8 | MXFP4 |",
    "|---" * 7 + "|",
  ]
  how = {"xla": "NCCL", "mosaic": "kernels"}
  parts = {
    ("exchange", "dispatch"): "packed, sent, widened",
    ("exchange", "wire"): "sent alone",
    ("exchange", "combine"): "results back, in bf16",
    ("layer", None): "the layer, forward and backward",
  }
  for of_run, own in _by_run(rows).items():
    for (kind, part), name in parts.items():
      of_part = [row for row in own if (row["kind"], row.get("part")) == (kind, part)]
      base = next(row["time_us"] for row in of_part if row["payload"].startswith("bf"))
      for exchange in dict.fromkeys(row["exchange"] for row in of_part):
        cells = [_time_cell(r, base) for r in of_part if r["exchange"] == exchange]
        cells = " | ".join(cells * 3 if part == "combine" else cells)
        lines.append(f"| {of_run} | {name} | {how[exchange]} | {cells} |")
  shape = "{tokens:,} tokens of width {d} on each GPU, top-{top_k}.".format(**rows[0])
  sources = dict.fromkeys(map(told_source, rows))
  return "\n".join(lines) + f"\n\n{shape} {' '.join(sources)}"


def _by_run(rows):
  """By the cells that tell how many experts and GPUs there were."""
  found = {}
  for row in rows:
    found.setdefault(f"{row['experts']} | {row['devices']}", []).append(row)
  return found


def _time_cell(row, base):
  time = row["time_us"]
  text = f"{time:,.0f} us" if row["kind"] == "exchange" else f"{time / 1e3:,.1f} ms"
  return f"{text}, {time / base:.2f}"


def layer_bytes_table(rows: list[Row]) -> str:
  """GB of a device that a layer sends to the others, and keeps for the backward pass."""
  recipes = "`bf16` | `fp8_dispatch` | `hopper_fp4_dispatch`"
  lines = [f"| experts | GPUs | | by | {recipes} |", "|---" * 7 + "|"]
  how = {"xla": "NCCL, in padded buffers", "mosaic": "kernels"}
  layers = [row for row in rows if row["kind"] == "layer"]
  for of_run, of_any in _by_run(layers).items():
    for exchange in dict.fromkeys(row["exchange"] for row in of_any):
      own = [row for row in of_any if row["exchange"] == exchange]
      for field, name in (("bytes_sent", "sent"), ("bytes_kept", "kept")):
        if field == "bytes_sent" or exchange == "xla":  # what is kept is the same
          cells = " | ".join(f"{row[field] / 1e9:.2f}" for row in own)
          by = how[exchange] if field == "bytes_sent" else ""
          lines.append(f"| {of_run} | {name} | {by} | {cells} |")
  return "\n".join(lines)


def fill(text: str, name: str, content: str) -> str:
  """Replaces what stands between `<!-- name -->` and `<!-- /name -->`."""
  pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
  filled, count = re.subn(pattern, lambda m: m[1] + content + "\n" + m[2], text, flags=re.DOTALL)
  if count != 1:
    raise ValueError(f"the page has {count} places `<!-- {name} -->`, not one")
  return filled


def pages(results: Path) -> dict[str, dict[str, str]]:
  """Each page's tables by the name of their place; rows that are not measured yet have none."""
  rows = lambda name: logs.read_rows(results / f"{name}.jsonl")  # noqa: E731
  over_gpus = {
    name: recompute_table(rows(name))
    for name in ("recompute", "recompute_32", "recompute_unrolled_16", "recompute_unrolled_24")
    if (results / f"{name}.jsonl").exists()
  }
  for name, alone in (
    ("scaling", "moe_wide_512_step_time"),
    ("scaling_attention", "moe_wide_512_attention_step_time"),
  ):
    if (results / f"{name}.jsonl").exists():
      over_gpus[name] = scaling_table(rows(alone) + rows(name))
  bench, moe_ffn, few_rows = map(rows, ("kernel_bench", "moe_ffn", "few_rows"))
  return {
    "README.md": {"demo": losses_table(rows("demo"))},
    "docs/results.md": {
      "step_time": step_time_table(rows("step_time")),
      "moe_1b": losses_table(rows("moe_1b")),
      "moe_1b_gradients": gradients_table(rows("moe_1b_gradients")),
      "moe_1b_step": cost_table(rows("moe_1b_step_time"), rows("moe_1b_memory")),
      "moe_wide": losses_table(rows("moe_wide")),
      "moe_wide_profile": profile_table(rows("moe_wide_profile")),
      "moe_wide_lengths": lengths_table(
        rows("moe_wide_peak"),
        {length: rows(f"moe_wide_{length}_step_time") for length in (512, 4096)},
        {4096: rows("moe_wide_4096_memory")},
      ),
      "moe_wide_attention": step_time_table(rows("moe_wide_4096_attention_step_time")),
      "moe_wide_attention_512": step_time_table(rows("moe_wide_512_attention_step_time")),
      "dispatch": dispatch_table(rows("dispatch")),
      "layer_bytes": layer_bytes_table(rows("dispatch")),
    }
    | over_gpus,
    "docs/scaling.md": cost_tables.scaling_tables(results),
    "docs/reinforcement_learning.md": rl_tables.page_tables(results),
    "pallas_kernels/README.md": {
      "elementwise": kernel_tables.elementwise_table(bench),
      "matmul": kernel_tables.matmul_table(bench),
      "source": told_source(bench[0]),
      "moe_ffn": kernel_tables.moe_ffn_table(moe_ffn),
      "moe_ffn_source": told_source(moe_ffn[0]),
      "few_rows": kernel_tables.few_rows_table(few_rows),
      "few_rows_source": told_source(few_rows[0]),
    },
  }


def main(_) -> None:
  results = _ROOT / "results"
  if _COLLECT.value:
    workdir = Path(_COLLECT.value)
    of_rl = "arms" in (logs.read_json(workdir / "config.json") or {})
    (rl_tables.collect if of_rl else collect)(workdir, results / f"{workdir.name}.jsonl")
  for name, places in pages(results).items():
    page = _ROOT / name
    text = page.read_text()
    for place, content in places.items():
      text = fill(text, place, content)
    page.write_text(text)
  for name in ("demo", "moe_1b", "moe_wide"):
    draw = pictures.demo_picture if name == "demo" else pictures.seeds_picture
    draw(logs.read_rows(results / f"{name}.jsonl"), _ROOT / "docs" / f"{name}.svg")


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
