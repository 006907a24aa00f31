"""Convolutions that nothing constrains: the stem and blocks of LiResNet and BRONet as their authors train them.

Hu et al. 2023, arXiv 2301.12549; Lai et al. 2025, arXiv 2505.15174. A loss that knows the constant of the network
(EMMA, logit annealing) is given a differentiable estimate of it, so the scale of the logits is learned. It differs from
the public code in that the estimate is a pure function of the kernel, without running vectors, and that the bound of
the trained network is proven.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liplayers.core.checks import Size2d
from liplayers.layers.bases.kernel import KernelConv2d
from liplayers.layers.bases.near_identity import near_identity
from liplayers.layers.liresnet import LiResNetConv2dBlock
from liplayers.linalg.convolution import polyphase, symbol_norm_estimate

__all__ = ["FreeConv2d", "FreeResidualConv2dBlock"]


class FreeConv2d(KernelConv2d):
    r"""Convolution whose kernel is the parameter, with a norm that is estimated in training and proven after it.

    Not 1-Lipschitz: `lipschitz_bound()` is a proven bound of the norm that it has, for every image size, and
    `lipschitz_estimate()` the norm from below within 2 %, differentiable, for losses that are given the network's
    constant. Every stride, dilation and group count. Signal gain at initialisation is 1 (one orthogonal tap). Cost:
    that of nn.Conv2d; an estimate takes Chebyshev iteration at 4(k − 1) × 4(k − 1) frequencies.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: step of the kernel in pixels, an integer or a pair.
        padding: zeros or pixels around the image on each side, an integer or a pair, or "same" or "valid".
        dilation: distance between the taps of the kernel in pixels, an integer or a pair.
        groups: in how many groups the channels are connected.
        bias: whether b is there.
        padding_mode: what surrounds the image, "zeros" or "circular".
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: reflection, replication, circular padding beyond (k − 1)/2.
        ShapeError: at call, circular padding with a stride that does not divide the image.

    Source: Hu et al. 2023, arXiv 2301.12549.

    >>> conv = FreeConv2d(3, 8, 3, stride=2, padding=1)
    >>> round(conv.lipschitz_estimate().item(), 4)
    1.0
    """

    constant_estimate = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2d,
        stride: Size2d = 1,
        padding: Size2d | str = 0,
        dilation: Size2d = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.raw = self.new_parameter((out_channels, in_channels // groups, *self.kernel_size), device, dtype)
        self.bias = self.new_parameter((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """The weight itself."""
        return [weight]

    def map_weight(self, raw: Tensor) -> Tensor:
        return raw

    def lipschitz_bound(self) -> float:
        """The proven norm of the kernel that runs."""
        return self.proven_norm()

    def map_norm(self, raw: Tensor) -> Tensor:
        """The norm of the kernel from below within 2 %."""
        return _estimate(self, raw)

    def lipschitz_estimate(self) -> Tensor:
        """Of the norm, differentiable."""
        return self.mapped("map_norm")


class FreeResidualConv2dBlock(LiResNetConv2dBlock):
    r"""Convolutional residual block without activation or normalisation: y = (δ + K) ∗ x + b.

    Not 1-Lipschitz, as `FreeConv2d`: the norm of δ + K is estimated in training and proven after it. δ is the identity
    tap; an activation follows. Signal gain at initialisation is about 1. Cost: it runs one plain convolution.

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

    >>> FreeResidualConv2dBlock(4)(torch.randn(2, 4, 7, 5)).shape
    torch.Size([2, 4, 7, 5])
    """

    constant_estimate = False
    weights_since = "0.1.0"

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
        super().__init__(channels, kernel_size, bias, padding_mode, device, dtype, residual_depth=residual_depth)

    def map_weight(self, raw: Tensor, gain: Tensor | None = None) -> Tensor:
        return near_identity(raw, gain, depth=self.residual_depth)

    def map_norm(self, raw: Tensor, gain: Tensor | None = None) -> Tensor:
        """The norm of δ + K from below within 2 %."""
        return _estimate(self, self.map_weight(raw, gain))

    def lipschitz_estimate(self) -> Tensor:  # type: ignore[override]
        """Of the norm, differentiable."""
        return self.mapped("map_norm")


def _estimate(conv: KernelConv2d, kernel: Tensor) -> Tensor:
    groups = kernel.unflatten(0, (conv.groups, -1))
    return symbol_norm_estimate(polyphase(groups, conv.stride, conv.dilation)).amax()
