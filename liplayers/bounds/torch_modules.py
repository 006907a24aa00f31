"""Bounds of torch's own modules. A module that is not here has no known bound, and raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from liplayers.core.parametrized import plain_type, require_constant
from liplayers.core.precision import executed
from liplayers.errors import UnknownBoundError
from liplayers.linalg import upward
from liplayers.linalg.convolution import overlap
from liplayers.linalg.verified import Enclosure, conv_norm_enclosure, norm_enclosure
from liplayers.modules.activations import slope_range

__all__ = ["RULES", "Bound", "Rule", "Shape", "torch_bound"]

Shape = tuple[int, ...]
Bound = float | Enclosure
Rule = Callable[[Any, "Shape | None"], "Bound | Callable[[], Bound]"]  # what takes long is returned to be called later


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _isometry(module: nn.Module, shape: Shape | None) -> float:
    return 1.0


def _linear(module: nn.Linear, shape: Shape | None) -> Callable[[], Enclosure]:
    return lambda: norm_enclosure(executed(module.weight))


def _conv(module: nn.Conv1d | nn.Conv2d, shape: Shape | None) -> Callable[[], Bound]:
    """The norm on the infinite grid times that of the padding, which zeros and a mere wrap-around leave at 1."""
    line = module.weight.dim() == 3  # an image of height 1
    stride, dilation = _sizes(module.stride, line), _sizes(module.dilation, line)
    groups = module.groups

    def norm() -> Enclosure:
        weight = executed(module.weight)
        return conv_norm_enclosure(weight.unsqueeze(2) if line else weight, stride, dilation, groups)

    pads = _per_axis(module._reversed_padding_repeated_twice)
    if module.padding_mode == "zeros" or not any(map(any, pads)):
        return norm
    if module.padding_mode == "circular" and _wraps_around(module, pads, shape):
        return norm
    padding = _padding_norm(module.padding_mode, pads, shape)
    return lambda: upward.product(norm().upper, padding)


def _sizes(value: int | tuple[int, ...], line: bool) -> tuple[int, int]:
    return (1, _pair(value)[0]) if line else _pair(value)


def _per_axis(pads: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) of each axis, from what F.pad takes, which begins with the last one."""
    return list(zip(pads[::2], pads[1::2], strict=True))[::-1]


def _wraps_around(module: nn.Conv1d | nn.Conv2d, pads: list[tuple[int, int]], shape: Shape | None) -> bool:
    """Whether circular padding makes of each axis a torus, or less, on which the convolution acts."""
    axes = len(pads)
    spans = (d * (k - 1) for k, d in zip(module.weight.shape[2:], _pair(module.dilation)[:axes], strict=True))
    if any(sum(pad) > span for pad, span in zip(pads, spans, strict=True)):
        return False
    sizes = (None,) * axes if shape is None else shape[-axes:]
    strides = _pair(module.stride)[:axes]
    return all(s == 1 or (n is not None and n % s == 0) for n, s in zip(sizes, strides, strict=True))


def _padding_norm(mode: str, pads: list[tuple[int, int]], shape: Shape | None) -> float:
    """√(how often padding repeats a pixel), the product over the axes; without a shape for the worst size."""
    if shape is None and mode == "circular":
        raise UnknownBoundError("what its circular padding repeats depends on the image size: pass input_shape")
    sizes = [None] * len(pads) if shape is None else list(shape[-len(pads) :])
    return upward.root(math.prod(_copies(mode, *pad, size) for pad, size in zip(pads, sizes, strict=True)))


def _copies(mode: str, before: int, after: int, size: int | None) -> int:
    """The most copies of a pixel along one axis that is padded (or cropped, where negative), itself included."""
    if size is not None:
        positions = torch.arange(size, dtype=torch.float64)[None, None]
        return int(F.pad(positions, (before, after), mode).long().flatten().bincount().max())
    before, after = max(before, 0), max(after, 0)
    if mode == "replicate":
        return 1 + before + after  # of the one pixel of the smallest image
    return 1 + (before > 0) + (after > 0)  # each side repeats a pixel once: torch pads by less than the image


def _pad2d(module: nn.ReflectionPad2d | nn.ReplicationPad2d | nn.CircularPad2d, shape: Shape | None) -> float:
    return _padding_norm(_PAD_MODES[type(module)], _per_axis(module.padding), shape)


_PAD_MODES: dict[type[nn.Module], str] = {
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
    nn.CircularPad2d: "circular",
}


def _conv_transpose2d(module: nn.ConvTranspose2d, shape: Shape | None) -> Callable[[], Enclosure]:
    """The norm of its adjoint, a convolution with the same kernel."""
    stride, dilation, groups = _pair(module.stride), _pair(module.dilation), module.groups
    return lambda: conv_norm_enclosure(executed(module.weight), stride, dilation, groups)


def _overlaps(module: nn.MaxPool2d | nn.AvgPool2d) -> int:
    """How many windows meet in a pixel; pooling of norm 1 in each window has the root of it as its norm."""
    dilation = _pair(getattr(module, "dilation", 1))
    stride = module.kernel_size if module.stride is None else module.stride
    sizes = zip(_pair(module.kernel_size), _pair(stride), dilation, strict=True)
    return math.prod(overlap(*size) for size in sizes)


def _max_pool(module: nn.MaxPool2d, shape: Shape | None) -> float:
    if module.return_indices:
        raise UnknownBoundError("return_indices=True")
    return upward.root(_overlaps(module))


def _avg_pool(module: nn.AvgPool2d, shape: Shape | None) -> float:
    area = math.prod(_pair(module.kernel_size))
    if module.divisor_override:
        square = Fraction(area, module.divisor_override**2)
    elif module.ceil_mode or (_pair(module.padding) != (0, 0) and not module.count_include_pad):
        square = Fraction(1)  # a window at the border may average a single pixel
    else:
        square = Fraction(1, area)
    return upward.root(square * _overlaps(module))


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
    return upward.root(Fraction(1, math.prod(n // out for n, out in sizes)))


def _adaptive_max_pool(module: nn.AdaptiveMaxPool2d, shape: Shape | None) -> float:
    if module.return_indices:
        raise UnknownBoundError("return_indices=True")
    return upward.root(math.prod(_windows_on_a_pixel(n, out) for n, out in _adaptive_sizes(module, shape)))


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
    variances = [Fraction(v) + Fraction(module.eps) for v in module.running_var.double().tolist()]
    weights = [1.0] * len(variances) if module.weight is None else module.weight.double().tolist()
    if min(variances) <= 0:
        return math.inf
    return upward.root(max(Fraction(w) ** 2 / v for w, v in zip(weights, variances, strict=True)))


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


def _flatten(module: nn.Flatten, shape: Shape | None) -> float:
    if module.start_dim < 0 and shape is None:
        raise UnknownBoundError("its start_dim may be the batch: pass input_shape")
    if module.start_dim == 0 or (shape is not None and module.start_dim <= -1 - len(shape)):
        raise UnknownBoundError(f"start_dim={module.start_dim} is the batch, whose samples it joins: use nn.Flatten(1)")
    return 1.0


RULES: dict[type[nn.Module], Rule] = {
    nn.Identity: _isometry,
    nn.Flatten: _flatten,
    nn.Unflatten: _isometry,
    nn.PixelShuffle: _isometry,
    nn.PixelUnshuffle: _isometry,
    nn.ChannelShuffle: _isometry,
    nn.ZeroPad2d: _isometry,
    nn.ConstantPad2d: _isometry,
    nn.ReflectionPad2d: _pad2d,
    nn.ReplicationPad2d: _pad2d,
    nn.CircularPad2d: _pad2d,
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
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


def torch_bound(module: nn.Module, shape: Shape | None) -> Callable[[], Bound] | None:
    """What computes the bound of one of torch's modules on inputs of `shape`, of a weight from both sides.

    None if it is not known. The exact type counts: a subclass may compute something else.

    Raises:
        UnknownBoundError: there is none for this shape or these arguments.
    """
    require_constant(module)
    rule = RULES.get(plain_type(module))
    with torch.no_grad():
        bound = _entrywise(module) if rule is None else rule(module, shape)
    if bound is None:
        return None
    return torch.no_grad()(bound) if callable(bound) else lambda: bound
