"""What the README and the manual say runs: each block of Python, each command of train.py; links lead somewhere."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import types
from pathlib import Path

import hydra
import pytest
import torch
import yaml

import liplayers
from docs.pages import OBJECTS, escaped
from liplayers import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "guides").glob("*.md"))
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    registered = set(FAMILIES)
    module = types.ModuleType("manual")
    monkeypatch.setitem(sys.modules, "manual", module)  # so that its classes can be pickled
    try:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for number, block in enumerate(blocks, 1):
            torch.manual_seed(0)
            exec(compile(block, f"{page.name}, block {number}", "exec"), vars(module))
    finally:
        for family in set(FAMILIES) - registered:
            del FAMILIES[family]


def commands(script: str) -> list[tuple[str, str]]:
    """(page, arguments) of every command line that starts with `python <script>`."""
    return [
        (page.name, line.split(" #")[0].strip())
        for page in PAGES
        for line in re.findall(rf"^    python {script}(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


@pytest.mark.parametrize("config", ["train", "certify"])
def test_every_command_of_a_page_composes(config: str):
    seen = commands(f"{config}.py")
    assert len(seen) > 10
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for page, line in seen:
            overrides = [word for word in shlex.split(line) if not re.match(r"-|hydra|.*=mine", word)]
            try:
                hydra.compose(config, overrides if "-m" not in line.split() else [first_value(w) for w in overrides])
            except Exception as error:
                raise AssertionError(f"{page}: {config}.py {line}: {error}") from error


def first_value(override: str) -> str:
    """Of the values of a sweep."""
    return override if "[" in override else override.split(",")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8").lower(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in headings}, target


def test_a_docstring_is_plain_text_but_for_code_and_examples():
    lines = ["the norm |x| of *args, `f`s and `g|h", "k` of w_, x", "", ">>> a|b"]
    assert escaped(lines) == [r"the norm \|x\| of \*args, `f`\ s and `g|h", r"k` of w\_, x", "", ">>> a|b"]


def test_everything_public_is_documented_once():
    paths = [path for objects in OBJECTS.values() for path in objects]
    assert {"liplayers.lipschitz_bound", "liplayers.certification.CertifiedNetwork"} <= set(paths)
    assert not [path for objects in OBJECTS.values() for path, value in objects.items() if not inspect.getdoc(value)]
    assert len(paths) == len(set(paths))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_citation_names_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == liplayers.__version__
    assert citation["license"] == "MIT"
    assert f"## {liplayers.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
