"""LBDN's convolutional networks: sandwich blocks that halve the image, dense ones, a linear head (Wang & Manchester
2023, arXiv 2301.11526).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from liplayers.core.checks import check_positive
from liplayers.core.registry import get_layer
from liplayers.errors import ArgumentError
from liplayers.models.parts import LayerChoice, Mean, image_shape, make_head, sequence, subtract_mean
from liplayers.modules.activations import get_activation

__all__ = ["lbdn"]


def lbdn(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    conv_block: LayerChoice = "sandwich",
    dense_block: LayerChoice = "sandwich",
    channels: int = 64,
    stages: int = 3,
    width: int = 2048,
    activation: str | Callable[[], nn.Module] = "relu",
    head: LayerChoice = "normalized",
    mean: Mean = 0.5,
    padding_mode: str = "zeros",
    strided_kernel: int = 3,
    output_bias: bool = True,
) -> nn.Sequential:
    """Stages of two blocks, the second of stride 2, twice the channels in each next stage; dense blocks to `width`,
    `width` and half of it; head.

    The defaults are the network for CIFAR; Tiny-ImageNet has stages=4.

    Args:
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        conv_block: the convolutional blocks: a family's name, or a class with the arguments out_channels and stride
            (Sandwich, LDLT).
        dense_block: the dense blocks: a family's name, or a class with the argument out_features (Sandwich, LDLT, LBDN,
            Gershgorin).
        channels: channels of the first stage.
        stages: number of stages, each of which halves the image, rounding up.
        width: size of the first two dense blocks, at least 2.
        activation: the activation inside the blocks, which refuse what their proof does not cover: "maxmin",
            "groupsort", "fullsort", "abs", "beta_abs", "relu", "tanh" or "identity", or a class or function that makes
            one.
        head: the last layer: "normalized", "linear", "truncated", or a family's name.
        mean: subtracted from each pixel first, one number or one for each channel.
        padding_mode: of the convolutions, "zeros" or "circular".
        strided_kernel: odd, of the blocks of stride 2; it acts as one of half the size, rounded up, on the
            pixel-unshuffled image: 3 as 2 × 2, 1 as 1 × 1.
        output_bias: whether the sandwich blocks add a bias to their output; the paper's code has none.

    Raises:
        UnknownNameError: a block, activation or head of unknown name.
        ArgumentError: blocks whose output has the size of their input.

    Source: Wang & Manchester 2023, arXiv 2301.11526.

    >>> lbdn((3, 32, 32), 10, channels=4, stages=1, width=8).body[-1]
    SandwichBlock(
      features=8, hidden_features=4, out_features=4
      (activation): ReLU()
    )
    """
    image = image_shape(input_shape)
    check_positive(lbdn, channels=channels, stages=stages, num_classes=num_classes)
    if width < 2:
        raise ArgumentError(f"lbdn: width={width!r}; expected at least 2, as the last block has half of it")
    conv = _resizing(conv_block, "conv_block", output_bias, "out_channels", "stride")
    linear = _resizing(dense_block, "dense_block", output_bias, "out_features")
    here, *size = image
    body: list[nn.Module] = []
    for stage in range(stages):
        there = channels * 2**stage
        for stride, kernel, inputs in ((1, 3, here), (2, strided_kernel, there)):
            shape = {"out_channels": there, "kernel_size": kernel, "stride": stride, "padding_mode": padding_mode}
            body.append(conv(inputs, **shape, activation=get_activation(activation)))
        here, size = there, [(n + 1) // 2 for n in size]
    body.append(nn.Flatten())
    features = here * math.prod(size)
    for there in (width, width, width // 2):
        body.append(linear(features, out_features=there, activation=get_activation(activation)))
        features = there
    return sequence(
        preprocess=subtract_mean(image, mean),
        body=nn.Sequential(*body),
        head=make_head(head, features, num_classes),
    )


def _resizing(block: LayerChoice, role: str, output_bias: bool, *needed: str) -> Callable[..., nn.Module]:
    """The block of a family, if it takes the arguments that change the size."""
    make = get_layer(block, role)
    takes = inspect.signature(make).parameters
    if not {*needed, "activation"} <= set(takes):
        raise ArgumentError(f"lbdn: {role}={block!r} keeps the size of its input; use 'sandwich' or 'ldlt'")
    if output_bias:
        return make
    if "output_bias" not in takes:
        raise ArgumentError(f"lbdn: output_bias={output_bias}: {role}={block!r} has no such choice; use 'sandwich'")
    return partial(make, output_bias=False)
