"""From the settings in a config.json to a network: only models and layers of liplayers, only plain values.

Whoever wrote the settings is not trusted. Names are looked up in two lists, nothing is imported by its name, and the
network is first built without memory for its weights, to see that it is the one whose weights the bundle holds.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import liplayers.layers
import liplayers.models
from liplayers.errors import BundleError, LipschitzError
from liplayers.text import one_line, printable

__all__ = ["MOST_ENTRIES", "MOST_OPERATIONS", "build_network", "check_network", "check_settings", "portable"]

LARGEST_INTEGER = 2**20  # of a size or a count in a model's settings
MOST_INPUTS = 2**24  # numbers in one input
MOST_CLASSES = 2**16
MOST_ENTRIES = 2**28  # of one weight; 2**26 in BRONet for Tiny-ImageNet
MOST_OPERATIONS = 20_000  # of torch, to build a network; 2,170 for LipNeXt on ImageNet
_LEVELS = 30
_OF_THE_RUN = ("output", "resume", "overwrite", "allow", "threads")
_PATHS = ("root", "train", "test")  # of data; the last part of each may say what they are
_PARTS = ("liplayers.", "torch.optim.", "lightning.", "benchmarks.uci.")


def check_settings(where: str, node: Any, path: str = "", levels: int = _LEVELS) -> None:
    """Raise BundleError unless settings are plain, and what they would build is of the packages that training uses.

    Args:
        where: what the message begins with.
        node: the settings.
        path: to `node`, for the message.
        levels: how deep they may be nested.
    """
    if levels == 0:
        raise BundleError(f"{where}: {path} is nested deeper than {_LEVELS}; training writes nothing so deep")
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_" and not (isinstance(value, str) and value.startswith(_PARTS)):
                raise BundleError(f"{where}: {path or key} calls {_short(value)}, which is no part of liplayers")
            if not _is_plain(key) or key in ("_args_", "_convert_", "_recursive_"):
                raise BundleError(f"{where}: {path} has the key {_short(key)}; expected names of settings")
            check_settings(where, value, f"{path}.{key}" if path else key, levels - 1)
    elif isinstance(node, list):
        for value in node:
            check_settings(where, value, path, levels - 1)
    elif not (node is None or isinstance(node, bool | int | float | str)) or not _is_plain(node):
        raise BundleError(f"{where}: {path} is {_short(node)}; expected plain numbers and text")


def portable(config: Any, of_data: bool = False) -> Any:
    """Settings of a training without those that mean nothing elsewhere; of paths to data the last part is left.

    Args:
        config: the settings, or a part of them.
        of_data: whether it is a part that says what the data are.

    >>> portable({"output": "/home/me/run", "seed": 1, "data": {"root": "/mnt/data/cifar10", "cache": "/tmp"}})
    {'seed': 1, 'data': {'root': 'cifar10', 'cache': None}}
    """
    if isinstance(config, list):
        return [portable(value, of_data) for value in config]
    if not isinstance(config, dict):
        return config
    found: dict[str, Any] = {}
    for key, value in config.items():
        if of_data and key in _PATHS and isinstance(value, str):
            found[key] = Path(value).name.replace("..", "") or "data"
        elif of_data and key == "cache":
            found[key] = None
        elif of_data or key not in _OF_THE_RUN:
            found[key] = portable(value, of_data or key in ("data", "extra"))
    return found


def _is_plain(value: Any) -> bool:
    """Whether a value means itself, here and to omegaconf."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value.bit_length() <= 64
    if not isinstance(value, str):
        return True
    surrogates = any("\ud800" <= character <= "\udfff" for character in value)
    return not surrogates and "${" not in value and "\0" not in value and value != "???"


def _short(value: Any) -> str:
    return printable(f"{value!r:.60}")


def check_network(
    where: str, settings: Any, input_shape: tuple[int, ...], num_classes: int, state: Mapping[str, Tensor]
) -> None:
    """Raise unless the settings describe a network with these weights; takes no memory for weights.

    Args:
        where: what messages begin with.
        settings: of a model in `liplayers.models`, as training writes them.
        input_shape: of one input.
        num_classes: of the logits.
        state: the weights, by the names that they have in the network.

    Raises:
        BundleError: settings that are not plain, that name something else than a model or a layer of liplayers, or
            that build a network whose weights have other names, shapes or dtypes.
    """
    if not 0 < math.prod(input_shape) <= MOST_INPUTS or not 2 <= num_classes <= MOST_CLASSES:
        raise BundleError(
            f"{where}: inputs of shape {_short(input_shape)} in {num_classes} classes; expected at most "
            f"{MOST_INPUTS:,} numbers, and 2 to {MOST_CLASSES:,} classes"
        )
    check_settings(where, settings, "model")
    make = _chosen(where, settings, "model", _model)
    with _failures(where), torch.device("meta"), _Bounded():
        shapes = make(input_shape=input_shape, num_classes=num_classes).state_dict()
    for name in sorted(shapes.keys() | state.keys()):
        found, expected = (_described(each.get(name)) for each in (state, shapes))
        if found != expected:
            raise BundleError(f"{where}: the raw weight {printable(name)} is {found}, the model has {expected} there")


def build_network(where: str, settings: Any, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network that settings describe, with new weights; `check_network` has seen that it is no other.

    Args:
        where: what messages begin with.
        settings: of a model in `liplayers.models`, as training writes them.
        input_shape: of one input.
        num_classes: of the logits.

    Raises:
        BundleError: settings that build no network.
    """
    make = _chosen(where, settings, "model", _model)
    with _failures(where):
        return make(input_shape=input_shape, num_classes=num_classes)


def _described(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _chosen(where: str, node: Any, path: str, find: Callable[[str], Any]) -> Callable[..., Any]:
    """What a node with a `_target_` calls, with its settings as arguments."""
    target = node.get("_target_") if isinstance(node, dict) else None
    found = find(target) if isinstance(target, str) else None
    if found is None:
        raise BundleError(
            f"{where}: {path} calls {_short(target)}; expected a public {'model' if path == 'model' else 'layer'} of "
            "liplayers"
        )
    if path != "model" and node.get("_partial_") is not True:
        raise BundleError(f"{where}: {path} has no _partial_: true; a model makes its layers itself")
    settings = {
        key: _value(where, value, f"{path}.{key}")
        for key, value in node.items()
        if key not in ("_target_", "_partial_")
    }
    return partial(found, **settings)


def _value(where: str, value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return _chosen(where, value, path, _layer)
    if isinstance(value, list):
        return [_value(where, part, path) for part in value]
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise BundleError(f"{where}: {path}={value}; expected at most {LARGEST_INTEGER:,}")
    return value


def _model(target: str) -> Callable[..., nn.Module] | None:
    package, _, name = target.rpartition(".")
    found = vars(liplayers.models).get(name) if package == "liplayers.models" else None
    return found if inspect.isfunction(found) and found.__module__.startswith("liplayers.models.") else None


def _layer(target: str) -> type[nn.Module] | None:
    package, _, name = target.rpartition(".")
    found = vars(liplayers.layers).get(name) if package in ("liplayers", "liplayers.layers") else None
    is_layer = inspect.isclass(found) and issubclass(found, nn.Module)
    return found if is_layer and found.__module__.startswith("liplayers.layers.") else None


@contextmanager
def _failures(where: str) -> Iterator[None]:
    """Whatever a model's constructor raises about settings that nobody has tried, as one line."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, LipschitzError) else f"{type(error).__name__}: "
        raise BundleError(f"{where}: its settings build no network ({kind}{one_line(error)[:300]})") from None


class _Bounded(TorchFunctionMode):
    """Within it, building a network ends after so many operations, and makes no tensor of more entries."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operations += 1
        result = func(*args, **(kwargs or {}))
        if self.operations > MOST_OPERATIONS:
            raise BundleError(f"it takes more than {MOST_OPERATIONS:,} operations to build")
        if isinstance(result, Tensor) and result.numel() > MOST_ENTRIES:
            raise BundleError(f"a weight of {result.numel():,} entries; expected at most {MOST_ENTRIES:,}")
        return result
