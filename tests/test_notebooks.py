"""Every notebook runs on the code as it is, and was stored after such a run."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes
SECONDS = 300  # for one cell, on a slow machine

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def set_environment(patch: pytest.MonkeyPatch, package: Path, folder: Path) -> None:
    """For a kernel that finds liplayers in `package`, writes to `folder` alone and has no settings of a user."""
    patch.setenv("PYTHONPATH", str(package))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        patch.setenv(name, str(folder / name.lower()))


@contextmanager
def kernel(package: Path, folder: Path) -> Iterator[KernelManager]:
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, package, folder)
        manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder))
        client.stop_channels()
        try:
            yield manager
        finally:
            manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def shared_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """One for all notebooks: it imports torch once, and forgets every name before the next."""
    with kernel(ROOT, tmp_path_factory.mktemp("notebooks")) as manager:
        yield manager


def execute(notebook: NotebookNode, manager: KernelManager) -> NotebookNode:
    """The notebook after a run of its own, from cells without outputs."""
    fresh = copy.deepcopy(notebook)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    forget = new_code_cell("%reset -f")
    fresh.cells.insert(0, forget)
    NotebookClient(fresh, timeout=SECONDS, km=manager).execute()
    fresh.cells.remove(forget)
    return fresh


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> set[str]:
    """Of outputs: "image/png", "text/html", "stdout", "error", …"""
    found: set[str] = set()
    for output in cell.outputs:
        found |= set(output.get("data", {})) or {output.get("name", output.output_type)}
    return found


@pytest.mark.parametrize(
    "path",
    # the second compares all families, for half a minute
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * path.stem.startswith("2")) for path in NOTEBOOKS],
)
def test_a_notebook_runs_and_its_stored_outputs_are_of_the_same_kinds(path: Path, shared_kernel: KernelManager):
    stored = nbformat.read(path, as_version=4)
    fresh = execute(stored, shared_kernel)
    for number, (old, new) in enumerate(zip(code_cells(stored), code_cells(fresh), strict=True), 1):
        assert kinds(old) == kinds(new), f"code cell {number}: run the notebook again and store it"


def test_a_notebook_fails_where_the_code_that_it_calls_is_gone(tmp_path: Path):
    """An empty package in place of liplayers stops it at its imports."""
    (tmp_path / "liplayers").mkdir()
    (tmp_path / "liplayers" / "__init__.py").touch()
    with kernel(tmp_path, tmp_path) as manager, pytest.raises(CellExecutionError, match="liplayers"):
        execute(nbformat.read(NOTEBOOKS[0], as_version=4), manager)


@every_notebook
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
