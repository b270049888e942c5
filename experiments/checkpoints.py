"""Checkpoints of one run: Orbax writes the arrays, a manifest proves them whole, a rename counts.

  folder/00000100/state/          the arrays by leaf name, a plain Orbax PyTree checkpoint
  folder/00000100/manifest.json   step, metadata, leaves, and size and SHA-256 of every file

Until its last rename a checkpoint is `00000100.tmp`, which nothing reads and the next save removes:
kill -9 at any moment leaves the earlier checkpoints as they were. Orbax restores arrays with
flipped bytes without a word, so it opens no file before every hash agrees. Its CheckpointManager
would save an eighth of these lines: it proves nothing, and meets damage with tracebacks.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from experiments import logs

_MANIFEST = "manifest.json"
_BASE_BYTES = 128 << 10  # room on the disk beside the data: for any checkpoint
_LEAF_BYTES = 2 << 10  # and for each of its leaves


class Checkpoints:
  """The newest `keep` checkpoints in `folder`, written by one process at a time.

  A state is any pytree of jax.Arrays; it is restored bit for bit, to the default device.
  """

  def __init__(self, folder: str | os.PathLike, keep: int):
    if keep < 1:
      raise ValueError(f"{keep=} must be at least 1")
    self._folder = Path(folder).absolute()
    self._keep = keep
    self._damaged: set[int] = set()  # passed over by restore_latest; the next save removes them
    with _quiet_orbax():
      self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, without those that restore_latest found damaged."""
    return max(set(self._steps()) - self._damaged, default=None)

  def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
    """Returns with the checkpoint on the disk, then removes all but the newest `keep`.

    Raises ValueError for a step not after the latest and for metadata that JSON would change,
    OSError when the files can't be written: the earlier checkpoints are then all still there.
    """
    latest = self.latest_step()
    if latest is not None and step <= latest:
      raise ValueError(f"{step=} is not after the latest checkpoint, {latest}, in {self._folder}")
    if json.loads(json.dumps(metadata, allow_nan=False)) != metadata:
      raise ValueError(f"{metadata=} is not the same after a round trip through JSON")
    leaves = _named_leaves(state)
    for name, leaf in leaves.items():
      if not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(f"leaf {name!r} must be a jax.Array of numbers, not {leaf!r:.60}")
      if leaf.size == 0:
        raise ValueError(f"leaf {name!r} is {_describe(leaf)}; Orbax saves no empty arrays")
    partial = self._path(step).with_suffix(".tmp")
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._remove_rubbish()
      self._write(partial, step, leaves, metadata)
      os.replace(partial, self._path(step))
      logs.sync_folder(self._folder)
    except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
      shutil.rmtree(partial, ignore_errors=True)  # Orbax's threads may still be writing there
      raise OSError(
        f"cannot save the checkpoint of step {step} in {self._folder}: {_reason(error)}"
      ) from error
    for old in sorted(self._steps())[: -self._keep]:
      self._remove(old)

  def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """(step, state, metadata) of the newest whole checkpoint; None when there is no checkpoint.

    `abstract_state` has the state's tree, shapes and dtypes, as jax.eval_shape gives it, or is a
    function of the step that gives it. A damaged checkpoint is passed over with a warning. Raises
    OSError when all are damaged, ValueError when the leaves saved are not those of
    `abstract_state`. Writes nothing.
    """
    damage: dict[int, str] = {}
    for step in sorted(self._steps(), reverse=True):
      path = self._path(step)
      try:
        manifest = _checked_manifest(path)
      except _DamageError as error:
        damage[step] = str(error)
        logging.warning("checkpoint of step %d in %s is damaged: %s", step, self._folder, error)
        continue
      abstract = abstract_state(step) if callable(abstract_state) else abstract_state
      wanted = _named_leaves(abstract)
      _check_leaves(manifest["leaves"], wanted, path)
      with _quiet_orbax():
        saved = self._orbax.restore(path / "state", args=ocp.args.PyTreeRestore())
      arrays = [jax.device_put(saved[name]) for name in wanted]
      self._damaged = set(damage)
      state = jax.tree.unflatten(jax.tree.structure(abstract), arrays)
      return step, state, manifest["metadata"]
    if damage:
      found = "; ".join(f"step {step}: {reason}" for step, reason in damage.items())
      raise OSError(
        f"every checkpoint in {self._folder} is damaged ({found}); "
        "remove the folder to begin again at step 0"
      )
    return None

  def close(self) -> None:
    with _quiet_orbax():
      self._orbax.close()

  def _path(self, step: int) -> Path:
    return self._folder / f"{step:08d}"

  def _matching(self, pattern: str) -> list[Path]:
    if not self._folder.is_dir():
      return []
    return [path for path in self._folder.iterdir() if re.fullmatch(pattern, path.name)]

  def _steps(self) -> list[int]:
    return [int(path.name) for path in self._matching(r"\d{8,}")]

  def _remove(self, step: int) -> None:
    rubbish = self._path(step).with_suffix(".tmp")  # so that no half-removed checkpoint is read
    os.replace(self._path(step), rubbish)
    shutil.rmtree(rubbish)

  def _remove_rubbish(self) -> None:
    for path in self._matching(r"\d{8,}\.tmp"):
      shutil.rmtree(path)
    for step in self._damaged:
      self._remove(step)
    self._damaged = set()

  def _write(
    self, path: Path, step: int, leaves: dict[str, jax.Array], metadata: dict[str, Any]
  ) -> None:
    # Looked at first because Orbax's threads meet both limits with pages of tracebacks.
    need = sum(leaf.nbytes + _LEAF_BYTES for leaf in leaves.values()) + _BASE_BYTES
    free = shutil.disk_usage(self._folder).free
    if free < need:
      raise OSError(errno.ENOSPC, f"no space on the disk: {need} bytes needed, {free} free")
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < need:
      raise OSError(errno.EFBIG, f"files are limited to {limit} bytes, {need} may be needed")
    arrays = dict(zip(leaves, jax.device_get(list(leaves.values())), strict=True))
    path.mkdir()
    with _quiet_orbax():
      self._orbax.save(path / "state", args=ocp.args.PyTreeSave(arrays))
    content = {
      "step": step,
      "metadata": metadata,
      "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
      "files": {
        file.relative_to(path).as_posix(): _fingerprint(file)
        for file in sorted(path.rglob("*"))
        if file.is_file()
      },
    }
    logs.write_json(path / _MANIFEST, {"sha256": _digest(content), "content": content})


class _DamageError(Exception):
  """A checkpoint's files are not those that were saved."""


def _checked_manifest(path: Path) -> dict[str, Any]:
  """The manifest's content, after comparing it and every file with what was saved."""
  try:
    manifest = json.loads((path / _MANIFEST).read_bytes())
    content, digest = manifest["content"], manifest["sha256"]
  except OSError as error:
    raise _DamageError(f"{_MANIFEST}: {error.strerror}") from error
  except (ValueError, KeyError, TypeError) as error:
    raise _DamageError(f"{_MANIFEST} is not a manifest: {error!r}") from error
  if _digest(content) != digest:
    raise _DamageError(f"{_MANIFEST} has changed since it was saved")
  for name, saved in content["files"].items():
    try:
      found = _fingerprint(path / name)
    except OSError as error:
      raise _DamageError(f"{name}: {error.strerror}") from error
    if found["bytes"] != saved["bytes"]:
      raise _DamageError(f"{name} has {found['bytes']} bytes of {saved['bytes']}")
    if found != saved:
      raise _DamageError(f"{name} has changed since it was saved")
  return content


def _check_leaves(saved: dict[str, str], wanted: dict[str, Any], path: Path) -> None:
  expected = {name: _describe(leaf) for name, leaf in wanted.items()}
  differences = [
    f"{name}: saved {saved.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
    for name in {**expected, **saved}
    if saved.get(name) != expected.get(name)
  ]
  if differences:
    more = f"; and {len(differences) - 10} more" if len(differences) > 10 else ""
    raise ValueError(f"{path} holds another state: {'; '.join(differences[:10])}{more}")


def _named_leaves(tree: Any) -> dict[str, Any]:
  """Leaves by path, `params/blocks/0/w`, in the tree's order."""
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in named:
      raise ValueError(f"two leaves of the state are named {name!r}")
    named[name] = leaf
  return named


def _describe(leaf: Any) -> str:
  """`float32[128,256]`."""
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _digest(content: Any) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint(file: Path) -> dict[str, Any]:
  with open(file, "rb") as opened:
    digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": digest}


def _reason(error: OSError | ValueError) -> str:
  """The system's own words where they are known: tensorstore wraps them in a page of paths."""
  if code := re.search(r"os_error_code='(\d+)'", str(error)):
    return os.strerror(int(code[1]))
  return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
  """Orbax logs 20 lines a save, and tracebacks for errors that it raises as well."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)
