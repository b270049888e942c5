"""The processes that train a run together: how they meet, what they tell each other, how they end.

Every process but the first holds one TCP connection to process 0 for as long as it trains. A
process that ends closes it, so that the others end at once and say which one it was. JAX notices
that too, but only after its heartbeat timeout, and then aborts with a page of C++ (jax 0.11.2); it
is left to notice a machine that vanishes. For the same reason the processes meet here before they
meet in JAX.
"""

import contextlib
import dataclasses
import json
import os
import queue
import re
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing import connection
from typing import Any

import jax

from experiments.checks import address_of, validate_distributed
from experiments.comparison import Distributed

_HELLO_SECONDS = 2  # that a process which has connected may take to say which one it is
_WORD = b"fp4jax"
_HELLO = struct.Struct(f"!{len(_WORD)}sII")  # and its number, and how many it counts


class Group:
  """Processes 0 to `count` - 1, of which this is `index`; alone without connections.

  `connections` are those of process 0 by the number of the other process, elsewhere the one to
  process 0. A process that ends before `leave` ends all: each prints one line, with status 1.
  """

  def __init__(
    self,
    index: int = 0,
    count: int = 1,
    connections: Mapping[int, connection.Connection] | None = None,
  ):
    self.index = index
    self.count = count
    self._connections = dict(connections or {})
    self._received = {process: queue.SimpleQueue() for process in self._connections}
    self._ending = threading.Lock()  # so that only the first reason is printed
    if self._connections:
      threading.Thread(target=self._receive, daemon=True).start()

  def gather(self, value: Any) -> list[Any]:
    """The `value` of every process, in their order; to be called by all. Values are JSON."""
    if self.index:
      self._send(0, {"value": value})
      return self._received[0].get()
    others = [self._received[process].get() for process in sorted(self._connections)]
    values = json.loads(json.dumps([value, *others]))
    for process in self._connections:
      self._send(process, {"value": values})
    return values

  def leave(self) -> None:
    """Waits until all processes do; from then on none is missed."""
    self.gather(None)
    for process in self._connections:
      self._send(process, {"end": None})

  def fail(self, error: Exception) -> None:
    """Ends this process with `error` as one line, and the others with the same."""
    if isinstance(error, jax.errors.JaxRuntimeError):
      time.sleep(2)  # a collective fails where another process ended: _receive tells which
    reason = str(error)
    if not isinstance(error, ValueError | OSError):
      traceback.print_exception(error)
      reason = f"{type(error).__name__}: {reason}"
    self._end(reason, f"process {self.index}: {reason}")

  def stopped(self, number: int) -> None:
    """Tells the others that signal `number` ends this process at once: so it does them."""
    for process in self._connections:
      told = f"process {self.index} was stopped by signal {number}"
      self._send(process, {"end": told, "status": 128 + number})

  def _end(self, line: str, told: str, status: int = 1) -> None:
    self._ending.acquire()  # for good: a second reason waits until the process has ended
    for process in self._connections:
      self._send(process, {"end": told, "status": status})
    if self.index == 0:
      time.sleep(0.5)  # JAX aborts what is still there when process 0 ends
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(status)  # sys.exit would let JAX wait for the others

  def _send(self, process: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # _receive tells of a process that has ended
      self._connections[process].send_bytes(json.dumps(message).encode())

  def _receive(self) -> None:
    numbers = {c: process for process, c in self._connections.items()}
    while numbers:
      for ready in connection.wait(list(numbers)):
        process = numbers[ready]
        try:
          message = json.loads(ready.recv_bytes())
        except (EOFError, OSError):
          line = (
            f"process {process} has ended without a word, as one that was killed; "
            "the same commands go on from the last checkpoint"
          )
          self._end(line, line)
        if "value" in message:
          self._received[process].put(message["value"])
        elif message["end"] is None:
          del numbers[ready]
        else:
          self._end(message["end"], message["end"], message["status"])


@contextlib.contextmanager
def joined(settings: Distributed, environment: Mapping[str, str]) -> Iterator[Group]:
  """All processes of this run, which JAX then takes for one system; alone without settings.

  To be entered before JAX touches a device, and by every process. Under Slurm, in a step of
  several tasks, the settings are those of `slurm_settings`. With several processes an exception
  within ends them all.

  Raises:
    ValueError: settings that are not those of one of `num_processes` processes.
    OSError: the others were not there within `initialization_timeout`.
  """
  validate_distributed(settings)
  if settings.coordinator is None and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
    settings = dataclasses.replace(settings, **slurm_settings(environment))
  if settings.coordinator is not None:
    index, count = settings.process_id, settings.num_processes
    host, port = address_of(settings.coordinator)
    group = meet(index, count, host, port, settings.initialization_timeout)
    port = group.gather(_free_port(host) if index == 0 else None)[0]
    _join_jax(settings, f"{host}:{port}", count, index)
  else:
    group = Group()
  try:
    yield group
    group.leave()
  except Exception as error:
    if group.count == 1:
      raise
    group.fail(error)


def slurm_settings(environment: Mapping[str, str]) -> dict[str, Any]:
  """Of this task of a step: all meet on its first node, at a port that the job's number gives."""
  nodes = environment["SLURM_STEP_NODELIST"]  # "node[03-07,11],other2"
  first = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
  port = 61440 + int(environment["SLURM_JOB_ID"]) % 4096
  return {
    "coordinator": f"{first[1]}{first[2] or ''}:{port}",
    "num_processes": int(environment["SLURM_STEP_NUM_TASKS"]),
    "process_id": int(environment["SLURM_PROCID"]),
  }


def meet(index: int, count: int, host: str, port: int, timeout: int) -> Group:
  """Process `index` of `count` meets the others at `host`, where process 0 listens, in `timeout` s.

  Raises OSError if they are not all there by then; the message counts them.
  """
  deadline = time.monotonic() + timeout
  where = f"{host}:{port} within {timeout} s"
  if index == 0:
    return Group(0, count, _accept(count, host, port, deadline, where))
  while True:
    try:
      found = socket.create_connection((host, port), max(deadline - time.monotonic(), 0.1))
      break
    except OSError as error:
      if time.monotonic() > deadline:
        raise OSError(f"process {index} met no process 0 at {where}: {error}") from error
      time.sleep(0.1)
  found.sendall(_HELLO.pack(_WORD, index, count))
  return Group(index, count, {0: _connection(found)})


def _accept(
  count: int, host: str, port: int, deadline: float, where: str
) -> dict[int, connection.Connection]:
  """Connections of process 0 to all others, by their numbers."""
  try:
    server = socket.create_server((host, port), backlog=count)
  except OSError as error:
    raise OSError(f"process 0 cannot listen at {host}:{port}: {error}") from error
  met, connected = {}, []
  try:
    with server:
      while len(met) < count - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.1))
        found, _ = server.accept()
        hello = _hello(found, deadline)
        if hello is None:  # a stranger: of a port scan, say
          found.close()
          continue
        connected.append(_connection(found))
        index, theirs = hello
        if theirs != count:
          raise OSError(f"process {index} counts {theirs} processes, process 0 counts {count}")
        if not 0 < index < count:
          raise OSError(f"process {index} is not from 1 to {count - 1}")
        if index in met:
          raise OSError(f"two processes are distributed.process_id={index}")
        met[index] = connected[-1]
    return met
  except (OSError, EOFError, ValueError) as error:
    missing = ", ".join(str(i) for i in range(1, count) if i not in met)
    late = f"{len(met) + 1} of {count} processes met at {where}; missing: {missing}"
    reason = late if isinstance(error, TimeoutError) else str(error)
    for each in connected:
      with contextlib.suppress(OSError):
        each.send_bytes(json.dumps({"end": reason, "status": 1}).encode())
    raise OSError(reason) from error


def _hello(found: socket.socket, deadline: float) -> tuple[int, int] | None:
  """Which process connects, and how many it counts; None where it does not say so in time."""
  said, until = b"", min(time.monotonic() + _HELLO_SECONDS, deadline)
  with contextlib.suppress(OSError):
    while len(said) < _HELLO.size:
      found.settimeout(max(until - time.monotonic(), 0.01))
      if not (more := found.recv(_HELLO.size - len(said))):
        break
      said += more
  if len(said) < _HELLO.size or not said.startswith(_WORD):
    return None
  return _HELLO.unpack(said)[1:]


def _connection(found: socket.socket) -> connection.Connection:
  found.settimeout(None)
  found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  return connection.Connection(found.detach())


def _join_jax(settings: Distributed, *found: Any) -> None:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", False)  # StopSignals hears SIGTERM
  jax.distributed.initialize(
    *found,
    initialization_timeout=settings.initialization_timeout,
    heartbeat_timeout_seconds=settings.heartbeat_timeout,
  )


def _free_port(host: str) -> int:
  with socket.create_server((host, 0)) as server:
    return server.getsockname()[1]
