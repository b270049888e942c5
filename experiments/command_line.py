"""How the commands of experiments/ read their flags: a mistake is one line that says what to write.

_CONFIG = command_line.define_config()
...
app.run(command_line.one_line_errors(main), flags_parser=command_line.parse_flags)
"""

import functools
import itertools
import logging as python_logging
import operator
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.comparison import Comparison, Names, field_paths, near_fields
from experiments.config import Experiment

flags.disclaim_key_flags()  # --help of a command shows what is defined here for it


def define_config(
  cls: type[Comparison] = Experiment, example: str = "configs/demo.py"
) -> flags.FlagHolder:
  """--config, a file that makes a `cls`, such as `example`; its help lists every setting."""
  settings = "\n".join(f"--config.{path}={_default(path, cls)}" for path in field_paths(cls))
  holder = config_flags.DEFINE_config_file(
    "config",
    help_string=f"A file of configs/. Every setting is a flag behind it; {_source(cls)}, "
    f"{_source(Comparison)} and, for model.*, fp4jax.models.ModelConfig say what they mean. Before "
    f"the file changes them they are\n{settings}\n",
  )
  flags.FLAGS["config"].makes, flags.FLAGS["config"].example = cls, example
  made = lambda config: config is None or isinstance(config, cls)  # noqa: E731
  flags.register_validator("config", made, f"the file of --config makes no {cls.__name__}")
  return holder


def allow(name: str, items: Iterable[str]) -> None:
  """Refuses other items in the list that is the flag `name`, but empty ones."""
  allowed = list(dict.fromkeys(items))

  def validate(given):
    if unknown := [item for item in given if item and item not in allowed]:
      raise flags.ValidationError(f"{unknown[0]!r} is not one of {', '.join(allowed)}")
    return True

  flags.register_validator(name, validate)


def define_workdir(help_string: str, several: bool = False) -> flags.FlagHolder:
  """--workdir, a folder or `several`; an empty name, which is the present folder, is refused."""
  define = flags.DEFINE_list if several else flags.DEFINE_string
  holder = define("workdir", None, help_string, required=True)
  named = lambda given: given is None or all(given if several else [given])  # noqa: E731
  flags.register_validator("workdir", named, "--workdir is empty")
  return holder


def run_report(write: Callable[..., Path]) -> None:
  """The command that writes the page of `--workdir`, one or several, to `--out`."""
  workdirs = define_workdir("Folders of runs, with commas.", several=True)
  out = flags.DEFINE_string("out", None, "The page; of one workdir by default its report.html.")

  def main(_) -> None:
    if len(workdirs.value) > 1 and not out.value:
      raise ValueError("several workdirs need --out, the page to write")
    print(write(*workdirs.value, out=out.value))

  app.run(one_line_errors(main), flags_parser=parse_flags)


def one_line_errors(main: Callable) -> Callable:
  """`main`, but ValueError and OSError are one line; --verbosity=1 shows where they come from."""

  @functools.wraps(main)
  def guarded(argv):
    # At INFO, JAX tells of every backend that it did not find.
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    try:
      main(argv)
    except (ValueError, OSError) as error:
      logging.debug("", exc_info=True)
      sys.exit(f"error: {error}")

  return guarded


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parsing, for app.run(flags_parser=)."""
  if mistake := _unreadable_config(argv):
    sys.exit(f"error: {mistake}")
  try:
    _, *stray = flags.FLAGS(argv)
  except SyntaxError as error:
    sys.exit(f"error: {error.filename}, line {error.lineno}: {error.msg}")
  except (flags.Error, OSError) as error:
    told = _missing_config(argv) or _bare_setting(error) or _other_config() or _needed(error)
    sys.exit(f"error: {told or error}")
  except (KeyError, AttributeError) as error:
    if unknown := _unknown_setting(argv, error):
      sys.exit(f"error: {unknown}")
    if "get_config" in str(error):
      sys.exit("error: the file of --config has no function get_config, which makes the config")
    raise
  if mistake := _missing_config(argv) or _stray_argument(argv, stray):
    sys.exit(f"error: {mistake}")
  return argv


def _unreadable_config(argv: list[str]) -> str | None:
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
      path = (match[1] or following).partition(":")[0]  # what follows is for get_config
      if not Path(path).is_file():
        return f"--config={path}: there is no such file"
  return None


def _missing_config(argv: list[str]) -> str | None:
  given = any(re.match("--?config(=|$)", argument) for argument in argv)  # if it can't be read, too
  if "config" in flags.FLAGS and flags.FLAGS["config"].value is None and not given:
    return f"--config is needed, such as --config={flags.FLAGS['config'].example}"
  return None


def _other_config() -> str | None:
  if "config" not in flags.FLAGS:
    return None
  flag = flags.FLAGS["config"]
  if flag.value is None or isinstance(flag.value, flag.makes):
    return None
  return (
    f"the file of --config makes no {flag.makes.__name__}: it makes {type(flag.value).__name__}"
  )


def _needed(error: flags.Error | OSError) -> str | None:
  """A flag that is required and not given."""
  found = re.search("Flag (--\\w+) must have a value other than None", str(error))
  return f"{found[1]} is needed" if found else None


def _bare_setting(error: flags.Error | OSError) -> str | None:
  """A setting without `config.` before it."""
  if not isinstance(error, flags.UnrecognizedFlagError) or "config" not in flags.FLAGS:
    return None
  every = field_paths(flags.FLAGS["config"].makes)
  near = [path for path in every if error.flagname in (path, path.rpartition(".")[2])]
  hint = f"; did you mean {' or '.join(f'--config.{path}' for path in near)}?"
  return f"there is no --{error.flagname}{hint}" if near else None


def _unknown_setting(argv: list[str], error: KeyError | AttributeError) -> str | None:
  for argument in argv:
    flag = argument.lstrip("-").partition("=")[0]
    path = flag.removeprefix("config.")
    if path == flag or path.rpartition(".")[2] not in str(error):
      continue
    cls = flags.FLAGS["config"].makes
    if path in field_paths(cls):
      return f"the file of --config makes no {cls.__name__}: there is no --{flag}"
    near = " or ".join(f"--config.{name}" for name in near_fields(path, cls))
    hint = f"did you mean {near}?" if near else f"--help and {_source(cls)} list them all"
    return f"there is no --{flag}; {hint}"
  return None


def _stray_argument(argv: list[str], stray: list[str]) -> str | None:
  if not stray:
    return None
  at = argv.index(stray[0])
  rest = itertools.takewhile(lambda a: not a.startswith("-"), argv[at:])
  joined = "".join(argv[at - 1 : at] + list(rest))
  hint = f"; lists take no spaces: {joined}" if "," in joined else ""
  return f"unexpected argument {stray[0]!r}{hint}"


def _default(path: str, cls: type[Comparison]) -> str:
  value = operator.attrgetter(path)(cls())
  return ",".join(value) if isinstance(value, Names) else str(value)


def _source(cls: type) -> str:
  return f"{cls.__module__.replace('.', '/')}.py"
