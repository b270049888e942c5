"""What the runner asks of any experiment: which arms it compares, and what to do at which step.

An experiment is a dataclass that derives from `Comparison`; its groups of settings are dataclasses.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags


class Names(tuple):
  """Names in order, `bf16,mxfp4` on the command line."""


class _NamesParser(flags.ArgumentParser):
  def parse(self, argument):
    parts = argument.split(",") if isinstance(argument, str) else argument
    return Names(part.strip() for part in parts if part.strip())

  def flag_type(self):
    return "comma-separated names"


config_flags.register_flag_parser_for_type(Names, _NamesParser())


@dataclasses.dataclass
class Distributed:
  """Which of several processes this is; no part of the experiment, which others may go on with."""

  coordinator: str | None = None  # host:port where process 0 meets the others; None: one process
  num_processes: int | None = None
  process_id: int | None = None  # 0 to num_processes - 1
  initialization_timeout: int = 300  # seconds until all have met
  heartbeat_timeout: int = 30  # seconds until a machine that vanished is missed


@dataclasses.dataclass
class Comparison:
  """Arms that differ in what is compared, each trained from the same weights, once a seed."""

  ARMS: ClassVar[str]  # the field with the names of the arms, a `Names`
  # Of environment.json, what a workdir goes on with alone, and what it is called.
  KEPT: ClassVar[Mapping[str, str]] = {}
  BY_ARM: ClassVar[tuple[str, ...]] = ()  # of environment.json, what is told of every arm

  seeds: int = 1  # runs of every arm, seeded 0, 1, ...
  steps: int = 100
  log_every: int = 1
  eval_every: int = 20
  probe_every: int = 20  # 0: never
  checkpoint_every: int = 50  # 0: never, so that a stopped run begins again
  checkpoints_kept: int = 2
  implementation: str | None = None  # "mosaic" or "xla", see `Policy`; None: "mosaic" if it can run
  distributed: Distributed = dataclasses.field(default_factory=Distributed)

  def arm_names(self) -> Names:
    return getattr(self, self.ARMS)

  def definitions(self) -> dict[str, Any]:
    """What each arm means, as in recipes.json: a workdir refuses an arm that means something else
    by then."""
    raise NotImplementedError

  def why_not_longer(self) -> str | None:
    """Why a run of this is not the beginning of one with more steps; None: it is."""
    return None if self.checkpoint_every else "checkpoint_every=0 keeps no state to go on from"

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, as written to config.json: what belongs to the experiment."""
    fields = dataclasses.asdict(self)
    del fields["distributed"]
    return {name: list(v) if isinstance(v, Names) else v for name, v in fields.items()}


def from_dict[C: Comparison](cls: type[C], settings: Mapping[str, Any]) -> C:
  """The experiment of values as `to_dict` gives them; what they lack has its default.

  Raises TypeError at a setting that the experiment does not have."""
  return _with_settings(cls(), settings)


def _with_settings[T](group: T, settings: Mapping[str, Any]) -> T:
  changes = {}
  for name, value in settings.items():
    was = getattr(group, name, None)
    if dataclasses.is_dataclass(was):
      changes[name] = _with_settings(was, value)
    else:
      changes[name] = Names(value) if isinstance(was, Names) else value
  return dataclasses.replace(group, **changes)


def plain_fields(value: Any) -> Any:
  """For JSON: a dataclass by its type and fields, a dtype by its name."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {f.name: plain_fields(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"type": type(value).__name__} | fields
  if isinstance(value, tuple | list):
    return [plain_fields(v) for v in value]
  if value is None or isinstance(value, str | int | float):
    return value
  try:
    return jnp.dtype(value).name
  except TypeError:
    kind = type(value).__name__
    raise ValueError(
      f"{value!r}: recipes.json tells {kind} by its fields, and it has none; make it a frozen"
      " dataclass"
    ) from None


def field_paths(cls: type) -> list[str]:
  """Dotted names of every setting, `model.num_layers`."""
  return list(field_types(cls))


def field_types(cls: type, prefix: str = "") -> dict[str, Any]:
  types, kinds = {}, typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    kind = kinds[field.name]
    if dataclasses.is_dataclass(kind):
      types |= field_types(kind, f"{prefix}{field.name}.")
    else:
      types[prefix + field.name] = kind
  return types


def near_fields(name: str, cls: type) -> list[str]:
  """Up to three settings that a wrong name may mean: near in full, in its last part, or `lr`."""
  last = name.rpartition(".")[2]

  def likeness(path: str) -> float:
    end = path.rpartition(".")[2]
    if last == "".join(word[0] for word in end.split("_")):
      return 1.0
    pairs = ((name, path), (last, end))
    return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

  near = [path for path in field_paths(cls) if likeness(path) >= 0.6]
  return sorted(near, key=likeness, reverse=True)[:3]
