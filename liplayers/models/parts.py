"""What the models share: the preprocessing, the head, the sequence."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import FAMILIES, get_layer
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError, UnknownNameError
from liplayers.layers.free import FreeConv2d, FreeResidualConv2dBlock
from liplayers.layers.normalized import NormalizedLinear
from liplayers.modules.activations import get_activation
from liplayers.modules.containers import Normalize
from liplayers.modules.offsets import BatchCentering
from liplayers.modules.pooling import L2Pool2d, PadChannels

__all__ = [
    "LayerChoice",
    "Mean",
    "Shape3d",
    "around_backbone",
    "centred",
    "check_not_negative",
    "chosen",
    "flat_size",
    "image_shape",
    "make_head",
    "residual",
    "sequence",
    "started",
    "subtract_mean",
]

LayerChoice = str | Callable[..., nn.Module]
Shape3d = tuple[int, int, int]
Mean = float | Sequence[float]  # of all inputs, or of each channel


def subtract_mean(input_shape: Sequence[int], mean: Mean) -> nn.Module:
    """Subtract `mean` from each pixel or feature; a shift does not change the Lipschitz constant."""
    channels = input_shape[0]
    means = [float(m) for m in mean] if isinstance(mean, Sequence) else [float(mean)] * channels
    if len(means) != channels:
        raise ArgumentError(f"mean={mean}: expected one number, or one for each of {channels} channels")
    return Normalize(means, [1.0] * channels)


FREE: dict[str, Callable[..., nn.Module]] = {"conv": FreeConv2d, "conv_block": FreeResidualConv2dBlock}


def chosen(choice: LayerChoice, role: str) -> Callable[..., nn.Module]:
    """The layer of a family as by `get_layer`, and "free" for what is not constrained."""
    return FREE[role] if choice == "free" else get_layer(choice, role)


def check_not_negative(owner: Callable[..., nn.Module], **counts: int) -> None:
    """Raise ArgumentError unless every count is an integer of at least 0."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ArgumentError(f"{owner.__name__}: {name}={value!r}; expected an integer of at least 0")


def make_head(head: LayerChoice, features: int, num_classes: int) -> nn.Module:
    """The last layer: "normalized" (unit rows), "linear" (unconstrained), "truncated" (the first features are the
    logits), or a family with a linear layer.
    """
    if head == "normalized":
        return NormalizedLinear(features, num_classes)
    if head == "linear":
        return nn.Linear(features, num_classes)
    if head == "truncated":
        if features < num_classes:
            raise ArgumentError(f"head='truncated': {features} features for {num_classes} classes; widen the layer")
        return PadChannels(num_classes)
    known = ["normalized", "linear", "truncated", *(f.name for f in FAMILIES.values() if f.linear)]
    if isinstance(head, str) and head not in known:
        raise UnknownNameError.of("head", head, known)
    return get_layer(head, "linear")(features, num_classes)


def image_shape(input_shape: Sequence[int]) -> Shape3d:
    """`input_shape` as (channels, height, width), or an ArgumentError."""
    shape = tuple(int(n) for n in input_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ArgumentError(f"input_shape={shape}: expected (channels, height, width); model=mlp takes any shape")
    return shape


def flat_size(input_shape: Sequence[int]) -> int:
    """The number of features of an input of any shape."""
    shape = tuple(int(n) for n in input_shape)
    if not shape or min(shape) < 1:
        raise ArgumentError(f"input_shape={shape}: expected at least one size, each at least 1")
    return math.prod(shape)


def sequence(**modules: nn.Module) -> nn.Sequential:
    """An nn.Sequential of named modules."""
    return nn.Sequential(OrderedDict(modules))


def centred(
    make: Callable[..., nn.Module],
    channels: int,
    activation: str | Callable[[], nn.Module] | None,
    centering: str,
) -> list[nn.Module]:
    """A layer that keeps the number of channels, `BatchCentering` before or after it, and an activation or None.

    A bias of the layer would be lost in the mean that is subtracted after it: there the centering has it.
    """
    if centering not in ("before", "after"):
        raise UnknownNameError.of("centering", centering, ("before", "after"))
    follows = [] if activation is None else [get_activation(activation)]
    if centering == "before":
        return [BatchCentering(channels), make(), *follows]
    biased = bool(follows) and "bias" in inspect.signature(make).parameters
    return [make(bias=False) if biased else make(), BatchCentering(channels, bias=biased), *follows]


def started(layer: nn.Module, start: str) -> nn.Module:
    """A square layer as its family starts it, or as the identity."""
    if start not in ("family", "identity"):
        raise UnknownNameError.of("start", start, ("family", "identity"))
    if start == "family":
        return layer
    if not isinstance(layer, ParametrizedModule):
        raise ArgumentError(f"start='identity': {type(layer).__name__} has no dense weight; use start='family'")
    if layer.raw_device.type != "meta":
        weight = torch.empty_like(layer.effective())
        layer.assign_weight(nn.init.dirac_(weight) if weight.dim() == 4 else nn.init.eye_(weight))
    return layer


def residual(make: Callable[..., nn.Module], start: str, depth: int) -> Callable[..., nn.Module]:
    """One of `depth` equal layers, near the identity where its family takes a `residual_depth`, or as it starts."""
    if start not in ("residual", "family"):
        raise UnknownNameError.of("start", start, ("residual", "family"))
    if start == "family" or "residual_depth" not in inspect.signature(make).parameters:
        return make
    return partial(make, residual_depth=depth)


def around_backbone(
    image: Shape3d,
    backbone: Sequence[nn.Module],
    *,
    stem: LayerChoice,
    patch: LayerChoice,
    linear: LayerChoice,
    channels: int,
    width: int,
    dense: int,
    stem_patch: int | None,
    activation: str | Callable[[], nn.Module],
    start: str,
) -> nn.Sequential:
    """What LiResNet and BRONet put around their backbone, which keeps the shape of (channels, height, width).

    Before it a convolution 5 × 5 of stride 2, or one of patches of `stem_patch`; after it one of patches 4 × 4 (of
    smaller ones on smaller images) or ℓ2 pooling over them, a dense layer to `width` and `dense` more. An activation
    follows each of them, except the convolution of patches after the backbone.
    """
    conv = chosen(stem, "conv")
    if stem_patch is None:
        first = conv(image[0], channels, 5, stride=2, padding=2)
        sizes = [(n + 1) // 2 for n in image[1:]]
    else:
        check_positive(around_backbone, stem_patch=stem_patch)
        first = conv(image[0], channels, stem_patch, stride=stem_patch)
        sizes = [n // stem_patch for n in image[1:]]
    if min(sizes) < 1:
        raise ArgumentError(f"stem_patch={stem_patch}: larger than the image {image[1:]}")
    patch_size = min(4, *sizes)
    features = channels * math.prod(n // patch_size for n in sizes)
    body = [first, get_activation(activation), *backbone]
    if patch == "l2":
        body.append(L2Pool2d(patch_size))
    else:
        body.append(get_layer(patch, "conv")(channels, channels, patch_size, stride=patch_size))
    body.append(nn.Flatten())
    first_dense = get_layer(linear, "linear")
    further = residual(first_dense, start, dense)
    for make in (first_dense, *[further] * dense):
        body += [make(features, width), get_activation(activation)]
        features = width
    return nn.Sequential(*body)
