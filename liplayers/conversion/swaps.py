"""What each of torch's layers becomes: the rules for single modules, and the settings that they follow."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from liplayers.bounds.advice import advice
from liplayers.bounds.torch_modules import RULES, torch_bound
from liplayers.core.registry import FAMILIES, get_layer
from liplayers.errors import ArgumentError, LipschitzError, UnknownBoundError
from liplayers.linalg.verified import Enclosure
from liplayers.modules.activations import MaxMin, slope_range
from liplayers.modules.containers import Scale
from liplayers.modules.offsets import BatchCentering

__all__ = [
    "ACTIVATIONS",
    "Layer",
    "Settings",
    "Swap",
    "core",
    "from_torch",
    "hint",
    "swapped",
    "swaps",
]

Layer = str | Callable[..., nn.Module]
Replacement = Callable[[nn.Module], nn.Module]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.ConvTranspose1d: "conv_transpose",
    nn.ConvTranspose2d: "conv_transpose",
}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_POOLS = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.LPPool1d, nn.LPPool2d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip
# between layers; those that end in a range, such as Sigmoid, may be gates or outputs, and stay
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus,
)  # fmt: skip

_THREE = (
    "no family has a convolution in three dimensions",
    "two convolutions in the place of one, in two dimensions and in the third",
)
_MORE: dict[type[nn.Module], tuple[str, str]] = {
    nn.Conv3d: _THREE,
    nn.ConvTranspose3d: _THREE,
    nn.Embedding: ("it takes integers", "convert of the model that follows it"),
    nn.EmbeddingBag: ("it takes integers", "convert of the model that follows it"),
}


@dataclass(frozen=True)
class Settings:
    """The choices of `convert`."""

    conv: Layer
    linear: Layer
    fallback: Layer | None
    activation: str
    weights: str
    learned_sums: bool
    replace: Mapping[str | type[nn.Module], Replacement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("activation", ("maxmin", "keep")), ("weights", ("project", "fresh"))):
            if getattr(self, name) not in known:
                raise ArgumentError(
                    f"convert: {name}={getattr(self, name)!r}; expected {' or '.join(map(repr, known))}"
                )
        get_layer(self.conv, "conv"), get_layer(self.linear, "linear")
        if self.fallback is not None:
            get_layer(self.fallback, "conv")
        for key, rule in self.replace.items():
            if not isinstance(key, str | type) or not callable(rule):
                raise ArgumentError(
                    f"convert: replace={{{key!r}: {rule!r}}}; expected a path or type, and a function of the module "
                    f"that returns another"
                )


@dataclass(frozen=True)
class Place:
    """Where a module stands.

    Attributes:
        shapes: of its inputs, without the batch.
        dim: of the channels, for activations.
        norm: the batch normalization after a layer, whose gain goes into it.
        folded: whether the gain of a batch normalization goes into the layer before it.
    """

    shapes: set[tuple[int, ...]]
    dim: int = 1
    norm: nn.Module | None = None
    folded: bool = False


@dataclass(frozen=True)
class Swap:
    """What a module becomes, the distance of its weight, and what else there is to know."""

    module: nn.Module
    distance: float | None = None
    note: str = ""


def from_torch(module: nn.Module, layer: Layer) -> nn.Module:
    """A layer of a family in the place of one of torch's: the nearest member that `assign_weight` finds, its bias.

    Args:
        module: nn.Linear, nn.Conv2d or nn.ConvTranspose2d; in one dimension the layer becomes one of height 1, between
            two that reshape.
        layer: a family's name, or a class or function with torch's arguments.

    Raises:
        ArgumentError: another type; a family without a dense weight to start from, or that cannot honour an argument.
        UnknownNameError: no family of that name has such a layer.

    >>> from liplayers import BjorckLinear
    >>> linear = nn.Linear(3, 3)
    >>> layer = from_torch(linear, "bjorck")
    >>> type(layer) is BjorckLinear, torch.equal(layer.bias, linear.bias)
    (True, True)
    """
    role = "linear" if type(module) is nn.Linear else _CONVS.get(type(module))
    if role is None:
        kinds: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVS)
        known = ", ".join(kind.__name__ for kind in kinds)
        raise ArgumentError(f"from_torch: got {type(module).__name__}; expected one of {known}")
    made = _made(module, get_layer(layer, role))
    core(made).assign_weight(_flat_weight(module))  # type: ignore[operator]
    _copy_bias(module, made, torch.ones(()))
    return made


def swaps(module: nn.Module) -> bool:
    """Whether there is a rule for the module itself, whatever is in it."""
    known = (nn.Linear, *_CONVS, *_DROPOUTS, *_POOLS, *ACTIVATIONS)
    bounded = type(module) in RULES or slope_range(module) is not None
    return type(module) in known or isinstance(module, _BatchNorm) or bounded


def swapped(module: nn.Module, settings: Settings, place: Place) -> Swap:
    """What a module becomes.

    Args:
        module: for which there is a rule.
        settings: the choices.
        place: where it stands.

    Raises:
        UnknownBoundError: nothing can take its place.
    """
    kind = type(module)
    if kind is nn.Linear or kind in _CONVS:
        return _layer(module, settings, place)
    if isinstance(module, _BatchNorm):
        return _centering(module, settings, place)
    if kind in _DROPOUTS:
        return Swap(nn.Identity(), note="no effect in evaluation")
    if kind in ACTIVATIONS:
        return _activation(module, settings, place)
    if kind in _POOLS:
        return _pool(module, place.shapes)
    return Swap(module)


def hint(module: nn.Module) -> tuple[str, str]:
    """Why nothing takes the place of a module of torch's, or of one derived from it, and what to use instead."""
    for kind in type(module).__mro__:
        found = _MORE.get(kind) or advice(operation=kind.__name__)
        if kind.__module__.startswith("torch.nn.") and found[0]:
            return found
    return "", ""


# layers with weights


def _layer(module: Any, settings: Settings, place: Place) -> Swap:
    if type(module) is nn.Linear:
        made, note = _made(module, get_layer(settings.linear, "linear")), ""
    else:
        made, note = _convolution(module, settings.conv, _CONVS[type(module)], settings.fallback)
    if settings.weights == "fresh":
        return Swap(made, note=note)
    weight, gain = _flat_weight(module).double(), torch.ones((), dtype=torch.float64)
    if isinstance(place.norm, _BatchNorm):
        gain = _gain(place.norm)
        weight = weight * gain.view(-1, *[1] * (weight.dim() - 1))
        note = _joined(note, "with the gain of the normalization after it")
    try:
        distance: float = core(made).assign_weight(weight)  # type: ignore[operator]
    except ArgumentError:
        return Swap(made, note=_joined(note, "fresh: its family has no dense weight to start from"))
    _copy_bias(module, made, gain)
    norm = torch.linalg.vector_norm(weight).item()
    return Swap(made, distance / norm if norm else None, note)


def _convolution(module: nn.Module, choice: Layer, role: str, fallback: Layer | None) -> tuple[nn.Module, str]:
    """A convolution of the chosen family, or of the fallback where that has none for this geometry."""
    name = choice if isinstance(choice, str) else getattr(choice, "__name__", repr(choice))
    try:
        if isinstance(choice, str) and role not in _roles(choice):
            raise ArgumentError(f"family {name!r} has no transposed convolution")
        if "conv" in _orthogonal(choice) and _is_depthwise(module):
            raise ArgumentError(f"orthogonal filters of a single channel ({name}) are mere shifts")
        if not isinstance(choice, str) and role == "conv_transpose":
            raise ArgumentError(f"{name} makes no transposed convolution")
        return _made(module, get_layer(choice, role)), ""
    except ArgumentError as error:
        if fallback is None or fallback == choice:
            raise UnknownBoundError(
                f"{error}; name a family for such layers by fallback=, such as 'rescaled'"
            ) from None
        why = f"fallback: {error}"
    try:
        return _made(module, get_layer(fallback, role)), why
    except LipschitzError as error:
        raise UnknownBoundError(f"{why}; then {error}") from None


def _roles(name: str) -> set[str]:
    family = FAMILIES.get(name)
    return {role for role in ("conv", "conv_transpose") if family is not None and getattr(family, role) is not None}


def _orthogonal(layer: Layer) -> frozenset[str]:
    return FAMILIES[layer].orthogonal if isinstance(layer, str) and layer in FAMILIES else frozenset()


def _is_depthwise(module: Any) -> bool:
    return module.groups == module.in_channels == module.out_channels > 1 and math.prod(module.kernel_size) > 1


def _made(module: Any, layer: Callable[..., nn.Module]) -> nn.Module:
    """A new layer with the arguments of one of torch's."""
    place = {"device": module.weight.device, "dtype": module.weight.dtype}
    bias = module.bias is not None
    if type(module) is nn.Linear:
        return layer(module.in_features, module.out_features, bias=bias, **place)
    line = module.weight.dim() == 3
    names = ["kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if "output_padding" in inspect.signature(type(module)).parameters:
        names.append("output_padding")
    arguments = {name: getattr(module, name) for name in names}
    if line:  # an image of height 1
        ones = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
        for name, value in ones.items():
            if isinstance(arguments.get(name), tuple):
                arguments[name] = (value, *arguments[name])
    made = layer(module.in_channels, module.out_channels, **arguments, bias=bias, **place)
    if not line:
        return made
    return nn.Sequential(nn.Unflatten(1, (module.in_channels, 1)), made, nn.Flatten(1, 2))


def core(made: nn.Module) -> nn.Module:
    """The layer with the weight."""
    return made[1] if isinstance(made, nn.Sequential) else made


def _flat_weight(module: Any) -> Tensor:
    weight = module.weight.detach()
    return weight.unsqueeze(2) if weight.dim() == 3 else weight


def _copy_bias(module: nn.Module, made: nn.Module, gain: Tensor) -> None:
    bias, new = module.bias, getattr(core(made), "bias", None)
    if isinstance(bias, Tensor) and isinstance(new, Tensor):
        with torch.no_grad():
            new.copy_(bias.detach().double() * gain)


# normalization


def _gain(norm: _BatchNorm) -> Tensor:
    """What batch normalization multiplies each channel by; 1 for 0, which starts a branch at nothing."""
    variance = norm.running_var
    deviation = torch.ones(norm.num_features) if variance is None else (variance.detach().double() + norm.eps).sqrt()
    gain = deviation.reciprocal() if norm.weight is None else norm.weight.detach().double() / deviation
    return torch.where(gain == 0, 1, gain)


def folds(layer: nn.Module, norm: nn.Module, settings: Settings) -> bool:
    """Whether the gain of a normalization, which follows a layer directly, can go into it."""
    if settings.weights != "project" or not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return False
    of_features = type(layer) is nn.Linear and type(norm) is nn.BatchNorm1d  # of vectors: else it is along other axes
    return of_features or type(layer) in (nn.Conv1d, nn.Conv2d)


def _centering(module: _BatchNorm, settings: Settings, place: Place) -> Swap:
    made = BatchCentering(module.num_features, 0.1 if module.momentum is None else module.momentum, bias=module.affine)
    like = next((t for t in (module.weight, module.running_mean) if t is not None), torch.empty(0))
    made, note = made.to(like.device, like.dtype), "only the mean is taken off"
    if settings.weights == "project":
        gain = _gain(module)
        with torch.no_grad():
            if module.running_mean is not None:
                made.running_mean.copy_(module.running_mean * (gain if place.folded else 1))
            if made.bias is not None:
                made.bias.copy_(module.bias.detach())
        low, high = gain.abs().aminmax()
        note = "its gain went into the layer before" if place.folded else f"gains {low:.3g} to {high:.3g} left out"
    if type(module) in _NORMS:
        return Swap(made, note=note)
    after = getattr(module, "act", None)  # timm's normalization with an activation in it
    if type(module).__name__ != "BatchNormAct2d" or not isinstance(after, nn.Module):
        raise UnknownBoundError("it is a normalization with a forward of its own: replace it")
    swap = _activation(after, settings, place) if type(after) in ACTIVATIONS else Swap(after)
    return Swap(nn.Sequential(made, swap.module), note=_joined(note, swap.note))


# activations and pooling


def _activation(module: nn.Module, settings: Settings, place: Place) -> Swap:
    if settings.activation == "maxmin":
        channels = [shape[min(place.dim, 0)] for shape in place.shapes if shape]  # dim 1 is the first of a shape
        odd = [n for n in channels if n % 2]
        return Swap(MaxMin(place.dim), note=f"the last of {odd[0]} channels passes unchanged" if odd else "")
    slopes = slope_range(module)
    slope = math.inf if slopes is None else max(map(abs, slopes))
    if not math.isfinite(slope):
        raise UnknownBoundError("its slopes have no known bound: use activation='maxmin', or replace it")
    if getattr(module, "inplace", False):
        module.inplace = False  # type: ignore[assignment]
    if slope <= 1:
        return Swap(module)
    return Swap(nn.Sequential(module, inverse(slope)), note="divided by its largest slope")


def inverse(bound: float) -> Scale:
    """1/bound, rounded down."""
    return Scale(math.nextafter(1 / bound, 0))


def _pool(module: nn.Module, shapes: set[tuple[int, ...]]) -> Swap:
    """Without overlap where the size of the output allows it; else divided by its norm."""
    if isinstance(module, nn.MaxPool2d):
        disjoint = _disjoint(module, shapes)
        if disjoint is not None:
            return Swap(disjoint, note="windows do not overlap")
    return _scaled_to_one(module, shapes)


def _scaled_to_one(module: nn.Module, shapes: set[tuple[int, ...]]) -> Swap:
    """A module of torch's with a known bound, times its inverse."""
    found = [torch_bound(module, shape) for shape in shapes]
    if not found or None in found:
        raise UnknownBoundError("no bound is known for this type: replace it")
    bounds = [rule() for rule in found if rule is not None]
    bound = max(bound.upper if isinstance(bound, Enclosure) else bound for bound in bounds)
    if bound == 1:
        return Swap(module)
    return Swap(nn.Sequential(module, inverse(bound)), note="divided by its norm")


def _disjoint(module: nn.MaxPool2d, shapes: set[tuple[int, ...]]) -> nn.MaxPool2d | None:
    kernel, stride, dilation = (_pair(value) for value in (module.kernel_size, module.stride, module.dilation))
    if dilation != (1, 1) or module.return_indices or all(k <= s for k, s in zip(kernel, stride, strict=True)):
        return None
    smaller = tuple(map(min, kernel, stride))
    for ceil_mode in (False, True):
        pool = nn.MaxPool2d(smaller, stride, ceil_mode=ceil_mode)  # type: ignore[arg-type]
        if all(_size(pool, shape) == _size(module, shape) for shape in shapes):
            return pool
    return None


def _size(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(module(torch.empty(1, *shape, device="meta")).shape)
    except RuntimeError:  # a window larger than the image
        return ()


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
