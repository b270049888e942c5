import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import checkpoints

ROOT = Path(__file__).parents[1]


def make_state(seed: int):
  """Every dtype and container that a run saves, with random bits (so NaNs, infinities, -0)."""
  rng = np.random.default_rng(seed)

  def bits(dtype, *shape):
    dtype = jnp.dtype(dtype)
    return jnp.asarray(
      np.frombuffer(rng.bytes(dtype.itemsize * int(np.prod(shape))), dtype)
    ).reshape(shape)

  params = {
    "embed": bits(jnp.float32, 11, 8),
    "blocks": ({"w": bits(jnp.bfloat16, 8, 8)}, {"w": bits(jnp.bfloat16, 8, 8)}),
  }
  return {
    "params": params,
    "opt": optax.adamw(1e-3).init(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)),
    "codes": bits(jnp.uint8, 3, 5),
    "step": bits(jnp.int32),
  }


def abstract(state):
  return jax.eval_shape(lambda: state)


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert isinstance(a, jax.Array)
    assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path):
  """Checkpoints of steps 10 and 20, and their states."""
  states = {10: make_state(10), 20: make_state(20)}
  manager = checkpoints.Checkpoints(tmp_path / "ck", keep=2)
  for step, state in states.items():
    manager.save(step, state, {"metrics_bytes": step})
  manager.wait()
  yield tmp_path / "ck", manager, states
  manager.close()


@pytest.fixture
def absl_log(caplog):
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  with caplog.at_level("INFO", logger="absl"):
    yield caplog
  logging.set_verbosity(verbosity)


def test_restores_the_same_bits(saved):
  folder, _, states = saved
  again = checkpoints.Checkpoints(folder, keep=2)
  step, state, metadata = again.restore_latest(abstract(states[20]))
  assert (step, metadata) == (20, {"metrics_bytes": 20})
  assert_same(state, states[20])
  again.close()


def sharded(state, devices: int, axis: int):
  """Every array that divides into `devices` parts along `axis` in parts, the others on each."""
  mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])

  def sharding(leaf):
    divides = leaf.ndim > axis and leaf.shape[axis] % devices == 0
    return NamedSharding(mesh, P(*[None] * axis, "x") if divides else P())

  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), state
  )


@pytest.mark.parametrize("meshes", [((4, 0), (2, 1)), ((2, 1), (1, 0)), ((1, 0), (4, 1)), None])
def test_restores_onto_another_mesh(tmp_path, meshes):
  state = make_state(1)
  there, here = ((4, 0), None) if meshes is None else meshes
  placed = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), state, sharded(state, *there))
  assert len(placed["params"]["blocks"][0]["w"].devices()) == there[0]
  manager = checkpoints.Checkpoints(tmp_path, keep=1)
  manager.save(1, placed, {})
  wanted = abstract(state) if here is None else sharded(state, *here)
  _, found, _ = manager.restore_latest(wanted)
  manager.close()
  assert_same(found, state)
  if here:
    for leaf, asked in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      assert leaf.sharding.is_equivalent_to(asked.sharding, leaf.ndim)
  else:
    assert {leaf.committed for leaf in jax.tree.leaves(found)} == {False}


def test_a_state_can_be_donated_as_soon_as_save_returns(tmp_path, monkeypatch):
  written = threading.Event()
  hold(monkeypatch, written)
  manager = checkpoints.Checkpoints(tmp_path, keep=1)
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0)
  state = {str(i): jnp.arange(1 << 21, dtype=jnp.float32) + i for i in range(4)}
  kept = jax.tree.map(np.array, state)
  manager.save(1, state, {})
  for _ in range(3):
    state = overwrite(state)
  jax.block_until_ready(state)
  written.set()
  _, found, _ = manager.restore_latest(abstract(state))
  manager.close()
  assert_same(found, jax.tree.map(jnp.asarray, kept))


def hold(monkeypatch, written: threading.Event):
  """Saves end only once `written` is set."""
  fingerprint = checkpoints._fingerprint
  monkeypatch.setattr(checkpoints, "_fingerprint", lambda f: written.wait(20) and fingerprint(f))


def test_a_save_goes_on_in_the_background(tmp_path, monkeypatch):
  written = threading.Event()
  hold(monkeypatch, written)
  manager = checkpoints.Checkpoints(tmp_path, keep=1)
  manager.save(1, {"x": jnp.ones(4)}, {})
  assert manager.latest_step() is None
  deadline = time.monotonic() + 30
  while not os.listdir(tmp_path) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert os.listdir(tmp_path) == ["00000001.orbax-checkpoint-tmp"]
  written.set()
  manager.save(2, {"x": jnp.ones(4)}, {})  # waits for the first
  assert manager.latest_step() == 1
  manager.close()
  assert os.listdir(tmp_path) == ["00000002"]


@pytest.mark.parametrize("raised_by", ["save", "close"])
def test_the_next_call_raises_what_went_wrong_in_the_background(tmp_path, monkeypatch, raised_by):
  def broken(file):
    raise OSError(5, "Input/output error")

  manager = checkpoints.Checkpoints(tmp_path, keep=2)
  manager.save(1, {"x": jnp.ones(4)}, {})
  manager.wait()
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, "_fingerprint", broken)
    manager.save(2, {"x": jnp.ones(4)}, {})
    with pytest.raises(OSError, match=r"checkpoint of step 2 in .*: Input/output error"):
      manager.close() if raised_by == "close" else manager.save(3, {"x": jnp.ones(4)}, {})
  assert os.listdir(tmp_path) == ["00000001"]
  manager.save(3, {"x": jnp.ones(4)}, {})
  manager.close()
  assert manager.latest_step() == 3


def test_restored_arrays_can_be_donated(saved):
  _, manager, states = saved
  _, state, _ = manager.restore_latest(abstract(states[20]))
  double = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
  expected = jax.tree.map(lambda x: x + x, states[20])
  assert_same(double(state), expected)


def test_keeps_the_newest(tmp_path):
  manager = checkpoints.Checkpoints(tmp_path / "new" / "ck", keep=3)
  state = {"x": jnp.zeros(3)}
  assert manager.latest_step() is None
  assert manager.restore_latest(abstract(state)) is None
  assert not (tmp_path / "new").exists()  # looking writes nothing
  for step in (1, 2, 30, 123_456_789):
    manager.save(step, state, {})
    manager.wait()
    assert manager.latest_step() == step
  assert sorted(os.listdir(tmp_path / "new" / "ck")) == ["00000002", "00000030", "123456789"]
  manager.close()


def test_a_save_is_quiet_and_leaves_no_thread(tmp_path, absl_log, capfd):
  before = threading.active_count()
  manager = checkpoints.Checkpoints(tmp_path, keep=1)
  for step in range(1, 6):
    manager.save(step, make_state(step), {})
    manager.restore_latest(abstract(make_state(step)))
  manager.close()
  deadline = time.monotonic() + 10  # a thread that was told to end may take its time
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() == before
  assert not absl_log.records
  assert capfd.readouterr() == ("", "")
  assert logging.get_verbosity() == logging.INFO


@pytest.mark.parametrize(
  "step, state, metadata, error, message",
  [
    (20, {"x": np.ones(2, np.float32)}, {}, ValueError, "step=20 is not after .* 20"),
    (19, {}, {}, ValueError, "step=19 is not after .* 20"),
    (21, {"a": {"x": np.ones(2)}}, {}, TypeError, "'a/x' must be a jax.Array"),
    (21, {"step": 3}, {}, TypeError, "'step' must be a jax.Array"),
    (21, {"key": "typed"}, {}, TypeError, "'key' must be a jax.Array"),
    (21, {"x": "empty"}, {}, ValueError, r"'x' is float32\[0,2\]"),
    (21, {}, {"sizes": (1, 2)}, ValueError, "round trip"),
    (21, {}, {"loss": float("nan")}, ValueError, "nan"),
  ],
)
def test_refuses(saved, step, state, metadata, error, message):
  folder, manager, _ = saved
  made = {"typed": lambda: jax.random.key(0), "empty": lambda: jnp.zeros((0, 2))}
  state = {k: made[v]() if isinstance(v, str) else v for k, v in state.items()}
  with pytest.raises(error, match=message):
    manager.save(step, state, metadata)
  assert sorted(os.listdir(folder)) == ["00000010", "00000020"]


def test_refuses_to_keep_none(tmp_path):
  with pytest.raises(ValueError, match="keep=0 must be at least 1"):
    checkpoints.Checkpoints(tmp_path, keep=0)


def truncate(file: Path):
  os.truncate(file, file.stat().st_size // 2)


def flip(file: Path):
  content = bytearray(file.read_bytes())
  content[len(content) * 2 // 3] ^= 0x10
  file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damage_to_any_file_is_found(saved, absl_log, damage):
  folder, manager, states = saved
  checkpoint = folder / "00000020"
  files = [checkpoint / "manifest.json", *(checkpoint / "state").rglob("*")]  # what is read
  files = [f for f in files if f.is_file() and f.stat().st_size]
  assert len(files) > 5
  for file in files:
    content = file.read_bytes()
    damage(file)
    absl_log.clear()
    step, state, metadata = manager.restore_latest(abstract(states[10]))
    assert (step, metadata) == (10, {"metrics_bytes": 10})
    assert_same(state, states[10])
    (warning,) = absl_log.records
    assert warning.levelname == "WARNING"
    assert f"step 20 in {folder} is damaged: " in warning.getMessage()
    assert file.name in warning.getMessage()
    file.write_bytes(content)
  step, state, _ = manager.restore_latest(abstract(states[20]))
  assert step == manager.latest_step() == 20
  assert_same(state, states[20])


def test_no_flipped_byte_of_the_manifest_changes_what_is_restored(saved):
  folder, manager, states = saved
  file = folder / "00000020" / "manifest.json"
  content = file.read_bytes()
  found = set()
  for at in range(0, len(content), len(content) // 60):
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    step, state, metadata = manager.restore_latest(abstract(states[10]))
    assert metadata == {"metrics_bytes": step}
    assert_same(state, states[step])
    found.add(step)
  assert 10 in found


def test_an_emptied_checkpoint_is_passed_over(saved):
  folder, manager, states = saved
  shutil.rmtree(folder / "00000020")
  (folder / "00000020").mkdir()
  assert manager.restore_latest(abstract(states[10]))[0] == 10


def test_a_damaged_checkpoint_can_be_saved_again(saved):
  folder, manager, states = saved
  truncate(folder / "00000020" / "manifest.json")
  assert manager.restore_latest(abstract(states[10]))[0] == 10
  assert manager.latest_step() == 10
  manager.save(20, states[10], {"again": 1})
  manager.wait()
  step, state, metadata = manager.restore_latest(abstract(states[10]))
  assert (step, metadata) == (20, {"again": 1})
  assert_same(state, states[10])
  assert sorted(os.listdir(folder)) == ["00000010", "00000020"]


def test_all_damaged_is_an_error_every_time(saved):
  folder, manager, states = saved
  flip(folder / "00000010" / "manifest.json")
  (folder / "00000020" / "manifest.json").unlink()
  for _ in range(2):
    with pytest.raises(OSError, match=r"is damaged .*step 20: .*; step 10: ") as caught:
      manager.restore_latest(abstract(states[10]))
    assert str(folder) in str(caught.value)
  assert sorted(os.listdir(folder)) == ["00000010", "00000020"]


def test_another_state_is_no_damage(saved):
  folder, manager, states = saved
  wanted = abstract(states[20])
  wanted["params"]["embed"] = jax.ShapeDtypeStruct((12, 8), jnp.float32)
  wanted["codes"] = jax.ShapeDtypeStruct((3, 5), jnp.int8)
  wanted["extra"] = jax.ShapeDtypeStruct((), jnp.int32)
  del wanted["step"]
  with pytest.raises(ValueError) as caught:
    manager.restore_latest(wanted)
  message = str(caught.value)
  assert str(folder / "00000020") in message
  for difference in (
    "params/embed: saved float32[11,8], expected float32[12,8]",
    "codes: saved uint8[3,5], expected int8[3,5]",
    "extra: saved nothing, expected int32[]",
    "step: saved int32[], expected nothing",
  ):
    assert difference in message
  assert "blocks" not in message
  assert manager.latest_step() == 20


def test_leftovers_of_a_killed_save_are_ignored_then_removed(saved):
  folder, manager, states = saved
  for suffix in (".orbax-checkpoint-tmp", ".tmp"):  # as Orbax names it, as earlier versions did
    shutil.copytree(folder / "00000020", folder / f"00000030{suffix}")
  (folder / "notes.tmp").write_text("mine")
  assert manager.latest_step() == 20
  assert manager.restore_latest(abstract(states[20]))[0] == 20
  manager.save(40, states[20], {})
  manager.wait()
  assert sorted(os.listdir(folder)) == ["00000020", "00000040", "notes.tmp"]


SAVE_FOR_EVER = """
import sys
import jax, jax.numpy as jnp
from experiments import checkpoints

manager = checkpoints.Checkpoints(sys.argv[1], keep=2)


def state(step):
  return {"w": jnp.full((64, 1024), step, jnp.float32), "b": jnp.full(9, step, jnp.int32)}


restored = manager.restore_latest(jax.eval_shape(lambda: state(0)))
step = restored[0] if restored else 0
while True:
  step += 1
  manager.save(step, state(step), {"step": step})  # waits for the one before
  print(step - 1, flush=True)
"""


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path):
  rng = np.random.default_rng(0)
  wanted = {
    "w": jax.ShapeDtypeStruct((64, 1024), jnp.float32),
    "b": jax.ShapeDtypeStruct((9,), jnp.int32),
  }
  before = 0
  for _ in range(4):
    child = subprocess.Popen(
      [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)],
      stdout=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
      text=True,
    )
    with child:
      for _ in range(2):  # one save is whole
        child.stdout.readline()
      time.sleep(rng.uniform(0, 0.3))
      child.send_signal(signal.SIGKILL)
      told = [int(line) for line in child.stdout.read().split()]
    manager = checkpoints.Checkpoints(tmp_path, keep=2)
    step, state, metadata = manager.restore_latest(wanted)
    assert step > before and step >= max(told, default=0)  # what was told saved is saved
    assert metadata == {"step": step}
    assert np.all(np.asarray(state["w"]) == step) and np.all(np.asarray(state["b"]) == step)
    manager.close()
    before = step


FILL_THE_DISK = """
import json, os, resource, shutil, sys, time
import jax, numpy as np
from experiments import checkpoints

kind, folder = sys.argv[1:]
manager = checkpoints.Checkpoints(folder, keep=3)
rng = np.random.default_rng(0)
state = {str(i): jax.numpy.asarray(rng.integers(0, 256, 500_000, np.uint8)) for i in range(3)}
manager.save(1, state, {"n": 1})
manager.wait()
if kind == "size limit":
  resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
elif kind == "full, unforeseen":
  shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
try:
  manager.save(2, state, {"n": 2})
  manager.wait()
except OSError as error:
  print(json.dumps(str(error)))
print(json.dumps(os.listdir(folder)))
time.sleep(1)  # Orbax raises at the first file that fails, while its threads still write others
step, restored, metadata = manager.restore_latest(jax.eval_shape(lambda: state))
assert step == manager.latest_step() == 1 and metadata == {"n": 1}, step
assert all(np.array_equal(a, b) for a, b in zip(restored.values(), state.values(), strict=True))
manager.save(3, {"small": jax.numpy.ones(4)}, {})
manager.close()
print(json.dumps(sorted(os.listdir(folder))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, reason",
  [
    ("size limit", r"files are limited to 400000 bytes, 1\d+ may be needed"),
    ("full", r"no space on the disk: 1\d+ bytes needed, \d+ free"),
    ("full, unforeseen", "No space left on device"),
  ],
)
def test_full_disk(tmp_path, kind, reason):
  mounted = kind != "size limit"
  if mounted:
    mount = ["mount", "-t", "tmpfs", "-o", "size=2300k", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
      pytest.skip("needs the right to mount a tmpfs")
  try:
    child = subprocess.run(
      [sys.executable, "-c", FILL_THE_DISK, kind, str(tmp_path)],
      capture_output=True,
      env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
      text=True,
      timeout=60,
    )
  finally:
    if mounted:
      subprocess.run(["umount", str(tmp_path)], check=True)
  assert child.returncode == 0, child.stderr
  assert not child.stderr or kind == "full, unforeseen"
  message, left, after = (json.loads(line) for line in child.stdout.splitlines())
  # Of step 2 at most what Orbax had begun, by its own name or by ours.
  assert {name for name in left if not name.startswith("00000002.")} == {"00000001"}
  assert after == ["00000001", "00000003"]
  start = f"cannot save the checkpoint of step 2 in {tmp_path}: "
  assert message.startswith(start)
  assert re.fullmatch(reason, message.removeprefix(start))
