"""Every notebook: both files of the pair say the same, and every cell runs in a fresh kernel."""

import asyncio
import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted({p.stem for p in FOLDER.iterdir() if p.suffix in (".py", ".ipynb")})


def execute(notebook, cwd, tmp_path):
  """Runs the cells in a kernel whose temporary files and settings are its own."""
  # Tagged as the place to override: a run that happens to lie in runs/ must not decide the test.
  for cell in notebook.cells:
    if "parameters" in cell.metadata.get("tags", ()):
      cell.source += f"\nWORKDIR = Path({str(tmp_path / 'no-such-run')!r})"
  client = NotebookClient(
    notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(cwd)}}
  )
  own = {"TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython")}
  # Not client.execute(), which leaves its event loop open.
  asyncio.run(client.async_execute(env=os.environ | own))


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_says_the_same(name):
  """The .py is the source; the .ipynb is written from it, without outputs."""
  source = jupytext.read(FOLDER / f"{name}.py")
  paired = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
  nbformat.validate(paired)
  advice = f"jupytext --to ipynb notebooks/{name}.py writes the .ipynb again"
  assert source.metadata["jupytext"]["formats"] == "ipynb,py:percent"
  assert paired.metadata["jupytext"]["formats"] == "ipynb,py:percent"

  def said(notebook):
    return [(c.cell_type, c.source, c.metadata.get("tags")) for c in notebook.cells]

  assert said(paired) == said(source), advice
  outputs = [c.outputs or c.execution_count for c in paired.cells if c.cell_type == "code"]
  assert not any(outputs), advice


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs(name, tmp_path):
  execute(jupytext.read(FOLDER / f"{name}.py"), FOLDER, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_imports_and_parameters_run_from_the_root(name, tmp_path):
  notebook = jupytext.read(FOLDER / f"{name}.py")
  tagged = ["parameters" in c.metadata.get("tags", ()) for c in notebook.cells]
  notebook.cells = notebook.cells[: tagged.index(True) + 1]
  execute(notebook, ROOT, tmp_path)


def test_a_cell_that_raises_is_an_error(tmp_path):
  notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
  with pytest.raises(CellExecutionError, match="AssertionError"):
    execute(notebook, FOLDER, tmp_path)
