"""Multilayer perceptrons of 1-Lipschitz layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.models.parts import LayerChoice, Mean, flat_size, make_head, sequence, subtract_mean
from liplayers.modules.activations import get_activation

__all__ = ["mlp"]


def mlp(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    linear: LayerChoice = "cayley",
    width: int = 256,
    depth: int = 3,
    activation: str | Callable[[], nn.Module] = "maxmin",
    head: LayerChoice = "normalized",
    mean: Mean | None = 0.5,
) -> nn.Sequential:
    """`depth` dense layers of `width` with an activation after each, then a linear head.

    Args:
        input_shape: (channels, height, width) of one image, (features,) of one row of a table, or any other.
        num_classes: number of logits.
        linear: the dense layers: a family's name, or a class with nn.Linear's signature.
        width: size of each dense layer.
        depth: number of dense layers before the head.
        activation: the activation after each layer: "maxmin", "maxmin_neighbours", "groupsort", "fullsort", "abs",
            "beta_abs", "relu", "tanh" or "identity", or a class or function that makes one.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel or feature first, one number or one for each channel or feature; None for
            nothing, as for standardised features.

    Raises:
        UnknownNameError: a layer, activation or head of unknown name.

    >>> sum(p.numel() for p in mlp((1, 8, 8), 10, linear="aol", width=32, depth=2).parameters())
    3466
    """
    check_positive(mlp, width=width, depth=depth, num_classes=num_classes)
    layer = get_layer(linear, "linear")
    features = flat_size(input_shape)
    body: list[nn.Module] = []
    for _ in range(depth):
        body += [layer(features, width), get_activation(activation)]
        features = width
    preprocess = {} if mean is None else {"preprocess": subtract_mean(input_shape, mean)}
    return sequence(
        **preprocess,
        flatten=nn.Flatten(),
        body=nn.Sequential(*body),
        head=make_head(head, features, num_classes),
    )
