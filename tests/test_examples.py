"""The examples run as scripts, in any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path, tmp_path):
  done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "131072 bytes are 17408 in MXFP4_RCEIL" in done.stdout
