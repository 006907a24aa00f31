"""LipNeXt: orthogonal patch embedding, blocks of pointwise orthogonal maps and shifts, ℓ2 pooling (Hu et al. 2026,
arXiv 2601.18513).

No public code exists: the stem, the patch size and a position embedding in every block are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.errors import ArgumentError, UnknownNameError
from liplayers.layers.lipnext import LipNeXtBlock
from liplayers.models.parts import (
    LayerChoice,
    Mean,
    check_not_negative,
    image_shape,
    make_head,
    sequence,
    subtract_mean,
)
from liplayers.modules.activations import BetaAbs
from liplayers.modules.pooling import GlobalL2Pool2d

__all__ = ["lipnext"]


POOLS = ("l2", "flat")


def lipnext(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: int | Sequence[int] = 1024,
    depth: int | Sequence[int] = 32,
    patch_size: int = 4,
    stem: LayerChoice = "rko",
    shift_ratio: float = 1 / 16,
    beta: float = 0.5,
    position: bool = True,
    rotate: bool = True,
    pool: str = "l2",
    linear: LayerChoice = "manifold",
    dense: int = 0,
    dense_width: int = 256,
    head: LayerChoice = "normalized",
    mean: Mean = 0.5,
) -> nn.Sequential:
    """Patch embedding, `depth` LipNeXt blocks of `width` channels, the ℓ2 norm of each channel, head.

    LdWw has depth d and width w. The blocks' orthogonal matrices have 2·d·w² entries: 64·2²⁰ for L32W1024, the paper's
    64M network for CIFAR. Trained by `ManifoldAdamW` or `ManifoldMuon`, which keep them orthogonal.

    Several widths and depths make stages; before each but the first, patches of 2 × 2 pixels halve the image. Ours, as
    are `rotate=False`, the flat features and the dense layers: what trains best on a CPU.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        width: channels of the blocks, of each stage.
        depth: number of blocks, of each stage.
        patch_size: side of the patches in pixels, kernel and stride of the stem; it must divide the image.
        stem: the patch embedding, and the patches between stages: a family's name, or a class with nn.Conv2d's
            signature.
        shift_ratio: share of the channels that moves in each direction, up to 1/4.
        beta: share of the channels that are folded, in [0, 1].
        position: whether each block learns a position embedding, which fixes the image size.
        rotate: whether each block turns the channels before its shift as well as after it.
        pool: what follows the blocks, "l2" (norms of channels) or "flat" (all of them at each pixel).
        linear: the dense layers: a family's name, or a class with nn.Linear's signature.
        dense: number of dense layers before the head, each followed by the activation of the blocks.
        dense_width: size of each dense layer.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel first, one number or one for each channel.

    Raises:
        UnknownNameError: a layer or pooling of unknown name.
        ArgumentError: patches that do not divide the image, widths and depths that do not match, shares out of range.

    Source: Hu et al. 2026, arXiv 2601.18513.

    >>> lipnext((3, 32, 32), 10, width=16, depth=1).body[1]
    LipNeXtBlock(
      channels=16, image_size=(8, 8), shift_ratio=0.0625, beta=0.5, bias=True
      (shift): SpatialShift2d(ratio=0.0625)
      (activation): BetaAbs(beta=0.5, dim=-3)
    )
    """
    image = image_shape(input_shape)
    widths, depths = (list(n) if isinstance(n, Sequence) else [n] for n in (width, depth))
    if not widths or len(widths) != len(depths):
        raise ArgumentError(f"lipnext: width={width}, depth={depth}; expected as many of one as of the other")
    check_positive(lipnext, patch_size=patch_size, num_classes=num_classes, dense_width=dense_width)
    check_positive(lipnext, **{f"width of stage {i}": n for i, n in enumerate(widths, 1)})
    check_positive(lipnext, **{f"depth of stage {i}": n for i, n in enumerate(depths, 1)})
    check_not_negative(lipnext, dense=dense)
    if pool not in POOLS:
        raise UnknownNameError.of("pool", pool, POOLS)
    whole = patch_size * 2 ** (len(widths) - 1)
    if image[1] % whole or image[2] % whole:
        raise ArgumentError(
            f"lipnext: patch_size={patch_size} and {len(widths)} stages need an image of multiples of {whole} pixels; "
            f"got {image[1:]}"
        )

    patches = get_layer(stem, "conv")
    body: list[nn.Module] = []
    channels, height, across = image
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        side = 2 if stage else patch_size
        body.append(patches(channels, width, side, stride=side))
        channels, height, across = width, height // side, across // side
        size = (height, across) if position else None
        body += [LipNeXtBlock(width, size, shift_ratio=shift_ratio, beta=beta, rotate=rotate) for _ in range(depth)]
    if pool == "l2":
        body.append(GlobalL2Pool2d())
    else:
        body.append(nn.Flatten())
        channels *= height * across
    for _ in range(dense):
        body += [get_layer(linear, "linear")(channels, dense_width), BetaAbs(beta)]
        channels = dense_width
    return sequence(
        preprocess=subtract_mean(image, mean), body=nn.Sequential(*body), head=make_head(head, channels, num_classes)
    )
