"""LiResNet's linear residual block: (I + conv)x as one convolution (Hu et al. 2023, arXiv 2301.12549).

It differs from the public code in that the whole, identity included, is divided by its norm: a dense block by a proven
bound, a convolution by a tight estimate, whose quotient has a proven norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liplayers.core.checks import check_odd_kernel
from liplayers.core.registry import Family, register
from liplayers.layers.rescaled import RescaledConv2d, RescaledLinear

__all__ = ["LiResNetBlock", "LiResNetConv2dBlock"]

NOISE = 0.1  # of the initial branch, a Gaussian whose norm is about twice this


class LiResNetBlock(RescaledLinear):
    r"""Dense residual block without activation, a contraction: y = (I + P)x/‖I + P‖⁺ + b.

    An activation follows it. Signal gain at initialisation is about 1/(1 + 2·0.1). Cost: 8 products of Gram matrices.

    Args:
        features: size of input and output.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (*, features) → the same.

    Raises:
        ArgumentError: features that is not a positive integer.

    Source: Hu et al. 2023, arXiv 2301.12549.

    >>> LiResNetBlock(6)(torch.randn(2, 6)).shape
    torch.Size([2, 6])
    """

    def __init__(
        self,
        features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, features, bias, device, dtype)

    def reset_parameters(self) -> None:
        """A small Gaussian P, no bias."""
        nn.init.normal_(self.raw, std=NOISE / self.in_features**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """K with I + K = W."""
        return [weight - torch.eye(len(weight), dtype=weight.dtype, device=weight.device)]

    def map_weight(self, raw: Tensor) -> Tensor:
        return super().map_weight(raw + torch.eye(len(raw), dtype=raw.dtype, device=raw.device))


class LiResNetConv2dBlock(RescaledConv2d):
    r"""Convolutional residual block without activation: y = (δ + K) ∗ x/‖δ + K‖ + b, ‖δ + K‖ by a tight estimate.

    δ is the identity tap; an activation follows. It would be a contraction for ‖δ + K‖ itself;
    estimate and proven bound are `RescaledConv2d`'s, for every image size, zero and circular padding. Signal gain at
    initialisation is about 1/(1 + 2·0.1). Cost: Chebyshev iteration at 4(k − 1) × 4(k − 1) frequencies; it runs one
    plain convolution.

    Args:
        channels: channels of input and output.
        kernel_size: size of the kernel in pixels; odd, so that the image keeps its size with padding (k − 1)/2.
        bias: whether b is there.
        padding_mode: what surrounds the image, "zeros" or "circular".
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, channels, H, W) → the same.

    Raises:
        ArgumentError: an even kernel, another padding mode.
        ShapeError: at call, another number of channels.

    Source: Hu et al. 2023, arXiv 2301.12549.

    >>> LiResNetConv2dBlock(4)(torch.randn(2, 4, 7, 5)).shape
    torch.Size([2, 4, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_odd_kernel(self, kernel_size)
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """A small Gaussian K, no bias."""
        nn.init.normal_(self.raw, std=NOISE / self.raw[0].numel() ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def identity(self, like: Tensor) -> Tensor:
        """δ, the identity as a kernel."""
        kernel = torch.zeros_like(like)
        centre = self.kernel_size[0] // 2
        kernel[:, :, centre, centre] = torch.eye(self.in_channels, dtype=like.dtype, device=like.device)
        return kernel

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """K with δ + K = W."""
        return [weight - self.identity(weight)]

    def map_weight(self, raw: Tensor) -> Tensor:
        return super().map_weight(raw + self.identity(raw))


register(Family("liresnet", dense_block=LiResNetBlock, conv_block=LiResNetConv2dBlock))
