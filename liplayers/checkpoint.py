"""The checkpoint format: Lightning's, plus one entry that says how to rebuild the model. Never unpickles code."""

from __future__ import annotations

import hashlib
import pickle
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.core.module import LipschitzModule
from liplayers.errors import CheckpointError

__all__ = [
    "KEY",
    "MOST_STEPS",
    "Checkpoint",
    "check_parts",
    "describe",
    "load_checkpoint",
    "load_tensors",
    "run_folder",
    "widen_scalars",
]

KEY = "liplayers"
MOST_STEPS = 2**53  # that a checkpoint may say it has behind it
_PREFIX = "model."

# Configs have some hundred parts, optimizer states some for each tensor.
_PARTS_OF_CONFIG, _PARTS, _LEVELS = 10**5, 10**6, 50


def describe(config: dict[str, Any], input_shape: tuple[int, ...], class_names: tuple[str, ...]) -> dict[str, Any]:
    """The entry that a checkpoint carries: plain numbers, strings, lists and dicts only."""
    from liplayers import __version__

    return {
        "version": __version__,
        "config": config,
        "input_shape": list(input_shape),
        "class_names": [str(name) for name in class_names],
    }


def run_folder(path: str | Path) -> Path:
    """The output folder of the run that a checkpoint belongs to.

    >>> run_folder("runs/demo/checkpoints/best.ckpt").as_posix(), run_folder("runs/best.ckpt").as_posix()
    ('runs/demo', 'runs')
    """
    folder = Path(path).parent
    return folder.parent if folder.name == "checkpoints" else folder


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: the entry of `describe`, the model's tensors, the file's hash."""

    path: Path
    sha256: str
    version: str
    config: dict[str, Any]
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    epoch: int
    global_step: int
    state_dict: dict[str, Tensor]

    @property
    def model_config(self) -> dict[str, Any]:
        """What rebuilds the model; settings that older versions did not have are as they were then."""
        model = self.config["model"]
        backbones = ("liplayers.models.bronet", "liplayers.models.liresnet")
        older = self._release < (0, 2) and model.get("_target_") in backbones
        return {"start": "family", **model} if older else model

    @property
    def _release(self) -> tuple[int, ...]:
        try:
            return _release(self.version)
        except ValueError:
            raise CheckpointError(f"{self.path}: version={self.version!r}; expected one such as 0.2.0") from None

    def load_into(self, model: nn.Module) -> None:
        """Copy the tensors into `model`, built from this checkpoint's config.

        Raises:
            CheckpointError: they do not fit, or a layer of the version that wrote them made other weights of them.
        """
        for name, module in model.named_modules():
            if isinstance(module, LipschitzModule) and self._release < _release(module.weights_since):
                raise CheckpointError(
                    f"{self.path}: written by liplayers {self.version}, where {name} ({type(module).__name__}) had "
                    f"other weights for the same parameters; use that version, or train again"
                )
        own = model.state_dict()
        if any(tensor.is_meta for tensor in own.values()):
            raise CheckpointError(f"{self.path}: its config builds a model on the meta device, without values")
        for name, tensor in self.state_dict.items():
            if not isinstance(tensor, Tensor) or (name in own and tensor.is_complex() != own[name].is_complex()):
                raise CheckpointError(f"{self.path}: {name} is not a tensor, or not real or complex as in its model")
        try:
            model.load_state_dict(self.state_dict)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise CheckpointError(f"{self.path}: the weights do not fit the model of its config ({detail})") from None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:3])


def widen_scalars(states: dict[int, dict[str, Any]]) -> None:
    """Make vectors of one entry of what an optimizer kept of scalar parameters, which are such vectors now."""
    kept = {k for state in states.values() for k, v in state.items() if isinstance(v, Tensor) and v.dim()}
    for state in states.values():
        state.update({k: v[None] for k, v in state.items() if k in kept and isinstance(v, Tensor) and not v.dim()})


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint with weights_only=True: tensors and plain containers, no code.

    Raises:
        CheckpointError: missing, truncated, unreadable, or not written by liplayers.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a file in it, such as {path}/checkpoints/best.ckpt")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; training writes them to <output>/checkpoints/")
    content = load_tensors(path)
    if not isinstance(content, dict) or not isinstance(content.get(KEY), dict) or "state_dict" not in content:
        raise CheckpointError(
            f"{path}: a torch file, but not a checkpoint of liplayers (no entry {KEY!r}); train with train.py"
        )
    check_parts(path, content[KEY])
    check_parts(path, content, _PARTS)
    entry, state = content[KEY], content["state_dict"]
    try:
        if not all(isinstance(entry["config"][key], dict) for key in ("model", "data")):
            raise TypeError("config")
        return Checkpoint(
            path=path,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            version=str(entry["version"]),
            config=entry["config"],
            input_shape=tuple(int(n) for n in entry["input_shape"]),
            class_names=tuple(str(name) for name in entry["class_names"]),
            epoch=_count(content, "epoch"),
            global_step=_count(content, "global_step"),
            state_dict={k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)},
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: its entry {KEY!r} is incomplete ({error}); train again") from None


def _count(content: dict[str, Any], name: str) -> int:
    value = content.get(name, -1)
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= MOST_STEPS:
        raise TypeError(f"{name}={value!r:.40} is no count")
    return value


def check_parts(path: Path, content: Any, most: int = _PARTS_OF_CONFIG) -> None:
    """Raise where containers have more than so many parts, or too many levels.

    One that occurs twice counts twice: a few lists within one another may stand for billions of parts, and one within
    itself for infinitely many.

    Raises:
        CheckpointError: naming `path`.
    """
    levels: list[Iterator[Any]] = [iter([content])]
    parts = 0
    while levels:
        for value in levels[-1]:
            parts += 1 + (len(value) // 100 if isinstance(value, (str, bytes)) else 0)
            if parts > most or len(levels) > _LEVELS:
                raise CheckpointError(
                    f"{path}: holds containers of more than {most:,} parts or {_LEVELS} levels; liplayers writes none "
                    "so large"
                )
            if isinstance(value, dict):
                levels.append(chain.from_iterable(value.items()))
                break
            if isinstance(value, (list, tuple, set, frozenset)):
                levels.append(iter(value))
                break
        else:
            levels.pop()


def load_tensors(path: Path) -> Any:
    """What a file of `torch.save` holds, with weights_only=True.

    Raises:
        CheckpointError: truncated, unreadable, or holding more than tensors and plain containers.
    """
    if _is_compressed(path):
        raise CheckpointError(f"{path}: is compressed, which torch.save never does; save it with torch.save")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        foreign = "it holds objects other than tensors, which are never unpickled"
        reason = foreign if zipfile.is_zipfile(path) else "not a checkpoint"
        raise CheckpointError(f"{path}: cannot be read ({reason})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(f"{path}: truncated, or not a checkpoint at all") from None


def _is_compressed(path: Path) -> bool:
    """Whether a zip archive may grow in memory by any factor."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    except (OSError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile):
        return False  # torch will say what it is
