"""A pretrained policy in every format, by round to nearest, by search and with training.

    python -m experiments.qat --out=results/qat.jsonl --methods=bf16,rtn --formats=all --workers=8
    python -m experiments.qat --out=results/qat.jsonl --methods=llm_qat,qad,acs,mxfp4_weights,\
block_ap,e2e_qp,efficient_qat,fp4_minmax,llm_fp4 --formats=MXFP4,NVFP4

A row for each method, format and choice of operands: perplexity of held-out text, and the share of
held-out problems that are solved. Rows are added to the file; a row that is there, of the same
settings and commit, is not measured again, so that the same command goes on where one was stopped.
The settings are flags: experiments/qat/settings.py says what they mean.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable

from absl import app, flags

from experiments import command_line, logs
from experiments.comparison import Names
from experiments.environment import COMMIT, describe_environment
from experiments.qat import methods, rows
from experiments.qat.settings import METHODS, Settings, check_names
from experiments.qat.source import load_source
from fp4jax.formats import FORMATS

_OUT = flags.DEFINE_string("out", None, "JSONL file to add rows to.", required=True)
_METHODS = flags.DEFINE_list("methods", ["bf16", "rtn"], f"Of {', '.join(METHODS)}; or all.")
_FORMATS = flags.DEFINE_list(
  "formats", ["MXFP4", "NVFP4"], "Of fp4jax.FORMATS; or all that a method can have."
)
_OPERANDS = flags.DEFINE_list(
  "operands", ["weights", "both"], "weights: activations stay in bf16; both: these too."
)
_WORKERS = flags.DEFINE_integer(
  "workers", 1, "Cases at once, each in a process of its own.", lower_bound=1
)
_DEFINE = {
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}
_SETTINGS = {
  field.name: _DEFINE[type(field.default)](field.name, field.default, "See settings.py.")
  for field in dataclasses.fields(Settings)
}
_ENVIRONMENT = ("device", "git_commit", "git_dirty", "versions")


def main(_) -> None:
  if _WORKERS.value > 1:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # they share the device's memory
  settings = Settings(**{name: flag.value for name, flag in _SETTINGS.items()})
  named, formats = _names(_METHODS.value, METHODS), _names(_FORMATS.value, FORMATS)
  operands = Names(_OPERANDS.value)
  check_names(named, formats, operands)
  environment = {
    name: value
    for name, value in describe_environment(COMMIT.value).items()
    if name in _ENVIRONMENT
  }
  wanted = list(methods.cases(named, formats, operands))
  if _FORMATS.value == ["all"]:
    wanted = [case for case in wanted if methods.lacked_format(case) is None]
  for case in wanted:
    if why := methods.why_not(case, settings):
      raise ValueError(f"--methods: {why}")
  left = rows.missing(wanted, logs.read_rows(_OUT.value), settings, environment)
  log = logs.JsonLines(_OUT.value)
  if left:
    measure = functools.partial(rows.measure_apart, settings)
    if _WORKERS.value == 1:
      measure = functools.partial(rows.measure, load_source(settings))
    for row in rows.measure_all(measure, left, _WORKERS.value):
      log.write(row | environment)
      print(
        f"{row['method']:13s} {row['format']:17s} {row['operands']:7s} "
        f"perplexity {row['perplexity']:8.3f}, accuracy {row['accuracy']:.3f} "
        f"+- {row['accuracy_error']:.3f}, {row['seconds']:.0f} s",
        flush=True,
      )
  log.close()


def _names(given: list[str], known: Iterable[str]) -> Names:
  return Names(known if given == ["all"] else given)


if __name__ == "__main__":
  app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
