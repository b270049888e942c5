"""Checkpoints of one run: Orbax writes the arrays, a manifest proves them whole, a rename counts.

  folder/00000100/state/          the arrays by leaf name, an Orbax PyTree checkpoint
  folder/00000100/manifest.json   step, metadata, leaves, size and SHA-256 of every file in state

Every process writes its own shards, in the background; once all have, process 0 hashes the files,
writes the manifest and renames. Until then the checkpoint is `00000100.orbax-checkpoint-tmp`, which
nothing reads and the next save removes: kill -9 of any process at any moment leaves the earlier
checkpoints as they were. Orbax restores arrays with flipped bytes without a word, so it opens no
file before every hash agrees: hashes of files, because they are known before anything is restored,
whatever the mesh. All processes share in checking them, and pass over what one finds damaged.
Orbax's CheckpointManager proves nothing, and meets damage with tracebacks.
"""

import errno
import hashlib
import json
import logging as python_logging
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from experiments import logs
from experiments.processes import Group

_MANIFEST = "manifest.json"
_PARTIAL = ".orbax-checkpoint-tmp"
_BASE_BYTES = 128 << 10  # room on the disk beside the data: for any checkpoint
_LEAF_BYTES = 2 << 10  # and for each of its leaves


class Checkpoints:
  """The newest `keep` checkpoints in `folder`, written by all processes of `group` together.

  A state is any pytree of jax.Arrays, with several processes arrays over the devices of all; it is
  restored bit for bit, to any sharding. The methods are called by all processes.
  """

  def __init__(self, folder: str | os.PathLike, keep: int, group: Group | None = None):
    if keep < 1:
      raise ValueError(f"{keep=} must be at least 1")
    self._folder = Path(folder).absolute()
    self._keep = keep
    self._group = group or Group()
    self._damaged: set[int] = set()  # passed over by restore_latest; the next save removes them
    self._writing: int | None = None  # the step that is being written
    self._content: dict[str, Any] = {}  # of its manifest, but for the files
    logging.get_absl_logger().addFilter(_not_of_orbax)
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(),
      async_options=ocp.AsyncOptions(post_finalization_callback=self._prove),
      checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=False),
    )

  def latest_step(self) -> int | None:
    """Step of the newest checkpoint that is on the disk, without those that restore_latest found
    damaged."""
    return max(set(self._steps()) - self._damaged, default=None)

  def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
    """Returns once `state` is copied and may be donated; it is written while training goes on.

    Waits for the save before, whose errors it raises. Raises ValueError for a step not after the
    latest and for metadata that JSON would change, OSError when there is no room: the earlier
    checkpoints are then all still there.
    """
    self.wait()
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
    self._content = {
      "step": step,
      "metadata": metadata,
      "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
    }
    self._writing = step
    try:
      if self._group.index == 0:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_rubbish()
      self._damaged = set()
      self._group.gather(None)
      self._check_room(leaves)
      self._orbax.save(self._path(step), args=ocp.args.Composite(state=ocp.args.PyTreeSave(leaves)))
    except (OSError, ValueError) as error:
      raise self._failed(error) from error

  def wait(self) -> None:
    """Returns once the last save is on the disk, and removes all but the newest `keep`.

    Raises OSError, with the step, when it can't be written.
    """
    try:
      self._orbax.wait_until_finished()
      if self._writing is not None and self._group.index == 0:
        logs.sync_folder(self._folder)
        for old in sorted(self._steps())[: -self._keep]:
          self._remove(old)
    except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
      raise self._failed(error) from error
    self._writing = None

  def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """(step, state, metadata) of the newest whole checkpoint; None when there is no checkpoint.

    `abstract_state` has the state's tree, shapes and dtypes, as jax.eval_shape gives it, or is a
    function of the step that gives it. A leaf with a sharding is restored to it, each device
    reading its part, another to the default device. A damaged checkpoint is passed over with a
    warning. Raises OSError when all are damaged, ValueError when the leaves saved are not those of
    `abstract_state`. Writes nothing.
    """
    self.wait()
    damage: dict[int, str] = {}
    for step in self._group.gather(sorted(self._steps(), reverse=True))[0]:
      path = self._path(step)
      try:
        manifest, reason = _checked_manifest(path, self._group), None
      except _DamageError as error:
        reason = str(error)
      reason = next(filter(None, self._group.gather(reason)), None)
      if reason is not None:
        damage[step] = reason
        logging.warning("checkpoint of step %d in %s is damaged: %s", step, self._folder, reason)
        continue
      abstract = abstract_state(step) if callable(abstract_state) else abstract_state
      wanted = _named_leaves(abstract)
      _check_leaves(manifest["leaves"], wanted, path)
      self._damaged = set(damage)
      state = jax.tree.unflatten(jax.tree.structure(abstract), _read(path / "state", wanted))
      return step, state, manifest["metadata"]
    if damage:
      found = "; ".join(f"step {step}: {reason}" for step, reason in damage.items())
      raise OSError(
        f"every checkpoint in {self._folder} is damaged ({found}); "
        "remove the folder to begin again at step 0"
      )
    return None

  def close(self) -> None:
    """Waits for the last save; raises its error."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def _path(self, step: int) -> Path:
    return self._folder / f"{step:08d}"

  def _partial(self, step: int) -> Path:
    return self._folder / f"{step:08d}{_PARTIAL}"

  def _matching(self, pattern: str) -> list[Path]:
    if not self._folder.is_dir():
      return []
    return [path for path in self._folder.iterdir() if re.fullmatch(pattern, path.name)]

  def _steps(self) -> list[int]:
    return [int(path.name) for path in self._matching(r"\d{8,}")]

  def _remove(self, step: int) -> None:
    rubbish = self._partial(step)  # so that no half-removed checkpoint is read
    os.replace(self._path(step), rubbish)
    shutil.rmtree(rubbish)

  def _remove_rubbish(self) -> None:
    for path in self._matching(rf"\d{{8,}}(\.tmp|{re.escape(_PARTIAL)})"):
      shutil.rmtree(path)
    for step in self._damaged:
      self._remove(step)

  def _check_room(self, leaves: dict[str, jax.Array]) -> None:
    """Looked at first because Orbax's threads meet both limits with pages of tracebacks."""
    need = sum(leaf.nbytes + _LEAF_BYTES for leaf in leaves.values()) + _BASE_BYTES
    free = shutil.disk_usage(self._folder).free
    if free < need:
      raise OSError(errno.ENOSPC, f"no space on the disk: {need} bytes needed, {free} free")
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < need:
      raise OSError(errno.EFBIG, f"files are limited to {limit} bytes, {need} may be needed")

  def _prove(self) -> None:
    """Called by Orbax in process 0 when all have written, before the rename."""
    path = self._partial(self._content["step"])
    files = {
      file.relative_to(path).as_posix(): _fingerprint(file)
      for file in sorted((path / "state").rglob("*"))
      if file.is_file()
    }
    content = self._content | {"files": files}
    logs.write_json(path / _MANIFEST, {"sha256": _digest(content), "content": content})

  def _failed(self, error: OSError | ValueError) -> OSError:
    step, self._writing = self._writing, None
    if self._group.index == 0:
      shutil.rmtree(
        self._partial(step), ignore_errors=True
      )  # Orbax's threads may still write there
    return OSError(f"cannot save the checkpoint of step {step} in {self._folder}: {_reason(error)}")


class _DamageError(Exception):
  """A checkpoint's files are not those that were saved."""


def _checked_manifest(path: Path, group: Group) -> dict[str, Any]:
  """The manifest's content; it, and this process's share of the files, are what was saved."""
  try:
    manifest = json.loads((path / _MANIFEST).read_bytes())
    content, digest = manifest["content"], manifest["sha256"]
  except OSError as error:
    raise _DamageError(f"{_MANIFEST}: {error.strerror}") from error
  except (ValueError, KeyError, TypeError) as error:
    raise _DamageError(f"{_MANIFEST} is not a manifest: {error!r}") from error
  if _digest(content) != digest:
    raise _DamageError(f"{_MANIFEST} has changed since it was saved")
  for name, saved in list(content["files"].items())[group.index :: group.count]:
    try:
      found = _fingerprint(path / name)
    except OSError as error:
      raise _DamageError(f"{name}: {error.strerror}") from error
    if found["bytes"] != saved["bytes"]:
      raise _DamageError(f"{name} has {found['bytes']} bytes of {saved['bytes']}")
    if found != saved:
      raise _DamageError(f"{name} has changed since it was saved")
  return content


def _read(path: Path, wanted: dict[str, Any]) -> list[jax.Array]:
  """The arrays of the leaves `wanted`, in their order, where their shardings say."""
  arguments = {
    name: ocp.RestoreArgs(restore_type=np.ndarray)
    if getattr(leaf, "sharding", None) is None
    else ocp.ArrayRestoreArgs(sharding=leaf.sharding)
    for name, leaf in wanted.items()
  }
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    found = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
  arrays = [found[name] for name in wanted]
  return [jax.device_put(array) if isinstance(array, np.ndarray) else array for array in arrays]


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


def _not_of_orbax(record: python_logging.LogRecord) -> bool:
  """Orbax logs 20 lines a save, and tracebacks for errors that it raises as well."""
  return "orbax" not in Path(record.pathname).parts
