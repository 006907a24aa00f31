"""SLL networks: zero-padded channels, residual convolution blocks, dense blocks (arXiv 2303.03169)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from liplayers.layers.base import check_positive
from liplayers.layers.pooling import PadChannels
from liplayers.layers.registry import get_layer
from liplayers.models.parts import LayerChoice, centring, flat_size, image_shape, make_head, sequence


def sllnet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    conv_block: LayerChoice = "sll",
    dense_block: LayerChoice = "sll",
    linear: LayerChoice = "aol",
    channels: int = 32,
    conv_blocks: int = 4,
    width: int = 512,
    dense_blocks: int = 2,
    head: LayerChoice = "normalized",
    mean: float = 0.5,
) -> nn.Sequential:
    """`conv_blocks` on the image with `channels`, a dense layer to `width`, `dense_blocks`, head.

    The dense layer stands in for the paper's truncation to the first `width` features; without dense blocks there is
    neither.

    Args:
        input_shape: (channels, height, width) of one image.
        conv_block, dense_block: a family's name, or a class that is called with the number of channels or features.
        linear: the layer from the image's features to `width`.
        conv_blocks, dense_blocks: may be 0.

    Raises:
        UnknownNameError: a block or head of unknown name.

    >>> sllnet((1, 8, 8), 10, conv_blocks=0, width=64)[2]
    Flatten(start_dim=1, end_dim=-1)
    """
    image = image_shape(input_shape)
    check_positive(sllnet, channels=channels, width=width, num_classes=num_classes)
    body: list[nn.Module] = []
    if conv_blocks:
        block = get_layer(conv_block, "conv_block")
        body += [PadChannels(channels), *(block(channels) for _ in range(conv_blocks))]
    features = flat_size(image) // image[0] * (channels if conv_blocks else image[0])
    tail: list[nn.Module] = []
    if dense_blocks:
        block = get_layer(dense_block, "dense_block")
        tail += [get_layer(linear, "linear")(features, width), *(block(width) for _ in range(dense_blocks))]
        features = width
    return sequence(
        preprocess=centring(image, mean),
        features=nn.Sequential(*body),
        flatten=nn.Flatten(),
        body=nn.Sequential(*tail),
        head=make_head(head, features, num_classes),
    )
