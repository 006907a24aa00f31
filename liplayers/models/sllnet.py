"""SLL networks: zero-padded channels, residual convolution blocks, dense blocks (arXiv 2303.03169)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from liplayers.modules.pooling import PadChannels, ScaledAvgPool2d

__all__ = ["sllnet"]


def sllnet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    conv_block: LayerChoice = "sll",
    dense_block: LayerChoice = "sll",
    linear: LayerChoice = "aol",
    channels: int = 32,
    conv_blocks: int = 4,
    hidden_channels: int | None = None,
    pool: int = 1,
    width: int | None = 512,
    dense_blocks: int = 2,
    hidden_features: int | None = None,
    head: LayerChoice = "normalized",
    mean: Mean = 0.5,
) -> nn.Sequential:
    """`conv_blocks` on the image with `channels`, pooling, a dense layer to `width`, `dense_blocks`, head.

    The paper's networks have hidden_channels=5, pool=4, width=None, hidden_features=2048. Their (channels, conv_blocks,
    dense_blocks) are (45, 20, 7), small; (60, 30, 10), medium; (90, 50, 10), large; (120, 70, 15), xlarge: 41M, 78M,
    118M and 236M parameters on CIFAR.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        conv_block: the convolutional blocks: a family's name, or a class that is called with the number of channels.
        dense_block: the dense blocks: a family's name, or a class that is called with the number of features.
        linear: the layer from the image's features to `width`, if there are dense blocks: a family's name, or a class
            with nn.Linear's signature.
        channels: channels of the convolutional blocks.
        conv_blocks: number of convolutional blocks; may be 0.
        hidden_channels: hidden channels of each convolutional block; None for the family's default, and for blocks
            without any.
        pool: side in pixels of the patches that are averaged after the convolutions; 1 for none.
        width: size of the dense blocks; None for the number of the image's features, without a layer before them.
        dense_blocks: number of dense blocks; may be 0.
        hidden_features: hidden units of each dense block; None for the family's default, and for blocks without any.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel first, one number or one for each channel.

    Raises:
        UnknownNameError: a block or head of unknown name.
        ArgumentError: patches larger than the image.

    Source: Araujo et al. 2023, arXiv 2303.03169.

    >>> sllnet((1, 8, 8), 10, conv_blocks=0, width=64)[2]
    Flatten(start_dim=1, end_dim=-1)
    """
    image = image_shape(input_shape)
    check_positive(sllnet, channels=channels, pool=pool, num_classes=num_classes)
    check_not_negative(sllnet, conv_blocks=conv_blocks, dense_blocks=dense_blocks)
    if min(image[1:]) < pool:
        raise ArgumentError(f"sllnet: pool={pool} is larger than the image {image[1:]}")
    body: list[nn.Module] = []
    if conv_blocks:
        block = get_layer(conv_block, "conv_block")
        hidden: dict[str, Any] = {} if hidden_channels is None else {"hidden_channels": hidden_channels}
        body += [PadChannels(channels), *(block(channels, **hidden) for _ in range(conv_blocks))]
    if pool > 1:
        body.append(ScaledAvgPool2d(pool))
    features = (channels if conv_blocks else image[0]) * (image[1] // pool) * (image[2] // pool)
    tail: list[nn.Module] = []
    if dense_blocks:
        block = get_layer(dense_block, "dense_block")
        hidden = {} if hidden_features is None else {"hidden_features": hidden_features}
        if width is not None:
            check_positive(sllnet, width=width)
            tail.append(get_layer(linear, "linear")(features, width))
            features = width
        tail += [block(features, **hidden) for _ in range(dense_blocks)]
    return sequence(
        preprocess=subtract_mean(image, mean),
        features=nn.Sequential(*body),
        flatten=nn.Flatten(),
        body=nn.Sequential(*tail),
        head=make_head(head, features, num_classes),
    )
