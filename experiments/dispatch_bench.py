"""Times what experts on several GPUs cost: rows to their experts and back, and a whole layer.

    python -m experiments.dispatch_bench --out=results/dispatch.jsonl

Every GPU has --tokens tokens and its share of the experts. Rows travel by `lax.all_to_all` ("xla")
and by kernels that store into the peers' memory ("mosaic"). Before anything is timed, what arrived
is compared with what one device packs. A time is the wall clock of the slowest device, per call of
many in a row; payloads take turns.
"""

import concurrent.futures
import functools
import itertools
import math
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
from fp4jax.dispatch import AllToAll, Choices, packed
from fp4jax.formats import Format
from fp4jax.implementation import device_obstacle
from fp4jax.mosaic.dispatch import PeerMemory
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


def by_kernels(plan: AllToAll) -> PeerMemory:
  return PeerMemory(plan.token_of_slot, plan.slot_of_token, plan.peer_of_choice, plan.axis)


def exchanges() -> dict[str, Callable[[AllToAll], AllToAll]]:
  """By their name, from the plan of "xla"."""
  return {"xla": lambda plan: plan} | ({} if device_obstacle() else {"mosaic": by_kernels})


def programs(mesh: Mesh, num_experts: int) -> dict[tuple[str, str, str], Callable]:
  """By exchange, payload and what is done, of (experts, plan, x, x packed, rows that lie ready for
  all peers): all in shards."""
  over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
  found = {("", "", "plan"): over(lambda experts, *_: plan_of(experts, num_experts))}

  def there(of, fmt, experts, plan, x, rows, ready):
    return jax.tree.leaves(widened(of(plan).send_rows(x, fmt, "mosaic"), fmt))

  def wire(of, name, experts, plan, x, rows, ready):
    """As many bytes from buffers that lie ready."""
    if of is by_kernels:
      from pallas_kernels import exchange

      return exchange.send(rows[name], plan.slot_of_token, plan.token_of_slot.shape[1], AXIS)
    by_peer = [r.reshape(lax.axis_size(AXIS), -1, r.shape[1]) for r in ready[name]]
    return [lax.all_to_all(r, AXIS, 0, 0).reshape(-1, r.shape[2]) for r in by_peer]

  def combine(of, experts, plan, x, rows, ready):
    results = ready["bf16"][0].astype(jnp.float32)
    return of(plan).collect(results, jnp.bfloat16, jnp.bfloat16)

  for exchange, of in exchanges().items():
    for name, fmt in PAYLOADS.items():
      found[exchange, name, "dispatch"] = over(functools.partial(there, of, fmt))
      found[exchange, name, "wire"] = over(functools.partial(wire, of, name))
    found[exchange, "bfloat16", "combine"] = over(functools.partial(combine, of))
  return found


def check(mesh: Mesh, x: jax.Array, plan: AllToAll) -> None:
  """Raises where a row that arrived is not what one device packs of it, bit for bit."""
  over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
  whole, token_of_slot = np.asarray(x), np.asarray(plan.token_of_slot)
  peers = mesh.size
  tokens, slots = len(whole) // peers, token_of_slot.shape[1]
  token_of_slot = token_of_slot.reshape(peers, peers, slots)
  for (exchange, of), (name, fmt) in itertools.product(exchanges().items(), PAYLOADS.items()):
    send = lambda x, plan, of=of, fmt=fmt: of(plan).send_rows(x, fmt, "mosaic")  # noqa: E731
    arrived = jax.jit(over(send))(x, plan)
    expected = jax.jit(packed, static_argnums=(1, 2))(jnp.asarray(whole), fmt, "mosaic")
    for a, e in zip(jax.tree.leaves(arrived), jax.tree.leaves(expected), strict=True):
      a, e = np.asarray(a).reshape(peers, peers, slots, -1), np.asarray(e)
      for device, source in itertools.product(range(peers), range(peers)):
        here = token_of_slot[source, device]
        rows = e[source * tokens : (source + 1) * tokens][here[here < tokens]]
        if not np.array_equal(a[device, source, : len(rows)], rows.reshape(len(rows), -1)):
          raise ValueError(f"{exchange} {name}: what device {device} has from {source} differs")


def layers(mesh: Mesh) -> Iterator[tuple[tuple[str, str], Callable]]:
  """Forward and backward pass of `moe_ffn`, of (x, experts, weights, dout, w13, w2)."""
  for exchange, (name, recipe) in itertools.product(exchanges(), LAYERS.items()):
    yield (exchange, name), jax.jit(functools.partial(_layer, mesh, recipe, exchange))


def _layer(mesh: Mesh, recipe: Recipe, exchange: str, x, experts, weights, dout, w13, w2):
  y, pull, dropped = _forward(mesh, recipe, exchange, x, experts, weights, w13, w2)
  return y, *pull(dout), dropped


def _forward(mesh: Mesh, recipe: Recipe, exchange: str, x, experts, weights, w13, w2):
  """y, what goes back from its gradient, and the choices dropped."""

  def own(x, w13, w2, weights, experts):
    options = {"expert_axis": AXIS, "capacity_factor": _CAPACITY.value, "exchange": exchange}
    y, dropped = fp4jax.moe_ffn(x, w13, w2, experts, weights, recipe, **options)
    return y, dropped[None]

  layer = jax.shard_map(own, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
  run = lambda x, w13, w2, weights: layer(x, w13, w2, weights, experts)  # noqa: E731
  return jax.vjp(run, x, w13, w2, weights, has_aux=True)


def bytes_sent(recipe: Recipe, d: int) -> int:
  """Of a row of a token, there and back, in the forward and the backward pass."""
  x = jax.ShapeDtypeStruct((1, d), jnp.bfloat16)
  payload, total = recipe.payload, 2 * jnp.dtype(recipe.payload.sums).itemsize * d
  for fmt in (payload.forward or recipe.residual.lhs, payload.backward):
    there = jax.eval_shape(lambda x, fmt=fmt: packed(x, fmt, "xla"), x)
    total += sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(there))
  return total


def bytes_kept(mesh: Mesh, name: str, exchange: str, arguments: tuple) -> int:
  """Of a device, from the forward to the backward pass, weights not counted."""
  x, experts, weights, _, *of_experts = arguments
  forward = functools.partial(_forward, mesh, LAYERS[name], exchange)
  _, pull, _ = jax.eval_shape(forward, x, experts, weights, *of_experts)
  kept = [r for r in jax.tree.leaves(pull) if r.shape not in [w.shape for w in of_experts]]
  return sum(math.prod(r.shape) * r.dtype.itemsize for r in kept) // mesh.size


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
  goes_elsewhere = np.arange(mesh.size) != np.arange(mesh.size)[:, None]  # by device and peer
  of_peers = np.asarray(plan.slot_of_token).reshape(mesh.size, mesh.size, -1) < _TOKENS.value
  elsewhere = int(np.sum(of_peers & goes_elsewhere[..., None]))  # rows of all devices
  shape = {"tokens": _TOKENS.value, "d": d, "experts": num_experts, "top_k": k}
  shape["devices"] = len(devices)
  rows_of = jax.jit(
    over(lambda x: {n: jax.tree.leaves(packed(x, f, "mosaic")) for n, f in PAYLOADS.items()})
  )
  arguments = experts, plan, x, rows_of(x), rows_of(normal(2, (tokens * len(devices), d)))
  compiled = {key: jax.jit(f) for key, f in programs(mesh, num_experts).items()}
  for (exchange, payload, part), time_of in in_turns(
    compiled, arguments, _ROUNDS.value, _CALLS.value
  ).items():
    row = {"kind": "exchange", "exchange": exchange, "payload": payload, "part": part}
    yield shape | row | time_of
  del arguments, compiled

  f = _F.value
  w13, w2 = normal(3, (num_experts, d, 2 * f)), normal(4, (num_experts, f, d))
  weights = jax.device_put(jnp.full((tokens, k), 1 / k, jnp.float32), place)
  arguments = x, experts, weights, normal(5, (tokens, d)), w13 / d**0.5, w2 / f**0.5
  del w13, w2
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compile_one = lambda program: program.lower(*arguments).compile()  # noqa: E731
    names, programs_of = zip(*layers(mesh), strict=True)
    compiled = dict(zip(names, pool.map(compile_one, programs_of), strict=True))
  dropped = {key: int(np.sum(program(*arguments)[-1])) for key, program in compiled.items()}
  calls = max(1, _CALLS.value // 5)
  for (exchange, name), time_of in in_turns(compiled, arguments, _ROUNDS.value, calls).items():
    memory = compiled[exchange, name].memory_analysis()
    row = {"kind": "layer", "exchange": exchange, "payload": name, "f": f}
    row |= {"capacity_factor": _CAPACITY.value, "dropped": dropped[exchange, name]}
    slots = min(_TOKENS.value, math.ceil(_CAPACITY.value * tokens * k / mesh.size**2))
    sent = (mesh.size - 1) * slots if exchange == "xla" else elsewhere // mesh.size
    row["bytes_sent"] = sent * bytes_sent(LAYERS[name], d)
    row["bytes_kept"] = bytes_kept(mesh, name, exchange, arguments)
    yield shape | row | {"temp_bytes": memory.temp_size_in_bytes} | time_of


def main(_) -> None:
  environment = describe_environment(COMMIT.value)
  log = logs.Rewritten(_OUT.value)
  for experts in map(int, _EXPERTS.value):
    for row in measure(experts):
      keys = ("device", "git_commit", "git_dirty", "versions")
      log.write(row | {key: environment[key] for key in keys})
      name = " ".join(
        str(row[key]) for key in ("kind", "exchange", "payload", "part") if row.get(key)
      )
      print(f"{row['experts']:4d} experts  {name:32s} {row['time_us']:9.0f} us", flush=True)
  log.close()


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
