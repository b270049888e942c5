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
# # Where the error of FP4 comes from
#
# `fp4jax.decompose` splits the error of a block-scaled format, without a remainder, into three
# parts (arXiv 2605.20402):
#
# | part | what it is |
# |---|---|
# | scale bias | `Q(x) - Q*(x)`: the stored scale is not the ideal one, `amax / 6` |
# | deadzone | `Q*(x) - x` where `abs(x) < amax / 24`: even the ideal scale rounds these to zero |
# | grid noise | `Q*(x) - x` everywhere else: FP4 has only eight magnitudes |
#
# `Q` rounds with the stored scale, `Q*` with the ideal one. We go from one block by hand, over a
# million random values, to the weights and the probes of a trained model.

# %%
import dataclasses
import functools
import importlib.util
import itertools
import sys
import tempfile
from pathlib import Path

# Jupyter starts in notebooks/, from where neither package is found.
if not (importlib.util.find_spec("fp4jax") and importlib.util.find_spec("experiments")):
  sys.path.insert(0, str(Path.cwd().parent))

# %%
import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from flax import nnx
from IPython.display import Markdown
from plotly.subplots import make_subplots

import experiments.run
from experiments.config import Data, Experiment, Names, Optimizer, Quantize
from experiments.load import load_run
from experiments.summary import BASELINE, last_probe_rows, read_records
from fp4jax import (
  FP8_BLOCK,
  MXFP4,
  MXFP8,
  NVFP4,
  decompose,
  dequantize,
  fake_quantize,
  hadamard,
  quantize,
  recipes,
)
from fp4jax.models import ModelConfig

# %% [markdown]
# The trained model of section 6: `make demo` writes it. Without it, the notebook trains a very
# small one.

# %% tags=["parameters"]
ROOT = Path(experiments.run.__file__).resolve().parents[1]
WORKDIR = ROOT / "runs" / "demo"
RECIPE = "mxfp4"

# %% [markdown]
# How this notebook draws: one colour for each part, the same as in the report of a run.

# %%
PARTS = {
  "scale_bias": ("scale bias", "#e69f00"),
  "deadzone": ("deadzone", "#56b4e9"),
  "grid_noise": ("grid noise", "#a3a6ab"),
  "cross": ("cross terms", "#5a5f68"),
}
BLUE, RED, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#b8629a"
INK, FAINT = "#1c1f24", "#a3a6ab"

pio.templates["notebook"] = go.layout.Template(
  layout={
    "autosize": False,
    "width": 720,
    "height": 300,
    "margin": {"l": 60, "r": 20, "t": 40, "b": 45},
    "font": {"size": 12, "color": INK},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    "barmode": "relative",
    "xaxis": {"zeroline": False},
  }
)
pio.templates.default = "plotly_white+notebook"


def line(x, y, name, colour, dash="solid"):
  return go.Scatter(x=x, y=y, name=name, line={"color": colour, "width": 2, "dash": dash})


def part_bar(part, **coordinates):
  name, colour = PARTS[part]
  marker = {"color": colour}
  if part == "cross":
    marker["pattern"] = {"shape": "/", "size": 5, "fgcolor": colour, "bgcolor": "white"}
  return go.Bar(name=name, marker=marker, **coordinates)


def table(header, rows):
  cell = lambda c: c if isinstance(c, str) else f"{c:.3f}"  # noqa: E731
  lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
  return Markdown("\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines))


# %% [markdown]
# ## 1. One block by hand
#
# An MXFP4 block is 32 values with one scale. E2M1 has the magnitudes below, so a scale of
# `amax / 6` would put the largest value exactly on the largest of them. But the scale is stored as
# a power of two (E8M0). We round it up, `scale_rule="rceil"`, so that nothing overflows; OCP's own
# rule, which rounds down, is in section 3.

# %%
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MXFP4_RCEIL = dataclasses.replace(MXFP4, scale_rule="rceil")

block = np.asarray(jax.random.normal(jax.random.key(0), (32,)))
amax = np.max(np.abs(block))
ideal_scale = amax / 6
stored_scale = 2.0 ** np.ceil(np.log2(ideal_scale))
delta = np.log2(stored_scale / ideal_scale)
print(f"{amax=:.4f}  {ideal_scale=:.4f}  {stored_scale=:.4f}  {delta=:.3f}")


# %% [markdown]
# Rounding by hand, to the nearest multiple of the scale, gives what the library gives: the codes
# (three bits of magnitude, one of sign), the code of the scale, and the values.


# %%
def codes_by_hand(x, scale):
  return np.argmin(np.abs(np.abs(x)[:, None] / scale - GRID), axis=1)


def round_by_hand(x, scale):
  return np.copysign(GRID[codes_by_hand(x, scale)] * scale, x).astype(np.float32)


q = quantize(block, MXFP4_RCEIL)
packed = np.asarray(q.codes)  # two codes a byte, the first in the low nibble
codes = np.stack([packed & 15, packed >> 4], axis=1).ravel()
np.testing.assert_array_equal(codes, codes_by_hand(block, stored_scale) + 8 * np.signbit(block))
np.testing.assert_array_equal(q.scales, [127 + np.log2(stored_scale)])
np.testing.assert_array_equal(dequantize(q), round_by_hand(block, stored_scale))
np.testing.assert_array_equal(dequantize(q), fake_quantize(block, MXFP4_RCEIL))
assert q.nbytes * 8 / block.size == MXFP4_RCEIL.bits_per_value

rows = [
  ["x", *block[:8]],
  ["x / scale", *(block[:8] / stored_scale)],
  ["code", *(f"{c:04b}" for c in codes[:8])],
  ["Q(x)", *np.asarray(dequantize(q))[:8]],
]
table(["", *(str(i) for i in range(8))], rows)

# %% [markdown]
# The two grids under the block's magnitudes. The stored grid is the ideal one, stretched by
# `2^delta`: it reaches beyond the largest value, and all of its steps are wider. The shaded range
# is the dead zone.

# %%
rows = {
  "stored grid": (GRID * stored_scale, "line-ns-open", PARTS["scale_bias"][1]),
  "ideal grid": (GRID * ideal_scale, "line-ns-open", INK),
  "values": (np.abs(block), "circle-open", BLUE),
}
figure = go.Figure()
for name, (x, symbol, colour) in rows.items():
  marker = {"symbol": symbol, "size": 12, "color": colour, "line": {"width": 1.5}}
  figure.add_scatter(x=x, y=[name] * len(x), mode="markers", marker=marker)
figure.add_vrect(x0=0, x1=amax / 24, fillcolor=PARTS["deadzone"][1], opacity=0.35, line_width=0)
figure.update_layout(xaxis_title="magnitude", height=190, margin_l=90, showlegend=False)

# %% [markdown]
# The three parts of the error, value by value, the smallest magnitude on the left. Small values
# are lost to the dead zone; beyond it each value has its grid noise, and on top the scale bias,
# which often has the opposite sign. Their sum is the error.

# %%
parts = decompose(block, MXFP4_RCEIL)
error = parts.scale_bias + parts.deadzone + parts.grid_noise
np.testing.assert_allclose(error, dequantize(q) - block, rtol=0, atol=2**-23 * amax)

order = np.argsort(np.abs(block))
bars = [part_bar(p, y=np.asarray(getattr(parts, p))[order]) for p in list(PARTS)[:3]]
marker = {"color": INK, "size": 5}
dots = go.Scatter(y=np.asarray(parts.total)[order], mode="markers", name="error", marker=marker)
go.Figure([*bars, dots]).update_layout(
  xaxis_title="values of the block, smallest first", yaxis_title="error"
)

# %% [markdown]
# ## 2. A million values
#
# Over many blocks, what counts is each part's share of the squared error. Squares of a sum have
# cross terms. Deadzone and grid noise never overlap, so theirs is zero; what is left is the one
# between scale bias and grid noise (and, for some rules, a small one with the deadzone):
#
#     1 = scale_bias + deadzone + grid_noise + cross terms
#
# `ErrorDecomposition.summary()` has these shares, and a few more numbers.


# %%
@functools.partial(jax.jit, static_argnames=("fmt", "axis", "rounding"))
def split(x, fmt, **options):
  parts = decompose(x, fmt, **options)
  return parts, parts.summary()


def numbers(x, fmt, **options):
  """The summary as floats, with `cross` for both cross terms together."""
  _, summary = split(x, fmt, **options)
  found = {name: float(value) for name, value in dataclasses.asdict(summary).items()}
  return found | {"cross": found["cross_scale_grid"] + found["cross_scale_deadzone"]}


# %% [markdown]
# The ideal scale of a block can lie anywhere between two powers of two. We let it: Gaussian blocks
# are multiplied by a factor spread evenly over one binade, in logarithm. We compare them with
# Laplace values, whose tails are heavier, and with what the paper reports for LLM weights.

# %%
BLOCKS = 2**15
keys = jax.random.split(jax.random.key(1), 6)
spread = 2 ** jax.random.uniform(keys[0], (BLOCKS, 1))
gaussian = spread * jax.random.normal(keys[1], (BLOCKS, 32))
laplace = spread * jax.random.laplace(keys[2], (BLOCKS, 32))

measured = {
  "Gaussian": numbers(gaussian, MXFP4_RCEIL),
  "Laplace": numbers(laplace, MXFP4_RCEIL),
}
published = {  # arXiv 2605.20402
  "Qwen2.5-3B, published": (1.725, 0.026, 0.703, -0.657),
  "Qwen3-30B-A3B, published": (1.726, 0.022, 0.712, -0.658),
}
columns = ("scale_bias", "deadzone", "grid_noise", "cosine")
rows = [[name, *(own[c] for c in columns)] for name, own in measured.items()]
table(["", *columns], rows + [[name, *reported] for name, reported in published.items()])

# %% [markdown]
# Gaussian values have the published shares within a few hundredths: these say more about the
# format than about language models. Heavier tails move the shares towards the dead zone.

# %%
for own in measured.values():
  assert abs(sum(own[part] for part in PARTS) - 1) < 1e-4
for reported in published.values():
  ours = [measured["Gaussian"][c] for c in columns]
  np.testing.assert_allclose(ours, reported, atol=0.05)
assert measured["Laplace"]["deadzone"] > 1.5 * measured["Gaussian"]["deadzone"]

# %% [markdown]
# How can scale bias alone be more than the whole error? Let `e = Q(x) - x` be the error with the
# stored scale and `e* = Q*(x) - x` the one with the ideal scale. Scale bias is `e - e*`, so it
# contains the ideal grid's error a second time, with the opposite sign. If `e` and `e*` are
# uncorrelated, and the squared norm of `e*` is `r` times that of `e`, then scale bias has the share
# `1 + r` and the cross term is `-2 r`. That is the case here, so only `1 - r`, what they leave
# together, is lost to the scale.

# %%
parts, _ = split(gaussian, MXFP4_RCEIL)
ideal_error = parts.deadzone + parts.grid_noise
correlation = float(jnp.corrcoef(parts.total.ravel(), ideal_error.ravel())[0, 1])
own = measured["Gaussian"]
r = own["deadzone"] + own["grid_noise"]
assert abs(correlation) < 0.05
np.testing.assert_allclose([own["scale_bias"], own["cross"]], [1 + r, -2 * r], atol=0.05)
print(f"correlation of e and e*: {correlation:.3f}")
print(f"scale bias {own['scale_bias']:.3f}, 1 + r {1 + r:.3f}")
print(f"cross term {own['cross']:.3f}, -2 r  {-2 * r:.3f}")
print(f"the ideal scale would gain {-10 * np.log10(r):.2f} dB")

# %% [markdown]
# ### Scale bias against delta
#
# `delta = log2(stored scale / ideal scale)` says how far a block's grid is stretched; under
# "rceil" it lies between 0 and 1. Here the blocks are sorted by it.


# %%
def by_delta(x, fmt, bins_per_octave=24):
  """For the blocks of each bin of delta: squared norms relative to that of x."""
  exponent = np.asarray(quantize(x, fmt).scales)[:, 0].astype(int) - 127
  delta = exponent - np.log2(np.max(np.abs(x), axis=1) / 6)
  bins, index = np.unique(np.floor(delta * bins_per_octave).astype(int), return_inverse=True)
  parts, _ = split(x, fmt)

  def energy(part):
    return np.bincount(index, np.sum(np.square(part), axis=1))

  curves = {p: getattr(parts, p) for p in ("total", "scale_bias", "deadzone", "grid_noise")}
  is_max = np.abs(x) == np.max(np.abs(x), axis=1, keepdims=True)
  curves["max"] = np.where(is_max, parts.total, 0)
  full = np.bincount(index) > 100
  relative = {name: (energy(c) / energy(parts.x))[full] for name, c in curves.items()}
  return delta, (bins[full] + 0.5) / bins_per_octave, relative


# %%
delta, centres, curves = by_delta(gaussian, MXFP4_RCEIL)
assert delta.min() > -1e-5 and delta.max() < 1 + 1e-5
assert abs(np.mean(2**delta) - 1 / np.log(2)) < 0.01
print(f"the stored scale is on average {np.mean(2**delta) - 1:.0%} larger than the ideal one")

# %%
figure = go.Figure([line(centres, curves[p], *PARTS[p]) for p in list(PARTS)[:3]])
figure.add_trace(line(centres, curves["total"], "total", INK))
figure.add_trace(line(centres, curves["max"], "total, largest value of a block only", INK, "dot"))
for maximum in (6, 5, 4, 3.5, 3):
  figure.add_vline(
    np.log2(6 / maximum),
    line={"color": FAINT, "width": 1, "dash": "dash"},
    annotation={"text": f"{maximum}", "font_color": "#62676f"},
    annotation_position="top left" if maximum == 3 else "top right",
  )
figure.update_layout(
  xaxis_title="delta (above: the largest value of a block, divided by its scale)",
  yaxis_title="relative to squared norm of x",
  yaxis_range=[0, 1.2 * curves["scale_bias"].max()],
  height=380,
)

# %% [markdown]
# Grid noise and deadzone belong to the ideal scale and do not depend on delta. Scale bias does,
# but it does not simply grow. It says how far two grids are apart, not how bad the second one is:
# it is zero where they coincide, and small again near 1/2, because the points of E2M1 lie about
# half an octave apart, so that the stretched grid almost falls onto the ideal one.
#
# The total is low where the largest value of the block lies on a point of its grid, 6 or 4, and has
# its peak where that value lies halfway between the two, on 5. The dotted line shows why: the peak
# is the error of this one value of the 32. At 3 the total is higher again, since all steps are
# twice those of the ideal grid.

# %%
near = {m: np.argmin(np.abs(centres - np.log2(6 / m))) for m in (6, 5, 4, 3)}
total, largest = curves["total"], curves["max"]
assert curves["scale_bias"][near[6]] < 0.2 * curves["scale_bias"].max()
assert curves["scale_bias"][np.abs(centres - 0.5) < 0.03].max() < 0.5 * curves["scale_bias"].max()
half_octave_on = GRID[2:7] * 2**0.5
assert np.max(np.abs(half_octave_on / GRID[3:8] - 1)) < 0.07
assert total.argmax() == near[5] and total[near[4]] < 1.2 * total[near[6]]
assert largest[near[5]] - largest[near[4]] > 0.6 * (total[near[5]] - total[near[4]])
assert total[near[3]] > 1.3 * total[near[6]]
print(f"largest value on 5 instead of 4: {total[near[5]] / total[near[4]] - 1:.0%} more error")

# %% [markdown]
# ## 3. The scale rules
#
# A power-of-two rule only chooses in which octave delta lies: every rule sees the same curve
# through another window of length 1. Below zero the stored scale is too small and clips.

# %%
RULES = {"floor": RED, "even": PINK, "oas": GREEN, "rceil": BLUE}
by_rule = {rule: dataclasses.replace(MXFP4, scale_rule=rule) for rule in RULES}
curve, windows = {}, []
for i, (rule, colour) in enumerate(RULES.items()):
  delta, centres, curves = by_delta(gaussian, by_rule[rule])
  for at, value in zip(centres, curves["total"], strict=True):
    assert abs(value / curve.setdefault(at, value) - 1) < 0.1  # one curve for all
  height = 0.0005 + 0.0007 * i
  windows.append(line([delta.min(), delta.max()], [height] * 2, rule, colour))
curve = sorted(curve.items())
error = line([c[0] for c in curve], [c[1] for c in curve], "error", INK)
go.Figure([error, *windows]).update_layout(
  xaxis_title="delta", yaxis_title="relative to squared norm of x", yaxis_rangemode="tozero"
)

# %%
measured = {rule: numbers(gaussian, fmt) for rule, fmt in by_rule.items()}
columns = ("sqnr_db", "scale_bias", "deadzone", "grid_noise", "cross_scale_grid")
columns += ("cross_scale_deadzone", "clipped", "flushed", "gain")
table(["", *columns], [[rule, *(own[c] for c in columns)] for rule, own in measured.items()])

# %% [markdown]
# - Only "rceil" never clips. There the stored scale is never below the ideal one, so everything in
#   the dead zone stays zero under `Q` too, and the cross term of scale bias and deadzone vanishes:
#   this is the paper's lemma, and it needs this rule. Under the others it is small and negative.
# - "oas" and "even" differ only where a block's maximum is exactly 7 times a power of two.
#   They clip a little, but avoid the right end of the curve, and have the highest SQNR.
# - "floor", OCP's rule, clips most, and its `gain`, `<x, Q(x)> / <x, x>`, is lowest: the largest
#   values lose some of their size.

# %%
assert measured["rceil"]["cross_scale_deadzone"] == 0 == measured["rceil"]["clipped"]
for rule in ("floor", "even", "oas"):
  assert -0.05 < measured[rule]["cross_scale_deadzone"] < 0 < measured[rule]["clipped"]
for name, value in measured["oas"].items():
  np.testing.assert_allclose(measured["even"][name], value, atol=0.02)
sqnr = {rule: own["sqnr_db"] for rule, own in measured.items()}
assert sqnr["oas"] > max(sqnr["floor"], sqnr["rceil"]) + 0.1
assert max(measured, key=lambda rule: measured[rule]["clipped"]) == "floor"
assert min(measured, key=lambda rule: measured[rule]["gain"]) == "floor"

# %% [markdown]
# ## 4. Formats, outliers and the Hadamard transform
#
# The same for four formats, on Gaussian values and on the same values with one in a thousand made
# 20 times larger. `hadamard` mixes the values of every 32 by an orthogonal matrix, so an outlier is
# spread over its block; transforming back leaves the squared error as it is.

# %%
FORMATS = (MXFP4, NVFP4, MXFP8, FP8_BLOCK)
plain = jax.random.normal(keys[3], (1024, 512))
is_outlier = jax.random.bernoulli(keys[4], 1e-3, plain.shape)
data = {"Gaussian": plain, "with outliers": jnp.where(is_outlier, 20 * plain, plain)}

x = data["with outliers"]
parts, _ = split(hadamard(x, axis=-1, block=32), NVFP4)
back = hadamard(parts.x + parts.total, axis=-1, block=32)
np.testing.assert_allclose(jnp.linalg.norm(back - x), jnp.linalg.norm(parts.total), rtol=1e-3)

# %%
sqnr = {
  (name, fmt.name): [
    numbers(values, fmt)["sqnr_db"] for values in (x, hadamard(x, axis=-1, block=32))
  ]
  for name, x in data.items()
  for fmt in FORMATS
}

# %%
figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=list(data))
names = [fmt.name for fmt in FORMATS]
for column, name in enumerate(data, 1):
  for i, (label, colour) in enumerate({"as it is": BLUE, "after hadamard": RED}.items()):
    y = [sqnr[name, fmt][i] for fmt in names]
    bar = go.Bar(
      x=names,
      y=y,
      name=label,
      marker_color=colour,
      showlegend=column == 1,
      text=[f"{v:.1f}" for v in y],
      textposition="outside",
      cliponaxis=False,
    )
    figure.add_trace(bar, row=1, col=column)
figure.update_layout(yaxis_title="SQNR (dB)", barmode="group", legend_y=1.12, margin_t=70)

# %% [markdown]
# - E4M3 has two more bits of mantissa than E2M1, at 6 dB each.
# - A Gaussian stays Gaussian under an orthogonal matrix, so nothing changes there.
# - With outliers, the transform helps the formats with power-of-two scales and costs the others
#   some SQNR. An outlier holds much of its block's squared norm. `amax / q_max`, stored with some
#   bits of mantissa, puts it almost exactly on the grid's last point; a power of two puts it
#   anywhere. Once it is spread over its block, nothing is special about it any more, for better or
#   worse.
#
# SQNR weighs values by their squares, so it is kind to formats that keep outliers and lose the
# small values beside them. Look at `flushed`, or at the loss of a training run, before you choose.


# %%
def outlier_error(fmt):
  x = data["with outliers"]
  parts, _ = split(x, fmt)
  return float(jnp.linalg.norm(parts.total[is_outlier]) / jnp.linalg.norm(x[is_outlier]))


flushed = {fmt.name: numbers(data["with outliers"], fmt)["flushed"] for fmt in FORMATS}
assert abs(sqnr["Gaussian", "MXFP8"][0] - sqnr["Gaussian", "MXFP4"][0] - 12) < 1
for fmt in FORMATS:
  before, after = sqnr["Gaussian", fmt.name]
  assert abs(before - after) < 0.1
  before, after = sqnr["with outliers", fmt.name]
  assert (after > before) == fmt.has_power_of_two_scales
assert outlier_error(NVFP4) < 0.5 * outlier_error(MXFP4)
rows = [[f.name, f"{f.bits_per_value}", outlier_error(f), flushed[f.name]] for f in FORMATS]
table(["with outliers", "bits a value", "relative error of the outliers", "flushed to zero"], rows)

# %% [markdown]
# ## 5. Stochastic rounding
#
# Stochastic rounding goes up with a probability that is the distance from the point below, in
# steps, so that its mean is the value itself. We round the same values up to 256 times and look at
# the error of the mean over the draws.

# %%
x = gaussian[:1024]
DRAWS = 256


@functools.partial(jax.jit, static_argnames="fmt")
def error_of_means(x, fmt, key):
  """Squared error of the mean over the first 1, 2, ... draws, relative to x."""

  def draw(total, i):
    total += fake_quantize(x, fmt, rounding="stochastic", key=jax.random.fold_in(key, i))
    return total, jnp.sum(jnp.square(total / (i + 1) - x)) / jnp.sum(jnp.square(x))

  return jax.lax.scan(draw, jnp.zeros_like(x), jnp.arange(DRAWS))[1]


draws = np.arange(1, DRAWS + 1)
nearest = 10 ** (-numbers(x, MXFP4_RCEIL)["sqnr_db"] / 10)
unclipped = np.asarray(error_of_means(x, MXFP4_RCEIL, keys[5]))
clipped = np.asarray(error_of_means(x, MXFP4, keys[5]))
curves = [
  line(draws, np.full(DRAWS, nearest), "nearest, rceil", INK),
  line(draws, unclipped, "stochastic, rceil", BLUE),
  line(draws, clipped, "stochastic, floor", RED),
]
figure = go.Figure(curves).update_layout(xaxis_title="draws", yaxis_title="error of the mean")
figure.update_xaxes(type="log", dtick=1).update_yaxes(type="log", dtick=1, exponentformat="power")

# %% [markdown]
# One draw is noisier than rounding to nearest. But its errors are independent, so that of the mean
# falls as one over the number of draws, while rounding to nearest makes the same error every time.
# That is what counts where many rounded products are added up, as in a weight gradient. A rule that
# clips spoils it: what lies beyond 6 can't be rounded up, and that bias stays.
#
# Rounding to nearest also shrinks: its `gain` is below 1. That of stochastic rounding is 1 but for
# noise.

# %%
assert unclipped[0] > 1.5 * nearest
np.testing.assert_allclose(unclipped * draws, unclipped[0], rtol=0.1)
assert unclipped[-1] < 0.05 * nearest and clipped[-1] > 2 * unclipped[-1]

summaries = {
  "nearest": numbers(x, MXFP4_RCEIL),
  "stochastic": numbers(x, MXFP4_RCEIL, rounding="stochastic", key=keys[5]),
}
assert summaries["nearest"]["gain"] < 0.995 and abs(summaries["stochastic"]["gain"] - 1) < 0.005
columns = ("sqnr_db", "gain", "flushed")
rows = [[name, *(own[c] for c in columns)] for name, own in summaries.items()]
table(["", *columns], rows)

# %% [markdown]
# ## 6. A trained model
#
# If there is no run of the recipe in `WORKDIR`, we train a very small one for a few steps, on the
# source text of this library.

# %%
TINY = Experiment(
  recipes=Names((RECIPE,)),
  steps=20,
  eval_batches=1,
  eval_every=20,
  probe_every=20,
  data=Data(
    path=str(ROOT / "fp4jax" / "**" / "*.py"),
    sequence_length=64,
    batch_size=4,
    validation_fraction=0.5,
  ),
  model=ModelConfig(num_layers=2, d_model=64, d_ff=64, num_experts=0),
  quantize=Quantize(attention=False),
  optimizer=Optimizer(warmup_steps=5),
)
if not (WORKDIR / "runs" / f"{RECIPE}-0" / "finished.json").exists():
  folder = tempfile.TemporaryDirectory(prefix="fp4jax-")  # gone with the kernel
  WORKDIR = Path(folder.name)
  jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
  experiments.run.run(TINY, str(WORKDIR))
  jax.config.update("jax_disable_most_optimizations", False)

records = read_records(WORKDIR)
config, model = load_run(WORKDIR, f"{RECIPE}-0")  # as its newest checkpoint has it
recipe = recipes.by_name(RECIPE)
print(f"{WORKDIR}: {', '.join(records.arms)}, {config.steps} steps")

# %% [markdown]
# Every weight matrix, whether the recipe quantizes it or not, in blocks along the axis that the
# forward GEMM contracts, the one before the last. Layers are apart, the experts of a layer
# together. The model reads its float32 weights in the dtype of its activations, and so do we. The
# first bar is that of the Gaussian values above: as far as a weight's bar resembles it, its blocks
# are like blocks of Gaussian values.

# %%
weights = {}
for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
  name = jax.tree_util.keystr(path, simple=True, separator=".")
  if name.split(".")[-1].startswith("w"):
    leaf = leaf.astype(config.model.dtype)
    layers = enumerate(leaf) if name.startswith("blocks.") else [(config.model.num_layers, leaf)]
    weights |= {(name.removeprefix("blocks."), layer): w for layer, w in layers}

fmt = recipe.fprop.rhs.format
of_weights = {("Gaussian values", ""): numbers(gaussian, fmt)}
of_weights |= {key: numbers(w, fmt, axis=-2) for key, w in weights.items()}
bars = [
  part_bar(
    part,
    y=[f"{name} {layer}" for name, layer in of_weights],
    x=[own[part] for own in of_weights.values()],
    orientation="h",
  )
  for part in PARTS
]
figure = go.Figure(bars).add_vline(1, line={"dash": "dash", "color": FAINT, "width": 1})
figure.update_layout(
  xaxis_title=f"share of squared error, {fmt.name}, after {config.steps} steps",
  yaxis_autorange="reversed",
  height=110 + 24 * len(of_weights),
  margin_l=190,
)

# %% [markdown]
# While it trains, the runner probes every operand of every GEMM in the same way and writes a row
# for each to `probes.jsonl`. A probe of the step that we have loaded saw the same weights, as the
# right-hand side of fprop: its numbers must be ours.

# %%
WEIGHT = {
  "attention.qkv": "attention.w_qkv",
  "attention.out": "attention.w_out",
  "experts.w13": "feed_forward.w13",
  "experts.w2": "feed_forward.w2",
}
rows = last_probe_rows(records.probes, RECIPE)
probed = rows.query("seed == 0 and step == @config.steps and gemm == 'fprop' and operand == 'rhs'")
probed = probed[probed.module.isin(list(WEIGHT))]
for row in probed.itertuples():
  own = of_weights[WEIGHT[row.module], row.layer]
  for name in ("sqnr_db", "scale_bias", "grid_noise", "cosine"):
    np.testing.assert_allclose(own[name], getattr(row, name), atol=0.01)
print(f"{len(probed)} rows of the probe agree with the weights")

# %% [markdown]
# The SQNR of all operands at the last probe, one dot for each GEMM of each layer; the dashed line
# is that of Gaussian values in the format of the weights above. `fprop rhs` and `dgrad rhs` are
# weights, in blocks along one axis and the other; `fprop lhs` and `wgrad lhs` are activations,
# `dgrad lhs` and `wgrad rhs` gradients. An operand left of the line loses more than Gaussian values
# do: its tails are heavier, its maxima come to lie where the curve of section 3 is high, or its
# recipe rounds it stochastically.

# %%
dots = []
quantized = [name for name in records.arms if name != BASELINE]
for name, colour in zip(quantized, itertools.cycle((BLUE, RED, GREEN, PINK)), strict=False):
  rows = last_probe_rows(records.probes, name)
  dot = go.Scatter(
    x=rows.sqnr_db,
    y=rows.gemm + " " + rows.operand,
    text=rows.module + ", layer " + rows.layer.astype(str),
    mode="markers",
    name=name,
    showlegend=True,
    marker={"color": colour, "size": 8, "opacity": 0.6},
  )
  dots += [dot] if len(rows) else []
figure = go.Figure(dots)
figure.add_vline(
  of_weights["Gaussian values", ""]["sqnr_db"], line={"dash": "dash", "color": FAINT, "width": 1}
)
figure.update_layout(xaxis_title="SQNR (dB)", yaxis_autorange="reversed", margin_l=100, height=320)
