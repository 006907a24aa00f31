"""Torch's plain layers: what each of ours is compared with.

linear, conv and conv_transpose stand beside nn.Linear, nn.Conv2d and nn.ConvTranspose2d with the very same arguments,
the padding mode included. A block stands beside a plain residual block with the multiply-adds that it runs itself in
evaluation (`plain_block`), so the rule needs no list of families.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

KERNEL = 3  # of the plain convolutional block

PLAIN: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "conv": nn.Conv2d,
    "conv_transpose": nn.ConvTranspose2d,
}


class PlainBlock(nn.Module):
    """x + W₁x + b, or x − W₂σ(W₁x + b) with ReLU: dense, or convolutions that keep the image's size.

    Args:
        width: features or channels of input and output.
        hidden: outputs of W₁; None for the block with one product.
        kernel: None for a dense block, else the size of the kernels, odd.
        padding_mode: "zeros" or "circular".
    """

    def __init__(self, width: int, hidden: int | None, kernel: int | None, padding_mode: str) -> None:
        super().__init__()
        self.width, self.hidden, self.kernel, self.padding_mode = width, hidden, kernel, padding_mode
        units = width if hidden is None else hidden
        self.first: nn.Module
        self.second: nn.Module | None = None
        if kernel is None:
            self.first = nn.Linear(width, units)
            self.second = None if hidden is None else nn.Linear(units, width, bias=False)
            return
        options: dict[str, Any] = {"padding": kernel // 2, "padding_mode": padding_mode}
        self.first = nn.Conv2d(width, units, kernel, **options)
        if hidden is not None:  # torch's transposed convolution knows no circular padding
            last = nn.ConvTranspose2d if padding_mode == "zeros" else nn.Conv2d
            self.second = last(units, width, kernel, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return x + hidden if self.second is None else x - self.second(F.relu(hidden))

    def describe(self) -> str:
        """Its formula in a few characters; equal for equal blocks."""
        kind = "" if self.kernel is None else f", {self.kernel}×{self.kernel} {self.padding_mode}"
        if self.hidden is None:
            return f"x + Wx{kind}"
        return f"x − W₂σ(W₁x){'' if self.hidden == self.width else f', {self.hidden} hidden'}{kind}"


@torch.no_grad()
def multiply_adds(layer: nn.Module, x: Tensor) -> tuple[int, bool]:
    """What a forward pass in evaluation runs once its weights are known, and whether a Fourier transform was in it.

    Counted are products of matrices and convolutions; complex multiply-adds count as one, transforms as nothing.

    >>> multiply_adds(nn.Linear(3, 5), torch.zeros(2, 3))
    (30, False)
    """
    transform = torch.ops.aten._fft_r2c
    training = layer.training
    layer.eval()
    layer(x)
    mapping: dict[Any, Any] = {transform: lambda *shapes, **options: 0}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer(x)
    layer.train(training)
    counts = counter.get_flop_counts().get("Global", {})
    return counter.get_total_flops() // 2, transform in counts


def plain_block(layer: nn.Module, x: Tensor, padding_mode: str) -> PlainBlock:
    """The plain residual block with the multiply-adds of `layer`, a block that keeps the shape of `x`.

    For images the kernel is 3×3 or 1×1, whichever is nearer: a block of up to 4 multiply-adds for each pixel and pair
    of channels (LipNeXt: two 1×1 products, the shifts cost none) stands beside 1×1 convolutions. Below 1.5 products
    of that kernel it is x + Wx (LiResNet), else x − W₂σ(W₁x + b) with as many hidden units as give the same
    count (SLL, CPL: as many as features). A block that runs in the Fourier domain does the work of a 3×3 kernel by
    other means; it stands beside 3×3 convolutions, one or two, as it multiplies each frequency once or twice.
    """
    count, fourier = multiply_adds(layer, x)
    image = x.dim() == 4
    width = x.shape[1] if image else x.shape[-1]
    product = x.numel() * width
    if fourier:
        height, columns = x.shape[-2:]
        frequencies = height * (columns // 2 + 1) / (height * columns)
        return PlainBlock(width, None if count < 1.5 * product * frequencies else width, KERNEL, padding_mode)
    kernel = None
    if image:
        kernel = KERNEL if count > math.sqrt(2 * KERNEL**2) * product else 1
        product *= kernel**2
    hidden = None if count < 1.5 * product else max(1, round(width * count / (2 * product)))
    return PlainBlock(width, hidden, kernel, padding_mode)
