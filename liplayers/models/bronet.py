"""BRONet: orthogonal convolutions between a strided stem and dense layers (Lai et al. 2025, arXiv 2505.15174).

It differs from the public code in the stem, which is divided by its norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
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
    chosen,
    image_shape,
    make_head,
    residual,
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
    start: str = "residual",
    activation: str | Callable[[], nn.Module] = "maxmin",
    head: LayerChoice = "normalized",
    mean: Mean = 0.5,
) -> nn.Sequential:
    """Stem, `depth` 3 × 3 convolutions, each with `BatchCentering`, one of patches 4 × 4, dense layers, head.

    Residual blocks may come before the convolutions. The defaults are BRONet-L on CIFAR (68.8M parameters).

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        conv: the convolutions of the backbone: a family's name, or a class with nn.Conv2d's signature.
        rank_ratio: of BRO's convolutions, in (0, 1]; None for BRO's default and for every other family.
        dense_rank_ratio: likewise, of BRO's square dense layers, in (0, 1]; with it, dense layers and patches whose
            output is smaller than their input have the rank of the output, as on Tiny-ImageNet.
        stem: the first convolution, 5 × 5 with stride 2: a family's name, a class with nn.Conv2d's signature, or "free"
            for one that is not constrained, whose norm the loss is given.
        patch: the convolution of stride 4 after the backbone: a family's name, or a class with nn.Conv2d's signature;
            "l2" for ℓ2 pooling in its place.
        linear: the dense layers: a family's name, or a class with nn.Linear's signature.
        channels: channels of the backbone.
        blocks: number of LiResNet blocks before the convolutions, as in the hybrid for ImageNet; an activation follows
            each.
        depth: number of convolutions in the backbone.
        width: size of each dense layer.
        dense: number of dense layers after the first.
        stem_patch: size in pixels of the patches of a stem with kernel = stride, as for ImageNet; None for a stem of 5
            × 5 with stride 2.
        centering: whether the means are subtracted "before" each layer or "after" it, as in the public code; before it,
            they are those of its output up to the border.
        start: "residual" for equal layers near the identity as in the public code, where their family takes a
            `residual_depth` (BRO, Cholesky, LiResNet; the others as they start), or "family" for all as they start.
        activation: the activation after each layer: "maxmin", "maxmin_neighbours", "groupsort", "fullsort", "abs",
            "beta_abs", "relu", "tanh" or "identity", or a class or function that makes one.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel first, one number or one for each channel.

    Raises:
        UnknownNameError: a layer, activation, centering, start or head of unknown name.
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
    block = chosen("free" if stem == "free" else "liresnet", "conv_block")
    maps = [partial(residual(block, start, blocks), channels)] * blocks
    maps += [partial(residual(layer, start, depth), channels, channels, 3, padding=1, **options)] * depth
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
        start=start,
    )
    return sequence(preprocess=subtract_mean(image, mean), body=body, head=make_head(head, width, num_classes))


def _ranked(choice: LayerChoice, role: str, rank_ratio: float | None) -> LayerChoice:
    """BRO's layer with this rank where it is square, and the rank of the smaller side elsewhere."""
    make = get_layer(choice, role)
    if rank_ratio is None or "rank_ratio" not in inspect.signature(make).parameters:
        return choice

    @wraps(make)  # its signature
    def made(inputs: int, outputs: int, kernel_size: int = 1, **arguments: Any) -> nn.Module:
        sizes = inputs * kernel_size**2, outputs
        ratio = rank_ratio if sizes[0] == sizes[1] else min(sizes) / max(sizes)
        shape = (inputs, outputs) if role == "linear" else (inputs, outputs, kernel_size)
        return make(*shape, rank_ratio=ratio, **arguments)

    return made
