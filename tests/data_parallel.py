"""`python tests/data_parallel.py DEVICES ...` is the runner with that many CPU devices a process,
batches in parts over all of them and the state on each."""

import dataclasses
import functools
import sys

from experiments.stop_signals import StopSignals

_STOP = StopSignals().listen()  # before the imports that start threads
# ruff: noqa: E402

import jax
from absl import app
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import command_line, data, run

make_trainer, batches = run.make_trainer, data.batches


@functools.cache
def over_devices(*axes: str) -> NamedSharding:
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, P(*axes))


def make_parallel(*args):
  trainer = make_trainer(*args)
  functions = {}
  for name in ("init", "step", "evaluate", "probe"):
    function = getattr(trainer, name).__wrapped__
    functions[name] = jax.jit(function, out_shardings=over_devices())
  return dataclasses.replace(trainer, **functions)


run.make_trainer = make_parallel
run._STOP = _STOP
data.batches = lambda *args: batches(*args, over_devices("data"))
jax.config.update("jax_num_cpu_devices", int(sys.argv.pop(1)))
app.run(command_line.one_line_errors(run.main), flags_parser=command_line.parse_flags)
