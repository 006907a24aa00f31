"""BRONet: orthogonal convolutions between a strided stem and dense layers (Lai et al. 2025, arXiv 2505.15174).

It differs from the public code in that the means are subtracted before each convolution rather than after it, where
they are those of its output up to the border, and in the stem, which is divided by its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.models.parts import (
    LayerChoice,
    around_backbone,
    check_not_negative,
    image_shape,
    make_head,
    sequence,
    subtract_mean,
)
from liplayers.modules.activations import get_activation
from liplayers.modules.offsets import BatchCentering

__all__ = ["bronet"]


def bronet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    conv: LayerChoice = "bro",
    rank_ratio: float | None = None,
    stem: LayerChoice = "rescaled",
    patch: LayerChoice = "cholesky",
    linear: LayerChoice = "cholesky",
    channels: int = 512,
    blocks: int = 0,
    depth: int = 12,
    width: int = 2048,
    dense: int = 8,
    stem_patch: int | None = None,
    activation: str | Callable[[], nn.Module] = "maxmin",
    head: LayerChoice = "normalized",
    mean: float = 0.5,
) -> nn.Sequential:
    """Stem, `depth` 3 × 3 convolutions, each after `BatchCentering`, one of patches 4 × 4, dense layers, head.

    Residual blocks may come before the convolutions. The defaults are BRONet-L on CIFAR (68.8M parameters).

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        conv: the convolutions of the backbone: a family's name, or a class with nn.Conv2d's signature.
        rank_ratio: of BRO's convolutions, in (0, 1]; None for BRO's default and for every other family.
        stem: the first convolution, 5 × 5 with stride 2: a family's name, or a class with nn.Conv2d's signature.
        patch: the convolution of stride 4 after the backbone: a family's name, or a class with nn.Conv2d's signature.
        linear: the dense layers: a family's name, or a class with nn.Linear's signature.
        channels: channels of the backbone.
        blocks: number of LiResNet blocks before the convolutions, as in the hybrid for ImageNet; an activation follows
            each.
        depth: number of convolutions in the backbone.
        width: size of each dense layer.
        dense: number of dense layers after the first.
        stem_patch: size in pixels of the patches of a stem with kernel = stride, as for ImageNet; None for a stem of 5
            × 5 with stride 2.
        activation: the activation after each layer: "maxmin", "groupsort", "fullsort", "abs", "beta_abs", "relu",
            "tanh" or "identity", or a class or function that makes one.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel.

    Raises:
        UnknownNameError: a layer, activation or head of unknown name.
        ArgumentError: patches larger than the image, sizes below 1.

    Source: Lai et al. 2025, arXiv 2505.15174.

    >>> bronet((3, 32, 32), 10, channels=8, depth=1, width=16, dense=0).head
    NormalizedLinear(in_features=16, out_features=10, bias=True)
    """
    image = image_shape(input_shape)
    check_positive(bronet, channels=channels, depth=depth, width=width, num_classes=num_classes)
    check_not_negative(bronet, dense=dense, blocks=blocks)
    layer = get_layer(conv, "conv")
    options: dict[str, Any] = {} if rank_ratio is None else {"rank_ratio": rank_ratio}
    residual = get_layer("liresnet", "conv_block")
    maps = [residual(channels) for _ in range(blocks)]
    maps += [layer(channels, channels, 3, padding=1, **options) for _ in range(depth)]
    backbone = [module for each in maps for module in (BatchCentering(channels), each, get_activation(activation))]
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
    )
    return sequence(preprocess=subtract_mean(image, mean), body=body, head=make_head(head, width, num_classes))
