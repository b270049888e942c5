"""Each function and recipe over 4 devices, against one: `.venv/bin/python tests/sharding_table.py`.

Tokens are divided among the devices, weights are whole on each. Of jit the numbers are those of one
call on one device; of shard_map those of a call per shard on one device, weights' gradients added,
and of moe_ffn those of one call in as many parts.
"""

import contextlib
import functools
import sys
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import fp4jax
from fp4jax import operands, recipes

AXES = ("data", "model")
SHARDS = 4
SEED = 7
ROWS, WHOLE = PartitionSpec(AXES), PartitionSpec()
MODES = ("jit Auto", "jit Explicit", "shard_map")
EXACT_SUMS = ("mxfp4", "mxfp4_rht_sr")  # products of few bits and alike: float32 sums round nothing


class Case(NamedTuple):
  """A function of (sharded, whole) arguments, its first one rows of tokens."""

  apply: callable  # (recipe, *arguments) -> rows
  arguments: tuple
  specs: tuple  # of jit; in shard_map what is divided is divided into shards of tokens
  of_shards: tuple  # the arguments that shard_map takes: sizes are each shard's own
  differentiated: tuple[int, ...]


def _dot_general(recipe, x, w):
  contract = (((x.ndim - 1,), (0,)), ((), ()))
  return fp4jax.dot_general(recipe, key=jax.random.key(SEED))(x, w, contract)


def _grouped_dot(recipe, x, w, sizes):
  sizes = sizes.reshape(-1, w.shape[0])[0]  # of one shard it has an axis in front
  return fp4jax.grouped_dot(x, w, sizes, recipe, key=jax.random.key(SEED))


def _moe_ffn(recipe, x, w13, w2, weights, experts, token_parts=1):
  keys = jax.random.key(SEED), jax.random.key(SEED + 1)
  how = {"keys": keys, "token_parts": token_parts}
  return fp4jax.moe_ffn(x, w13, w2, experts, weights, recipe, **how)


def cases() -> dict[str, Case]:
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  k, f, experts = 128, 128, 2
  x, w = normal(2, 256, k), normal(k, 128)
  sequences = PartitionSpec("data", "model")  # each device has half of a sequence
  rows, w_experts = normal(512, k), normal(experts, k, 128)
  sizes = jnp.asarray([[50, 60], [128, 0], [0, 100], [3, 1]])
  tokens, w13, w2 = normal(128, k), normal(experts, k, 2 * f) / 8, normal(experts, f, k) / 8
  choices = jnp.asarray(rng.integers(0, experts, (128, 2)))
  weights = jnp.asarray(rng.random((128, 2)), jnp.float32)
  moe = (tokens, w13, w2, weights, choices)
  return {
    "dot_general": Case(_dot_general, (x, w), (sequences, WHOLE), (x, w), (0, 1)),
    "grouped_dot": Case(
      _grouped_dot,
      (rows, w_experts, sizes.sum(0)),
      (ROWS, WHOLE, WHOLE),
      (rows, w_experts, sizes),
      (0, 1),
    ),
    "moe_ffn": Case(_moe_ffn, moe, (ROWS, WHOLE, WHOLE, ROWS, ROWS), moe, (0, 1, 2, 3)),
  }


def with_gradients(case: Case, recipe, function=None):
  """(*arguments, dout) -> result and gradients, of `function` in place of `case.apply`."""
  function = function or functools.partial(case.apply, recipe)

  def run(*arguments_and_dout):
    *arguments, dout = arguments_and_dout

    def of_differentiated(*some):
      merged = list(arguments)
      for i, value in zip(case.differentiated, some, strict=True):
        merged[i] = value
      return function(*merged)

    out, pull = jax.vjp(of_differentiated, *(arguments[i] for i in case.differentiated))
    return (out, *pull(dout))

  return run


def cotangent(case: Case) -> jax.Array:
  """As long as the result: rows of tokens, 128 columns."""
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(*case.arguments[0].shape[:-1], 128)), jnp.float32)


def make_mesh(kind: AxisType) -> Mesh:
  return jax.make_mesh((2, 2), AXES, axis_types=(kind,) * 2, devices=jax.devices("cpu")[:SHARDS])


def place(mesh: Mesh, arrays, specs):
  return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


def over_devices(case: Case, recipe, mode: str):
  """Result and gradients over the 4 devices."""
  mesh = make_mesh(AxisType.Explicit if mode == "jit Explicit" else AxisType.Auto)
  with jax.set_mesh(mesh):
    specs = (*case.specs, case.specs[0])
    if mode != "shard_map":
      arguments = place(mesh, (*case.arguments, cotangent(case)), specs)
      return jax.jit(with_gradients(case, recipe))(*arguments)
    if case.apply is _grouped_dot:
      specs = (ROWS, WHOLE, ROWS, ROWS)
    sharded = jax.shard_map(
      functools.partial(case.apply, recipe), in_specs=specs[:-1], out_specs=specs[-1]
    )
    arguments = place(mesh, (*case.of_shards, cotangent(case)), specs)
    return jax.jit(with_gradients(case, recipe, sharded))(*arguments)


@functools.cache  # for both modes of jit
def on_one_device(function: str, recipe):
  case = cases()[function]
  return jax.jit(with_gradients(case, recipe))(*case.arguments, cotangent(case))


@contextlib.contextmanager
def keys_of_shard(i: jax.Array):
  """What divided operands draw by on shard i; weights draw by the key as it is."""

  def of(key, *_):
    own = key if key is None else jax.random.fold_in(key, i)
    return key if key is None else operands.Keys(lhs=own, rhs=key, dy=own, shared=key)

  with mock.patch.object(operands.Keys, "of", of):
    yield


def shard_by_shard(case: Case, recipe):
  """The call of each shard on one device: results in a row, gradients of weights in a list."""
  specs = case.specs if case.apply is not _grouped_dot else (ROWS, WHOLE, ROWS)

  def cut(x, spec, i):
    if spec == WHOLE:
      return x
    if len(spec) == 2:  # batch and sequence
      return x[i // 2 : i // 2 + 1, i % 2 * x.shape[1] // 2 : (i % 2 + 1) * x.shape[1] // 2]
    n = len(x) // SHARDS
    return x[i * n : (i + 1) * n]

  @jax.jit
  def run(i, *arguments):
    with keys_of_shard(i):
      return with_gradients(case, recipe)(*arguments)

  everything = (*case.of_shards, cotangent(case)), (*specs, specs[0])
  parts = [
    run(i, *(cut(x, spec, i) for x, spec in zip(*everything, strict=True))) for i in range(SHARDS)
  ]
  specs_out = (specs[0], *(specs[i] for i in case.differentiated))
  results = []
  for spec, part in zip(specs_out, zip(*parts, strict=True), strict=True):
    if spec == WHOLE:
      results.append([np.asarray(p) for p in part])
    elif len(spec) == 2:
      rows = [np.concatenate(part[i : i + 2], axis=1) for i in (0, 2)]
      results.append(np.concatenate(rows))
    else:
      results.append(np.concatenate(part))
  return results


def in_parts(case: Case, recipe):
  """One call of `moe_ffn` on one device, its tokens in as many parts as there are shards; of the
  weights' gradients a list whose sum they are."""
  function = functools.partial(_moe_ffn, recipe, token_parts=SHARDS)
  run = jax.jit(with_gradients(case, recipe, function))
  arguments, dout = case.arguments, cotangent(case)
  results = [np.asarray(r) for r in run(*arguments, dout)]
  part = np.arange(len(dout)) // (len(dout) // SHARDS)
  alone = [run(*arguments, jnp.where((part == i)[:, None], dout, 0)) for i in range(SHARDS)]
  for i in (2, 3):  # a part without a gradient adds none
    results[i] = [np.asarray(r[i]) for r in alone]
  return results


def sum_of_magnitudes(case: Case, recipe):
  """Sum of |x_q| |dy_q| over the tokens: rounding is symmetric, so that it is the gradient of the
  weights of |x| and |dy|. Of recipes without transforms."""
  absolute = (jnp.abs(case.arguments[0]), *case.arguments[1:], jnp.abs(cotangent(case)))
  return jax.jit(with_gradients(case, recipe))(*absolute)[2]


class Difference(NamedTuple):
  name: str
  same: bool  # bit for bit
  largest: float  # as a share of the largest value
  excess: np.ndarray  # |difference| / what the order of a float32 sum may change


def differences(function: str, recipe, mode: str) -> list[Difference]:
  """Of the result and of each gradient, in the order of the arguments."""
  case = cases()[function]
  got = over_devices(case, recipe, mode)
  if mode != "shard_map":
    expected = on_one_device(function, recipe)
  elif function == "moe_ffn":
    expected = in_parts(case, recipe)
  else:
    expected = shard_by_shard(case, recipe)
  found = []
  unit = 2.0**-24  # half an ulp of 1
  for i, (a, b) in enumerate(zip(got, expected, strict=True)):
    a, bound = np.asarray(a), 0.0
    if isinstance(b, list):
      # A sum of n terms in two orders: each within (n - 1) half ulps of the sum of magnitudes.
      bound = 2 * (SHARDS - 1) * unit * sum(np.abs(p) for p in b)
      b = functools.reduce(np.add, b)
    elif function == "dot_general" and i == 2 and recipe.name not in EXACT_SUMS:
      tokens = case.arguments[0].size // case.arguments[0].shape[-1]
      bound = 2 * (tokens - 1) * unit * np.asarray(sum_of_magnitudes(case, recipe))
    b = np.asarray(b)
    assert np.isfinite(b).all() and np.abs(b).max() > 0, (function, recipe.name, mode, i)
    difference = np.abs(a - b)
    excess = np.divide(difference, bound, out=np.full(b.shape, np.inf), where=bound > 0)
    excess = np.where(difference == 0, 0.0, excess)
    name = "y" if i == 0 else f"d{i}"
    same = bool((a == b).all())
    found.append(Difference(name, same, float(difference.max() / np.abs(b).max()), excess))
  return found


def cell(found: list[Difference]) -> str:
  words = {d.name: "bits" if d.same else f"{d.largest:.0e}" for d in found}
  if set(words.values()) == {"bits"}:
    return "bit for bit"
  return ", ".join(f"{name} {word}" for name, word in words.items() if word != "bits")


def main(names):
  print(f"| function | recipe | {' | '.join(MODES)} |\n|---|---|{'---|' * len(MODES)}")
  for function in cases():
    for name in names or recipes.RECIPES:
      cells = [cell(differences(function, recipes.RECIPES[name], mode)) for mode in MODES]
      print(f"| {function} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", SHARDS)
  main(sys.argv[1:])
