"""The precision of products: torch's settings for the whole process, held by any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["Setting", "exact_precision", "executed", "executed_dtype", "held"]


def executed_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that products with a weight run in here and now: its own, or autocast's, if not float64."""
    device = weight.device.type
    if device == "meta" or weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def executed(weight: Tensor) -> Tensor:
    """In float64, the weight that runs here and now."""
    return weight.detach().to(executed_dtype(weight)).double()


class Setting:
    """A setting of torch's for the whole process, and how many threads need it to be `value`.

    The first thread sets it, and the last one restores what was there. Nothing is set where the value there will do.
    """

    def __init__(self, owner: Any, name: str, value: Any, will_do: tuple[Any, ...] = (), default: Any = None) -> None:
        self.owner, self.name, self.value, self.will_do, self.default = owner, name, value, (value, *will_do), default
        self.holders = 0
        self.before: Any = None

    @property
    def fits(self) -> bool:
        """Whether it will do, and not only for as long as another thread holds it."""
        return not self.holders and self._now() in self.will_do

    def take(self) -> bool:
        """Whether it has to be given back."""
        if self.fits:
            return False
        if self._now() not in self.will_do:
            self.before = self._now()
            self._set(self.value)
        self.holders += 1
        return True

    def give_back(self) -> None:
        self.holders -= 1
        if self.holders or self._now() != self.value:  # meanwhile set by someone else
            return
        if self.default is not None:
            self._set(self.default)
        if self._now() != self.before:  # it was not inherited from a more general setting
            self._set(self.before)

    def _now(self) -> Any:
        return getattr(self.owner, self.name)

    def _set(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


_settings_lock = threading.Lock()


@contextmanager
def held(settings: Sequence[Setting], general: Sequence[Setting] = ()) -> Iterator[None]:
    """Within this context every setting has a value that will do, whatever other threads do.

    `general` are settings that the others may inherit from: set first, where one of the others will not do.
    """
    taken: list[Setting] = []
    try:
        with _settings_lock:
            if any(setting.holders for setting in general) or not all(setting.fits for setting in settings):
                taken.extend(setting for setting in (*general, *settings) if setting.take())
        yield
    finally:
        with _settings_lock:
            for setting in reversed(taken):
                setting.give_back()


def _in_float32(backend: Any) -> Setting:
    return Setting(backend, "fp32_precision", "ieee", will_do=("none",), default="none")


# cudnn's convolutions inherit TF32 in a way that cannot be set again: what they inherit from is changed first
_GENERAL = [Setting(torch.backends, "fp32_precision", "ieee")]


_CUDA = [_in_float32(torch.backends.cuda.matmul), _in_float32(torch.backends.cudnn.conv)]  # type: ignore[attr-defined]


_ONEDNN = [_in_float32(torch.backends.mkldnn.matmul), _in_float32(torch.backends.mkldnn.conv)]  # type: ignore[attr-defined]


@contextmanager
def exact_precision(device: torch.device) -> Iterator[None]:
    """Autocast off, and products of float32 matrices and kernels on `device` in float32, not in TF32 or bfloat16."""
    # meta knows no autocast; torch.compile traces no backend settings
    fixed = device.type == "meta" or torch.compiler.is_compiling()
    with (
        nullcontext() if fixed else held(_CUDA if device.type == "cuda" else _ONEDNN, _GENERAL),
        nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False),
    ):
        yield
