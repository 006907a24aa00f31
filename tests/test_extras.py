"""What `pip install liplayers` does without: packages of the extras, each of which is named where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from liplayers.commands import front_command
from liplayers.commands.entry import run
from liplayers.errors import MissingPackageError
from liplayers.extras import extra
from tests.without_extras import NEEDED, plain

ROOT = Path(__file__).parents[1]


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_these_packages_are_needed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tuple(map(plain, project["dependencies"])) == NEEDED


def test_with_them_alone_the_core_works_and_the_rest_says_what_to_install(tmp_path: Path):
    done = run_python(tmp_path, str(ROOT / "tests" / "without_extras.py"))
    assert (done.stderr, done.stdout, done.returncode) == ("", "", 0)


def test_a_command_without_its_extra_is_one_line_and_exit_status_1(tmp_path: Path):
    start = "import sys; sys.modules['hydra'] = None; from liplayers.commands import train_command; train_command()"
    done = run_python(tmp_path, "-c", start, "--help")
    said = "error: hydra is not installed: pip install 'liplayers[train]'\n"
    assert (done.stderr, done.stdout, done.returncode) == (said, "", 1)


def test_what_is_missing_of_liplayers_itself_is_in_no_extra():
    says = r"^nothing is not installed: pip install 'liplayers\[export\]'$"
    with pytest.raises(MissingPackageError, match=says), extra("export"):
        import nothing.inside  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'liplayers\.nothing'"), extra("export"):
        import liplayers.nothing  # noqa: F401


def test_a_command_that_lacks_one_package_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def task(cfg: object) -> None:
        with extra("train"):
            import nothing  # noqa: F401

    monkeypatch.setattr(sys, "argv", ["certify.py", "ckpt=a"])
    with pytest.raises(SystemExit) as ended:
        run("certify", task)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: nothing is not installed: pip install 'liplayers[train]'\n"

    monkeypatch.setattr(sys, "argv", ["liplayers-front", "runs"])
    monkeypatch.delitem(sys.modules, "liplayers.cli.front", raising=False)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SystemExit) as ended:
        front_command()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: pandas is not installed: pip install 'liplayers[train]'\n"
