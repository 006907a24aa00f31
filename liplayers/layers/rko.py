"""RKO, reshaped kernel orthogonalisation (Serrurier et al. 2021, arXiv 2006.06520).

It differs from the public code: the kernel matrix is orthogonalised exactly, by Cholesky factorisation in float64, and
divided by a tight estimate of its norm rather than by the overlap factor, which is up to k too large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from liplayers.core.checks import Size2d
from liplayers.core.registry import Family, register
from liplayers.layers.bases.kernel import KernelConv2d, LipschitzConvTranspose2d
from liplayers.linalg.convolution import overlap, polyphase, symbol_norm_estimate
from liplayers.linalg.orthogonal import cholesky_orthogonal
from liplayers.linalg.stiefel import nearest_orthogonal

__all__ = ["RKOConv2d", "RKOConvTranspose2d"]


class RKOConv2d(KernelConv2d):
    r"""Convolution with an orthogonal kernel matrix, divided by an estimate of its norm.

    The kernel as an out × (in·kh·kw) matrix is orthogonalised, then divided by `symbol_norm_estimate` of its polyphase
    form. Where kernel_size = stride (patches) it is orthogonal and 1-Lipschitz; elsewhere its norm is about 1, and
    `lipschitz_bound()` proves what it is. Every stride, dilation and group count. Signal gain at initialisation is 1
    (one orthogonal tap). Cost: a Cholesky factorisation of the kernel matrix, Chebyshev iteration at
    4(k − 1) × 4(k − 1) frequencies.

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

    Source: Serrurier et al. 2021, arXiv 2006.06520.

    >>> layer = RKOConv2d(3, 48, 4, stride=4)  # patches: orthogonal
    >>> x = torch.randn(1, 3, 8, 8)
    >>> bool((layer(x).norm() - x.norm()).abs() < 1e-4)
    True
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

    def orthogonalise(self, matrix: Tensor) -> Tensor:
        """The kernel matrices (groups, out, in·kh·kw) with orthonormal rows or columns."""
        return cholesky_orthogonal(matrix)

    @property
    def _disjoint(self) -> bool:
        """Whether no two patches of the kernel overlap: its norm is then that of the kernel matrix."""
        sizes = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        return math.prod([overlap(*size) for size in sizes]) == 1

    @property
    def weights_since(self) -> str:  # type: ignore[override]
        """Before 0.2.0 it was divided by a bound; patches are divided by nothing."""
        return "0.1.0" if self._disjoint else "0.2.0"

    def lipschitz_bound(self) -> float:
        """1 for patches; else the proven norm of the kernel that runs."""
        return super().lipschitz_bound() if self._disjoint else self.proven_norm()

    def lipschitz_estimate(self) -> float:
        return 1.0

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """The polar factor of each kernel matrix."""
        matrices = rearrange(weight, "(g o) i a b -> g o (i a b)", g=self.groups)
        return [nearest_orthogonal(matrices).reshape(weight.shape)]

    def map_weight(self, raw: Tensor) -> Tensor:
        kernel = self.orthogonalise(rearrange(raw, "(g o) i a b -> g o (i a b)", g=self.groups)).reshape(raw.shape)
        if self._disjoint:
            return kernel
        groups = rearrange(kernel, "(g o) i a b -> g o i a b", g=self.groups)
        norm = symbol_norm_estimate(polyphase(groups, self.stride, self.dilation))
        kernel = groups / rearrange(torch.where(norm > 0, norm, 1), "g -> g 1 1 1 1")
        return rearrange(kernel, "g o i a b -> (g o) i a b")


class RKOConvTranspose2d(LipschitzConvTranspose2d):
    """The adjoint of an `RKOConv2d`, a contraction with the signature of `torch.nn.ConvTranspose2d`.

    Stride, dilation, groups and output_padding as in torch; zero padding only. Signal gain at initialisation is 1 at
    most. Cost as `RKOConv2d`.

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

    Source: Serrurier et al. 2021, arXiv 2006.06520.

    >>> RKOConvTranspose2d(8, 3, 4, stride=2, padding=1)(torch.randn(1, 8, 5, 5)).shape
    torch.Size([1, 3, 10, 10])
    """

    family = RKOConv2d

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


register(Family("rko", conv=RKOConv2d, conv_transpose=RKOConvTranspose2d))
