"""LipConvNet: stages of 1-Lipschitz convolutions, each closed by a strided one (arXiv 2105.11417)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.errors import ArgumentError
from liplayers.models.parts import (
    LayerChoice,
    Mean,
    check_not_negative,
    image_shape,
    make_head,
    sequence,
    subtract_mean,
)
from liplayers.modules.activations import get_activation

__all__ = ["lipconvnet"]


def lipconvnet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    conv: LayerChoice = "bro",
    linear: LayerChoice | None = None,
    channels: int = 32,
    stages: int = 3,
    convs_per_stage: int = 1,
    kernel_size: int = 3,
    activation: str | Callable[[], nn.Module] = "maxmin",
    dense: int = 0,
    width: int = 256,
    head: LayerChoice = "normalized",
    mean: Mean = 0.5,
) -> nn.Sequential:
    """Stages of `convs_per_stage` convolutions and one of stride 2 that doubles the channels; then dense layers, head.

    stages=5 and convs_per_stage = n/5 − 1 is LipConvNet-n (n = 5, 10, … 40) on images of 32 × 32, with the paper's 32
    channels; its last convolution has kernel 1 there and `kernel_size` here.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        conv: the convolutions: a family's name, or a class with nn.Conv2d's signature.
        linear: the dense layers: a family's name, or a class with nn.Linear's signature; None takes the family of
            `conv`, which must then be a name.
        channels: channels of the first stage.
        stages: number of stages, each of which halves the image; ⌈height/2^stages⌉ must stay at least 1.
        convs_per_stage: number of convolutions of stride 1 before that of stride 2; may be 0.
        kernel_size: size of the kernels in pixels.
        activation: the activation after each layer: "maxmin", "maxmin_neighbours", "groupsort", "fullsort", "abs",
            "beta_abs", "relu", "tanh" or "identity", or a class or function that makes one.
        dense: number of dense layers before the head.
        width: size of each dense layer.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel first, one number or one for each channel.

    Raises:
        UnknownNameError: a layer, activation or head of unknown name.
        ArgumentError: more stages than the image has halvings.

    Source: Singla & Feizi 2021, arXiv 2105.11417.

    >>> lipconvnet((3, 32, 32), 10, conv="aol", channels=8, stages=3).head
    NormalizedLinear(in_features=1024, out_features=10, bias=True)
    """
    image = image_shape(input_shape)
    check_positive(lipconvnet, channels=channels, stages=stages, kernel_size=kernel_size)
    check_not_negative(lipconvnet, convs_per_stage=convs_per_stage, dense=dense)
    check_positive(lipconvnet, width=width, num_classes=num_classes)
    layer = get_layer(conv, "conv")
    size, here = list(image[1:]), image[0]
    body: list[nn.Module] = []
    for stage in range(stages):
        if min(size) < 2:
            raise ArgumentError(f"stages={stages}: the image {image[1:]} can be halved {stage} times only")
        there = channels * 2**stage
        for _ in range(convs_per_stage):
            body += [layer(here, there, kernel_size, padding=kernel_size // 2), get_activation(activation)]
            here = there
            size = [n + 1 - kernel_size % 2 for n in size]  # even kernels let the image grow
        body += [layer(here, 2 * there, kernel_size, stride=2, padding=kernel_size // 2), get_activation(activation)]
        here = 2 * there
        size = [(n + 2 * (kernel_size // 2) - kernel_size) // 2 + 1 for n in size]
    features = here * size[0] * size[1]
    body.append(nn.Flatten())
    dense_layer = get_layer(conv if linear is None else linear, "linear") if dense else None
    for _ in range(dense):
        assert dense_layer is not None
        body += [dense_layer(features, width), get_activation(activation)]
        features = width
    return sequence(
        preprocess=subtract_mean(image, mean),
        body=nn.Sequential(*body),
        head=make_head(head, features, num_classes),
    )
