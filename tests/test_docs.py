"""The generated page is current, every registered layer is documented in full, and the example does what it says."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from audit import EVERY
from torch import nn

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


ROOMS = (
    "core", "modules", "layers", "models", "export", "bounds", "bundles", "audit", "conversion", "evaluator", "losses",
    "training", "errors",
)  # fmt: skip


def _documented() -> dict[str, Any]:
    """Every public class and function of these rooms, and every public method, by its full name."""
    found = {}
    for room in ROOMS:
        top = importlib.import_module(f"liplayers.{room}")
        inner = pkgutil.walk_packages(getattr(top, "__path__", []), f"{top.__name__}.")
        for module in (top, *(importlib.import_module(info.name) for info in inner)):
            for name in getattr(module, "__all__", []):
                thing = getattr(module, name)
                if getattr(thing, "__module__", None) == module.__name__:
                    found[f"{module.__name__}.{name}"] = thing
                    methods = vars(thing).items() if inspect.isclass(thing) else ()
                    public = {key: value for key, value in methods if not key.startswith("_")}
                    found |= {f"{module.__name__}.{name}.{k}": v for k, v in public.items() if inspect.isfunction(v)}
    return found


DOCUMENTED = _documented()


def _arguments(thing: Any) -> list[str] | None:
    """The names in its own section "Args", or None without one."""
    section = re.search(r"^Args:\n((?: .*\n?)+)", inspect.cleandoc(thing.__doc__ or ""), re.MULTILINE)
    return re.findall(r"^    (\S.*?):", section[1], re.MULTILINE) if section else None


def _parameters(thing: Any) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name != "self"]


@pytest.mark.parametrize("name", [name for name, thing in DOCUMENTED.items() if _arguments(thing) is not None])
def test_the_arguments_are_listed_as_in_the_signature_one_a_line(name: str):
    assert _arguments(DOCUMENTED[name]) == _parameters(DOCUMENTED[name])


def test_every_public_module_lists_its_arguments():
    modules = {k: v for k, v in DOCUMENTED.items() if inspect.isclass(v) and issubclass(v, nn.Module)}
    assert len(modules) > 70
    own = {k: v for k, v in modules.items() if v.__init__ is not nn.Module.__init__ and _parameters(v)}
    assert not [name for name, module in own.items() if _arguments(module) is None]


def test_the_example_of_a_new_family_is_short_and_gets_everything_for_free():
    assert len((ROOT / "docs" / "new_family.py").read_text(encoding="utf-8").splitlines()) <= 35
    command = [sys.executable, "-m", "docs.new_family"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MirrorLinear" in done.stdout
    assert "training step" in done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 50
