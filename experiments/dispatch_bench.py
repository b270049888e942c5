"""Times what experts on several GPUs cost: rows to their experts and back, and a whole layer.

    python -m experiments.dispatch_bench --out=results/dispatch.jsonl

Every GPU has --tokens tokens and its share of the experts. Before anything is timed, what arrived
is compared with what one device packs. A time is the wall clock of the slowest device, per call of
many in a row; payloads take turns.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fp4jax
from experiments import command_line, logs
from experiments.environment import COMMIT, describe_environment
from fp4jax import recipes
from fp4jax.dispatch import AllToAll, Choices
from fp4jax.formats import Format
from fp4jax.implementation import device_obstacle
from fp4jax.quantization import pack_rows
from fp4jax.recipe import Recipe

_OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 16384, "Of each device.", lower_bound=128)
_D = flags.DEFINE_integer("d", 7168, "Width of a token.", lower_bound=128)
_F = flags.DEFINE_integer("f", 2048, "Width of an expert, in the whole layer.", lower_bound=128)
_EXPERTS = flags.DEFINE_list("experts", ["64", "256"], "How many there are.")
_TOP_K = flags.DEFINE_integer("top_k", 8, "Of a token.", lower_bound=1)
_CAPACITY = flags.DEFINE_float("capacity_factor", 1.1, "Of the whole layer.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Of each program.", lower_bound=3)
_CALLS = flags.DEFINE_integer("calls", 10, "In a row, of each round.", lower_bound=1)

AXIS = "expert"
PAYLOADS = {"bf16": None, "fp8": fp4jax.FP8_BLOCK_POW2, "mxfp4": fp4jax.MXFP4}
LAYERS = {
  "bf16": recipes.BF16.replace({"payload.sums": "bfloat16"}),
  "fp8": recipes.FP8_DISPATCH,
  "hopper_fp4": recipes.HOPPER_FP4_DISPATCH,
}


def packed(x: jax.Array, fmt: Format | None) -> Any:
  return x if fmt is None else pack_rows(x, fmt, "mosaic")


def widened(arrived: Any, fmt: Format | None) -> Any:
  """What the first GEMM reads: bf16, or E4M3 with a scale for 128 values."""
  if fmt != fp4jax.MXFP4:
    return arrived
  if device_obstacle():
    return fp4jax.quantize(fp4jax.dequantize(arrived, jnp.bfloat16), fp4jax.FP8_BLOCK_POW2)
  from pallas_kernels import convert

  return convert.mxfp4_to_fp8_rows(arrived.codes, arrived.scales)


def plan_of(experts: jax.Array, num_experts: int) -> AllToAll:
  tokens, k = experts.shape
  part = lax.axis_index(AXIS).astype(jnp.int32)[None]
  places = jnp.arange(tokens * k, dtype=jnp.int32).reshape(tokens, k)
  choices = Choices(experts, jnp.zeros(tokens, jnp.int32), places, part)
  return AllToAll.of(choices, AXIS, num_experts // lax.axis_size(AXIS), tokens)[0]


def programs(mesh: Mesh, num_experts: int) -> dict[tuple[str, str], Callable]:
  """By payload and what is done, of (x, experts, plan, what arrived): all in shards."""
  over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
  found = {("", "plan"): over(lambda x, experts, plan, sums: plan_of(experts, num_experts))}
  for name, fmt in PAYLOADS.items():

    def dispatch(x, experts, plan, sums, fmt=fmt):
      return jax.tree.leaves(widened(plan.send(packed(x, fmt)), fmt))

    def wire(x, experts, plan, sums, name=name):
      """As many bytes from buffers that lie ready."""
      rows = [r.reshape(lax.axis_size(AXIS), -1, r.shape[1]) for r in sums[name]]
      return [lax.all_to_all(r, AXIS, 0, 0).reshape(-1, r.shape[2]) for r in rows]

    found[name, "dispatch"] = over(dispatch)
    found[name, "wire"] = over(wire)

  def combine(x, experts, plan, sums):
    return plan.collect(sums["bf16"][0].astype(jnp.float32), jnp.bfloat16).astype(jnp.bfloat16)

  found["bfloat16", "combine"] = over(combine)
  return found


def check(mesh: Mesh, x: jax.Array, plan: AllToAll) -> None:
  """Raises where a row that arrived is not what one device packs of it, bit for bit."""
  over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
  whole, token_of_slot = np.asarray(x), np.asarray(plan.token_of_slot)
  peers = mesh.size
  tokens, slots = len(whole) // peers, token_of_slot.shape[1]
  token_of_slot = token_of_slot.reshape(peers, peers, slots)
  for name, fmt in PAYLOADS.items():
    arrived = jax.jit(over(lambda x, plan, fmt=fmt: plan.send(packed(x, fmt))))(x, plan)
    expected = jax.jit(packed, static_argnums=1)(jnp.asarray(whole), fmt)
    for a, e in zip(jax.tree.leaves(arrived), jax.tree.leaves(expected), strict=True):
      if not a.size:
        continue
      a, e = np.asarray(a).reshape(peers, peers, slots, -1), np.asarray(e)
      for device in range(peers):
        for source in range(peers):
          here = token_of_slot[source, device]
          rows = e[source * tokens : (source + 1) * tokens][here[here < tokens]]
          if not np.array_equal(a[device, source, : len(rows)], rows.reshape(len(rows), -1)):
            raise ValueError(f"{name}: what device {device} has from {source} differs")


def layers(mesh: Mesh) -> Iterator[tuple[str, Callable]]:
  """Forward and backward pass of `moe_ffn`, of (x, experts, weights, dout, w13, w2)."""
  for name, recipe in LAYERS.items():
    yield name, jax.jit(functools.partial(_layer, mesh, recipe))


def _layer(mesh: Mesh, recipe: Recipe, x, experts, weights, dout, w13, w2):
  def own(x, w13, w2, weights, experts):
    options = {"expert_axis": AXIS, "capacity_factor": _CAPACITY.value}
    y, dropped = fp4jax.moe_ffn(x, w13, w2, experts, weights, recipe, **options)
    return y, dropped[None]

  layer = jax.shard_map(own, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
  run = lambda x, w13, w2, weights: layer(x, w13, w2, weights, experts)  # noqa: E731
  y, pull, dropped = jax.vjp(run, x, w13, w2, weights, has_aux=True)
  return y, *pull(dout), dropped


def times_us(program: Callable, arguments: tuple, calls: int) -> float:
  began = time.perf_counter()
  for _ in range(calls):
    result = program(*arguments)
  jax.block_until_ready(result)
  return (time.perf_counter() - began) / calls * 1e6


def in_turns(compiled: dict, arguments: tuple, rounds: int, calls: int) -> dict[Any, dict]:
  for program in compiled.values():
    jax.block_until_ready(program(*arguments))
  times = {key: [] for key in compiled}
  for _ in range(rounds):
    for key, program in compiled.items():
      times[key].append(times_us(program, arguments, calls))
  found = {}
  for key, own in times.items():
    low, median, high = statistics.quantiles(own, n=4)
    found[key] = {"time_us": median, "time_us_quartiles": [low, high]}
  return found


def measure(num_experts: int) -> Iterator[dict[str, Any]]:
  devices = jax.devices()
  mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
  place = NamedSharding(mesh, P(AXIS))
  tokens, d, k = _TOKENS.value * len(devices), _D.value, _TOP_K.value
  normal = jax.jit(
    lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16),
    static_argnums=1,
    out_shardings=place,
  )
  scores = np.random.default_rng(1).random((tokens, num_experts), np.float32)
  experts = np.argpartition(scores, -k, axis=1)[:, -k:].astype(np.int32)
  experts = jax.device_put(experts, place)
  x = normal(0, (tokens, d))
  over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
  plan = jax.jit(over(lambda experts: plan_of(experts, num_experts)))(experts)
  check(mesh, x, plan)
  shape = {"tokens": _TOKENS.value, "d": d, "experts": num_experts, "top_k": k}
  shape["devices"] = len(devices)
  sums = normal(2, (tokens * len(devices), d))
  ready = {
    name: jax.tree.leaves(jax.jit(over(lambda x, f=fmt: packed(x, f)))(sums))
    for name, fmt in PAYLOADS.items()
  }
  arguments = x, experts, plan, ready
  compiled = {key: jax.jit(f) for key, f in programs(mesh, num_experts).items()}
  for (payload, part), time_of in in_turns(
    compiled, arguments, _ROUNDS.value, _CALLS.value
  ).items():
    yield shape | {"kind": "exchange", "payload": payload, "part": part} | time_of
  del sums, ready, arguments, compiled

  f = _F.value
  w13, w2 = normal(3, (num_experts, d, 2 * f)), normal(4, (num_experts, f, d))
  weights = jax.device_put(jnp.full((tokens, k), 1 / k, jnp.float32), place)
  arguments = x, experts, weights, normal(5, (tokens, d)), w13 / d**0.5, w2 / f**0.5
  compiled, dropped = {}, {}
  for name, program in layers(mesh):
    compiled[name] = program.lower(*arguments).compile()
    dropped[name] = int(np.sum(compiled[name](*arguments)[-1]))
  calls = max(1, _CALLS.value // 5)
  for name, time_of in in_turns(compiled, arguments, _ROUNDS.value, calls).items():
    memory = compiled[name].memory_analysis()
    yield (
      shape
      | {"kind": "layer", "payload": name, "f": f, "capacity_factor": _CAPACITY.value}
      | {"dropped": dropped[name], "temp_bytes": memory.temp_size_in_bytes}
      | time_of
    )


def main(_) -> None:
  environment = describe_environment(COMMIT.value)
  log = logs.Rewritten(_OUT.value)
  for experts in map(int, _EXPERTS.value):
    for row in measure(experts):
      keys = ("device", "git_commit", "git_dirty", "versions")
      log.write(row | {key: environment[key] for key in keys})
      name = " ".join(str(row[key]) for key in ("kind", "payload", "part") if row.get(key))
      print(f"{row['experts']:4d} experts  {name:24s} {row['time_us']:9.0f} us", flush=True)
  log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
