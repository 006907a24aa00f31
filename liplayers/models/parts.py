"""What the models share: the preprocessing, the head, the sequence."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from liplayers.errors import ArgumentError, UnknownNameError
from liplayers.layers.containers import Normalize
from liplayers.layers.heads import NormalizedLinear
from liplayers.layers.registry import FAMILIES, get_layer

LayerChoice = str | Callable[..., nn.Module]
Shape3d = tuple[int, int, int]


def centring(input_shape: Sequence[int], mean: float) -> nn.Module:
    """Subtract `mean` from each pixel or feature; a shift does not change the Lipschitz constant."""
    channels = input_shape[0]
    return Normalize([mean] * channels, [1.0] * channels)


def make_head(head: LayerChoice, features: int, num_classes: int) -> nn.Module:
    """The last layer: "normalized" (unit rows), "linear" (unconstrained), or a family with a linear layer."""
    if head == "normalized":
        return NormalizedLinear(features, num_classes)
    if head == "linear":
        return nn.Linear(features, num_classes)
    known = ["normalized", "linear", *(f.name for f in FAMILIES.values() if f.linear)]
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
