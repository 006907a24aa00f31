"""Norm-rescaled layers, W = P/‖P‖: the stem and convolutions of LiResNet (Hu et al. 2023, arXiv 2301.12549).

It differs from the public code. A dense layer is divided by a proven upper bound, by Gram iteration (Delattre et al.
2023, arXiv 2305.16173; 2024, arXiv 2402.03240). A convolution is divided by a tight estimate on the symbol, a pure
function of the kernel without running vectors, and its bound is the proven norm of the quotient: it holds for every
image size and for zero and circular padding, where power iteration estimates from below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from liplayers.core.checks import Size2d
from liplayers.core.registry import Family, register
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.layers.bases.kernel import KernelConv2d, LipschitzConvTranspose2d
from liplayers.linalg.convolution import polyphase, symbol_norm_estimate
from liplayers.linalg.norms import gram_iteration_bound, unit_scale

__all__ = ["RescaledConv2d", "RescaledConvTranspose2d", "RescaledLinear"]


class RescaledLinear(LipschitzLinear):
    r"""Dense layer, a contraction: W = P/‖P‖⁺ with a proven upper bound ‖P‖⁺ ≥ ‖P‖, the Schatten-512 norm.

    All singular values keep their ratio, so W has norm 1 (up to n^(1/512)) and is not orthogonal. Signal gain at
    initialisation is 1 (P orthogonal). Cost: 8 products of Gram matrices of the shorter side.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (*, in_features) → (*, out_features).

    Raises:
        ArgumentError: sizes that are not positive integers.

    Source: Hu et al. 2023, arXiv 2301.12549; bound: Delattre et al. 2023, arXiv 2305.16173.

    >>> W = RescaledLinear(8, 5).weight
    >>> 0.98 < torch.linalg.matrix_norm(W, 2).item() <= 1 + 1e-6
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.raw = self.new_parameter((out_features, in_features), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """The weight itself, which is rescaled."""
        return [weight]

    def map_weight(self, raw: Tensor) -> Tensor:
        P, _ = unit_scale(raw)  # the weight does not depend on the scale
        norm = gram_iteration_bound(P)
        return P / torch.where(norm > 0, norm, 1)


class RescaledConv2d(KernelConv2d):
    r"""Convolution with a norm of about 1: K/‖K‖ for an estimate of ‖K‖, each group by its own.

    The estimate is `symbol_norm_estimate`, up to 2 % below the norm; with stride, that of the polyphase kernel. It
    proves nothing: `lipschitz_bound()` is the proven norm of the quotient, about 1, for zero padding of any width,
    minimal circular padding, every image size, stride, dilation and group count. Training takes 1. Signal gain at
    initialisation is 1 (one orthogonal tap). Cost: Chebyshev iteration at 4(k − 1) × 4(k − 1) frequencies; the bound
    takes seconds at 64 channels and minutes at 512.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: pixels from one position of the kernel to the next, an integer or a pair.
        padding: pixels around the image on each side, an integer or a pair; "same" (with stride 1 only) or "valid"
            (none).
        dilation: pixels from one tap of the kernel to the next, an integer or a pair.
        groups: number of groups of channels that are mapped apart; it divides in_channels and out_channels.
        bias: whether b is there.
        padding_mode: what the padding holds, "zeros" or "circular".
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: what would exceed norm 1 (reflection, replication, circular padding beyond (k − 1)/2).
        ShapeError: at call, circular padding with a stride that does not divide the image.

    Source: Hu et al. 2023, arXiv 2301.12549; bound: Delattre et al. 2023, arXiv 2305.16173.

    >>> RescaledConv2d(3, 8, 3, stride=2, padding=1)(torch.randn(1, 3, 9, 9)).shape
    torch.Size([1, 8, 5, 5])
    """

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

    weights_since = "0.2.0"  # before it was divided by a bound

    def lipschitz_bound(self) -> float:
        """The proven norm of the kernel that runs: about 1, whatever the estimate was that it was divided by."""
        return self.proven_norm()

    def lipschitz_estimate(self) -> float:
        return 1.0

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """The weight itself, which is rescaled."""
        return [weight]

    def map_weight(self, raw: Tensor) -> Tensor:
        P, _ = unit_scale(rearrange(raw, "(g o) i a b -> g o i a b", g=self.groups))  # whatever its scale
        norm = symbol_norm_estimate(polyphase(P, self.stride, self.dilation))
        kernel = P / rearrange(torch.where(norm > 0, norm, 1), "g -> g 1 1 1 1")
        return rearrange(kernel, "g o i a b -> (g o) i a b")


class RescaledConvTranspose2d(LipschitzConvTranspose2d):
    """The adjoint of a `RescaledConv2d`, a contraction with the signature of `torch.nn.ConvTranspose2d`.

    Stride, dilation, groups and output_padding as in torch; zero padding only. Signal gain at initialisation is 1 at
    most. Cost as `RescaledConv2d`.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: pixels of the output from one position of the kernel to the next, an integer or a pair.
        padding: pixels that are cut from the output on each side, an integer or a pair.
        output_padding: pixels more at the end of the output, an integer or a pair; fewer than the larger of stride and
            dilation.
        groups: number of groups of channels that are mapped apart; it divides in_channels and out_channels.
        bias: whether b is there.
        dilation: pixels from one tap of the kernel to the next, an integer or a pair.
        padding_mode: "zeros", the only value of transposed convolutions.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: a padding mode other than "zeros", output_padding that is too large.
        ShapeError: at call, another number of channels.

    Source: Hu et al. 2023, arXiv 2301.12549; bound: Delattre et al. 2023, arXiv 2305.16173.

    >>> RescaledConvTranspose2d(8, 3, 4, stride=2, padding=1)(torch.randn(1, 8, 5, 5)).shape
    torch.Size([1, 3, 10, 10])
    """

    family = RescaledConv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2d,
        stride: Size2d = 1,
        padding: Size2d = 0,
        output_padding: Size2d = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size2d = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)


register(Family("rescaled", linear=RescaledLinear, conv=RescaledConv2d, conv_transpose=RescaledConvTranspose2d))
