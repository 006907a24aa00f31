"""Multilayer perceptrons of 𝓛-Lipschitz blocks: SLL and CPL nets, LBDN, LDLT networks, Gershgorin nets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.errors import ArgumentError
from liplayers.models.parts import LayerChoice, Mean, flat_size, make_head, sequence, subtract_mean
from liplayers.modules.activations import get_activation
from liplayers.modules.pooling import PadChannels

__all__ = ["blockmlp"]


def blockmlp(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    block: LayerChoice = "ldlt",
    width: int = 256,
    depth: int = 4,
    layers: int = 1,
    activation: str | Callable[[], nn.Module] = "relu",
    linear: LayerChoice = "cayley",
    head: LayerChoice = "normalized",
    mean: Mean | None = 0.5,
) -> nn.Sequential:
    """`depth` dense blocks of `width`, then a linear head.

    A first block whose output may differ in size from its input (Sandwich, LBDN, LDLT, Gershgorin) takes the
    features to `width`. Before others they are padded with zeros, or where there are more of them than `width`, mapped
    by a layer of `linear`.

    Args:
        input_shape: (channels, height, width) of one image, (features,) of one row of a table, or any other.
        num_classes: number of logits.
        block: the blocks: a family's name, or a class that is called with the number of features.
        width: size of each block's output.
        depth: number of blocks.
        layers: hidden layers of each block, each of size `width`, for blocks that can have several (LDLT, LBDN,
            Gershgorin).
        activation: the activation inside the blocks, which refuse what their proof does not cover: "maxmin",
            "groupsort", "fullsort", "abs", "beta_abs", "relu", "tanh" or "identity", or a class or function that makes
            one. After linear blocks (LiResNet) it follows them.
        linear: the layer to `width` before blocks that keep their size: a family's name, or a class with nn.Linear's
            signature.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel or feature first, one number or one for each channel or feature; None for
            nothing, as for standardised features.

    Raises:
        UnknownNameError: a block, layer, activation or head of unknown name.
        ArgumentError: several layers for a block that has one.

    >>> blockmlp((7,), 3, width=16, depth=2, mean=None).body[0].extra_repr()
    'features=7, hidden_features=16, out_features=16'
    """
    check_positive(blockmlp, width=width, depth=depth, layers=layers, num_classes=num_classes)
    make = get_layer(block, "dense_block")
    takes = inspect.signature(make).parameters
    if layers > 1 and not {"out_features", "hidden_features"} <= set(takes):
        raise ArgumentError(f"blockmlp: layers={layers}; a block {block!r} has one hidden layer: use depth={layers}")
    features = flat_size(input_shape)
    preprocess = {} if mean is None else {"preprocess": subtract_mean(input_shape, mean)}
    body: list[nn.Module] = []
    if "out_features" not in takes and features != width:
        body.append(PadChannels(width) if features < width else get_layer(linear, "linear")(features, width))
        features = width
    for _ in range(depth):
        arguments: dict[str, Any] = {}
        if features != width:
            arguments["out_features"] = width
        if layers > 1:
            arguments["hidden_features"] = (width,) * layers
        if "activation" in takes:
            body.append(make(features, activation=get_activation(activation), **arguments))
        else:
            body += [make(features, **arguments), get_activation(activation)]
        features = width
    return sequence(
        **preprocess,
        flatten=nn.Flatten(),
        body=nn.Sequential(*body),
        head=make_head(head, features, num_classes),
    )
