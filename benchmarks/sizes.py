"""The configurations that every family is measured in, and how a layer of one is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import Parameter, isclass, signature
from typing import Any

from torch import nn

from liplayers import FAMILIES
from liplayers.errors import ArgumentError


@dataclass(frozen=True)
class Size:
    """One configuration of a role: the shape of the input batch and the arguments of the layer."""

    name: str
    input_shape: tuple[int, ...]
    arguments: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def _linear(batch: int, inputs: int, outputs: int) -> Size:
    return Size(f"{batch} × {inputs} → {outputs}", (batch, inputs), (inputs, outputs))


def _conv(batch: int, inputs: int, outputs: int, image: int, mode: str = "zeros", stride: int = 1) -> Size:
    name = f"{batch} × {inputs} → {outputs}, 3×3" + (f" stride {stride}" if stride > 1 else "")
    options = {"stride": stride, "padding": 1, "padding_mode": mode}
    return Size(f"{name}, {image}×{image}, {mode}", (batch, inputs, image, image), (inputs, outputs, 3), options)


def _conv_transpose(batch: int, inputs: int, outputs: int, image: int, kernel: int = 3, stride: int = 1) -> Size:
    name = f"{batch} × {inputs} → {outputs}, {kernel}×{kernel}" + (f" stride {stride}" if stride > 1 else "")
    options = {"stride": stride, "padding": 1}
    return Size(f"{name}, {image}×{image}", (batch, inputs, image, image), (inputs, outputs, kernel), options)


def _dense_block(batch: int, features: int) -> Size:
    return Size(f"{batch} × {features}", (batch, features), (features,))


def _conv_block(batch: int, channels: int, image: int, mode: str = "zeros") -> Size:
    name = f"{batch} × {channels}, {image}×{image}, {mode}"
    return Size(name, (batch, channels, image, image), (channels,), {"padding_mode": mode})


# the first of conv and conv_block, zeros and circular, are the headline
SIZES: dict[str, tuple[Size, ...]] = {
    "conv": (
        _conv(128, 64, 64, 32),
        _conv(128, 64, 64, 32, "circular"),
        _conv(128, 128, 128, 16),
        _conv(128, 64, 128, 16, stride=2),
    ),
    "conv_block": (
        _conv_block(128, 64, 32),
        _conv_block(128, 64, 32, "circular"),
        _conv_block(128, 128, 16),
    ),
    "conv_transpose": (
        _conv_transpose(128, 64, 64, 32),
        _conv_transpose(128, 128, 128, 16),
        _conv_transpose(128, 128, 64, 8, kernel=4, stride=2),
    ),
    "linear": (_linear(512, 512, 512), _linear(512, 1024, 256)),
    "dense_block": (_dense_block(512, 512), _dense_block(512, 1024)),
}
QUICK_SIZES: dict[str, tuple[Size, ...]] = {
    "conv": (_conv(4, 4, 4, 6), _conv(4, 4, 4, 6, "circular"), _conv(4, 4, 8, 6, stride=2)),
    "conv_block": (_conv_block(4, 4, 6), _conv_block(4, 4, 6, "circular")),
    "conv_transpose": (_conv_transpose(4, 4, 4, 6), _conv_transpose(4, 8, 4, 3, kernel=4, stride=2)),
    "linear": (_linear(16, 16, 16), _linear(16, 32, 8)),
    "dense_block": (_dense_block(16, 16),),
}


def _accepts(make: Callable[..., object], name: str) -> bool:
    """Whether a constructor, or one that it hands its arguments on to, has a parameter of that name."""
    for cls in make.__mro__ if isclass(make) else (make,):
        parameters = signature(cls.__init__ if isclass(cls) else cls).parameters.values()
        if any(p.name == name for p in parameters):
            return True
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            return False
    return False


def build(family: str, role: str, size: Size) -> nn.Module:
    """The family's layer of a size.

    Raises:
        ArgumentError: the family refuses the configuration; a block that has no `padding_mode` counts as "zeros".
    """
    make = getattr(FAMILIES[family], role)
    options = dict(size.options)
    if role == "conv_block" and not _accepts(make, "padding_mode"):
        mode = options.pop("padding_mode")
        if mode != "zeros":
            raise ArgumentError(f"{getattr(make, '__name__', family)}: has no argument padding_mode={mode!r}")
    return make(*size.arguments, **options)
