"""The examples run."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path, capsys):
  runpy.run_path(str(path))
  assert "131072 bytes are 17408 in MXFP4_RCEIL" in capsys.readouterr().out
