"""BRONet: orthogonal convolutions between a strided stem and dense layers (Lai et al. 2025, arXiv 2505.15174).

Differs from the public code in the stem's norm, which is a proven bound.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.models.parts import (
    LayerChoice,
    Mean,
    around_backbone,
    centred,
    check_not_negative,
    image_shape,
    make_head,
    sequence,
    subtract_mean,
)

__all__ = ["bronet"]


def bronet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    conv: LayerChoice = "bro",
    rank_ratio: float | None = None,
    dense_rank_ratio: float | None = None,
    stem: LayerChoice = "rescaled",
    patch: LayerChoice = "cholesky",
    linear: LayerChoice = "cholesky",
    channels: int = 512,
    blocks: int = 0,
    depth: int = 12,
    width: int = 2048,
    dense: int = 8,
    stem_patch: int | None = None,
    centering: str = "before",
    activation: str | Callable[[], nn.Module] = "maxmin",
    head: LayerChoice = "normalized",
    mean: Mean = 0.5,
) -> nn.Sequential:
    """Stem, `depth` 3 × 3 convolutions, each with `BatchCentering`, one of patches 4 × 4, dense layers, head.

    Residual blocks may come before the convolutions. The defaults are BRONet-L on CIFAR (68.8M parameters).

    Args:
        input_shape: (channels, height, width) of one image.
        conv: of the backbone, a family's name or a class with nn.Conv2d's signature.
        rank_ratio: of BRO's convolutions; None for BRO's default and for every other family.
        dense_rank_ratio: likewise, of BRO's square dense layers; with it, dense layers and patches whose output is
            smaller than their input have the rank of the output, as on Tiny-ImageNet.
        stem: of the first convolution, 5 × 5 with stride 2.
        patch: of the convolution of stride 4 after the backbone; "l2" for ℓ2 pooling in its place.
        linear: of the dense layers.
        channels: of the backbone.
        blocks: LiResNet's, with an activation after each, before the convolutions, as in the hybrid for ImageNet.
        depth: convolutions in the backbone.
        width, dense: size of the dense layers, and how many follow the first.
        stem_patch: None, or the size of the patches of a stem with kernel = stride, as for ImageNet.
        centering: whether the means are subtracted "before" each convolution or "after" it, as in the public code:
            they are those of its output, which before it holds up to the border.
        head: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from the pixels first, one number or one for each channel.

    Raises:
        UnknownNameError: a layer, activation, centering or head of unknown name.
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
    maps = [partial(residual, channels)] * blocks
    maps += [partial(layer, channels, channels, 3, padding=1, **options)] * depth
    backbone = [module for make in maps for module in centred(make, channels, activation, centering)]
    body = around_backbone(
        image,
        backbone,
        stem=stem,
        patch=patch if patch == "l2" else _ranked(patch, "conv", dense_rank_ratio),
        linear=_ranked(linear, "linear", dense_rank_ratio),
        channels=channels,
        width=width,
        dense=dense,
        stem_patch=stem_patch,
        activation=activation,
    )
    return sequence(preprocess=subtract_mean(image, mean), body=body, head=make_head(head, width, num_classes))


def _ranked(choice: LayerChoice, role: str, rank_ratio: float | None) -> LayerChoice:
    """BRO's layer with this rank where it is square, and the rank of the smaller side elsewhere."""
    make = get_layer(choice, role)
    if rank_ratio is None or "rank_ratio" not in inspect.signature(make).parameters:
        return choice

    def made(inputs: int, outputs: int, kernel_size: int = 1, **arguments: Any) -> nn.Module:
        sizes = inputs * kernel_size**2, outputs
        ratio = rank_ratio if sizes[0] == sizes[1] else min(sizes) / max(sizes)
        shape = (inputs, outputs) if role == "linear" else (inputs, outputs, kernel_size)
        return make(*shape, rank_ratio=ratio, **arguments)

    return made
