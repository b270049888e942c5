"""Workdirs of runs that never ran, and what a report makes of them."""

import json
import math
import random
from pathlib import Path

from experiments import config as config_lib
from experiments import report_charts, report_page, summary

RECIPES = ("bf16", "fp8", "mxfp4", "mxfp4_rht_sr", "hopper_fp4")
ENTROPY = 3.25


def log_of(workdir, name):
  """Rows tell whose they are, so that one folder serves all runs."""
  return workdir / "runs" / "all" / f"{name}.jsonl"


def write_rows(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_workdir(
  path: Path,
  *,
  recipes=RECIPES,
  seeds=2,
  steps=100,
  layers=2,
  diverged=None,
  stopped_at=None,
) -> Path:
  """A plausible run; `diverged` (recipe, seed, step) ends that run in NaN."""
  path.mkdir(parents=True, exist_ok=True)
  config = config_lib.Experiment(recipes=config_lib.Names(recipes), seeds=seeds, steps=steps)
  config.model.num_layers = layers
  (path / "config.json").write_text(json.dumps(config.to_dict()))
  penalty = dict(zip(RECIPES, (0.0, 0.001, 0.03, 0.012, 0.006), strict=True))
  saved = dict(zip(RECIPES, (36864.0, 20480.0, 11264.0, 11264.0, 14336.0), strict=True))
  speed = dict(zip(RECIPES, (41.0, 48.0, 77.0, 92.0, 60.0), strict=True))
  environment = {
    "argv": ["run.py", "--config=configs/demo.py", f"--workdir={path}"],
    "versions": {"python": "3.12.11", "jax": "0.11.2"},
    "device": "NVIDIA H100",
    "git_commit": "0123abc",
    "git_dirty": True,
    "corpus": {"name": "stdlib", "files": 800, "unigram_entropy_nats": ENTROPY},
    "parameters": 1_234_567,
    "saved_activation_bytes_per_token": {r: saved[r] for r in recipes},
  }
  (path / "environment.json").write_text(json.dumps(environment))

  metrics, probes, timing = [], [], []
  for recipe in recipes:
    for seed in range(seeds):
      noise = random.Random(f"{recipe} {seed}")
      shift = random.Random(seed).gauss(0, 0.008)

      def loss_at(step, recipe=recipe, shift=shift):
        at = step / steps
        fit = 1.75 + 3.8 * math.exp(-11 * at) + 0.35 * math.exp(-3 * at)
        return fit + shift + penalty[recipe] * (0.5 + at)

      for step in range(1, (stopped_at or steps) + 1):
        run = {"recipe": recipe, "seed": seed, "step": step}
        nan = diverged is not None and diverged[:2] == (recipe, seed) and step >= diverged[2]
        loss = None if nan else loss_at(step) + noise.gauss(0, 0.06)
        norm = None if nan else math.exp(noise.gauss(0, 0.2)) * (0.4 + 3 * math.exp(-step / 10))
        balance, z = 1 + noise.random() / step, 4 * noise.random()
        routing = {"load_balance_loss": balance, "router_z_loss": z, "learning_rate": 1e-3 / step}
        metrics.append(run | {"split": "train", "loss": loss, "grad_norm": norm} | routing)
        timing.append(run | {"step_time_ms": speed[recipe] + noise.random() + 9000 * (step == 1)})
        if nan:
          probe = {"step": step, "layer": 1, "module": "experts.w13", "gemm": "dgrad"}
          event = {"event": "diverged", "probe": probe | {"operand": "lhs"}}
          metrics.append(run | {"split": "event"} | event)
          break
        if step % 20 == 0:
          score = loss_at(step) + noise.gauss(0, 0.002)
          metrics.append(run | {"split": "validation", "loss": score})
          load = [[1 / 4 + noise.uniform(-0.1, 0.1) for _ in range(4)] for _ in range(layers)]
          metrics.append(run | {"split": "routing", "load": load})
          if recipe != "bf16":
            probes += probe_rows(run, noise, layers, step / steps)
  write_rows(log_of(path, "metrics"), metrics)
  write_rows(log_of(path, "probes"), probes)
  write_rows(log_of(path, "timing"), timing)
  return path


def probe_rows(run, noise, layers, progress):
  """Rows of every quantization at one step; FP8 scales are exact, MXFP4's are powers of two."""
  modules = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "experts.w13",
    "experts.w2",
  )
  gemms = [(gemm, side) for gemm in ("fprop", "dgrad", "wgrad") for side in ("lhs", "rhs")]
  if run["recipe"] == "hopper_fp4":
    gemms.append(("residual", "lhs"))
  rows = []
  for layer in range(layers):
    for module in modules:
      for gemm, operand in gemms:
        fp8 = run["recipe"] == "fp8" or (run["recipe"] == "hopper_fp4" and gemm == "wgrad")
        heavy = (gemm == "dgrad") + layer / layers + (module == "experts.w2") + progress
        scale = 0.0 if fp8 else 1.7 + 0.05 * noise.gauss(0, 1) - 0.15 * heavy
        deadzone = 0.002 if fp8 else 0.03 + 0.05 * heavy
        grid = 0.998 if fp8 else 0.7 - 0.05 * heavy
        cross = 1 - scale - deadzone - grid
        rows.append(
          run
          | {"layer": layer, "module": module, "gemm": gemm, "operand": operand}
          | {"format": "FP8 E4M3" if fp8 else "MXFP4", "scale_bias": scale}
          | {"source": source_of(run["recipe"], gemm, operand)}
          | {"deadzone": deadzone, "grid_noise": grid, "cross_scale_grid": cross}
          | {"cross_scale_deadzone": 0.0, "cosine": -0.65, "gain": 1.01}
          | {"sqnr_db": (31 if fp8 else 17) - 1.5 * heavy + 0.2 * noise.gauss(0, 1)}
          | {"flushed": deadzone / 4, "clipped": 0.0}
        )
  return rows


def small_workdir(path, losses, steps=20, environment=None):
  """`losses`: {recipe: validation losses by seed at the last step}; train loss = step number."""
  path.mkdir(parents=True, exist_ok=True)
  seeds = max(map(len, losses.values()))
  config = {"recipes": list(losses), "seeds": seeds, "steps": steps}
  (path / "config.json").write_text(json.dumps(config))
  (path / "environment.json").write_text(json.dumps(environment or {}))
  metrics = []
  for recipe, by_seed in losses.items():
    for seed, loss in enumerate(by_seed):
      run = {"recipe": recipe, "seed": seed}
      for step in range(1, steps + 1):
        metrics.append(run | {"step": step, "split": "train", "loss": step + seed})
      metrics.append(run | {"step": steps, "split": "validation", "loss": loss})
  write_rows(log_of(path, "metrics"), metrics)
  return path


def source_of(recipe, gemm, operand):
  kept = recipe == "hopper_fp4" and operand == "lhs" and gemm in ("fprop", "wgrad")
  return "residual" if kept else "original"


def operand_row(recipe, operand, sqnr_db, shares=(1.5, 0.25, 0.5, -1.25, 0.0), layer=0):
  gemm, side = operand.split(" ")
  row = {"recipe": recipe, "seed": 0, "step": 20, "layer": layer, "module": "m", "gemm": gemm}
  row |= {"operand": side, "sqnr_db": sqnr_db, "source": source_of(recipe, gemm, side)}
  return row | dict(zip(summary.SHARES, shares, strict=True))


def rows_of(path):
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def page_without_plotly(path):
  """The page and its own script, without plotly's source, which no test is about."""
  text = path.read_text()
  return text.replace(report_page.packed_plotly(), "")


def all_figures(workdir):
  records = summary.read_records(workdir)
  charts = [*report_charts.curve_charts(records).values(), *report_charts.load_charts(records)]
  charts += [chart for group in report_charts.probe_charts(records).values() for chart in group]
  return [figure for chart in charts for figure in chart["figures"].values()]
