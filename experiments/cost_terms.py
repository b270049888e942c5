"""What a training step costs on N GPUs: counted work over measured rates, part by part.

A device's time is the sum of its parts; none hides behind another. docs/scaling.md has the terms,
what they predict and what they miss; `experiments.cost_constants` reads the rates from results/.
"""

import dataclasses
import math

import jax.numpy as jnp

from experiments.config import ALL_GEMMS
from fp4jax.formats import Format
from fp4jax.models import ModelConfig
from fp4jax.mosaic import gemms as mosaic
from fp4jax.recipe import Recipe

BYTES = 256  # the vocabulary of a config without a tokenizer
OPTIMIZER_BYTES = 32  # a parameter: AdamW reads p, g, m, v, writes p, m, v; the norm reads g
STATE_BYTES, GRADIENT_BYTES = 12, 4  # a parameter: p, m and v, and g, in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """A language model, in weights, and values of a token."""

  layers: int
  expert_layers: int  # of them
  d: int
  f: int  # of one expert
  experts: int  # of a layer
  top_k: int
  attention: int  # weights of the projections of one layer
  qkv: int  # values of a token's queries, keys and values
  values: int  # of what attention mixes
  scores: int  # multiply-adds of a pair of tokens: heads * (width of a key + width of a value)
  dense: int = 0  # weights of dense and shared feed-forward blocks, of all layers
  head: int  # weights, as many as the embedding's
  quantized_attention: bool = False
  unrolled: bool = False  # no loop over the layers

  @property
  def expert_weights(self) -> int:
    """Of one layer."""
    return 3 * self.experts * self.d * self.f

  @property
  def other_weights(self) -> int:
    """Of all layers, on every device; those of norms are not counted."""
    router = self.expert_layers * self.d * self.experts
    return self.layers * self.attention + self.dense + 2 * self.head + router


def shape_of(c: ModelConfig, quantized_attention: bool = False) -> Shape:
  """Of a mixture of experts whose tokens are bytes."""
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  return Shape(
    layers=c.num_layers,
    expert_layers=c.num_layers,
    d=c.d_model,
    f=c.d_ff,
    experts=c.num_experts,
    top_k=c.top_k,
    attention=c.d_model * (2 * heads + 2 * kv_heads),
    qkv=heads + 2 * kv_heads,
    values=heads,
    scores=2 * heads,
    dense=3 * c.d_model * c.d_ff_shared * c.num_layers,
    head=c.d_model * BYTES,
    quantized_attention=quantized_attention,
    unrolled=c.unroll,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What a device has of a step, and where its peers are."""

  tokens: int  # of each device
  length: int  # of a sequence
  data: int = 1
  expert: int = 1
  capacity_factor: float | None = None
  exchange: str = "xla"
  remat: str = "none"
  imbalance: float = 1.0  # choices on the busiest device of `expert`, over those on the mean one
  node: int = 8  # devices that NVLink joins; others are reached over the network

  def slots(self, shape: Shape) -> int:
    """Rows that a device has room for from one peer, as `fp4jax.moe_ffn` reserves it."""
    if self.capacity_factor is None:
      return self.tokens
    room = math.ceil(self.capacity_factor * self.tokens * shape.top_k / self.expert)
    return min(self.tokens, room)

  def rows_held(self, shape: Shape) -> int:
    """Rows of the experts' arrays, empty ones included."""
    rows = self.tokens * shape.top_k
    if self.expert > 1:
      rows = self.expert * self.slots(shape) * shape.top_k
    if self.capacity_factor is not None:
      rows = min(rows, math.ceil(self.capacity_factor * self.tokens * shape.top_k))
    return rows + mosaic.BLOCK * shape.experts

  def rows_multiplied(self, shape: Shape) -> float:
    """On the busiest device. Each expert's rows from each peer are filled up to a whole block."""
    rows = min(self.tokens * shape.top_k * self.imbalance, self.rows_held(shape))
    return rows + mosaic.BLOCK / 2 * shape.experts

  def rows_sent(self, shape: Shape) -> float:
    """By one device to the others: a token once to a peer; by XLA's all_to_all empty slots too."""
    if self.exchange == "xla":
      return (self.expert - 1) * self.slots(shape)
    share = expected_share(shape.experts, shape.top_k, self.expert)
    return (self.expert - 1) * min(share * self.tokens, self.slots(shape))


def expected_share(experts: int, top_k: int, peers: int) -> float:
  """Of the tokens, those with one or more of their experts on a given peer, if all are alike."""
  others = experts - experts // peers
  return 1 - math.comb(others, top_k) / math.comb(experts, top_k)


def bytes_per_value(fmt: Format | None) -> float:
  return 2 if fmt is None else fmt.bits_per_value / 8


def exchanges(recipe: Recipe) -> tuple[float, float, float, float]:
  """Bytes a value of what travels: x and results, then the gradient of the results and dx."""
  forward, kept = recipe.payload.forward, recipe.residual.lhs
  if forward is None and "original" not in (recipe.fprop.lhs.source, recipe.wgrad.lhs.source):
    forward = kept
  sums = recipe.payload.sums.itemsize
  return bytes_per_value(forward), sums, bytes_per_value(recipe.payload.backward), sums


def row_bytes(recipe: Recipe, shape: Shape) -> tuple[float, float]:
  """Of a row of the experts, what else than GEMMs reads and writes, forward and backward.

  Counted in `fp4jax.moe_ffn`: rows are gathered (x twice, dout, results, dx), SwiGLU and its
  backward pass read and write, and what is quantized is read in bf16 and written packed: dout as it
  is gathered, h in the read that SwiGLU makes.
  """
  d, f, k = shape.d, shape.f, shape.top_k
  if mosaic.multiplied_dtype(recipe, "fprop") == jnp.bfloat16:
    return 6 * d + 6 * f, 10 * d + 12 * f
  if recipe.residual.lhs is None:
    return (4 + 3 / k) * d + 5 * f, 13 * d + 11 * f
  kept = bytes_per_value(recipe.residual.lhs)
  forward = (3 + 3 * kept + (2 + kept) / k) * d + (5 + 2 * kept) * f
  return forward, (7 + 3 * kept) * d + (7 + 2 * kept) * f


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants:
  """Per second, of one device of the kind that `fit` was asked for; by recipe where one differs."""

  experts_flops: dict[str, float]  # by dtype, of the grouped kernels
  dense_flops: float  # of one large product in bf16
  score_flops: float
  memory: float  # bytes
  weight_bytes: dict[str, float]  # of a weight of the experts, beside the GEMMs' FLOPs
  other_bytes: dict[str, float]  # of a value of the residual stream, in one layer
  wire: dict[str, tuple[float, float]]  # by exchange: seconds, and bytes
  plan: float  # seconds of a layer: which row goes where
  reduce: float  # bytes, of an all-reduce
  transient_bytes: dict[str, float]  # of a value of the rows of one layer
  network: float = 50e9  # bytes; an assumption, InfiniBand of 400 Gb/s a GPU


def of_recipe(constant: dict[str, float], recipe: Recipe) -> float:
  """What is measured of it, or of the recipe that it is but for what it sends."""
  base = recipe.name.partition("[")[0].removesuffix("_dispatch")
  found = [constant[name] for name in (recipe.name, base) if name in constant]
  if not found:
    raise ValueError(f"recipe {recipe.name!r}: only {', '.join(constant)} are measured")
  return found[0]


def experts_seconds(
  shape: Shape, recipe: Recipe, run: Run, constants: Constants
) -> dict[str, float]:
  """Of the experts of all layers, forward and backward, by part.

  Raises:
    ValueError: experts that the devices do not divide, or what no committed row measures.
  """
  _check(shape, run)
  c, layers = constants, shape.expert_layers
  rows, weights = run.rows_held(shape), shape.expert_weights // run.expert
  return {
    "experts, GEMMs": sum(_gemm_seconds(shape, recipe, run, c).values()),
    "experts, element-wise": sum(row_bytes(recipe, shape)) * rows * layers / c.memory,
    "experts, weights": of_recipe(c.weight_bytes, recipe) * layers * weights / c.memory,
    "exchange": sum(_sent_seconds(shape, recipe, run, c)) + c.plan * layers * (run.expert > 1),
  }


def step_seconds(shape: Shape, recipe: Recipe, run: Run, constants: Constants) -> dict[str, float]:
  """Of a step, by part."""
  c = constants
  dense, scores = _attention_seconds(shape, recipe, run, c)
  local = shape.expert_layers * shape.expert_weights // run.expert + shape.other_weights
  other = of_recipe(c.other_bytes, recipe) * run.tokens * shape.d * shape.layers / c.memory
  parts = experts_seconds(shape, recipe, run, c) | {
    "attention and head, GEMMs": dense,
    "attention, scores": scores,
    "other": other,
    "optimizer": OPTIMIZER_BYTES * local / c.memory,
    "gradients' all-reduce": reduced_bytes(shape, run) / c.reduce,
    "loop over the layers": looped_bytes(shape, recipe, run) / c.memory,
  }
  if run.remat != "none":  # the forward pass, a third, of attention and of what is left
    parts["computed again"] = (dense + scores + other) / 3
    if _runs_experts_again(recipe, run.remat):  # but for GEMM 2, whose result nothing asks for
      rows = row_bytes(recipe, shape)[0] * run.rows_held(shape) * shape.expert_layers / c.memory
      parts["computed again"] += _gemm_seconds(shape, recipe, run, c)["fprop"] * 2 / 3 + rows
    if _runs_experts_again(recipe, run.remat) or recipe.residual.lhs is None:
      parts["computed again"] += _sent_seconds(shape, recipe, run, c)[0]
  return parts


def _gemm_seconds(shape, recipe, run, constants):
  """Of the experts: fprop, dgrad and wgrad of w13, two thirds, and of w2."""
  flops = 2 * run.rows_multiplied(shape) * 3 * shape.d * shape.f * shape.expert_layers
  dtypes = {gemm: mosaic.multiplied_dtype(recipe, gemm).name for gemm in ALL_GEMMS}
  return {gemm: flops / constants.experts_flops[dtype] for gemm, dtype in dtypes.items()}


def _attention_seconds(shape, recipe, run, constants):
  """Of all products outside of the experts, and of the scores: half of the pairs of tokens."""
  plain, quantized = shape.head, shape.dense
  if shape.quantized_attention:
    quantized += shape.layers * shape.attention
  else:
    plain += shape.layers * shape.attention
  dtype = mosaic.multiplied_dtype(recipe, "fprop")  # bf16 is XLA's own product
  rate = constants.dense_flops if dtype == jnp.bfloat16 else constants.experts_flops[dtype.name]
  dense = 6 * run.tokens * (plain / constants.dense_flops + quantized / rate)
  pairs = run.tokens * (run.length + 1) / 2
  return dense, 6 * pairs * shape.scores * shape.layers / constants.score_flops


def _sent_seconds(shape, recipe, run, constants):
  sent = (exchange_seconds(shape, run, value, constants) for value in exchanges(recipe))
  return [seconds * shape.expert_layers for seconds in sent]


def exchange_seconds(shape: Shape, run: Run, value_bytes: float, constants: Constants) -> float:
  """Of one exchange of rows: latency, what leaves a device, and its gathering and packing."""
  if run.expert == 1:
    return 0.0
  if run.exchange not in constants.wire:
    raise ValueError(f"exchange={run.exchange!r}: only {', '.join(constants.wire)} are measured")
  latency, speed = constants.wire[run.exchange]
  sent = run.rows_sent(shape) * shape.d * value_bytes
  near = (min(run.node, run.expert) - 1) / (run.expert - 1)
  wire = max(near * sent / speed, (1 - near) * sent / constants.network)
  return latency + wire + packing_bytes(shape, run, value_bytes) / constants.memory


def packing_bytes(shape: Shape, run: Run, value_bytes: float) -> float:
  """What is gathered is read and written; what is packed is also read in bf16, and widened.

  A kernel gathers nothing and packs MXFP4 on its way; FP8 is packed before, and widened nowhere.
  """
  slots, packed = run.expert * run.slots(shape), value_bytes < 2
  if run.exchange != "xla":
    widened = slots * (value_bytes + 1) if value_bytes < 1 else 0
    return (widened + (run.tokens * (2 + value_bytes) if 1 < value_bytes < 2 else 0)) * shape.d
  widened = packed * (run.tokens + slots) * (value_bytes + 2)
  return (2 * value_bytes * slots + widened) * shape.d


def reduced_bytes(shape: Shape, run: Run) -> float:
  """2 (N - 1) / N of the float32 gradients, by each device."""
  experts = shape.expert_layers * shape.expert_weights // run.expert
  sizes = (experts, run.data), (shape.other_weights, run.data * run.expert)
  return sum(GRADIENT_BYTES * weights * 2 * (n - 1) / n for weights, n in sizes)


def looped_bytes(shape: Shape, recipe: Recipe, run: Run) -> float:
  """What XLA moves so that a loop over the layers has one array of all: it fills the array, copies
  each layer's part in, and of what is kept copies it out again before the backward pass reads it.
  """
  if shape.unrolled:
    return 0.0
  local = shape.expert_layers * shape.expert_weights // run.expert + shape.other_weights
  return 5 * shape.layers * kept_bytes(shape, recipe, run) + 3 * GRADIENT_BYTES * local


def _runs_experts_again(recipe, remat):
  packed = None not in (recipe.residual.lhs, recipe.residual.hidden)
  return remat == "everything" or (remat == "attention+norm+experts" and not packed)


def kept_bytes(shape: Shape, recipe: Recipe, run: Run) -> float:
  """Of a device, of one layer: what the forward pass keeps as `fp4jax.models.remat` says."""
  x, h = (bytes_per_value(fmt) for fmt in (recipe.residual.lhs, recipe.residual.hidden))
  tokens, packed = run.tokens, recipe.residual.lhs is not None
  arrived = run.expert * run.slots(shape) if run.expert > 1 else tokens
  block = tokens * 2 * shape.d
  routing = tokens * 4 * (shape.experts + 2 * shape.top_k)
  hidden = run.rows_held(shape) * 2 * h * shape.f
  match run.remat:
    case "none":
      attention = tokens * 2 * (shape.qkv + shape.values + 2 * shape.d)
      # The router keeps its input, which is x as experts read it or another array.
      is_x = run.expert == 1 and not packed and recipe.payload.forward is None
      routing += 0 if is_x else tokens * 2 * shape.d
      return block + attention + routing + arrived * x * shape.d + hidden
    case "attention+norm":
      return block + routing + (arrived if packed else tokens) * x * shape.d + hidden
    case "attention+norm+experts":
      if _runs_experts_again(recipe, run.remat):
        return block + routing
      return block + routing + arrived * x * shape.d + hidden
    case "everything":
      return block
    case _:
      raise ValueError(f"remat={run.remat!r} is no policy of fp4jax.models.remat")


def memory_bytes(shape: Shape, recipe: Recipe, run: Run, constants: Constants) -> dict[str, float]:
  """Of a device, by part, as `experiments.step_memory` counts it, at the peak. One layer has again
  what its policy does not keep. A loop over the layers has room for all gradients when the backward
  pass begins; else a layer's take the place of what it kept, and the peak is at either end."""
  _check(shape, run)
  local = shape.expert_layers * shape.expert_weights // run.expert + shape.other_weights
  row = shape.d + 3 * shape.f  # values: x, the two halves of h, and a
  transient = of_recipe(constants.transient_bytes, recipe)
  kept, gradients = kept_bytes(shape, recipe, run), GRADIENT_BYTES * local
  peak = gradients, shape.layers * kept
  if shape.unrolled:
    peak = max((gradients / shape.layers, shape.layers * kept), (gradients, kept), key=sum)
  return {
    "state": STATE_BYTES * local,
    "gradients": peak[0],
    "kept": peak[1],
    "computed again": kept_bytes(shape, recipe, dataclasses.replace(run, remat="none")) - kept,
    "transient": transient * row * run.rows_held(shape),
  }


def _check(shape, run):
  if shape.experts % run.expert:
    raise ValueError(f"expert={run.expert} devices do not divide {shape.experts} experts")
