"""Several processes that train one run: two on this machine, each with two CPU devices."""

import concurrent.futures
import contextlib
import functools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import connection

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import ROOT, SMALL, finish, rows_of, small, wait_for_lines
from test_checkpoints import sharded

from experiments import checks, processes
from experiments.checkpoints import Checkpoints
from experiments.comparison import Distributed
from experiments.train import make_trainer, policy_of
from fp4jax import recipes

TIMEOUT = 60  # seconds within which the others notice; they take less than one


def free_port() -> int:
  with socket.create_server(("localhost", 0)) as server:
    return server.getsockname()[1]


def in_threads(*calls):
  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    return [future.result(TIMEOUT) for future in [pool.submit(call) for call in calls]]


def meet(indices, count=None, timeout=10):
  """What each of the processes `indices` of `count` gets: its group, or the error's message."""
  port = free_port()

  def one(index):
    try:
      return processes.meet(index, count or len(indices), "localhost", port, timeout)
    except OSError as error:
      return str(error).replace(f"localhost:{port}", "here")

  return in_threads(*[lambda i=i: one(i) for i in indices])


@pytest.fixture
def ended(monkeypatch):
  """Lines of the groups that end; not the process but the thread that noticed stops."""
  lines = queue.SimpleQueue()
  monkeypatch.setattr(processes, "print", lambda line, **_: lines.put(line), raising=False)
  monkeypatch.setattr(os, "_exit", lambda code: threading.Event().wait())
  return lambda: lines.get(timeout=TIMEOUT)


def test_every_process_learns_what_all_say_in_their_order():
  groups = meet([2, 0, 1])
  for turn in range(20):
    said = in_threads(*[functools.partial(g.gather, [turn, g.index]) for g in groups])
    assert said == [[[turn, 0], [turn, 1], [turn, 2]]] * 3
  in_threads(*[g.leave for g in groups])


def test_alone_there_is_nobody_to_ask():
  group = processes.Group()
  assert (group.index, group.count, group.gather({"a": 1})) == (0, 1, [{"a": 1}])
  group.leave()


def test_processes_that_never_arrive_are_counted(ended):
  first, _ = meet([0, 3], count=4, timeout=1)
  assert first == "2 of 4 processes met at here within 1 s; missing: 1, 2"
  assert ended().startswith("error: 2 of 4 processes met")  # process 3 is told
  (alone,) = meet([1], count=2, timeout=1)
  assert alone.startswith("process 1 met no process 0 at here within 1 s: ")


def test_all_miss_a_process_that_ends(ended):
  port = free_port()

  def goes_again():
    while True:
      with contextlib.suppress(ConnectionRefusedError):
        found = socket.create_connection(("localhost", port))
        with contextlib.closing(connection.Connection(found.detach())) as first:
          return os.write(first.fileno(), processes._HELLO.pack(b"fp4jax", 2, 3))

  stay = [functools.partial(processes.meet, i, 3, "localhost", port, 10) for i in (0, 1)]
  groups = in_threads(*stay, goes_again)
  expected = "error: process 2 has ended without a word, as one that was killed; "
  assert ended() == ended() == expected + "the same commands go on from the last checkpoint"
  del groups


def test_all_say_why_one_fails(ended):
  groups = meet([0, 1])
  threading.Thread(target=groups[1].fail, args=[OSError("no space")], daemon=True).start()
  assert {ended(), ended()} == {"error: no space", "error: process 1: no space"}


@pytest.mark.parametrize(
  "others, message",
  [
    ([(1, 3), (1, 3)], "two processes are distributed.process_id=1"),
    ([(1, 2)], "process 1 counts 2 processes, process 0 counts 3"),
    ([(7, 3)], "process 7 is not from 1 to 2"),
  ],
)
def test_processes_that_do_not_fit_together(ended, others, message):
  port = free_port()
  calls = [lambda i=i, n=n: processes.meet(i, n, "localhost", port, 10) for i, n in others]
  with pytest.raises(OSError, match=message):
    in_threads(*calls, lambda: processes.meet(0, 3, "localhost", port, 10))
  assert [ended() for _ in others] == [f"error: {message}"] * len(others)


@pytest.mark.parametrize(
  "said", [b"GET / HTTP/1.0\r\n\r\n", b"fp4", b""], ids=["other", "part", "none"]
)
def test_a_stranger_is_not_waited_for(monkeypatch, said):
  monkeypatch.setattr(processes, "_HELLO_SECONDS", 0.5)
  port = free_port()

  def stranger():
    while True:
      with contextlib.suppress(ConnectionRefusedError):
        found = socket.create_connection(("localhost", port))
        found.sendall(said)
        return found

  calls = [functools.partial(processes.meet, i, 2, "localhost", port, 20) for i in (0, 1)]
  found, first, second = in_threads(stranger, calls[0], lambda: (time.sleep(0.2), calls[1]())[1])
  assert (
    in_threads(*[functools.partial(g.gather, g.index) for g in (first, second)]) == [[0, 1]] * 2
  )
  in_threads(first.leave, second.leave)
  found.close()


def test_strangers_do_not_extend_the_time(monkeypatch):
  monkeypatch.setattr(processes, "_HELLO_SECONDS", 60)
  port, began = free_port(), time.monotonic()

  def stranger():
    with contextlib.suppress(OSError):
      time.sleep(0.3)
      with socket.create_connection(("localhost", port)) as found:
        found.recv(1)

  def first():
    with pytest.raises(OSError, match=r"1 of 2 processes met at .* within 2 s; missing: 1"):
      processes.meet(0, 2, "localhost", port, 2)

  in_threads(stranger, first)
  assert time.monotonic() - began < 30


@pytest.mark.parametrize(
  "nodes, host",
  [("localhost", "localhost"), ("gpu[03-07,11],cpu2", "gpu03"), ("a-1,b", "a-1"), ("n7", "n7")],
)
def test_tasks_of_slurm_meet_on_the_first_node(nodes, host):
  environment = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "4097"}
  environment |= {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}
  assert processes.slurm_settings(environment) == {
    "coordinator": f"{host}:61441",
    "num_processes": 8,
    "process_id": 3,
  }


def test_a_signal_that_stops_one_at_once_stops_all(ended, monkeypatch):
  statuses = queue.SimpleQueue()
  monkeypatch.setattr(os, "_exit", lambda code: (statuses.put(code), threading.Event().wait()))
  groups = meet([0, 1, 2], count=3)
  groups[1].stopped(15)
  assert {ended() for _ in groups} == {"error: process 1 was stopped by signal 15"}
  assert {statuses.get(timeout=TIMEOUT) for _ in groups} == {128 + 15}


def test_who_stops_at_once_says_so_before():
  program = """
import os, signal, threading
from experiments.stop_signals import StopSignals
stop = StopSignals().listen()
stop.before_exit = lambda number: print("told", number, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait(60)
"""
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, f"told {int(signal.SIGTERM)}\n")


def test_a_port_in_use_is_named():
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(OSError, match=f"process 0 cannot listen at localhost:{port}: .* in use"):
      processes.meet(0, 2, "localhost", port, 1)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"coordinator": "a:1"}, "distributed.num_processes, distributed.process_id not given"),
    ({"process_id": 0}, "distributed.coordinator, distributed.num_processes not given"),
    ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator='a' is not host:port"),
    (
      {"coordinator": "a:1", "num_processes": 0, "process_id": 0},
      "num_processes=0 is not at least",
    ),
    (
      {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
      "process_id=2 is not from 0 to 1",
    ),
    (
      {"coordinator": "a:1", "num_processes": 2, "process_id": -1},
      "process_id=-1 is not from 0 to",
    ),
    ({"heartbeat_timeout": 0}, "heartbeat_timeout=0 is not at least 1"),
  ],
)
def test_settings_that_name_no_process_are_refused(settings, message):
  with (
    pytest.raises(ValueError, match=message),
    processes.joined(Distributed(**settings), {}),
  ):
    raise AssertionError
  with pytest.raises(ValueError, match=message):
    checks.validate(small(distributed=Distributed(**settings)))


def test_which_process_it_is_does_not_belong_to_the_experiment():
  assert small(**{"distributed.process_id": 1}).to_dict() == small().to_dict()


def test_all_pass_over_what_one_finds_damaged(tmp_path):
  states = {step: {"x": jnp.full(8, step)} for step in (1, 2)}
  with contextlib.closing(Checkpoints(tmp_path, 2)) as saving:
    for step, state in states.items():
      saving.save(step, state, {})
  files = sorted(json.loads((tmp_path / "00000002/manifest.json").read_bytes())["content"]["files"])
  groups = meet([0, 1])
  for victim in files[:2]:  # process 0 reads the first, process 1 the second
    path = tmp_path / "00000002" / victim
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    restoring = [Checkpoints(tmp_path, 2, group) for group in groups]
    found = in_threads(
      *[lambda c=c: c.restore_latest(jax.eval_shape(lambda: states[1])) for c in restoring]
    )
    assert [step for step, _, _ in found] == [1, 1]
    path.write_bytes(content)
  in_threads(*[g.leave for g in groups])


class Job:
  """The runner in two processes; those that still run are killed at the end of the test."""

  def __init__(self, corpus_file):
    self._corpus = corpus_file
    self._started = []

  def start(self, workdir, *arguments, devices=(2, 2), only=None, slurm=False, **own):
    """Processes of that many devices each; `process_1=` are flags that it alone is given."""
    values = SMALL | {
      "data.path": self._corpus,
      "recipes": "bf16",
      "data.batch_size": 4,
      "probe_every": 0,
    }
    flags = [f"--config.{k}={v}" for k, v in values.items()]
    port, count = free_port(), len(devices)
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    started = []
    for i, number in enumerate(devices):
      line = [sys.executable, "-m", "experiments.run", "--config=configs/demo.py"]
      line += [f"--workdir={workdir}", *flags, *arguments, *own.get(f"process_{i}", ())]
      if slurm:
        environment |= {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost"}
        environment |= dict.fromkeys(["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"], str(count))
        environment |= dict.fromkeys(["SLURM_PROCID", "SLURM_LOCALID"], str(i))
      elif count > 1:
        line.append(f"--config.distributed.coordinator=localhost:{port}")
        line.append(f"--config.distributed.num_processes={count}")
        line.append(f"--config.distributed.process_id={i}")
      environment["JAX_NUM_CPU_DEVICES"] = str(number)
      if only is None or i in only:
        out = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen(line, cwd=ROOT, env=environment, **out))
    self._started += started
    return started

  def close(self):
    for process in self._started:
      process.kill()
      process.communicate()


def finish_all(started, *codes):
  return [finish(p, code) for p, code in zip(started, codes or [0] * len(started), strict=True)]


@pytest.fixture
def job(corpus_file):
  with contextlib.closing(Job(corpus_file)) as job:
    yield job


@pytest.fixture(scope="module")
def of_two(corpus_file, tmp_path_factory):
  """A run of two processes that was never stopped."""
  workdir = tmp_path_factory.mktemp("of_two")
  with contextlib.closing(Job(corpus_file)) as job:
    outs = finish_all(job.start(workdir))
  assert "report: " in outs[0] and "report: " not in outs[1] and "tokens/s" not in outs[1]
  return workdir


METRICS = "runs/bf16-0/metrics.jsonl"


def test_two_processes_train_what_one_does(job, of_two, tmp_path):
  finish_all(job.start(tmp_path, devices=[4]))
  mine, other = (rows_of(workdir, "metrics") for workdir in (of_two, tmp_path))
  assert len(mine) == len(other) > 8
  for a, b in zip(mine, other, strict=True):
    assert a.keys() == b.keys()
    for name, value in a.items():
      if isinstance(value, str):
        assert value == b[name]
      else:  # devices are summed in another order: float32's eps of 6e-8, grown over 8 steps
        np.testing.assert_allclose(value, b[name], rtol=1e-4)
  assert (of_two / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
  names = [{p.relative_to(w).parts[:3] for p in w.rglob("*")} for w in (of_two, tmp_path)]
  assert names[0] == names[1]
  assert len(list((of_two / "runs/bf16-0/tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_two_processes_train_in_fp4_as_one_device_does(job, tmp_path):
  """Two devices each, against one device: losses to their last bits."""
  arguments = "--config.recipes=mxfp4,mxfp4_rht_sr", "--config.mesh.token_parts=4"
  started = [job.start(tmp_path / "two", *arguments)]
  started += [job.start(tmp_path / "one", *arguments, devices=[1])]
  for each in started:
    finish_all(each)
  one, two = (rows_of(tmp_path / name, "metrics") for name in ("one", "two"))
  losses = [[row["loss"] for row in rows if row["split"] == "train"] for rows in (one, two)]
  assert len(losses[0]) == 2 * 8
  np.testing.assert_allclose(*losses, rtol=0, atol=8 * 2.0**-21)  # ulps of numbers from 4 to 8


@pytest.mark.slow
def test_stopped_and_killed_it_goes_on_bit_for_bit(job, of_two, tmp_path):
  started = job.start(tmp_path)
  wait_for_lines(tmp_path / METRICS, 2, started[0])
  started[1].send_signal(signal.SIGTERM)  # to one: both save the same step
  outs = finish_all(started, *[128 + signal.SIGTERM] * 2)
  steps = {out.split("saved its state after step ")[1].split()[0] for out in outs}
  assert len(steps) == 1 and int(steps.pop()) < 8

  started = job.start(tmp_path)
  lines = (tmp_path / METRICS).read_bytes().count(b"\n")
  wait_for_lines(tmp_path / METRICS, lines + 1, started[0])
  started[1].kill()
  began = time.monotonic()
  out, _ = finish_all(started, 1, -signal.SIGKILL)
  assert time.monotonic() - began < TIMEOUT
  errors = [line for line in out.splitlines() if line.startswith("error: ")]
  assert errors == [
    "error: process 1 has ended without a word, as one that was killed; "
    "the same commands go on from the last checkpoint"
  ]
  assert "Traceback" not in out

  finish_all(job.start(tmp_path))
  assert (tmp_path / METRICS).read_bytes() == (of_two / METRICS).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
  "own, message",
  [
    (
      {"process_1": ["--config.steps=9"]},
      "processes differ: config.steps: 8 in process 0, 9 in process 1",
    ),
    (
      {"process_0": ["--config.mesh.fsdp=4"], "process_1": ["--config.mesh.data=4"]},
      "processes differ: config.mesh.data: None in process 0, 4 in process 1; config.mesh.fsdp: 4",
    ),
    ({"process_1": ["--config.steps=0"], "slurm": True}, "steps=0 is not from 1"),
    ({"only": [0]}, "1 of 2 processes met at localhost:"),
    ({"only": [1]}, "process 1 met no process 0 at localhost:"),
    ({"only": [0], "slurm": True}, "1 of 2 processes met at localhost:"),
  ],
)
def test_what_one_process_can_not_do_ends_all_with_one_line(job, tmp_path, own, message):
  started = job.start(tmp_path / "run", "--config.distributed.initialization_timeout=8", **own)
  for out in finish_all(started, *[1] * len(started)):
    (error,) = [line for line in out.splitlines() if "error: " in line]
    assert error.startswith("error: ") and message in error and "Traceback" not in out
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_two_processes_saved_one_restores_onto_any_mesh(of_two, corpus_file):
  config = small(**{"data.path": corpus_file})
  policy = policy_of(recipes.by_name("bf16"), config)
  wanted = make_trainer(config, 256, policy).init.eval_shape(jnp.int32(0))
  with contextlib.closing(Checkpoints((of_two / METRICS).parent / "checkpoints", 2)) as saved:
    step, plain, _ = saved.restore_latest(wanted)
    assert step == int(plain.step) == 8
    for devices in (4, 2, 1):
      _, found, _ = saved.restore_latest(sharded(wanted, devices, 0))
      jax.tree.map(np.testing.assert_array_equal, found, plain)


@pytest.mark.slow
def test_the_same_command_goes_on_with_fewer_devices(job, of_two, tmp_path):
  for devices, codes in (([2, 2], [128 + signal.SIGTERM] * 2), ([2], [128 + signal.SIGTERM])):
    started = job.start(tmp_path, devices=devices)
    path = tmp_path / METRICS
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    wait_for_lines(path, lines + 1, started[0])
    started[-1].send_signal(signal.SIGTERM)
    finish_all(started, *codes)
  finish_all(job.start(tmp_path, devices=[1]))
  found, expected = (rows_of(workdir, "metrics") for workdir in (tmp_path, of_two))
  assert [row["step"] for row in found] == [row["step"] for row in expected]
  for a, b in zip(found, expected, strict=True):
    # The parts of the tokens are those that the workdir began with: sums alone differ.
    np.testing.assert_allclose(a.get("loss", 0), b.get("loss", 0), rtol=1e-4)
  environment = json.loads((tmp_path / "environment.json").read_bytes())
  sizes = [environment["mesh"], *(again["mesh"] for again in environment["resumed"])]
  assert [each["data"] for each in sizes] == [4, 2, 1]
  assert json.loads((tmp_path / "config.json").read_bytes())["mesh"]["token_parts"] == 4
