"""ConvNet XS to L of "1-Lipschitz Layers Compared" (Prach et al. 2023, arXiv 2311.16833)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.errors import ArgumentError
from liplayers.models.parts import LayerChoice, Mean, image_shape, make_head, sequence, started, subtract_mean
from liplayers.modules.activations import get_activation
from liplayers.modules.pooling import MaxPool2d, PadChannels, Patchify2d

__all__ = ["convnet"]


def convnet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    conv: LayerChoice = "aol",
    channels: int = 64,
    blocks: int | None = None,
    convs_per_block: int = 5,
    kernel_size: int = 3,
    activation: str | Callable[[], nn.Module] = "maxmin",
    head: LayerChoice = "truncated",
    mean: Mean = 0.5,
    padding_mode: str = "zeros",
    start: str = "family",
) -> nn.Sequential:
    """Channels padded with zeros, a 1 × 1 convolution, blocks that each halve the image, max pooling, a 1 × 1
    convolution, head.

    A block has `convs_per_block` convolutions, of kernel 1 on images of 2 pixels or fewer; then the first half of the
    channels is kept and 2 × 2 pixels become channels, so that there are twice as many. Strides are not needed:
    every family of convolutions fits. channels = 16, 32, 64, 128 are the paper's XS, S, M, L on CIFAR (1.57M,
    6.28M, 25.12M and 100.46M parameters).

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        conv: the convolutions: a family's name, or a class with nn.Conv2d's signature.
        channels: w, the channels of the first block; even.
        blocks: number of blocks, each of which halves the image; None for as many as it can be halved, 5 for CIFAR and
            6 for Tiny-ImageNet.
        convs_per_block: number of convolutions in each block.
        kernel_size: size of their kernels in pixels, odd.
        activation: the activation after each layer: "maxmin", "maxmin_neighbours", "groupsort", "fullsort", "abs",
            "beta_abs", "relu", "tanh" or "identity", or a class or function that makes one.
        head: the last layer: "truncated" (the first outputs of the last convolution are the logits, as in the paper),
            "normalized", "linear", or a family's name.
        mean: subtracted from each pixel first, one number or one for each channel.
        padding_mode: of the convolutions, "zeros" or "circular".
        start: of the layers that keep their size: "family", what each begins as, or "identity", as in the paper, for
            families with a dense weight.

    Raises:
        UnknownNameError: a layer, activation, start or head of unknown name.
        ArgumentError: more blocks than the image can be halved, an even kernel, an odd number of channels.

    Source: Prach et al. 2023, arXiv 2311.16833.

    >>> convnet((3, 32, 32), 10, channels=16).head
    PadChannels(channels=10)
    """
    image = image_shape(input_shape)
    check_positive(convnet, channels=channels, convs_per_block=convs_per_block, kernel_size=kernel_size)
    check_positive(convnet, num_classes=num_classes)
    if channels % 2 or kernel_size % 2 == 0:
        raise ArgumentError(f"convnet: channels={channels}, kernel_size={kernel_size}; expected even and odd")
    count = _halvings(image) if blocks is None else blocks
    if not 0 < count <= _halvings(image):
        raise ArgumentError(f"convnet: blocks={count}; an image {image[1:]} can be halved {_halvings(image)} times")
    layer = get_layer(conv, "conv")
    body: list[nn.Module] = [PadChannels(channels), layer(channels, channels, 1), get_activation(activation)]
    height, width = image[1:]
    for _ in range(count):
        kernel = kernel_size if min(height, width) > 2 else 1
        for _ in range(convs_per_block):
            conv_layer = layer(channels, channels, kernel, padding=kernel // 2, padding_mode=padding_mode)
            body += [started(conv_layer, start), get_activation(activation)]
        body += [PadChannels(channels // 2), Patchify2d(2)]
        channels, height, width = 2 * channels, height // 2, width // 2
    body += [MaxPool2d((height, width)), layer(channels, channels, 1), nn.Flatten()]
    return sequence(
        preprocess=subtract_mean(image, mean),
        body=nn.Sequential(*body),
        head=make_head(head, channels, num_classes),
    )


def _halvings(image: Sequence[int]) -> int:
    """How often height and width are both even."""
    height, width = image[1:]
    count = 0
    while height % 2 == width % 2 == 0:
        height, width, count = height // 2, width // 2, count + 1
    return count
