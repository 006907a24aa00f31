"""The AOL networks small, medium and large, on patches (Prach & Lampert 2022, arXiv 2208.03160)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.errors import ArgumentError
from liplayers.models.parts import LayerChoice, Mean, image_shape, make_head, sequence, started, subtract_mean
from liplayers.modules.activations import get_activation
from liplayers.modules.pooling import PadChannels, Patchify2d

__all__ = ["aolnet"]


def aolnet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    conv: LayerChoice = "aol",
    linear: LayerChoice = "aol",
    patch_size: int = 4,
    channels: int = 192,
    depth: int = 12,
    patch_features: int = 16,
    dense: int = 14,
    activation: str | Callable[[], nn.Module] = "maxmin",
    head: LayerChoice = "truncated",
    mean: Mean = 0.5,
    padding_mode: str = "zeros",
    start: str = "family",
) -> nn.Sequential:
    """Patches become channels, a 1 × 1 convolution, `depth` 3 × 3 convolutions, a 1 × 1 convolution of which
    `patch_features` channels are kept, dense layers that keep the number of features, head.

    patch_features = 16, 32, 48 are the paper's AOL-Small, Medium and Large on CIFAR.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        conv: the convolutions: a family's name, or a class with nn.Conv2d's signature.
        linear: the dense layers: a family's name, or a class with nn.Linear's signature.
        patch_size: side of the patches in pixels; it must divide the image.
        channels: channels of the convolutions.
        depth: number of 3 × 3 convolutions.
        patch_features: channels of each patch that the dense layers see.
        dense: number of dense layers; no activation follows the last.
        activation: the activation after each layer: "maxmin", "maxmin_neighbours", "groupsort", "fullsort", "abs",
            "beta_abs", "relu", "tanh" or "identity", or a class or function that makes one.
        head: the last layer: "truncated" (the first outputs of the last layer are the logits, as in the paper),
            "normalized", "linear", or a family's name.
        mean: subtracted from each pixel first, one number or one for each channel.
        padding_mode: of the convolutions, "zeros" or "circular".
        start: of the layers that keep their size: "family", what each begins as, or "identity", as in the paper, for
            families with a dense weight.

    Raises:
        UnknownNameError: a layer, activation, start or head of unknown name.
        ArgumentError: patches that do not divide the image.

    Source: Prach & Lampert 2022, arXiv 2208.03160.

    >>> aolnet((3, 32, 32), 10, channels=8, depth=1, dense=1).body[-1]
    AOLLinear(in_features=1024, out_features=1024, bias=True)
    """
    image = image_shape(input_shape)
    check_positive(aolnet, patch_size=patch_size, channels=channels, depth=depth, patch_features=patch_features)
    check_positive(aolnet, dense=dense, num_classes=num_classes)
    if image[1] % patch_size or image[2] % patch_size:
        raise ArgumentError(f"aolnet: patch_size={patch_size} does not divide the image {image[1:]}")
    layer = get_layer(conv, "conv")
    features = patch_features * (image[1] // patch_size) * (image[2] // patch_size)
    embedding = layer(image[0] * patch_size**2, channels, 1)
    body: list[nn.Module] = [Patchify2d(patch_size), embedding, get_activation(activation)]
    for _ in range(depth):
        inner = layer(channels, channels, 3, padding=1, padding_mode=padding_mode)
        body += [started(inner, start), get_activation(activation)]
    body += [started(layer(channels, channels, 1), start), PadChannels(patch_features), nn.Flatten()]
    for i in range(dense):
        body += [get_activation(activation)] if i else []
        body.append(started(get_layer(linear, "linear")(features, features), start))
    return sequence(
        preprocess=subtract_mean(image, mean),
        body=nn.Sequential(*body),
        head=make_head(head, features, num_classes),
    )
