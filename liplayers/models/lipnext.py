"""LipNeXt: orthogonal patch embedding, blocks of pointwise orthogonal maps and shifts, ℓ2 pooling (Hu et al. 2026,
arXiv 2601.18513).

No public code exists: the stem, the patch size and a position embedding in every block are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.errors import ArgumentError
from liplayers.layers.lipnext import LipNeXtBlock
from liplayers.models.parts import LayerChoice, Mean, image_shape, make_head, sequence, subtract_mean
from liplayers.modules.pooling import GlobalL2Pool2d

__all__ = ["lipnext"]


def lipnext(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: int = 1024,
    depth: int = 32,
    patch_size: int = 4,
    stem: LayerChoice = "rko",
    shift_ratio: float = 1 / 16,
    beta: float = 0.5,
    position: bool = True,
    head: LayerChoice = "normalized",
    mean: Mean = 0.5,
) -> nn.Sequential:
    """Patch embedding, `depth` LipNeXt blocks of `width` channels, the ℓ2 norm of each channel, head.

    LdWw has depth d and width w. The blocks' orthogonal matrices have 2·d·w² entries: 64·2²⁰ for L32W1024, the paper's
    64M network for CIFAR. Trained by `ManifoldAdamW`, which keeps them orthogonal.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        width: channels of the blocks.
        depth: number of blocks.
        patch_size: side of the patches in pixels, kernel and stride of the stem; it must divide the image.
        stem: the patch embedding: a family's name, or a class with nn.Conv2d's signature.
        shift_ratio: share of the channels that moves in each direction, up to 1/4.
        beta: share of the channels that are folded, in [0, 1].
        position: whether each block learns a position embedding, which fixes the image size.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel first, one number or one for each channel.

    Raises:
        UnknownNameError: a stem or head of unknown name.
        ArgumentError: patches that do not divide the image, shares out of range.

    Source: Hu et al. 2026, arXiv 2601.18513.

    >>> lipnext((3, 32, 32), 10, width=16, depth=1).body[1]
    LipNeXtBlock(
      channels=16, image_size=(8, 8), shift_ratio=0.0625, beta=0.5, bias=True
      (shift): SpatialShift2d(ratio=0.0625)
      (activation): BetaAbs(beta=0.5, dim=-3)
    )
    """
    image = image_shape(input_shape)
    check_positive(lipnext, width=width, depth=depth, patch_size=patch_size, num_classes=num_classes)
    if image[1] % patch_size or image[2] % patch_size:
        raise ArgumentError(f"lipnext: patch_size={patch_size} does not divide the image {image[1:]}")
    size = (image[1] // patch_size, image[2] // patch_size) if position else None
    embedding = get_layer(stem, "conv")(image[0], width, patch_size, stride=patch_size)
    blocks = [LipNeXtBlock(width, size, shift_ratio=shift_ratio, beta=beta) for _ in range(depth)]
    return sequence(
        preprocess=subtract_mean(image, mean),
        body=nn.Sequential(embedding, *blocks, GlobalL2Pool2d()),
        head=make_head(head, width, num_classes),
    )
