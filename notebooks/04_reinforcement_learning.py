# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which part of FP4's error breaks what in reinforcement learning
#
# A policy is sampled by one program, the rollout, and trained by another. Both may compute in FP4,
# and arXiv 2605.20402 claims that each part of FP4's error breaks another path: scale bias the
# gradient, the deadzone the rollout, grid noise the entropy. This notebook goes from the tokens of
# one rollout to the table of all parts on all paths, with a policy of a million parameters that
# names the largest of three numbers.
#
# | path | what is quantized |
# |---|---|
# | rollout | the pass that samples |
# | forward | the trainer's forward GEMMs |
# | backward | the trainer's two backward GEMMs, both operands |

# %%
import functools
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

# Jupyter starts in notebooks/, from where the packages are not found.
if not (importlib.util.find_spec("configs") and importlib.util.find_spec("experiments")):
  sys.path.insert(0, str(Path.cwd().parent))

# Most of this notebook's time is compiling: LLVM's first level of optimization is enough here.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

# %%
import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import Markdown

from configs import rl_demo
from experiments.load import policy_of_run
from experiments.rl import grpo
from experiments.rl.arms import arm_of_any_parts
from experiments.rl.microscope import SUBSETS, distance, part_rows
from experiments.rl.run import POLICY, Setting
from experiments.rl.start import start_params

# %% [markdown]
# `make rl-demo` writes the policy; without it, it is taught here, in less than a minute.

# %% tags=["parameters"]
ROOT = Path(rl_demo.__file__).resolve().parents[1]
WORKDIR = ROOT / "runs" / "rl_demo"
BASE = "mxfp4"

# %% [markdown]
# How this notebook draws: one colour for each part, the same as in the report of a run.

# %%
PARTS = {
  "scale_bias": ("scale bias", "#e69f00"),
  "deadzone": ("deadzone", "#56b4e9"),
  "grid_noise": ("grid noise", "#a3a6ab"),
}
BLUE, RED, GREEN, INK = "#0072b2", "#d55e00", "#009e73", "#1c1f24"

pio.templates["notebook"] = go.layout.Template(
  layout={
    "autosize": False,
    "width": 720,
    "height": 300,
    "margin": {"l": 60, "r": 20, "t": 40, "b": 45},
    "font": {"size": 12, "color": INK},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
  }
)
pio.templates.default = "plotly_white+notebook"


def table(header, rows):
  cell = lambda c: c if isinstance(c, str) else f"{c:.4g}"  # noqa: E731
  lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
  return Markdown("\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines))


# %% [markdown]
# ## 1. A rollout, token by token
#
# The policy knows the form of an answer, one of the three numbers, but not which. We sample
# answers in MXFP4, and read what the trainer says of the very same tokens in bf16:
# the arm `mxfp4@rollout`. A language model's answer ends with a stop token, written `.` here.

# %%
config = rl_demo.get_config()
config.start.teaching.steps = 200  # of the demo's 600
setting = Setting.of(config)
try:
  params = policy_of_run(WORKDIR, config, setting, run=None)
except ValueError:  # none is there yet
  new = Path(tempfile.mkdtemp()) / POLICY
  params = start_params(new, config, setting.source, setting.problems, lambda step, loss: None)

learner_of = functools.cache(functools.partial(setting.learner, config))
arm = f"{BASE}@rollout"
learner = learner_of(arm)
answers, said = learner.collect(params, seed=0, step=0)
scored = learner.trainer.score(params, answers.rollout)

rollout, mask = answers.rollout, np.asarray(answers.rollout.mask)
sampled, trained = np.asarray(rollout.logprobs), np.asarray(scored.logprobs)
rows = []
for i in range(0, 4 * config.rollout.group, config.rollout.group):
  for t in np.flatnonzero(mask[i]):
    token = chr(int(rollout.tokens[i, t + 1])) if rollout.tokens[i, t + 1] else "."
    first = t == np.flatnonzero(mask[i])[0]
    rows.append(
      [
        f"{answers.problems[i].question} → {answers.texts[i]}" if first else "",
        f"`{token}`",
        sampled[i, t],
        trained[i, t],
        trained[i, t] - sampled[i, t],
      ]
    )
table(["question → answer", "token", f"log p, {BASE} rollout", "log p, bf16 trainer", "gap"], rows)

# %% [markdown]
# Over all answers, every token is a point. Off the diagonal lies what importance sampling has to
# make up for, and what it truncates.

# %%
figure = go.Figure(
  go.Scatter(
    x=sampled[mask],
    y=trained[mask],
    mode="markers",
    marker={"size": 4, "color": BLUE},
    name="token",
  )
)
low = float(min(sampled[mask].min(), trained[mask].min()))
figure.add_scatter(
  x=[low, 0], y=[low, 0], mode="lines", line={"color": INK, "width": 1}, name="equal"
)
figure.update_xaxes(title=f"log p of the {BASE} rollout (nats)")
figure.update_yaxes(title="log p of the bf16 trainer (nats)")

# %% [markdown]
# ## 2. Equal numerics leave no gap
#
# The same arm on both sides says the same of every token, up to float32's last bits, since rollout
# and trainer are compiled to round where the code rounds. (A processor may add up one row in
# another order than many; then a bf16 rounding turns in a few tokens.) `ppo_kl` is the mean of
# `log(p_rollout / p_trainer)`; `token_mult_prob_error`, the mean factor between the two
# probabilities, is healthy below 1.03 to 1.05. A router that sees other numbers sends tokens to
# other experts: *flips*.


# %%
def gap_of(arm):
  own = learner_of(arm)
  found, _ = own.collect(params, seed=0, step=0)
  score = own.trainer.score(params, found.rollout)
  gap = grpo.divergence(found.rollout.logprobs, score.logprobs, found.rollout.mask)
  flips = np.sort(found.rollout.routing, -1) != np.sort(score.routing, -1)
  is_flipped = flips.any((0, 3))[np.asarray(found.rollout.mask)]
  return [gap["ppo_kl"], gap["token_mult_prob_error"], 100 * is_flipped.mean()]


ARMS = ["bf16", BASE, arm]
gaps = {name: [float(value) for value in gap_of(name)] for name in ARMS}
table(
  ["arm", "ppo_kl (nats)", "token_mult_prob_error", "tokens with a flip (%)"],
  [[name, *values] for name, values in gaps.items()],
)

# %% [markdown]
# ## 3. Each part alone, on each path alone
#
# A quantizer that adds only one part of its error to an operand, on one path, with all others in
# bf16; its state says which part, so that all rows come from one program. `kl` is the exact KL
# divergence of the next token's distribution from bf16's, `entropy_gap` its entropy less bf16's,
# over the tokens of one bf16 rollout. The error of GRPO's gradient is relative to the gradient in
# bf16.
#
# With the experts of the bf16 rollout *replayed*, what is left of the divergence is the numerics of
# the GEMMs alone; the rest is the router's flips.

# %%
sampling, *found = part_rows(config, setting, params, BASE, SUBSETS[:3], replays=(False,))


def cell(part, path, column):
  (row,) = (r for r in found if (r["parts"], r["path"]) == ([part], path))
  return row[column]


COLUMNS = {
  "KL to bf16 (nats)": ("rollout", "kl"),
  "tokens with a flip": ("rollout", "router_flips/tokens"),
  "entropy less bf16's (nats)": ("rollout", "entropy_gap"),
  "gradient error, forward": ("forward", "gradient_error"),
  "gradient error, backward": ("backward", "gradient_error"),
}
in_bf16, _ = learner_of("bf16").collect(params, seed=0, step=0)
replayed = {
  part: distance(
    setting.model,
    arm_of_any_parts(BASE).rollout,
    config.quantize,
    params,
    in_bf16.rollout,
    replay=True,
    parts=(part,),
  )
  for part in PARTS
}
table(
  ["part", *COLUMNS, "KL, experts replayed"],
  [
    [name, *(cell(part, *where) for where in COLUMNS.values()), replayed[part]["kl"]]
    for part, (name, _) in PARTS.items()
  ],
)

# %%
figure = go.Figure()
for part, (name, colour) in PARTS.items():
  figure.add_bar(
    name=name,
    x=["forward", "backward"],
    y=[cell(part, path, "gradient_error") for path in ("forward", "backward")],
    marker={"color": colour},
  )
figure.update_yaxes(title="error of the gradient, of bf16's")

# %% [markdown]
# ## 4. What this says, and what it does not
#
# The claims, each a question to the table. They are about one small policy before it is trained;
# `python -m experiments.rl.microscope` asks the same of any policy and of any format.

# %%
largest = lambda path, column: max(PARTS, key=lambda part: abs(cell(part, path, column)))  # noqa: E731
questions = {
  "scale bias hurts the gradient (forward)": ("scale_bias", "forward", "gradient_error"),
  "scale bias hurts the gradient (backward)": ("scale_bias", "backward", "gradient_error"),
  "the deadzone hurts the rollout": ("deadzone", "rollout", "kl"),
  "grid noise raises the entropy": ("grid_noise", "rollout", "entropy_gap"),
}
table(
  ["claim", "its part has", "the largest is", "with"],
  [
    [
      claim,
      cell(part, path, column),
      PARTS[largest(path, column)][0],
      cell(largest(path, column), path, column),
    ]
    for claim, (part, path, column) in questions.items()
  ],
)
