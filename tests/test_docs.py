"""The generated page is current, every registered layer is documented in full, and the example does what it says."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from audit import EVERY

from docs.catalogue import PAGE, page
from liplayers import FAMILIES

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_registry_generates():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.catalogue"


@pytest.mark.parametrize(("family", "role"), EVERY, ids=["-".join(e) for e in EVERY])
def test_a_layer_states_what_it_is_costs_and_comes_from(family: str, role: str):
    make = getattr(FAMILIES[family], role)
    doc = inspect.getdoc(make) or ""
    assert "Cost" in doc, "states no cost"
    assert "ignal gain at initialisation" in " ".join(doc.split()), "states no signal gain"
    assert re.search(r"^Source: ", doc, re.MULTILINE), "names no source"
    assert ">>>" in doc, "has no example"
    kinds = ("rthogonal", "contraction", "1-Lipschitz")
    assert any(kind in doc for kind in kinds), f"says neither of {kinds}"
    if role in FAMILIES[family].orthogonal:
        assert "rthogonal" in doc


def test_the_example_of_a_new_family_is_short_and_gets_everything_for_free():
    assert len((ROOT / "docs" / "new_family.py").read_text(encoding="utf-8").splitlines()) <= 33
    command = [sys.executable, "-m", "docs.new_family"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MirrorLinear" in done.stdout
    assert "training step" in done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 50
