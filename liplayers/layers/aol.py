"""AOL, almost-orthogonal layers: a contraction by rescaling each input (Prach & Lampert 2022, arXiv 2208.03160).

It differs from the paper in three points: the shorter side of the matrix is rescaled (the paper always takes the
inputs), strided kernels are rescaled in their polyphase form, which is tighter, and columns of zeros give zeros.
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
from liplayers.linalg.convolution import autocorrelation, polyphase, tap_phases
from liplayers.linalg.norms import gram, unit_scale

__all__ = ["AOLConv2d", "AOLConvTranspose2d", "AOLLinear"]


def safe_rsqrt(row_sums: Tensor) -> Tensor:
    """d^(−1/2), and 1 for sums whose d^(−3/2) is out of range: their columns are negligible beside norm 1."""
    usable = row_sums > torch.finfo(row_sums.dtype).tiny ** 0.6
    return torch.where(usable, torch.where(usable, row_sums, 1).rsqrt(), 1)


class AOLLinear(LipschitzLinear):
    r"""Dense layer, a contraction: W = P·diag(Σ_j |PᵀP|_ij)^(−1/2), or the same on the rows if they are fewer.

    The proof: diag(d) − PᵀP is diagonally dominant, hence positive semidefinite. Not orthogonal in general. Signal
    gain at initialisation is 1 (P orthogonal). Cost: one Gram matrix.

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

    Source: Prach & Lampert 2022, arXiv 2208.03160.

    >>> layer = AOLLinear(8, 5)
    >>> layer(torch.randn(2, 8)).shape, bool(torch.linalg.matrix_norm(layer.weight, 2) <= 1 + 1e-6)
    (torch.Size([2, 5]), True)
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
        scale = safe_rsqrt(gram(P).abs().sum(-1))
        return P * scale if len(scale) == P.shape[1] else P * scale[:, None]


class AOLConv2d(KernelConv2d):
    r"""Convolution, a contraction: each input channel (and stride phase) is divided by √(Σ_j Σ_lags |K*K|_ij).

    The bound holds for zero padding of any width, minimal circular padding, every stride, dilation and group count.
    Where the outputs are fewer than the inputs (times the stride's area) they are rescaled instead. Signal gain at
    initialisation is 1 (one orthogonal tap). Cost: one autocorrelation of the kernel.

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

    Source: Prach & Lampert 2022, arXiv 2208.03160.

    >>> AOLConv2d(3, 8, 3, stride=2, padding=1)(torch.randn(1, 3, 9, 9)).shape
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

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """The weight itself, which is rescaled."""
        return [weight]

    def map_weight(self, raw: Tensor) -> Tensor:
        P, _ = unit_scale(rearrange(raw, "(g o) i a b -> g o i a b", g=self.groups))  # whatever its scale
        phases = polyphase(P, self.stride, self.dilation)
        inputs = phases.shape[2] <= phases.shape[1]
        scale = safe_rsqrt(autocorrelation(phases, "in" if inputs else "out").abs().sum((2, 3, 4)))
        if inputs:
            (sh, sw), (kh, kw), (dh, dw) = self.stride, self.kernel_size, self.dilation
            scale = rearrange(scale, "g (i a b) -> g 1 i a b", a=sh, b=sw)
            scale = scale[..., tap_phases(kh, sh, dh), :][..., tap_phases(kw, sw, dw)]
        else:
            scale = rearrange(scale, "g o -> g o 1 1 1")
        return rearrange(P * scale, "g o i a b -> (g o) i a b")


class AOLConvTranspose2d(LipschitzConvTranspose2d):
    """The adjoint of an `AOLConv2d`, a contraction with the signature of `torch.nn.ConvTranspose2d`.

    Stride, dilation, groups and output_padding as in torch; zero padding only. Signal gain at initialisation is 1 at
    most. Cost as `AOLConv2d`.

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

    Source: Prach & Lampert 2022, arXiv 2208.03160.

    >>> AOLConvTranspose2d(8, 3, 4, stride=2, padding=1)(torch.randn(1, 8, 5, 5)).shape
    torch.Size([1, 3, 10, 10])
    """

    family = AOLConv2d

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


register(Family("aol", linear=AOLLinear, conv=AOLConv2d, conv_transpose=AOLConvTranspose2d))
