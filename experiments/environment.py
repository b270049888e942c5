"""What a run ran on: versions, device, commit, command line."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_dtypes", "numpy", "grain")

COMMIT = flags.DEFINE_string("commit", None, "Commit of a copy that git knows nothing of.")


def describe_environment(commit: str | None = None) -> dict[str, Any]:
  """Versions, device, git commit and whether the tree differs from it, and the command line.

  `commit` is that of the code where it runs from a copy that git knows nothing of.
  """
  device = jax.devices()[0]
  kind = platform.machine() if device.platform == "cpu" else device.device_kind
  count = f"x{jax.device_count()}"
  if jax.process_count() > 1:
    count += f" in {jax.process_count()} processes"
  return {
    "argv": ["python", *sys.orig_argv[1:]],
    "versions": {"python": platform.python_version()}
    | {name: _version(name) for name in _PACKAGES},
    "device": f"{device.platform} {kind} {count}, {os.cpu_count()} CPU cores",
    "git_commit": commit or _git("rev-parse", "HEAD"),
    "git_dirty": None if commit else _is_dirty(),
  }


def _version(name: str) -> str | None:
  """None for a package that is not installed: the kernels need fewer than a run."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _is_dirty() -> bool | None:
  status = _git("status", "--porcelain")
  return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
  """Output of a git command on this repository; None without git or outside a repository."""
  try:
    done = subprocess.run(
      ("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
  except (FileNotFoundError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip()


def told_source(row: Mapping[str, Any]) -> str:
  """Where the row of a table is from, in words."""
  commit = "unknown" if row["git_commit"] is None else row["git_commit"][:9]
  dirty = ", with uncommitted changes" if row["git_dirty"] else ""
  return f"Device: {row['device']}. Commit {commit}{dirty}."
