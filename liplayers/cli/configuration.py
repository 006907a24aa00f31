"""Configs as hydra gives them: building from them, checking values, and what a checkpoint's config may hold."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Collection, Sequence
from typing import Any, get_args, get_type_hints

from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from torch import nn

from liplayers.certification import parse_radius
from liplayers.checkpoint import Checkpoint
from liplayers.commands.quoting import hydra_override
from liplayers.data import DataModule, Source
from liplayers.errors import ArgumentError, CheckpointError, ConfigError, LipschitzError, UnknownNameError
from liplayers.text import one_line

__all__ = [
    "DEEPEST",
    "LAYERS",
    "RENAMED",
    "TRUSTED",
    "UNASKED",
    "build",
    "build_data",
    "check_config",
    "flag",
    "integer",
    "literal",
    "plain",
    "radii",
    "text",
    "unasked",
]

# the packages whose public names a checkpoint's config may call
TRUSTED = (
    "liplayers.models",
    "liplayers.data",
    "liplayers.losses",
    "liplayers.training",
    "torch.optim",
    "lightning",
    "benchmarks.uci.data",
)
LAYERS = ("liplayers", "liplayers.layers")  # where a config may name a layer; of these packages nothing else
DEEPEST = 30  # a config within another; omegaconf recurses, and Python stops that somewhere below 400

# targets in the configs of older checkpoints, and what they are called now
RENAMED = {"liplayers.data.UCIData": "benchmarks.uci.data.UCI"}

# settings of data that fetch or write files, as they are where a checkpoint alone asks for more
UNASKED: dict[str, Any] = {"download": False, "cache": None}


def build(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a config node; what its target says about bad arguments comes out in one line."""
    if not isinstance(node, DictConfig):
        raise ConfigError(f"got {node!r} for settings of a part; expected {{_target_: …}}")
    _check_texts(node)
    try:
        return instantiate(node, **arguments, _convert_="all")
    except HydraException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, LipschitzError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise ConfigError(f"{node.get('_target_')}: {one_line(error.__cause__ or error)}") from None


def build_data(node: DictConfig) -> DataModule:
    """Build the data: of a data module's config, or of a source's, whose node has the settings of `DataModule`, too.

    A setting that both have goes to both.
    """
    if not isinstance(node, DictConfig):
        return build(node)
    name = str(node.get("_target_"))
    target = RENAMED.get(name, name)
    _check_found(target)
    try:
        source = get_object(target)
    except Exception:  # `build` says why
        source = None
    if not (inspect.isclass(source) and issubclass(source, Source)):
        data = build(node)
        if not isinstance(data, DataModule):
            path = node._get_full_key(None)
            raise ConfigError(f"{path}: makes {type(data).__name__}; expected _target_ of a Source or a DataModule")
        return data
    own, general = inspect.signature(source).parameters, inspect.signature(DataModule).parameters.keys() - {"source"}
    for key in node:
        if key not in {*own, *general} and not str(key).startswith("_"):
            raise UnknownNameError.of(f"setting of {target}", str(key), {*own, *general})
    make = build(_part(node, general, "liplayers.data.DataModule"), _partial_=True)
    return make(build(_part(node, own, target)))


def _check_found(target: str) -> None:
    """Raise where a part of the benchmarks is called, and liplayers is installed without them."""
    module = target.rpartition(".")[0]
    if not module.startswith("benchmarks."):
        return
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("benchmarks"):
            raise
        raise ConfigError(f"{target}: comes with a clone of the repository only; run the command there") from None


def _part(node: DictConfig, keys: Collection[str], target: str) -> DictConfig:
    """A node with these of its settings alone, which are called what they were."""
    part = copy.deepcopy(node)
    with open_dict(part):
        part["_target_"] = target
        for key in [key for key in part if key not in keys and not str(key).startswith("_")]:
            del part[key]
    return part


def _check_texts(node: DictConfig) -> None:
    """Raise where a target wants text and gets a number, such as the name of a column, or a path with a NUL."""
    try:
        target: Any = get_object(str(node.get("_target_")))
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # what cannot be imported or read, `instantiate` says
        return
    for key, value in node.items():
        members = get_args(hints.get(str(key))) or (hints.get(str(key)),)
        several = isinstance(value, ListConfig) and Sequence[str] in members
        for one in value if several else [value]:
            is_number = isinstance(one, (bool, int, float)) and type(one) not in members
            if (several or str in members) and (is_number or isinstance(one, str)):
                text(node._get_full_key(key), one)


def text(name: str, value: Any, expected: str = "text") -> str:
    """Text as it is; not a number, since `1_0` and `1e3` were another text before hydra read them."""
    if not isinstance(value, str):
        hint = ""
        if isinstance(value, (int, float)):
            shown = value if type(value) is int else "…"
            hint = f", not a number; where it is a name, quote it twice: \"{name}='{shown}'\""
        raise ConfigError(f"{name}={value}: expected {expected}{hint}")
    if "\0" in value:
        raise ConfigError(f"{name}={value!r}: holds a NUL character; expected {expected}")
    return value


def literal(value: str) -> str:
    """Text that omegaconf takes for itself."""
    return value.replace("${", "\\${")


def flag(name: str, value: Any) -> bool:
    """A setting that is true or false, or a ConfigError that names it."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: expected true or false")
    return value


def integer(name: str, value: Any, least: int | None = None) -> int:
    """A setting that is an integer, of at least `least`, or a ConfigError that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ConfigError(f"{name}={value!r}: expected an integer{'' if least is None else f' of at least {least}'}")
    return value


def radii(name: str, value: Any) -> list[float | str]:
    """A list of radii as given, each checked; a single one counts as a list."""
    given = list(value) if isinstance(value, (list, ListConfig)) else [value]
    radii = [radius.strip() if isinstance(radius, str) else radius for radius in given]
    for radius in radii:
        try:
            parse_radius(radius)
        except ArgumentError as error:
            raise ArgumentError(f"{name}: {error}") from None
    return radii


def check_config(checkpoint: Checkpoint, node: Any, allow: Any) -> None:
    """A checkpoint must not choose what code runs: numbers, strings, lists, dicts, and targets that are known."""
    packages = [allow] if isinstance(allow, str) else allow
    if not isinstance(packages, (list, tuple, ListConfig)) or not all(isinstance(name, str) for name in packages):
        raise ConfigError(f"allow={allow}: expected names of packages, such as [mypackage]")
    if isinstance(node, dict):  # names of files that are of no use here, and may be anything
        node = {key: value for key, value in node.items() if key not in ("output", "resume")}
    _check_node(checkpoint, node, list(packages), DEEPEST)


def _check_node(checkpoint: Checkpoint, node: Any, packages: Sequence[str], depth: int) -> None:
    if depth == 0:
        raise CheckpointError(f"{checkpoint.path}: its config is nested deeper than {DEEPEST}; train again")
    if isinstance(node, dict):
        if not all(isinstance(key, str) and _is_plain(key) for key in node):
            raise CheckpointError(f"{checkpoint.path}: its config has keys that are no names; expected plain strings")
        if "_target_" in node:
            _check_target(checkpoint, str(node["_target_"]), packages)
        for value in node.values():
            _check_node(checkpoint, value, packages, depth - 1)
    elif isinstance(node, list):
        for value in node:
            _check_node(checkpoint, value, packages, depth - 1)
    elif not isinstance(node, (str, int, float, bool, type(None))) or not _is_plain(node):
        raise CheckpointError(f"{checkpoint.path}: its config holds {_short(node)}; expected plain numbers and strings")


def unasked(checkpoint: Checkpoint, node: Any) -> Any:
    """A checkpoint's data config, or a part of it, that by itself makes no command fetch or write files."""
    if isinstance(node, list):
        return [unasked(checkpoint, value) for value in node]
    if not isinstance(node, dict):
        return node
    if "_args_" in node:
        raise CheckpointError(f"{checkpoint.path}: its data config has arguments without names; expected names for all")
    return {key: UNASKED[key] if key in UNASKED else unasked(checkpoint, value) for key, value in node.items()}


def _is_plain(value: Any) -> bool:
    """Whether a value means itself to omegaconf, and can be written to a file."""
    if isinstance(value, int):
        return value.bit_length() <= 64  # Python does not write integers of thousands of digits
    if not isinstance(value, str):
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "${" not in value and "\0" not in value and value != "???"


def _short(value: Any) -> str:
    return "a huge integer" if isinstance(value, int) else f"{value!r:.80}"


def _check_target(checkpoint: Checkpoint, target: str, packages: Sequence[str]) -> None:
    target = RENAMED.get(target, target)
    package = target.split(".")[0]
    if package in packages:
        return
    module, _, name = target.rpartition(".")
    if module in (*TRUSTED, *LAYERS):
        _check_found(target)
        found = getattr(importlib.import_module(module), name, None)
        origin = getattr(found, "__module__", "")
        if module in TRUSTED and callable(found) and origin.startswith(module):
            return
        is_layer = isinstance(found, type) and issubclass(found, nn.Module)
        if module in LAYERS and is_layer and origin.startswith("liplayers.layers."):
            return
    if package == "liplayers":
        raise CheckpointError(f"{checkpoint.path}: its config calls {target!r}; expected a public model, part or layer")
    raise CheckpointError(
        f"{checkpoint.path}: its config calls {target!r}, which is no part of liplayers; "
        f"if you trust the file, pass {hydra_override('allow', package)}"
    )


def plain(node: DictConfig) -> Any:
    """A part of a config as dicts and lists, references resolved."""
    return OmegaConf.to_container(node, resolve=True)
