"""Names that follow their values: a changed format or recipe says what was changed.

`dataclasses.replace(MXFP4, scale_rule="rceil").name` is "MXFP4[rceil]", for "MXFP4" would no longer
say what runs; `replace(MXFP4, name="MINE", ...)` is "MINE".
"""

import dataclasses
from collections.abc import Iterator
from typing import Any


class Name(str):
  """A name that remembers what it was given to, so that a changed copy can tell."""

  root: str
  owner: Any

  def __reduce__(self):
    return str, (str(self),)  # a copy names itself anew


def settle(value: Any) -> None:
  """Gives `value`, a frozen dataclass with a `name`, the name that says what it holds.

  A name that comes as a plain string is kept. One that `dataclasses.replace` carried over from
  another value is kept if nothing changed, else it tells the changes in brackets.
  """
  given = value.name
  if not isinstance(given, Name) or type(given.owner) is not type(value):
    _set(value, given, given, value)
  elif changed := list(_changes(given.owner, value)):
    _set(value, f"{given.root}[{', '.join(changed)}]", given.root, given.owner)
  else:
    _set(value, given.root, given.root, given.owner)


def brief(value: Any) -> str:
  """A value in a few words: by its name, or by its type and the fields that are not the default."""
  if isinstance(name := getattr(value, "name", None), str):
    return name
  if not dataclasses.is_dataclass(value) or isinstance(value, type):
    return getattr(value, "__name__", repr(value))
  fields = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
  told = [
    f"{f.name}={brief(v)}" for f, v in fields if f.default is dataclasses.MISSING or v != f.default
  ]
  return f"{type(value).__name__}({', '.join(told)})"


def _set(value, text, root, owner):
  name = Name(text)
  name.root, name.owner = root, owner
  object.__setattr__(value, "name", name)


def _changes(before: Any, after: Any, path: str = "") -> Iterator[str]:
  """ "wgrad.lhs.rounding=stochastic" for every field that differs; a value alone at the top."""
  for field in dataclasses.fields(after):
    if not field.compare:
      continue
    old, new = getattr(before, field.name), getattr(after, field.name)
    if old == new:
      continue
    here = path + field.name
    if type(old) is type(new) and dataclasses.is_dataclass(new) and not hasattr(new, "name"):
      yield from _changes(old, new, here + ".")
    elif isinstance(new, str) and not path:
      yield str(new)
    else:
      yield f"{here}={getattr(new, 'name', new)}"
