"""LiResNet: linear residual blocks between a strided stem and dense layers (Hu et al. 2023, arXiv 2301.12549, and 2024,
arXiv 2310.02513).

It differs from the public code in that each block is divided by its norm, which is proven at the end, and the means are
subtracted before each block or after it, rather than from its branch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.models.parts import (
    LayerChoice,
    Mean,
    around_backbone,
    centred,
    check_not_negative,
    chosen,
    image_shape,
    make_head,
    residual,
    sequence,
    subtract_mean,
)

__all__ = ["liresnet"]


def liresnet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    block: LayerChoice = "liresnet",
    stem: LayerChoice = "rescaled",
    patch: LayerChoice = "cholesky",
    linear: LayerChoice = "cholesky",
    channels: int = 512,
    depth: int = 12,
    width: int = 2048,
    dense: int = 8,
    stem_patch: int | None = None,
    centering: str = "before",
    start: str = "residual",
    activation: str | Callable[[], nn.Module] = "maxmin",
    head: LayerChoice = "normalized",
    mean: Mean = 0.5,
) -> nn.Sequential:
    """Stem, `depth` residual blocks, each with `BatchCentering`, a convolution of patches 4 × 4, dense layers, head.

    The defaults are the network of 2024 on CIFAR (82.9M parameters); channels=256, depth=18, dense=0 is that of 2023
    up to its neck, which is taken from 2024 here.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        block: the residual blocks: a family's name, a class that is called with the number of channels, or "free".
        stem: the first convolution, 5 × 5 with stride 2: a family's name, a class with nn.Conv2d's signature, or "free"
            for one that is not constrained, whose norm the loss is given.
        patch: the convolution of stride 4 after the backbone: a family's name, or a class with nn.Conv2d's signature;
            "l2" for ℓ2 pooling in its place.
        linear: the dense layers: a family's name, or a class with nn.Linear's signature.
        channels: channels of the blocks.
        depth: number of blocks in the backbone.
        width: size of each dense layer.
        dense: number of dense layers after the first.
        stem_patch: size in pixels of the patches of a stem with kernel = stride, as for ImageNet; None for a stem of 5
            × 5 with stride 2.
        centering: whether the means are subtracted "before" each layer or "after" it, as in the public code; before it,
            they are those of its output up to the border.
        start: "residual" for equal layers near the identity as in the public code, where their family takes a
            `residual_depth` (BRO, Cholesky, LiResNet; the others as they start), or "family" for all as they start.
        activation: the activation after each layer, and after each block that has none inside: "maxmin",
            "maxmin_neighbours", "groupsort", "fullsort", "abs", "beta_abs", "relu", "tanh" or "identity", or a class or
            function that makes one.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel first, one number or one for each channel.

    Raises:
        UnknownNameError: a layer, block, activation, centering, start or head of unknown name.
        ArgumentError: patches larger than the image, sizes below 1.

    Source: Hu et al. 2023, arXiv 2301.12549; Hu et al. 2024, arXiv 2310.02513.

    >>> liresnet((3, 32, 32), 10, channels=8, depth=1, width=16, dense=0).body[3]
    LiResNetConv2dBlock(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), \
residual_depth=1)
    """
    image = image_shape(input_shape)
    check_positive(liresnet, channels=channels, depth=depth, width=width, num_classes=num_classes)
    check_not_negative(liresnet, dense=dense)
    make = chosen(block, "conv_block")
    has_activation = "activation" in inspect.signature(make).parameters
    follows = None if has_activation else activation
    one = partial(residual(make, start, depth), channels)
    backbone = [m for _ in range(depth) for m in centred(one, channels, follows, centering)]
    body = around_backbone(
        image,
        backbone,
        stem=stem,
        patch=patch,
        linear=linear,
        channels=channels,
        width=width,
        dense=dense,
        stem_patch=stem_patch,
        activation=activation,
        start=start,
    )
    return sequence(preprocess=subtract_mean(image, mean), body=body, head=make_head(head, width, num_classes))
