"""Rows stored into the memory of other GPUs are those that all_to_all brings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fp4jax
from fp4jax import moe_ffn, recipes
from fp4jax.dispatch import AllToAll, Choices
from fp4jax.mosaic.dispatch import PeerMemory

FORMATS = {"bf16": None, "fp8": fp4jax.FP8_BLOCK_POW2, "mxfp4": fp4jax.MXFP4}
PER_DEVICE, K = 4, 3  # experts


def needs_gpus(test):
  few = jax.device_count() < 2
  return pytest.mark.gpu(pytest.mark.skipif(few, reason="needs two GPUs or more")(test))


def make_mesh(devices, data=1):
  axes = {"axis_types": (AxisType.Auto,) * 2, "devices": jax.devices()[: data * devices]}
  return jax.make_mesh((data, devices), ("data", "expert"), **axes)


ROWS = P(("data", "expert"))


def over(mesh, f):
  return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=ROWS, out_specs=ROWS))


def choices_of(mesh, tokens, seed=0):
  """Experts of every device's tokens: few ask the last device, and none its last expert."""
  rng = np.random.default_rng(seed)
  peers = mesh.shape["expert"]
  shares = np.r_[np.ones(PER_DEVICE * (peers - 1)), np.full(PER_DEVICE - 1, 0.05), 0]
  picks = [
    rng.choice(len(shares), K, replace=False, p=shares / shares.sum())
    for _ in range(tokens * mesh.size)
  ]
  return jnp.asarray(np.array(picks), jnp.int32)


def plan(kind, experts, slots):
  tokens = len(experts)
  own = jnp.zeros(tokens, jnp.int32), jnp.arange(tokens * K, dtype=jnp.int32).reshape(-1, K)
  part = lax.axis_index("expert").astype(jnp.int32)[None]
  return kind.of(Choices(experts, *own, part), "expert", PER_DEVICE, slots)[0]


def filled(mesh, experts, slots):
  """By device, source and slot, whether a row is for it: counted from the choices."""
  peers = mesh.shape["expert"]
  goes = np.asarray(experts).reshape(-1, peers, len(experts) // mesh.size, K) // PER_DEVICE
  counts = np.stack([(goes == p).any(-1).sum(-1) for p in range(peers)], 1)  # data, device, source
  return (np.arange(slots) < counts.reshape(-1, peers, 1)).reshape(-1)


@needs_gpus
@pytest.mark.parametrize("tokens, slots", [(301, 301), (640, 100)])
@pytest.mark.parametrize("d", [512, 1024, 7168])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_arrive_bit_for_bit_and_sums_return(name, d, tokens, slots):
  mesh = make_mesh(jax.device_count())
  x = jax.random.normal(jax.random.key(0), (tokens * mesh.size, d), jnp.bfloat16)
  experts = choices_of(mesh, tokens)

  def there_and_back(kind, x, experts):
    way = plan(kind, experts, slots)
    sums = way.send_rows(x, None, "mosaic")
    sums = jnp.where(jnp.isfinite(sums), sums, 0).astype(jnp.float32) * 3  # empty slots: anything
    return way.send_rows(x, FORMATS[name], "mosaic"), way.collect(sums, jnp.bfloat16, jnp.bfloat16)

  programs = [over(mesh, functools.partial(there_and_back, k)) for k in (PeerMemory, AllToAll)]
  (arrived, back), (want, want_back) = (program(x, experts) for program in programs)
  rows = filled(mesh, experts, slots)
  assert 0 < rows.sum() < rows.size
  for a, b in zip(jax.tree.leaves(arrived), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(np.asarray(a)[rows], np.asarray(b)[rows])
  # bf16 values times 3, in float32 exact, once in each of up to all devices: one order or another.
  back, want_back = (np.asarray(r, np.float32) for r in (back, want_back))
  assert (np.abs(back - want_back) <= 2.0**-8 * np.abs(want_back)).all()


@needs_gpus
def test_many_exchanges_in_a_row_and_in_a_loop():
  """The counters of one are those of the next, and a fast device waits for a slow one."""
  mesh = make_mesh(jax.device_count())
  tokens, d = 512, 1024
  x = jax.random.normal(jax.random.key(0), (tokens * mesh.size, d), jnp.bfloat16)
  experts = choices_of(mesh, tokens)

  def loop(kind, x, experts):
    way = plan(kind, experts, tokens)

    def body(x, i):
      # Devices have work of different length in between.
      spin = jnp.where(lax.axis_index("expert") == i % lax.axis_size("expert"), 200, 1)
      busy = lax.fori_loop(0, spin, lambda _, a: a @ a * 1e-3, jnp.eye(256, dtype=x.dtype))
      x = x + 0 * busy[0, 0]
      for _ in range(3):
        arrived = way.send_rows(x, fp4jax.MXFP4, "mosaic")
        rows = fp4jax.dequantize(arrived, jnp.bfloat16).astype(jnp.float32)
        x = way.collect(jnp.where(jnp.isfinite(rows), rows, 0) / K, jnp.bfloat16, jnp.bfloat16)
      return x, x[0]

    return lax.scan(body, x, jnp.arange(20))[0]

  got, again, want = (
    over(mesh, functools.partial(loop, k))(x, experts) for k in (PeerMemory, PeerMemory, AllToAll)
  )
  np.testing.assert_array_equal(np.asarray(got), np.asarray(again))
  np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@needs_gpus
@pytest.mark.parametrize("name", ["bf16", "fp8_dispatch", "hopper_fp4_dispatch"])
def test_a_layer_computes_the_same_by_either_exchange(name):
  mesh, tokens, d, f = make_mesh(jax.device_count()), 512, 1024, 256
  normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)  # noqa: E731
  of_all = PER_DEVICE * mesh.size
  x, dout = normal(0, tokens * mesh.size, d), normal(1, tokens * mesh.size, d)
  w13, w2 = normal(2, of_all, d, 2 * f) / d**0.5, normal(3, of_all, f, d) / f**0.5
  experts = choices_of(mesh, tokens)
  weights = jax.random.uniform(jax.random.key(4), experts.shape)

  def layer(exchange):
    def run(x, w13, w2, weights, experts):
      options = {"expert_axis": "expert", "implementation": "mosaic", "exchange": exchange}
      return moe_ffn(x, w13, w2, experts, weights, recipes.RECIPES[name], **options)

    specs = (ROWS, P("expert"), P("expert"), ROWS, ROWS)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=ROWS)
    y, pull = jax.vjp(lambda *floats: sharded(*floats, experts), x, w13, w2, weights)
    return y, *pull(dout)

  run = jax.jit(layer, static_argnums=0)
  got, want = run("mosaic"), run("xla")
  for a, b in zip(got, want, strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if mesh.size == 2:  # a sum of two has one order
      np.testing.assert_array_equal(a, b)
    assert np.linalg.norm(a - b) <= 2.0**-9 * np.linalg.norm(b)
  for _ in range(50):
    for a, b in zip(run("mosaic"), got, strict=True):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("data, devices", [(1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize("d", [512, 1024, 7168])
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_lower_for_the_gpu(name, d, data, devices, monkeypatch):
  monkeypatch.setattr("fp4jax.mosaic.quantize.device_obstacle", lambda: None)
  mesh = make_mesh(devices, data)

  def there_and_back(x, experts):
    way = plan(PeerMemory, experts, 200)
    arrived = way.send_rows(x, FORMATS[name], "mosaic")
    return arrived, way.collect(x.repeat(devices, 0)[: 200 * devices], jnp.float32, jnp.bfloat16)

  x = jax.ShapeDtypeStruct((200 * mesh.size, d), jnp.bfloat16)
  experts = jax.ShapeDtypeStruct((200 * mesh.size, K), jnp.int32)
  lowered = over(mesh, there_and_back).trace(x, experts).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("uses_xla_collective_metadata = true") == 2


def test_what_can_not_travel_so_is_refused(monkeypatch):
  monkeypatch.setattr("fp4jax.implementation.compute_capability", lambda: "9.0")
  mesh = make_mesh(2)

  def run(d=512, implementation="mosaic", expert_axis="expert", **options):
    shapes = (128, d), (8, d, 256), (8, 128, d), (128, K), (128, K)
    types = (jnp.bfloat16,) * 3 + (jnp.int32, jnp.float32)
    arguments = [jax.ShapeDtypeStruct(*both) for both in zip(shapes, types, strict=True)]
    how = {"expert_axis": expert_axis, "implementation": implementation, "exchange": "mosaic"}
    layer = lambda *a: moe_ffn(*a, recipes.HOPPER_FP4, **how | options)  # noqa: E731
    of_weights = ROWS if expert_axis is None else P("expert")
    specs = (ROWS, of_weights, of_weights, ROWS, ROWS)
    sharded = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=ROWS)
    return jax.eval_shape(sharded, *arguments)

  run()
  with pytest.raises(ValueError, match=r'exchange="mosaic": rows of width 384, no multiple of 512'):
    run(d=384)
  with pytest.raises(ValueError, match=r'exchange="mosaic": empty slots hold anything'):
    run(implementation="xla")
  with pytest.raises(ValueError, match=r'exchange="mosaic": without expert_axis no row travels'):
    run(expert_axis=None)
  with pytest.raises(ValueError, match=r"exchange='nccl' is not one of"):
    run(exchange="nccl")
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match=r"the GPUs of one process; there are 2 processes"):
    run()
