"""Every notebook runs on the code as it is, and was stored after such a run."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes
SECONDS = 300  # for one cell, on a slow machine

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a kernel runs that writes nowhere else, and has our package and no settings of a user."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook after a run of its own, from cells without outputs."""
    fresh = copy.deepcopy(notebook)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(folder)}}
    return NotebookClient(fresh, timeout=SECONDS, kernel_name="python3", resources=where).execute()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> set[str]:
    """Of outputs: "image/png", "text/html", "stdout", "error", …"""
    found: set[str] = set()
    for output in cell.outputs:
        found |= set(output.get("data", {})) or {output.get("name", output.output_type)}
    return found


def test_a_notebook_runs_and_its_stored_outputs_are_of_the_same_kinds(path: Path, alone: Path):
    stored = nbformat.read(path, as_version=4)
    fresh = execute(stored, alone)
    for number, (old, new) in enumerate(zip(code_cells(stored), code_cells(fresh), strict=True), 1):
        assert kinds(old) == kinds(new), f"code cell {number}: run the notebook again and store it"


def test_a_notebook_fails_where_the_code_that_it_calls_is_gone(path: Path, alone: Path, monkeypatch):
    """It starts with its imports, so that an empty package in place of liplayers stops it at once."""
    (alone / "liplayers").mkdir()
    (alone / "liplayers" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(alone))
    with pytest.raises(CellExecutionError, match="liplayers"):
        execute(nbformat.read(path, as_version=4), alone)


def test_a_stored_notebook_is_whole_small_and_tells_nothing_of_its_machine(path: Path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run once from top to bottom"
    assert not {"error", "stderr"} & set().union(*map(kinds, cells))
    assert "image/png" in set().union(*map(kinds, cells)), "shows no figure"
    assert path.stat().st_size < LARGEST
    assert all(not cell.metadata for cell in notebook.cells), "timings or settings of an editor"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    without_figures = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(home|root|tmp|Users|usr|opt|var|work|mnt)/|[A-Z]:\\\\| at 0x[0-9a-f]+", without_figures)
