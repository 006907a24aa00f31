"""Bounds of torch's own modules. What is not here is unknown, and unknown raises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from liplayers.errors import UnknownBoundError
from liplayers.layers.activations import slope_range
from liplayers.linalg.convolution import overlap
from liplayers.linalg.verified import conv_norm_enclosure, norm_enclosure

Shape = tuple[int, ...]
Rule = Callable[[Any, "Shape | None"], float]


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _isometry(module: nn.Module, shape: Shape | None) -> float:
    return 1.0


def _linear(module: nn.Linear, shape: Shape | None) -> float:
    return norm_enclosure(module.weight).upper


def _conv2d(module: nn.Conv2d, shape: Shape | None) -> float:
    stride, dilation = _pair(module.stride), _pair(module.dilation)
    if module.padding_mode == "circular":
        if isinstance(module.padding, str):
            same = module.padding == "same"
            pads = [same * d * (k - 1) for k, d in zip(module.kernel_size, dilation, strict=True)]
        else:
            pads = [2 * p for p in _pair(module.padding)]
        wide = any(p > d * (k - 1) for p, d, k in zip(pads, dilation, module.kernel_size, strict=True))
        divides = stride == (1, 1) or (
            shape is not None and not any(n % s for n, s in zip(shape[-2:], stride, strict=True))
        )
        if wide or not divides:
            raise UnknownBoundError(
                "circular padding beyond (k − 1)/2, or a stride not known to divide the image (pass input_shape)"
            )
    elif module.padding_mode != "zeros":
        raise UnknownBoundError(f"padding_mode={module.padding_mode!r}, known are 'zeros' and 'circular'")
    return conv_norm_enclosure(module.weight, stride, dilation, module.groups).upper


def _conv_transpose2d(module: nn.ConvTranspose2d, shape: Shape | None) -> float:
    """The norm of its adjoint, a convolution with the same kernel."""
    return conv_norm_enclosure(module.weight, _pair(module.stride), _pair(module.dilation), module.groups).upper


def _overlaps(module: nn.MaxPool2d | nn.AvgPool2d) -> float:
    dilation = _pair(getattr(module, "dilation", 1))
    sizes = zip(_pair(module.kernel_size), _pair(module.stride), dilation, strict=True)
    return math.sqrt(math.prod(overlap(*size) for size in sizes))


def _max_pool(module: nn.MaxPool2d, shape: Shape | None) -> float:
    if module.return_indices:
        raise UnknownBoundError("return_indices=True")
    return _overlaps(module)


def _avg_pool(module: nn.AvgPool2d, shape: Shape | None) -> float:
    area = math.prod(_pair(module.kernel_size))
    if module.divisor_override:
        weight = math.sqrt(area) / abs(module.divisor_override)
    elif module.ceil_mode or (_pair(module.padding) != (0, 0) and not module.count_include_pad):
        weight = 1.0  # a window at the border may average a single pixel
    else:
        weight = 1 / math.sqrt(area)
    return weight * _overlaps(module)


def _adaptive_sizes(module: nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d, shape: Shape | None) -> list[tuple[int, int]]:
    """(size of the image, size of the output) for height and width; an output size of None is that of the image."""
    if shape is None:
        raise UnknownBoundError("its bound depends on the image size: pass input_shape")
    target: Any = module.output_size
    target = target if isinstance(target, (tuple, list)) else (target, target)
    return [(n, out or n) for n, out in zip(shape[-2:], target, strict=True)]


def _adaptive_avg_pool(module: nn.AdaptiveAvgPool2d, shape: Shape | None) -> float:
    sizes = _adaptive_sizes(module, shape)
    if any(n % out for n, out in sizes):
        image, target = zip(*sizes, strict=True)
        raise UnknownBoundError(f"output size {target} does not divide the image {image}: windows overlap")
    return 1 / math.sqrt(math.prod(n // out for n, out in sizes))


def _adaptive_max_pool(module: nn.AdaptiveMaxPool2d, shape: Shape | None) -> float:
    if module.return_indices:
        raise UnknownBoundError("return_indices=True")
    return math.sqrt(math.prod(_windows_on_a_pixel(n, out) for n, out in _adaptive_sizes(module, shape)))


def _windows_on_a_pixel(size: int, windows: int) -> int:
    """How many of the windows [⌊i·n/w⌋, ⌈(i + 1)·n/w⌉) of adaptive pooling meet in one pixel, along one axis."""
    meeting = [0] * size
    for i in range(windows):
        for pixel in range(i * size // windows, -(-(i + 1) * size // windows)):
            meeting[pixel] += 1
    return max(meeting)


def _lp_pool(module: nn.LPPool2d, shape: Shape | None) -> float:
    kernel = _pair(module.kernel_size)
    stride = kernel if module.stride is None else _pair(module.stride)
    # with ceil_mode torch scales a patch cut by the border as if it were whole
    if module.norm_type != 2 or kernel != stride or module.ceil_mode:
        raise UnknownBoundError(
            "known are norm_type=2 with stride=kernel_size and ceil_mode=False; use liplayers.L2Pool2d"
        )
    return 1.0


def _batch_norm(module: nn.BatchNorm2d, shape: Shape | None) -> float:
    if module.training or module.running_var is None:
        raise UnknownBoundError("it has a bound only in eval mode with running statistics: call model.eval()")
    scale = (module.running_var.double() + module.eps).rsqrt()
    return (scale if module.weight is None else scale * module.weight.double()).abs().max().item()


def _refuse_randomness(module: nn.Module) -> None:
    if module.training:
        raise UnknownBoundError("it is random in training mode: call model.eval()")


def _dropout(module: nn.Dropout, shape: Shape | None) -> float:
    _refuse_randomness(module)
    return 1.0


def _entrywise(module: nn.Module) -> float | None:
    """The largest slope in absolute value; None for what has no slope range."""
    if type(module) is nn.RReLU:
        _refuse_randomness(module)
    slopes = slope_range(module)
    if slopes is None:
        return None
    bound = max(abs(slopes[0]), abs(slopes[1]))
    if bound > 1 and getattr(module, "inplace", False):
        raise UnknownBoundError("inplace=True with slopes above 1 also changes other uses of its input")
    return bound


RULES: dict[type[nn.Module], Rule] = {
    nn.Identity: _isometry,
    nn.Flatten: _isometry,
    nn.Unflatten: _isometry,
    nn.PixelShuffle: _isometry,
    nn.PixelUnshuffle: _isometry,
    nn.ChannelShuffle: _isometry,
    nn.ZeroPad2d: _isometry,
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.ConvTranspose2d: _conv_transpose2d,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_avg_pool,
    nn.AdaptiveMaxPool2d: _adaptive_max_pool,
    nn.LPPool2d: _lp_pool,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.Dropout: _dropout,
}


def torch_bound(module: nn.Module, shape: Shape | None) -> float | None:
    """The bound of one of torch's modules on inputs of `shape`; None if the type is not known.

    The exact type counts: a subclass may compute something else.
    """
    rule = RULES.get(type(module))
    if rule is not None:
        with torch.no_grad():
            return rule(module, shape)
    return _entrywise(module)
