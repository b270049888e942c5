"""The cost model: its counts by hand and as the code does it, its laws, and what it predicts."""

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import equations

import fp4jax
from configs import moe_wide
from experiments import cost_constants, cost_tables, logs, tables
from experiments.config import Experiment
from experiments.cost_constants import MOE_WIDE, fit
from experiments.cost_tables import DEEPSEEK_V3
from experiments.cost_terms import (
  BYTES,
  Constants,
  Run,
  bytes_per_value,
  exchange_seconds,
  exchanges,
  expected_share,
  kept_bytes,
  memory_bytes,
  reduced_bytes,
  row_bytes,
  shape_of,
  step_seconds,
)
from experiments.speed_of_light import gemm_flops
from experiments.train import make_trainer, parameter_counts, policy_of, saved_activation_bytes
from fp4jax import recipes
from fp4jax.models import ModelConfig
from fp4jax.models.remat import Remat

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
RECIPES = ("bf16", "fp8", "hopper_fp4", "fp8_dispatch", "hopper_fp4_dispatch")
PREDICTED_WITHIN = 0.15
LAYERS_WITHIN = 0.18  # over several GPUs: docs/scaling.md says which and why
RUN = Run(tokens=32768, length=512)
# So that times are what is counted: operations and bytes.
UNITS = Constants(
  experts_flops={"bfloat16": 1.0, "float8_e4m3fn": 1.0},
  dense_flops=1.0,
  score_flops=1.0,
  memory=1.0,
  weight_bytes=dict.fromkeys(RECIPES, 1.0),
  other_bytes=dict.fromkeys(RECIPES, 1.0),
  wire={"xla": (0.0, 1.0), "mosaic": (0.0, 1.0)},
  plan=0.0,
  reduce=1.0,
  transient_bytes=dict.fromkeys(RECIPES, 1.0),
)


def run(**changes) -> Run:
  return dataclasses.replace(RUN, **changes)


# Counts


@pytest.mark.parametrize(
  ("experts", "top_k", "peers"), [(8, 2, 4), (6, 3, 2), (8, 8, 2), (5, 1, 5)]
)
def test_a_peer_is_sent_what_enumeration_finds(experts, top_k, peers):
  choices = list(itertools.combinations(range(experts), top_k))
  own = [any(e < experts // peers for e in chosen) for chosen in choices]
  assert expected_share(experts, top_k, peers) == pytest.approx(sum(own) / len(choices))


def test_a_peer_is_sent_what_a_simulation_finds():
  """A binomial share of n tokens, 5 standard deviations: one false alarm in two million."""
  experts, top_k, peers, n = 256, 8, 8, 20_000
  scores = np.random.default_rng(0).random((n, experts))
  chosen = np.argpartition(scores, -top_k, axis=1)[:, -top_k:]
  p = expected_share(experts, top_k, peers)
  for peer in range(peers):
    share = np.mean(np.any(chosen // (experts // peers) == peer, axis=1))
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("fmt", [fp4jax.MXFP4, fp4jax.FP8_BLOCK, fp4jax.FP8_BLOCK_POW2])
def test_bytes_of_a_row(fmt):
  row = jax.eval_shape(lambda x: fp4jax.quantize(x, fmt), jnp.ones((1, 1024), jnp.bfloat16))
  assert bytes_per_value(fmt) * 1024 == row.nbytes


@pytest.mark.parametrize(
  ("name", "expected"),
  {
    "bf16": (2, 4, 2, 4),
    "fp8": (2, 4, 2, 4),
    "hopper_fp4": (17 / 32, 4, 2, 4),
    "fp8_dispatch": (33 / 32, 2, 33 / 32, 2),
    "hopper_fp4_dispatch": (17 / 32, 2, 33 / 32, 2),
  }.items(),
)
def test_bytes_of_a_value_that_travels(name, expected):
  assert exchanges(recipes.by_name(name)) == expected


def sent_bytes(jaxpr):
  for eqn in equations(jaxpr):
    if eqn.primitive.name == "all_to_all":
      yield sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars)


@pytest.mark.parametrize("capacity", [None, 1.25])
@pytest.mark.parametrize("name", RECIPES)
def test_bytes_of_all_exchanges_are_those_of_the_traced_layer(name, capacity):
  """Every all_to_all of forward and backward pass, one device's operands: its own rows too. Beside
  the four exchanges travel, of each slot, the choices (k experts, k places, a part), their weights
  and the gradients of those, 4 bytes each."""
  peers, tokens, d, f, e, k = 4, 64, 256, 128, 8, 2
  mesh = jax.make_mesh((peers,), ("expert",), axis_types=(AxisType.Auto,))
  recipe, by_device = recipes.by_name(name), P("expert")

  def layer(x, w13, w2, experts, weights):
    options = {"expert_axis": "expert", "capacity_factor": capacity, "implementation": "xla"}
    out = fp4jax.moe_ffn(x, w13, w2, experts, weights, recipe, **options)
    return out if capacity is None else out[0]

  def both(x, w13, w2, experts, weights, dout):
    over = jax.shard_map(layer, mesh=mesh, in_specs=by_device, out_specs=by_device)
    out, pull = jax.vjp(lambda x, a, b, w: over(x, a, b, experts, w), x, w13, w2, weights)
    return out, pull(dout)

  n = peers * tokens
  x = jax.ShapeDtypeStruct((n, d), jnp.bfloat16)
  w13, w2 = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((e, d, 2 * f), (e, f, d)))
  experts, weights = (jax.ShapeDtypeStruct((n, k), t) for t in (jnp.int32, jnp.float32))
  traced = sum(sent_bytes(jax.make_jaxpr(both)(x, w13, w2, experts, weights, x).jaxpr))

  shape = cost_constants.one_layer(d, f, e, k)
  own = Run(tokens=tokens, length=1, expert=peers, capacity_factor=capacity)
  rows = own.rows_sent(shape) * peers / (peers - 1)
  assert traced == rows * (d * sum(exchanges(recipe)) + 4 * (4 * k + 1))


def test_the_wide_model_is_the_config():
  config = moe_wide.get_config()
  assert shape_of(config.model, config.quantize.attention) == MOE_WIDE
  norms = (2 * MOE_WIDE.layers + 1) * MOE_WIDE.d
  weights = MOE_WIDE.layers * MOE_WIDE.expert_weights + MOE_WIDE.other_weights
  assert weights + norms == parameter_counts(config, BYTES)["parameters"]


def test_the_large_model_has_671_billion_parameters_and_37_active():
  shape = DEEPSEEK_V3
  experts = shape.expert_layers * shape.expert_weights
  assert experts + shape.other_weights == pytest.approx(671e9, rel=1e-3)
  active = experts * shape.top_k / shape.experts + shape.other_weights - shape.head
  assert active == pytest.approx(
    37e9, rel=0.02
  )  # the paper rounds, and counts the embedding or not


def test_operations_are_those_of_the_gemms():
  """But for the router's, and the rows that fill up half a block for each expert."""
  config = moe_wide.get_config()
  flops = {name: sum(own.values()) for name, own in gemm_flops(config, BYTES).items()}
  parts = step_seconds(MOE_WIDE, recipes.BF16, RUN, UNITS)
  filled = 1 + 8 * 64 / (32768 * 2)
  experts = flops["experts.w13"] + flops["experts.w2"]
  assert parts["experts, GEMMs"] == pytest.approx(experts * filled)
  outside = ("attention.qkv", "attention.out", "head.logits")
  assert parts["attention and head, GEMMs"] == sum(flops[name] for name in outside)
  assert parts["attention, scores"] == flops["scores.qk"] + flops["scores.av"]


Q = 17 / 32  # bytes of a value in MXFP4


@pytest.mark.parametrize(
  ("name", "forward", "backward"),
  [
    # x gathered, results read; h read, a written. dout and x gathered, dx read; h and g read, a and
    # dh written.
    ("bf16", (2 + 2 + 2, 4 + 2), (4 + 4 + 2, 4 + 2 + 2 + 4)),
    # x of a token quantized, its codes gathered, results read; h read, a written in FP8. dout read
    # and written in FP8 along both axes, x gathered and quantized, dx read; h and g read, a and
    # along both axes dh written in FP8.
    ("fp8", ((2 + 1) / 2 + 2 + 2, 4 + 1), (2 + 2 + 4 + 3 + 2, 4 + 2 + 1 + 4)),
    # The same of what is packed, x widened to FP8 twice; h is packed beside.
    (
      "hopper_fp4",
      ((2 + Q) / 2 + 2 * Q + (Q + 1) + 2, 4 + 2 * Q + 1),
      (2 + 2 + 2 * Q + (Q + 1) + 2, 2 * Q + 2 + 1 + 4),
    ),
  ],
)
def test_element_wise_bytes_by_hand(name, forward, backward):
  """Of a row with top-2, for d and for f: h and dh are two values for each of f."""
  for d, f, axis in ((1, 0, 0), (0, 1, 1)):
    found = row_bytes(recipes.by_name(name), cost_constants.one_layer(d, f, 8, 2))
    assert found == pytest.approx((forward[axis], backward[axis]))


def test_rows_in_arrays_and_in_gemms():
  """Of 4 peers and 100 tokens, top-2 of 8: any peer may send all tokens, with two choices each."""
  shape, filling = cost_constants.one_layer(128, 128, 8, 2), 128 * 8
  whole = Run(tokens=100, length=1, expert=4)
  bounded = dataclasses.replace(whole, capacity_factor=1.2)
  assert (whole.slots(shape), bounded.slots(shape)) == (100, 60)  # 1.2 * 100 * 2 / 4
  assert whole.rows_held(shape) == 4 * 100 * 2 + filling
  assert bounded.rows_held(shape) == 240 + filling
  assert whole.rows_sent(shape) == 300 and bounded.rows_sent(shape) == 180
  stored = dataclasses.replace(whole, exchange="mosaic")
  assert stored.rows_sent(shape) == pytest.approx(3 * 100 * (1 - (6 * 5) / (8 * 7)))
  uneven = dataclasses.replace(whole, imbalance=1.5)
  assert uneven.rows_multiplied(shape) == 300 + filling / 2


def test_an_all_reduce_of_the_gradients():
  """Experts over data, everything else over all devices; 2 (N - 1) / N of 4 bytes."""
  experts = MOE_WIDE.layers * MOE_WIDE.expert_weights
  other = MOE_WIDE.other_weights
  assert reduced_bytes(MOE_WIDE, RUN) == 0
  assert reduced_bytes(MOE_WIDE, run(data=4)) == 4 * 1.5 * (experts + other)
  assert reduced_bytes(MOE_WIDE, run(expert=4)) == 4 * 1.5 * other
  both = run(data=2, expert=2)
  assert reduced_bytes(MOE_WIDE, both) == 4 * (1.0 * experts / 2 + 1.5 * other)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, remat",
  [
    *itertools.product(["bf16", "fp8", "fp8_dispatch"], ["none", "everything"]),
    *itertools.product(["hopper_fp4"], get_args(Remat)),
  ],
)
def test_what_is_kept_is_what_the_program_keeps(name, remat):
  """Of the tokens that a longer batch has more, in a layer that a deeper model has more. The norms
  keep a few float32 a token that the model does not count."""
  config = Experiment(implementation="xla")
  config.model = ModelConfig(
    d_model=512, num_heads=4, num_kv_heads=2, head_dim=128, d_ff=256, remat=remat
  )
  config.quantize.attention = False
  kept = []
  for layers in (2, 3):
    config.model.num_layers = layers
    trainer = make_trainer(config, BYTES, policy_of(recipes.by_name(name), config))
    kept.append(saved_activation_bytes(trainer, 2, 128))
  sizes = [
    kept_bytes(
      shape_of(config.model), recipes.by_name(name), Run(tokens=n, length=128, remat=remat)
    )
    for n in (256, 512)
  ]
  assert (sizes[1] - sizes[0]) / 256 == pytest.approx(kept[1] - kept[0], abs=100)


# Laws


@pytest.mark.parametrize("name", RECIPES)
def test_more_work_takes_longer(name):
  recipe = recipes.by_name(name)
  constants = dataclasses.replace(fit(RESULTS, "H100"), reduce=300e9)  # it may be found hidden
  seconds = lambda own: sum(step_seconds(MOE_WIDE, recipe, own, constants).values())  # noqa: E731
  size = lambda own: sum(memory_bytes(MOE_WIDE, recipe, own, constants).values())  # noqa: E731
  assert seconds(run(tokens=65536)) > seconds(RUN)
  assert seconds(run(length=4096)) > seconds(RUN)
  assert seconds(run(data=4)) > seconds(run(data=2)) > seconds(RUN)
  assert size(run(data=4)) == size(RUN)
  peers = [run(expert=n, capacity_factor=1.25) for n in (2, 4, 8)]
  by_peers = [step_seconds(MOE_WIDE, recipe, own, constants) for own in peers]
  for part, order in (("exchange", 1), ("optimizer", -1), ("experts, weights", -1)):
    times = [order * parts[part] for parts in by_peers]
    assert times == sorted(times) and times[0] < times[-1]
  states = [memory_bytes(MOE_WIDE, recipe, own, constants)["state"] for own in peers]
  assert states == sorted(states, reverse=True) and states[0] > states[-1]
  rooms = [run(expert=4, capacity_factor=room) for room in (1.0, 1.25, 2.0, None)]
  assert list(map(seconds, rooms)) == sorted(map(seconds, rooms))
  assert list(map(size, rooms)) == sorted(map(size, rooms))
  uneven = run(expert=4, imbalance=1.5)
  assert seconds(uneven) > seconds(run(expert=4))
  policies = [run(remat=r) for r in ("none", "attention+norm", "attention+norm+experts")]
  policies.append(run(remat="everything"))
  assert list(map(seconds, policies)) == sorted(map(seconds, policies))
  assert list(map(size, policies)) == sorted(map(size, policies), reverse=True)


def test_fewer_bytes_travel_faster_and_the_network_is_slower_than_nvlink():
  constants = fit(RESULTS, "H100")
  own = run(expert=4)
  wire = [exchange_seconds(MOE_WIDE, own, b, constants) for b in (4, 2, 33 / 32, 17 / 32)]
  assert wire == sorted(wire, reverse=True)
  far = dataclasses.replace(own, node=2)
  assert exchange_seconds(MOE_WIDE, far, 2, constants) > wire[1]
  assert exchange_seconds(MOE_WIDE, RUN, 2, constants) == 0


# What it predicts


def read(*names):
  files = [RESULTS / f"{name}.jsonl" for name in names]
  return [row for file in files if file.exists() for row in logs.read_rows(file)]


def test_every_measured_time_is_a_cell():
  steps = read(*cost_constants.STEPS)
  steps = [row for row in steps if not row.get("oom")]
  assert len(list(cost_constants.steps(RESULTS))) == len(steps) >= 6
  layers = read("moe_ffn", "moe_ffn_h100", "dispatch")
  layers = [row for row in layers if row["kind"] in ("moe_ffn", "layer")]
  assert len(list(cost_constants.layers(RESULTS))) == len(layers) >= 12
  peaks = read(*cost_constants.PEAKS)
  assert len(list(cost_constants.peaks(RESULTS))) == len(peaks) >= 3


def test_cells_are_predicted():
  found = cost_tables.times(RESULTS)
  wrong = []
  for cell, seconds in found:
    bound = LAYERS_WITHIN if cell.is_layer and cell.devices > 1 else PREDICTED_WITHIN
    if not abs(seconds / cell.measured - 1) <= bound:
      wrong.append(
        f"{cell.recipe.name} {cell.run}: {seconds:.4f} s, measured {cell.measured:.4f} s"
      )
  assert not wrong, "\n".join(wrong)


def test_peaks_are_predicted():
  found = [pair for pair in cost_tables.peaks(RESULTS) if pair[0].measured < math.inf]
  errors = {
    f"{cell.recipe.name} {cell.run.remat} {cell.run.tokens}": size / cell.measured - 1
    for cell, size in found
    if not cell.is_fitted
  }
  assert len(errors) >= 6
  assert {name: error for name, error in errors.items() if not abs(error) <= 0.1} == {}


def test_a_loop_has_room_for_all_gradients():
  constants = fit(RESULTS, "H200")
  looped, one_by_one = (
    memory_bytes(
      dataclasses.replace(MOE_WIDE, layers=12, expert_layers=12, unrolled=unrolled),
      recipes.BF16,
      RUN,
      constants,
    )
    for unrolled in (False, True)
  )
  assert looped.pop("gradients") == 12 * one_by_one.pop("gradients")
  assert looped == one_by_one


def test_the_peak_of_unrolled_layers_is_at_either_end_of_the_backward_pass():
  """Of 12 layers all gradients are more than what is kept where all is computed again."""
  constants, sizes = fit(RESULTS, "H200"), {}
  for remat in ("none", "everything"):
    for unrolled in (False, True):
      shape = dataclasses.replace(MOE_WIDE, layers=12, expert_layers=12, unrolled=unrolled)
      parts = memory_bytes(shape, recipes.HOPPER_FP4, run(remat=remat), constants)
      sizes[remat, unrolled] = parts["gradients"], parts["kept"]
  for remat, at_the_end in (("none", False), ("everything", True)):
    gradients, kept = sizes[remat, False]
    expected = (gradients, kept / 12) if at_the_end else (gradients / 12, kept)
    assert sizes[remat, True] == pytest.approx(expected)


@pytest.mark.parametrize("remat", get_args(Remat))
def test_a_loop_copies_what_is_kept_and_the_gradients(remat):
  """Of what is kept 5 bytes for each: it is filled, copied in and out; of a gradient 3."""
  shape, own = dataclasses.replace(MOE_WIDE, unrolled=False), run(remat=remat)
  gradients = 4 * (3 * 2 * 8 * 4096 * 4096 + MOE_WIDE.other_weights)
  kept = 2 * kept_bytes(shape, recipes.FP8, own)
  parts = [step_seconds(one, recipes.FP8, own, UNITS) for one in (shape, MOE_WIDE)]
  assert parts[0].pop("loop over the layers") == 5 * kept + 3 * gradients
  assert parts[1].pop("loop over the layers") == 0
  assert parts[0] == parts[1]


def test_a_block_computed_again_has_its_values_beside():
  """Those that `none` keeps of every layer, of one."""
  constants = fit(RESULTS, "H200")
  sizes = [
    memory_bytes(
      dataclasses.replace(MOE_WIDE, unrolled=False), recipes.BF16, run(remat=remat), constants
    )
    for remat in ("none", "everything")
  ]
  kept = sizes[0].pop("kept") / 2, sizes[1].pop("kept") / 2
  assert sizes[0].pop("computed again") == 0
  assert sizes[1].pop("computed again") == kept[0] - kept[1] > 0
  assert sizes[0] == sizes[1]


def test_one_length_foretells_the_other():
  """With what is left and the speed of scores from other rows than the one that is predicted."""
  cells = [cell for cell in cost_constants.steps(RESULTS) if cell.source.startswith("moe_wide")]
  constants = fit(RESULTS, cells[0].gpu)
  for long in (cell for cell in cells if cell.run.length == 4096):
    of_long = long.recipe, long.shape
    (short,) = (c for c in cells if c.run.length == 512 and (c.recipe, c.shape) == of_long)
    parts = [
      step_seconds(c.shape, c.recipe, c.run, constants)["attention, scores"] for c in (short, long)
    ]
    assert short.measured - parts[0] + parts[1] == pytest.approx(long.measured, rel=0.02)


def scaling_row(recipe, ms, **fields):
  mesh = {"data": 1, "fsdp": 1, "expert": 1} | fields.pop("mesh", {})
  devices = math.prod(mesh.values())
  row = {"recipe": recipe, "step_time_ms": ms, "mesh": mesh, "devices": devices}
  row |= {
    "git_commit": "0" * 40,
    "tokens_per_step": 32768 * devices,
    "sequence_length": 512,
    "capacity_factor": None,
  }
  return row | {"device": f"gpu NVIDIA H100 80GB HBM3 x{devices}, 64 CPU cores"} | fields


def with_scaling(folder, rows):
  shutil.copytree(
    RESULTS, folder, ignore=shutil.ignore_patterns("scaling.jsonl", "recompute*.jsonl")
  )
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "scaling.jsonl").write_text(text)
  return folder


def test_new_rows_change_constants(tmp_path):
  """A step on one H100, and what BF16 takes longer on four: 6 GB in 20 ms are 300 GB/s."""
  alone = [scaling_row(name, ms) for name, ms in (("bf16", 170.0), ("fp8", 130.0))]
  four = scaling_row("bf16", 190.0, mesh={"data": 4})
  uneven = scaling_row("fp8", 200.0, mesh={"expert": 4}, busiest_device=2.0)
  results = with_scaling(tmp_path / "results", [*alone, four, uneven])
  constants = fit(results, "H100")
  assert constants.reduce == pytest.approx(reduced_bytes(MOE_WIDE, run(data=4)) / 20e-3)
  found = {
    (cell.source, cell.recipe.name, cell.devices): (cell, seconds)
    for cell, seconds in cost_tables.times(results)
  }
  assert found["scaling", "bf16", 1][1] == pytest.approx(0.170)
  assert found["scaling", "bf16", 4][1] == pytest.approx(0.190)
  assert found["scaling", "fp8", 4][0].run.imbalance == 2.0
  assert not found["scaling", "fp8", 4][0].is_fitted
  before = with_scaling(tmp_path / "before", [])
  assert fit(results, "H200").other_bytes["bf16"] == fit(before, "H200").other_bytes["bf16"]


def test_rows_of_other_models_and_policies_are_predicted(tmp_path):
  """As `recompute_table` writes them, where memory suffices and where it does not."""
  model = {"num_layers": 12, "d_model": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
  model |= {"num_experts": 8, "top_k": 2, "d_ff": 8192, "remat": "attention+norm"}
  fields = {"mesh": {"expert": 4}, "capacity_factor": 1.25, "model": model}
  fields |= {"remat": "attention+norm", "sequence_length": 4096}
  fits = scaling_row(
    "hopper_fp4_dispatch", 500.0, oom=False, peak_bytes=60e9, dropped=0.08, **fields
  )
  fails = scaling_row("bf16", None, oom=True, **fields)
  del fails["step_time_ms"]
  results = with_scaling(tmp_path / "results", [])
  before = fit(results, "H100")
  (results / "recompute.jsonl").write_text(json.dumps(fits) + "\n" + json.dumps(fails) + "\n")
  ((cell, seconds),) = [c for c in cost_tables.times(results) if c[0].source == "recompute"]
  assert cell.shape.layers == 12 and cell.run.remat == "attention+norm" and seconds > 0.1
  assert cell.run.imbalance == 1.25  # choices were dropped: the busiest device was full
  peaks = [cell for cell in cost_constants.peaks(results) if cell.source == "recompute"]
  assert [cell.measured for cell in peaks] == [60e9, math.inf]
  assert not any(cell.is_fitted for cell in (cell, *peaks))
  tables = cost_tables.scaling_tables(results)
  assert "out of memory |  |" in tables["peaks"] and "`attention+norm` again" in tables["times"]
  assert fit(results, "H100") == before


def test_stores_into_peers_have_constants_of_their_own(tmp_path):
  """Rows at 400 GB/s and 50 us, as a kernel that sends no empty slots would take."""
  results = with_scaling(tmp_path / "results", [])
  rows = logs.read_rows(RESULTS / "dispatch.jsonl")
  speed, latency = 400e9, 50e-6
  with (results / "dispatch.jsonl").open("a") as file:
    for row in rows:
      if row.get("part") == "wire" and row.get("exchange", "xla") == "xla":
        share = expected_share(row["experts"], row["top_k"], row["devices"])
        value = {"bf16": 2, "fp8": 33 / 32, "mxfp4": 17 / 32}[row["payload"]]
        sent = (row["devices"] - 1) * row["tokens"] * share * row["d"] * value
        time_us = (latency + sent / speed) * 1e6
        file.write(json.dumps(row | {"exchange": "stores", "time_us": time_us}) + "\n")
  wire = fit(results, "H100").wire
  assert wire["stores"] == pytest.approx((latency, speed))
  assert wire["xla"] == fit(RESULTS, "H100").wire["xla"]


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (scaling_row("bf16", 1.0, mesh={"fsdp": 2}), "no term for fsdp"),
    (scaling_row("bf16", 1.0, device="cpu x86_64 x1"), "neither an H100 nor an H200"),
  ],
)
def test_rows_that_it_can_not_tell_of_are_refused(tmp_path, row, message):
  results = with_scaling(tmp_path / "results", [row])
  with pytest.raises(ValueError, match=message):
    list(cost_constants.steps(results))


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("mxfp4", {}, "'mxfp4': only bf16, fp8"),
    ("bf16", {"expert": 3}, "expert=3 devices do not divide 8 experts"),
    ("bf16", {"expert": 2, "exchange": "nccl"}, "exchange='nccl': only xla"),
  ],
)
def test_what_is_not_measured_is_refused(name, changes, message):
  constants = dataclasses.replace(UNITS, wire={"xla": (0.0, 1.0)})
  with pytest.raises(ValueError, match=message):
    step_seconds(MOE_WIDE, recipes.by_name(name), run(**changes), constants)


def test_the_command_prints_parts_that_sum_up():
  line = [sys.executable, "-m", "experiments.cost_model", "--config=configs/moe_wide.py"]
  line += ["--config.mesh.expert=4", "--config.recipes=bf16", "--gpu=H200", "--imbalance=1.5"]
  line += ["--config.data.batch_size=256"]  # of 512 tokens each, 32,768 a device
  ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
  first, *parts = ran.stdout.splitlines()
  seconds = step_seconds(MOE_WIDE, recipes.BF16, run(expert=4, imbalance=1.5), fit(RESULTS, "H200"))
  assert first.startswith(f"bf16: {sum(seconds.values()) * 1e3:.1f} ms")
  sizes = {unit: [float(p.split()[-2]) for p in parts if p.endswith(unit)] for unit in ("ms", "GB")}
  assert sum(sizes["ms"]) == pytest.approx(sum(seconds.values()) * 1e3, abs=0.05 * len(seconds))
  assert sum(sizes["GB"][:-1]) == pytest.approx(sizes["GB"][-1], abs=0.25)


def test_the_page_holds_the_tables_of_the_rows():
  text = (ROOT / "docs" / "scaling.md").read_text()
  for name, content in cost_tables.scaling_tables(RESULTS).items():
    assert tables.fill(text, name, content) == text


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--config.data.microbatches=2"], "error: data.microbatches=2: the model has no term for it"),
    (["--config.mesh.data=3"], "error: data.batch_size=64 sequences over 3 devices"),
  ],
)
def test_the_command_refuses_what_it_would_count_wrong(options, message):
  line = [sys.executable, "-m", "experiments.cost_model", "--config=configs/moe_wide.py", *options]
  ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
  assert ran.returncode and ran.stderr.startswith(message), ran.stderr


def test_each_kind_of_gpu_has_its_own_rows(tmp_path):
  """As after a benchmark on an H100, whose rows take the place of an H200's."""
  results = with_scaling(tmp_path / "results", [])
  shutil.copy(results / "kernel_bench_h100.jsonl", results / "kernel_bench.jsonl")
  with pytest.raises(ValueError, match="are of one kind of GPU, H100"):
    fit(results, "H200")
