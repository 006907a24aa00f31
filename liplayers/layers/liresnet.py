"""LiResNet's linear residual block: (I + conv)x as one convolution (Hu et al. 2023, arXiv 2301.12549).

It differs from the public code in that the whole, identity included, is divided by its norm: a dense block by a proven
bound, a convolution by a tight estimate, whose quotient has a proven norm; and in its start without `residual_depth`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liplayers.core.checks import check_odd_kernel
from liplayers.core.registry import Family, register
from liplayers.layers.bases.near_identity import (
    around_identity,
    check_residual_depth,
    near_identity,
    residual_repr,
    start_near_identity_,
)
from liplayers.layers.rescaled import RescaledConv2d, RescaledLinear

__all__ = ["LiResNetBlock", "LiResNetConv2dBlock"]

NOISE = 0.1  # of the initial branch without `residual_depth`, a Gaussian whose norm is about twice this


class LiResNetBlock(RescaledLinear):
    r"""Dense residual block without activation, a contraction: y = (I + P)x/‖I + P‖⁺ + b.

    An activation follows it. Signal gain at initialisation is about 1/(1 + 2·0.1), with a residual depth 1. Cost: 8
    products of Gram matrices.

    Args:
        features: size of input and output.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.
        residual_depth: d, the number of equal blocks in the network: P = d^(−½)·γ·W for the parameters W, which starts
            at about 0, and γ, a gain for each row; None: P is the parameter.

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
        *,
        residual_depth: int | None = None,
    ) -> None:
        super(RescaledLinear, self).__init__(features, features)
        self.residual_depth = check_residual_depth(self, residual_depth)
        self.raw = self.new_parameter((features, features), device, dtype)
        self.gain = self.new_parameter((features, 1), device, dtype) if residual_depth else None
        self.bias = self.new_parameter((features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A small Gaussian, no bias."""
        _reset(self)

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """P with I + P = W."""
        return around_identity(weight, self.gain, depth=self.residual_depth)

    def map_weight(self, raw: Tensor, gain: Tensor | None = None) -> Tensor:
        return super().map_weight(near_identity(raw, gain, depth=self.residual_depth))

    def extra_repr(self) -> str:
        return super().extra_repr() + residual_repr(self.residual_depth)


class LiResNetConv2dBlock(RescaledConv2d):
    r"""Convolutional residual block without activation: y = (δ + K) ∗ x/‖δ + K‖ + b, ‖δ + K‖ by a tight estimate.

    δ is the identity tap; an activation follows. It would be a contraction for ‖δ + K‖ itself;
    estimate and proven bound are `RescaledConv2d`'s, for every image size, zero and circular padding. Signal gain at
    initialisation is about 1/(1 + 2·0.1), with a residual depth 1. Cost: Chebyshev iteration at
    4(k − 1) × 4(k − 1) frequencies; it runs one plain convolution.

    Args:
        channels: channels of input and output.
        kernel_size: size of the kernel in pixels; odd, so that the image keeps its size with padding (k − 1)/2.
        bias: whether b is there.
        padding_mode: what surrounds the image, "zeros" or "circular".
        device: of the parameters.
        dtype: of the parameters.
        residual_depth: d, the number of equal blocks in the network: K = d^(−½)·γ·W for the parameters W, which starts
            at about 0, and γ, a gain for each row; None: K is the parameter.

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
        *,
        residual_depth: int | None = None,
    ) -> None:
        check_odd_kernel(self, kernel_size)
        super(RescaledConv2d, self).__init__(channels, channels, kernel_size, 1, kernel_size // 2, 1, 1, padding_mode)
        self.residual_depth = check_residual_depth(self, residual_depth)
        self.raw = self.new_parameter((channels, channels, *self.kernel_size), device, dtype)
        self.gain = self.new_parameter((channels, 1, 1, 1), device, dtype) if residual_depth else None
        self.bias = self.new_parameter((channels,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A small Gaussian, no bias."""
        _reset(self)

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """K with δ + K = W."""
        return around_identity(weight, self.gain, depth=self.residual_depth)

    def map_weight(self, raw: Tensor, gain: Tensor | None = None) -> Tensor:
        return super().map_weight(near_identity(raw, gain, depth=self.residual_depth))

    def extra_repr(self) -> str:
        return super().extra_repr() + residual_repr(self.residual_depth)


def _reset(block: LiResNetBlock | LiResNetConv2dBlock) -> None:
    if block.gain is None:
        nn.init.normal_(block.raw, std=NOISE / block.raw[0].numel() ** 0.5)
    else:
        start_near_identity_(block.raw, block.gain)
    if block.bias is not None:
        nn.init.zeros_(block.bias)


register(Family("liresnet", dense_block=LiResNetBlock, conv_block=LiResNetConv2dBlock))
