"""`--help`: every setting with its value and what it does, from the comments beside the settings in configs/."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf

__all__ = ["COLUMN", "EXPERIMENT", "comments", "config_folder", "heading", "help_text"]

COLUMN = 38  # where descriptions begin
EXPERIMENT = "experiment"  # the group whose options change settings of the others


def config_folder() -> Path:
    """The folder of the configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def help_text(config_name: str, overrides: Sequence[str]) -> str:
    """What a command does, its groups, and its settings as they are with these overrides.

    Raises:
        HydraException, OmegaConfBaseException: overrides that cannot be composed.
    """
    folder = config_folder()
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        config: Any = hydra.compose(config_name, list(overrides), return_hydra_config=True)
    options = {group: name for group, name in config.hydra.runtime.choices.items() if "/" not in group}
    groups = [key for key in config if key in options] + [key for key in options if key not in config]
    described = _descriptions(folder, config_name, options)
    header = config.hydra.help.header
    values: Any = OmegaConf.to_container(config)
    del values["hydra"]
    own = {key: value for key, value in values.items() if key not in options}

    lines = [header.rstrip(), "", "Settings (name=value):", *_settings(own, described)]
    for group in groups:
        if options[group] is not None:
            about = heading(folder / group / f"{options[group]}.yaml")
            lines += ["", *f"{group}={options[group]}: {about}".splitlines()]
            lines += _settings(values.get(group, {}), described, f"{group}.")
    for group in groups:
        lines += ["", f"Options of {group} (such as --help {group}=…):"]
        for file in sorted((folder / group).glob("*.yaml")):
            lines += _entry(file.stem, heading(file).split("\n")[0])
    return "\n".join(lines) + "\n"


def heading(file: Path) -> str:
    """The comment that a file begins with; its first line says what the file is."""
    lines = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(line for line in lines if not line.startswith("@package"))


def comments(file: Path) -> dict[str, str]:
    """The comment beside each setting of a file and right below it, or the one right above, by dotted name."""
    text = file.read_text("utf-8")
    lines = text.splitlines()
    found: dict[str, str] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.value:
            simple = not isinstance(value, yaml.MappingNode | yaml.SequenceNode) or value.flow_style
            end = value.end_mark if simple else key.end_mark
            column = lines[end.line].find("#", end.column)
            if column >= 0:
                beside = " " * column + lines[end.line][column:]
                comment = [*_comment([beside, *lines[end.line + 1 :]], column)]
            else:
                comment = [*_comment(reversed(lines[: key.start_mark.line]), key.start_mark.column)][::-1]
            found[prefix + key.value] = " ".join(comment)
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{prefix}{key.value}.")

    walk(yaml.compose(text), "")
    return {name: comment for name, comment in found.items() if comment}


def _comment(lines: Iterable[str], column: int) -> Iterator[str]:
    """The text of the first lines, as long as they hold nothing but a comment in this column."""
    for line in lines:
        if line[:column].strip() or line[column : column + 1] != "#":
            return
        yield line[column + 1 :].strip()


def _descriptions(folder: Path, config_name: str, options: dict[str, str | None]) -> dict[str, str]:
    """By dotted name; what an experiment says of a setting that it adds counts, too."""
    found = comments(folder / f"{config_name}.yaml")
    for group, name in options.items():
        if group != EXPERIMENT and name is not None:
            found |= {f"{group}.{key}": text for key, text in comments(folder / group / f"{name}.yaml").items()}
    name = options.get(EXPERIMENT)
    while name is not None:
        file = folder / EXPERIMENT / f"{name}.yaml"
        found = comments(file) | found
        defaults = yaml.safe_load(file.read_text("utf-8"))["defaults"]
        name = next((entry for entry in defaults if isinstance(entry, str) and entry != "_self_"), None)
    return found


def _settings(values: dict[str, Any], described: dict[str, str], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key.startswith("_"):  # what is built, and how
            continue
        if isinstance(value, dict):
            yield from _entry(f"{name}: {value.get('_target_', '')}", described.get(name, ""))
            yield from _settings(value, described, f"{name}.")
        else:
            yield from _entry(f"{name}={_value(value)}", described.get(name, ""))


def _value(value: Any) -> str:
    if value == "???":
        return "(required)"
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True).split("\n")[0]


def _entry(head: str, text: str) -> Iterator[str]:
    """A name in the first column and what it is in the second, on as many lines as it takes."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    first, *more = wrap(text, max(width - COLUMN, 30), break_on_hyphens=False) or [""]
    if len(head) < COLUMN - 3:
        yield f"  {head:{COLUMN - 2}}{first}".rstrip()
    else:
        yield from (f"  {head}", " " * COLUMN + first) if first else (f"  {head}",)
    yield from (" " * COLUMN + line for line in more)
