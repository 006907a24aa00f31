"""Writes into docs/generated what the manual shows of the code, the settings and the results; conf.py calls it.

Nothing here names a module: a family, a function, a recipe or a table of results that is added appears by itself.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import liplayers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONFIGS = ROOT / "configs"
COMMANDS = "liplayers.cli."  # below it are the parts of the commands, which are no interface


def modules() -> list[ModuleType]:
    """The package and its public modules, those with the shortest path first."""
    found = [info.name for info in pkgutil.walk_packages(liplayers.__path__, "liplayers.")]
    names = [name for name in found if "._" not in name and not name.startswith(COMMANDS)]
    return [liplayers, *map(importlib.import_module, sorted(names, key=lambda name: (name.count("."), name)))]


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or the documented classes and functions that a module defines or a package passes on."""
    if hasattr(module, "__all__"):
        named = ((name, getattr(module, name)) for name in module.__all__)
        return [name for name, value in named if inspect.isclass(value) or inspect.isroutine(value)]
    package = hasattr(module, "__path__")
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__doc__
        and (value.__module__ == module.__name__ or (package and value.__module__.startswith("liplayers.")))
    ]


def public_objects() -> dict[str, dict[str, object]]:
    """By the module that defines them: each public object under the shortest path that it can be imported by."""
    found: dict[str, dict[str, object]] = {}
    seen: set[int] = set()
    for module in modules():
        for name in public_names(module):
            value = getattr(module, name)
            if id(value) not in seen and not isinstance(value, ModuleType):
                seen.add(id(value))
                home = getattr(value, "__module__", None) or module.__name__
                home = home if home.startswith("liplayers") else module.__name__
                found.setdefault(home, {})[f"{module.__name__}.{name}"] = value
    return found


OBJECTS = public_objects()
# what a text may call by its last name: everything that `import liplayers` gives, and every class
PUBLIC = {
    path.rpartition(".")[2]: path
    for objects in reversed(list(OBJECTS.values()))
    for path in objects
    if path.count(".") == 1 or path.rpartition(".")[2][0].isupper()
}


def write(folder: Path) -> None:
    """Everything that is generated, afresh."""
    shutil.rmtree(folder, ignore_errors=True)
    write_reference(folder / "reference")
    write_results(folder / "results")
    write_text(folder / "recipes.md", recipes())
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    write_project(folder)
    write_inventory(folder / "torch.inv")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def heading(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}"


def write_project(folder: Path) -> None:
    """The files of the repository's root that belong to the manual."""
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        write_text(folder / name, text.replace("](docs/", "](/").replace("](LICENSE)", "](LICENSE.md)"))
    write_text(folder / "LICENSE.md", "# Licence\n\n" + (ROOT / "LICENSE").read_text(encoding="utf-8"))


# The reference


def write_reference(folder: Path) -> None:
    """A page for each module that defines something public, and one for each package, which lists them."""
    packages: dict[str, list[str]] = {}
    for home, objects in OBJECTS.items():
        module = importlib.import_module(home)
        package = home if hasattr(module, "__path__") else home.rpartition(".")[0]
        packages.setdefault(package, [])
        if package != home:
            packages[package].append(home)
            write_text(folder / f"{home}.rst", module_page(home, objects))
    for package, homes in packages.items():
        write_text(folder / f"{package}.rst", package_page(package, sorted(homes)))
    order = sorted(packages, key=lambda name: (name.count("."), name))
    write_text(folder / "index.rst", index_page(order))


def toctree(entries: Iterable[str]) -> str:
    return "\n".join([".. toctree::", "   :maxdepth: 1", "", *(f"   {entry}" for entry in entries)])


def index_page(packages: list[str]) -> str:
    parts = [
        heading("Reference"),
        "Everything public, under the shortest path that it can be imported by. *Raises* says what an error means; "
        "all errors are subclasses of `liplayers.LipschitzError`.",
        toctree(packages),
    ]
    for package in packages:
        names = [path for home, objects in OBJECTS.items() if in_package(home, package) for path in objects]
        parts += [heading(package, "-"), summary(sorted(names))]
    return "\n\n".join(parts) + "\n"


def in_package(home: str, package: str) -> bool:
    return home == package or (home.rpartition(".")[0] == package and not is_package(home))


def is_package(name: str) -> bool:
    return hasattr(importlib.import_module(name), "__path__")


def summary(names: Iterable[str]) -> str:
    return "\n".join([".. autosummary::", "   :nosignatures:", "", *(f"   ~{name}" for name in names)])


def package_page(package: str, homes: list[str]) -> str:
    parts = [heading(package), f".. automodule:: {package}\n   :no-members:\n   :no-index:"]
    if homes:
        parts.append(toctree(homes))
    return "\n\n".join([*parts, *map(directive, OBJECTS.get(package, {}).items())]) + "\n"


def module_page(home: str, objects: dict[str, object]) -> str:
    head = f".. automodule:: {home}\n   :no-members:\n   :no-index:"
    return "\n\n".join([heading(home), head, *map(directive, objects.items())]) + "\n"


def directive(item: tuple[str, object]) -> str:
    path, value = item
    namespace = path.rpartition(".")[0]
    if inspect.isclass(value):
        lines = [f".. autoclass:: {path}", "   :members:", "   :show-inheritance:"]
    elif callable(value):
        lines = [f".. autofunction:: {path}"]
    else:
        lines = [f".. autodata:: {path}", "   :no-value:"]
    return f".. currentmodule:: {namespace}\n\n" + "\n".join(lines)


def escaped(lines: Iterable[str]) -> list[str]:
    """The lines of a docstring, in which only backquotes and examples are markup, as reStructuredText."""
    result = []
    example = code = False
    for line in lines:
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if example:
            result.append(line)
            continue
        code = code and bool(line.strip())  # between two backquotes, which may stand in two lines
        parts = line.split("`")
        texts = [part if (i % 2 == 1) ^ code else _escaped_text(part, i, len(parts)) for i, part in enumerate(parts)]
        result.append("`".join(texts))
        code ^= len(parts) % 2 == 0
    return result


def _escaped_text(text: str, number: int, parts: int) -> str:
    """Without markup; where it touches code an escaped space, which ends the code and is not shown."""
    plain = re.sub(r"([\\*|]|_(?=\W|$))", r"\\\1", text)
    before = "\\ " if number > 0 and text[:1].strip() else ""
    after = "\\ " if number < parts - 1 and text[-1:].strip() else ""
    return f"{before}{plain}{after}"


# Settings, recipes and results


def head(path: Path) -> list[str]:
    """The comment that a file of settings begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def recipes() -> str:
    """Every experiment with what its head says and its settings, then the choices of every group."""
    parts = [
        "# Recipes and settings",
        "Generated from `configs/`. A recipe is run with `python train.py experiment=NAME`; each setting can be "
        "overridden on the command line.",
        "## Recipes",
    ]
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        parts += [f"### {path.stem}", marked("\n".join(head(path))), yaml_block(path)]
    parts.append("## Choices of each group")
    for group in sorted({path.parent.name for path in CONFIGS.glob("*/*.yaml")} - {"experiment"}):
        parts.append(f"### {group}")
        for path in sorted((CONFIGS / group).glob("*.yaml")):
            parts += [f"**{path.stem}**", marked("\n".join(head(path))), yaml_block(path)]
    return "\n\n".join(parts) + "\n"


def marked(comment: str) -> str:
    """A comment as markdown, with commands and settings in code."""
    comment = re.sub(r"\A(.*[^.,:;\n])\n(?=[A-Z])", r"\1\n\n", comment)  # the first line is a title
    setting = r"[a-z_]+(?:\.[a-z_]+)*=[\w./]*\w"
    return re.sub(rf"python train\.py(?: {setting})*|(?<![\w.]){setting}", r"`\g<0>`", comment)


def yaml_block(path: Path) -> str:
    """A file of settings without the comment that it begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, 1) if not line.startswith("#"))
    return f"```{{literalinclude}} ../../{path.relative_to(ROOT)}\n:language: yaml\n:lines: {first}-\n```"


def write_results(folder: Path) -> None:
    """Tables, pictures and figures as the benchmarks left them; a list of the pages."""
    kept: Callable[[str, list[str]], Iterable[str]] = shutil.ignore_patterns("*_quick*", "*_part*", "jobs", "*_runs")
    shutil.copytree(RESULTS, folder, ignore=kept)
    found = sorted(folder.rglob("*.md"))
    for page in found:
        pattern = "*.png" if page.stem == page.parent.name else f"{page.stem}*.png"
        pictures = [f"![{picture.stem}]({picture.name})" for picture in sorted(page.parent.glob(pattern))]
        write_text(page, "\n\n".join([page.read_text(encoding="utf-8").rstrip(), *pictures]) + "\n")
    entries = "\n".join(page.relative_to(folder).with_suffix("").as_posix() for page in found)
    write_text(
        folder / "index.md",
        "# Tables of results\n\nAs the benchmarks wrote them, with the command, the machine and the versions.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{entries}\n```\n",
    )


# Torch's names

TORCH = {  # where torch documents names, each on a page of its own, and the modules that define them
    "torch.nn": "torch.nn.modules",
    "torch.nn.functional": "torch.nn.functional",
    "torch.optim": "torch.optim.",
    "torch.optim.lr_scheduler": "torch.optim.lr_scheduler",
}
SHARED_PAGES = {
    "torch.Tensor": "tensors",
    "torch.dtype": "tensor_attributes",
    "torch.device": "tensor_attributes",
    "torch.optim.Optimizer": "optim",
}


def torch_names() -> Iterator[tuple[str, str, str]]:
    """(name, kind, address) of what our signatures and docstrings name of torch, also under the path of its module."""
    for name, page in SHARED_PAGES.items():
        yield name, "class", f"{page}.html#{name}"
    yield "torch.optim.optimizer.Optimizer", "class", "optim.html#torch.optim.Optimizer"
    for package, modules in TORCH.items():
        for name, value in vars(importlib.import_module(package)).items():
            home = getattr(value, "__module__", None) or ""
            path = f"{package}.{name}"
            if name.startswith("_") or not home.startswith(modules) or path in SHARED_PAGES:
                continue
            kind = "class" if inspect.isclass(value) else "function"
            for alias in dict.fromkeys((path, f"{home}.{name}")):
                yield alias, kind, f"generated/{path}.html#{path}"


def write_inventory(path: Path) -> None:
    """A Sphinx inventory of torch, so that links to it need no network while the manual is built."""
    head = "# Sphinx inventory version 2\n# Project: torch\n# Version: \n# The rest is compressed with zlib.\n"
    lines = "".join(f"{name} py:{kind} 1 {page} -\n" for name, kind, page in torch_names())
    path.write_bytes(head.encode() + zlib.compress(lines.encode()))
