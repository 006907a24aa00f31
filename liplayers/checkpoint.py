"""The checkpoint format: Lightning's, plus one entry that says how to rebuild the model. Never unpickles code."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.errors import CheckpointError

KEY = "liplayers"
_PREFIX = "model."


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

    def load_into(self, model: nn.Module) -> None:
        """Copy the tensors into `model`, built from this checkpoint's config."""
        own = model.state_dict()
        if any(tensor.is_meta for tensor in own.values()):
            raise CheckpointError(f"{self.path}: its config builds a model on the meta device, without values")
        for name, tensor in self.state_dict.items():
            if not isinstance(tensor, Tensor) or (name in own and tensor.is_complex() != own[name].is_complex()):
                raise CheckpointError(f"{self.path}: {name} is no tensor of the kind that its model has")
        try:
            model.load_state_dict(self.state_dict)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise CheckpointError(f"{self.path}: the weights do not fit the model of its config ({detail})") from None


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
            epoch=int(content.get("epoch", -1)),
            global_step=int(content.get("global_step", -1)),
            state_dict={k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)},
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: its entry {KEY!r} is incomplete ({error}); train again") from None


def load_tensors(path: Path) -> Any:
    """What a file of `torch.save` holds, with weights_only=True.

    Raises:
        CheckpointError: truncated, unreadable, or holding more than tensors and plain containers.
    """
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
