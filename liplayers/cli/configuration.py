"""Configs as hydra gives them: building from them, checking values, and what a checkpoint's config may hold."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

import liplayers
from liplayers.certification import parse_radius
from liplayers.checkpoint import Checkpoint
from liplayers.errors import ArgumentError, CheckpointError, ConfigError, LipschitzError

# the packages whose public names a checkpoint's config may call
TRUSTED = ("liplayers.models", "liplayers.data", "liplayers.losses", "liplayers.training", "torch.optim", "lightning")
LAYERS = ("liplayers", "liplayers.layers")  # where a config may name a layer; of these packages nothing else


def config_folder() -> Path:
    """The folder of the configs: inside the installed package, or beside it in a checkout."""
    package = Path(liplayers.__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def build(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a config node; what its target says about bad arguments comes out in one line."""
    try:
        return instantiate(node, **arguments, _convert_="all")
    except HydraException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, LipschitzError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise ConfigError(f"{node.get('_target_')}: {one_line(error.__cause__ or error)}") from None


def integer(name: str, value: Any, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ConfigError(f"{name}={value!r}: expected an integer{'' if least is None else f' of at least {least}'}")
    return value


def radii(name: str, value: Any) -> list[float | str]:
    """A list of radii as given, each checked; a single one counts as a list."""
    radii = list(value) if isinstance(value, (list, ListConfig)) else [value]
    for radius in radii:
        try:
            parse_radius(radius)
        except ArgumentError as error:
            raise ArgumentError(f"{name}: {error}") from None
    return radii


def check_config(checkpoint: Checkpoint, node: Any, allow: Any) -> None:
    """A checkpoint must not choose what code runs: numbers, strings, lists, dicts, and targets that are known."""
    packages = [allow] if isinstance(allow, str) else list(allow)
    if isinstance(node, dict):
        if not all(isinstance(key, str) for key in node):
            raise CheckpointError(f"{checkpoint.path}: its config has keys that are no names; expected plain strings")
        if "_target_" in node:
            _check_target(checkpoint, str(node["_target_"]), packages)
        for value in node.values():
            check_config(checkpoint, value, packages)
    elif isinstance(node, list):
        for value in node:
            check_config(checkpoint, value, packages)
    elif not isinstance(node, (str, int, float, bool, type(None))) or not _is_plain(node):
        raise CheckpointError(f"{checkpoint.path}: its config holds {node!r:.80}; expected plain numbers and strings")


def _is_plain(value: Any) -> bool:
    """Whether a value means itself to omegaconf, and can be written to a file."""
    if not isinstance(value, str):
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "${" not in value and value != "???"


def _check_target(checkpoint: Checkpoint, target: str, packages: Sequence[str]) -> None:
    package = target.split(".")[0]
    if package in packages:
        return
    module, _, name = target.rpartition(".")
    if module in (*TRUSTED, *LAYERS):
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
        f"if you trust the file, pass allow=[{package}]"
    )


def plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
