"""Bounds of torch's own modules. A module that is not here has no known bound, and raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liplayers.bounds.advice import advice
from liplayers.core.parametrized import plain_type, require_constant
from liplayers.core.precision import executed
from liplayers.errors import UnknownBoundError
from liplayers.linalg import upward
from liplayers.linalg.convolution import overlap
from liplayers.linalg.verified import Enclosure, conv_norm_enclosure, norm_enclosure
from liplayers.modules.activations import slope_range

__all__ = [
    "RULES",
    "Bound",
    "Rule",
    "Shape",
    "conv_bound",
    "matrix_bound",
    "padding_bound",
    "torch_bound",
    "torch_rule",
]

Shape = tuple[int, ...]
Bound = float | Enclosure
Rule = Callable[[Any, "Shape | None"], "Bound | Callable[[], Bound]"]  # what takes long is returned to be called later


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _axes(value: Any, axes: int) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)


def _isometry(module: nn.Module, shape: Shape | None) -> float:
    return 1.0


# Weights --------------------------------------------------------------------------------------------------------------


def matrix_bound(weight: Tensor) -> Callable[[], Enclosure]:
    """The norm of a matrix as it runs."""
    if weight.dim() != 2:
        raise UnknownBoundError(f"its weight is of shape {tuple(weight.shape)}; expected a matrix")
    return lambda: norm_enclosure(executed(weight))


def conv_bound(weight: Tensor, stride: Any = 1, dilation: Any = 1, groups: int = 1) -> Callable[[], Bound]:
    """The norm of a convolution, and of its adjoint, on the infinite grid; padding with zeros leaves it a bound.

    Of images with depth: the sum over the kernel's slices, each of which convolves with some of the planes.
    """
    axes = weight.dim() - 2
    if axes not in (1, 2, 3):
        raise UnknownBoundError(
            f"its kernel is of shape {tuple(weight.shape)}; expected one of lines, images or volumes"
        )
    strides, dilations = (_pair((1, *_axes(v, axes))[-2:]) for v in (stride, dilation))

    def plane(kernel: Tensor) -> Enclosure:
        return conv_norm_enclosure(kernel, strides, dilations, groups)

    def norm() -> Bound:
        kernel = executed(weight)
        if axes == 3:
            return upward.total(*(plane(part).upper for part in kernel.unbind(2)))
        return plane(kernel.unsqueeze(2) if axes == 1 else kernel)

    return norm


def _linear(module: nn.Linear, shape: Shape | None) -> Callable[[], Enclosure]:
    return matrix_bound(module.weight)


def _conv(module: Any, shape: Shape | None) -> Callable[[], Bound]:
    """The norm on the infinite grid times that of the padding, which zeros and a mere wrap-around leave at 1."""
    norm = conv_bound(module.weight, module.stride, module.dilation, module.groups)
    pads = _per_axis(module._reversed_padding_repeated_twice)
    if module.padding_mode == "zeros" or not any(map(any, pads)):
        return norm
    if module.padding_mode == "circular" and _wraps_around(module, pads, shape):
        return norm
    padding = _padding_norm(module.padding_mode, pads, shape)

    def padded() -> float:
        found = norm()
        return upward.product(found.upper if isinstance(found, Enclosure) else found, padding)

    return padded


def _conv_transpose(module: Any, shape: Shape | None) -> Callable[[], Bound]:
    """The norm of its adjoint, a convolution with the same kernel."""
    return conv_bound(module.weight, module.stride, module.dilation, module.groups)


# Padding --------------------------------------------------------------------------------------------------------------


def _per_axis(pads: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) of each axis, from what F.pad takes, which begins with the last one."""
    return list(zip(pads[::2], pads[1::2], strict=True))[::-1]


def _wraps_around(module: Any, pads: list[tuple[int, int]], shape: Shape | None) -> bool:
    """Whether circular padding makes of each axis a torus, or less, on which the convolution acts."""
    axes = len(pads)
    spans = (d * (k - 1) for k, d in zip(module.weight.shape[2:], _axes(module.dilation, axes), strict=True))
    if any(sum(pad) > span for pad, span in zip(pads, spans, strict=True)):
        return False
    sizes = (None,) * axes if shape is None else shape[-axes:]
    strides = _axes(module.stride, axes)
    return all(s == 1 or (n is not None and n % s == 0) for n, s in zip(sizes, strides, strict=True))


def padding_bound(mode: str, pad: Sequence[int], shape: Shape | None) -> float:
    """The norm of F.pad."""
    return _padding_norm(mode, _per_axis(pad), shape)


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


def _pad(mode: str, module: Any, shape: Shape | None) -> float:
    return padding_bound(mode, module.padding, shape)


# Pooling and interpolation --------------------------------------------------------------------------------------------


def _overlaps(module: Any, axes: int) -> int:
    """How many windows meet in a pixel; pooling of norm 1 in each window has the root of it as its norm."""
    dilation = _axes(getattr(module, "dilation", 1), axes)
    stride = module.kernel_size if module.stride is None else module.stride
    sizes = zip(_axes(module.kernel_size, axes), _axes(stride, axes), dilation, strict=True)
    return math.prod(overlap(*size) for size in sizes)


def _refuse_indices(module: Any) -> None:
    if module.return_indices:
        raise UnknownBoundError("return_indices=True")


def _max_pool(axes: int, module: Any, shape: Shape | None) -> float:
    _refuse_indices(module)
    return upward.root(_overlaps(module, axes))


def _avg_pool(axes: int, module: Any, shape: Shape | None) -> float:
    area = math.prod(_axes(module.kernel_size, axes))
    if getattr(module, "divisor_override", None):
        square = Fraction(area, module.divisor_override**2)
    elif module.ceil_mode or (any(_axes(module.padding, axes)) and not module.count_include_pad):
        square = Fraction(1)  # a window at the border may average a single pixel
    else:
        square = Fraction(1, area)
    return upward.root(square * _overlaps(module, axes))


def _adaptive_sizes(axes: int, module: Any, shape: Shape | None) -> list[tuple[int, int]]:
    """(size of the image, size of the output) of each axis; an output size of None is that of the image."""
    if shape is None:
        raise UnknownBoundError("its bound depends on the image size: pass input_shape")
    target: Any = module.output_size
    target = target if isinstance(target, (tuple, list)) else (target,) * axes
    return [(n, n if out is None else out) for n, out in zip(shape[-axes:], target, strict=True)]


def _window(size: int, windows: int, i: int) -> range:
    """The pixels of one window of adaptive pooling along one axis, [⌊i·n/w⌋, ⌈(i + 1)·n/w⌉)."""
    return range(i * size // windows, -(-(i + 1) * size // windows))


def _adaptive_avg_pool(axes: int, module: Any, shape: Shape | None) -> Bound | Callable[[], Bound]:
    """The product over the axes of the norms of the matrices that average; 1/√k where windows of k pixels tile."""
    sizes = _adaptive_sizes(axes, module, shape)
    if all(out == 0 or n % out == 0 or out % n == 0 for n, out in sizes):
        return upward.product(*(_averaging_norm(n, out) for n, out in sizes))
    return lambda: upward.product(*(_averaging_norm(n, out) for n, out in sizes))


def _averaging_norm(size: int, windows: int) -> float:
    """Of adaptive averages along one axis."""
    if not windows:
        return 0.0
    if size % windows == 0:
        return upward.root(Fraction(windows, size))
    if windows % size == 0:
        return upward.root(windows // size)  # each pixel is repeated
    A = torch.zeros(windows, size, dtype=torch.float64)
    for i in range(windows):
        window = _window(size, windows, i)
        A[i, window.start : window.stop] = 1 / len(window)
    return upward.product(norm_enclosure(A).upper, 1 + _ENTRIES)


def _adaptive_max_pool(axes: int, module: Any, shape: Shape | None) -> float:
    _refuse_indices(module)
    return upward.root(math.prod(_windows_on_a_pixel(n, out) for n, out in _adaptive_sizes(axes, module, shape)))


def _windows_on_a_pixel(size: int, windows: int) -> int:
    """How many of the windows of adaptive pooling meet in one pixel, along one axis."""
    meeting = [0] * size
    for i in range(windows):
        for pixel in _window(size, windows, i):
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


_ENTRIES = 2.0**-40  # relative: of matrices whose rows sum up to 1, what rounding their entries may change of the norm


def _upsample(module: nn.Upsample, shape: Shape | None) -> Callable[[], float]:
    """The product over the axes of the norms of the matrices that interpolate, which torch applies one by one."""
    if shape is None:
        raise UnknownBoundError("its bound depends on the image size: pass input_shape")
    axes = len(shape) - 1
    if module.mode == "area":
        like: Any = torch.empty(1, *shape, device="meta")
        out = F.interpolate(like, module.size, module.scale_factor, "area").shape[-axes:]
        return lambda: upward.product(*(_averaging_norm(n, m) for n, m in zip(shape[-axes:], out, strict=True)))
    return lambda: upward.product(*(_interpolation_norm(module, axis, axes, shape) for axis in range(axes)))


def _interpolation_norm(module: nn.Upsample, axis: int, axes: int, shape: Shape) -> float:
    """Along one axis: of what becomes of each pixel of a line."""
    n = shape[axis - axes]
    sizes = [1] * axes
    sizes[axis] = n
    size = None if module.size is None else [1] * axes
    scale = None if module.scale_factor is None else [1.0] * axes
    if size is not None:
        size[axis] = _axes(module.size, axes)[axis]
    if scale is not None:
        factor: Any = module.scale_factor
        scale[axis] = factor if isinstance(factor, (int, float)) else tuple(factor)[axis]

    def resized(dtype: torch.dtype) -> Tensor:
        lines = torch.eye(n, dtype=dtype).view(1, n, *sizes)
        result = F.interpolate(lines, size, scale, module.mode, module.align_corners, module.recompute_scale_factor)
        return result.reshape(n, -1).T.double()

    if module.mode in ("nearest", "nearest-exact"):  # which pixel is the nearest one may be rounded
        return upward.root(max(int(resized(dtype).sum(0).max()) for dtype in (torch.float32, torch.float64)))
    return upward.product(norm_enclosure(resized(torch.float64)).upper, 1 + _ENTRIES)


# Normalisation, activations, and the rest -----------------------------------------------------------------------------


def _batch_norm(module: Any, shape: Shape | None) -> float:
    if module.training or module.running_var is None:
        raise UnknownBoundError("it has a bound only in eval mode with running statistics: call model.eval()")
    variances = module.running_var.double()
    weights = torch.ones_like(variances) if module.weight is None else module.weight.double()
    if not (variances + module.eps > 0).all():
        return math.inf
    squares = weights.square() / (variances + module.eps)
    largest = squares >= squares.max() * (1 - 2.0**-40)  # among these is the largest one
    pairs = zip(weights[largest].tolist(), variances[largest].tolist(), strict=True)
    return upward.root(max(Fraction(w) ** 2 / (Fraction(v) + Fraction(module.eps)) for w, v in pairs))


def _refuse_randomness(module: nn.Module) -> None:
    if module.training:
        raise UnknownBoundError("it is random in training mode: call model.eval()")


def _dropout(module: nn.Module, shape: Shape | None) -> float:
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


def _softplus(module: nn.Softplus, shape: Shape | None) -> float:
    """Of log(1 + exp(βx))/β, with slopes in [0, 1]; torch's jumps to x at the threshold, which certificates count."""
    if module.beta <= 0 or module.threshold < 20:
        raise UnknownBoundError(
            f"beta={module.beta}, threshold={module.threshold}: where it becomes x it jumps by "
            "log(1 + exp(−threshold))/β; known are beta > 0 and threshold of at least 20"
        )
    return 1.0


def _softmax(module: Any, shape: Shape | None) -> float:
    """Its Jacobian diag(p) − ppᵀ is symmetric with absolute row sums 2p(1 − p) ≤ 1/2 (softmin: of −x)."""
    _known_dim(module, shape)
    return 0.5


def _log_softmax(module: nn.LogSoftmax, shape: Shape | None) -> float:
    """Its Jacobian I − 1pᵀ is a projection, with the norm of its complement 1pᵀ: √n·‖p‖ ≤ √n."""
    dim = _known_dim(module, shape)
    if shape is None:
        raise UnknownBoundError("its bound depends on the number of entries: pass input_shape")
    return upward.root(((None, *shape)[dim]) or 0)


def _known_dim(module: Any, shape: Shape | None) -> int:
    if not isinstance(module.dim, int):
        raise UnknownBoundError("dim=None: say along which dimension")
    if module.dim < 0 and shape is None:
        raise UnknownBoundError("its dim may be the batch: pass input_shape")
    return module.dim


def _softmax2d(module: nn.Softmax2d, shape: Shape | None) -> float:
    if shape is None or len(shape) != 3:
        raise UnknownBoundError("its bound is that of images (N, C, H, W): pass input_shape")
    return 0.5


def _glu(module: nn.GLU, shape: Shape | None) -> float:
    raise UnknownBoundError(advice(module)[0])


def _embedding(module: Any, shape: Shape | None) -> float:
    """Whole numbers do not move: the bound is that of what follows, in what the table holds."""
    if module.max_norm is not None:
        raise UnknownBoundError("max_norm changes its table at each call: use max_norm=None")
    return 1.0


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
    nn.Linear: _linear,
    nn.LPPool2d: _lp_pool,
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    nn.Softplus: _softplus,
    nn.Softmax: _softmax,
    nn.Softmin: _softmax,
    nn.Softmax2d: _softmax2d,
    nn.LogSoftmax: _log_softmax,
    nn.GLU: _glu,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    nn.AlphaDropout: _dropout,
    nn.FeatureAlphaDropout: _dropout,
    nn.Dropout: _dropout,
}
for _n in (1, 2, 3):
    _rules: dict[str, Rule] = {
        "Conv": _conv,
        "ConvTranspose": _conv_transpose,
        "BatchNorm": _batch_norm,
        "Dropout": _dropout,
        "ZeroPad": _isometry,
        "ConstantPad": _isometry,
        "ReflectionPad": partial(_pad, "reflect"),
        "ReplicationPad": partial(_pad, "replicate"),
        "CircularPad": partial(_pad, "circular"),
        "MaxPool": partial(_max_pool, _n),
        "AvgPool": partial(_avg_pool, _n),
        "AdaptiveAvgPool": partial(_adaptive_avg_pool, _n),
        "AdaptiveMaxPool": partial(_adaptive_max_pool, _n),
    }
    RULES |= {getattr(nn, f"{_name}{_n}d"): _rule for _name, _rule in _rules.items()}


def torch_rule(module: nn.Module, shape: Shape | None) -> Bound | Callable[[], Bound] | None:
    """The bound of one of torch's modules on inputs of `shape`, or what computes it where that takes long.

    None if it is not known. The exact type counts: a subclass may compute something else.

    Raises:
        UnknownBoundError: there is none for this shape or these arguments.
    """
    require_constant(module)
    rule = RULES.get(plain_type(module))
    with torch.no_grad():
        bound = _entrywise(module) if rule is None else rule(module, shape)
    return torch.no_grad()(bound) if callable(bound) else bound


def torch_bound(module: nn.Module, shape: Shape | None) -> Callable[[], Bound] | None:
    """What computes `torch_rule`, of a weight from both sides; None if it is not known.

    Raises:
        UnknownBoundError: there is none for this shape or these arguments.
    """
    bound = torch_rule(module, shape)
    return bound if bound is None or callable(bound) else lambda: bound
