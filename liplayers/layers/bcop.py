"""Orthogonal convolutions with an explicit kernel: BCOP and AOC.

BCOP composes an orthogonal matrix with pairs of complementary projectors, one shift each (Li et al. 2019,
arXiv 1911.00937). AOC composes such a kernel with one of stride s and size s, whose matrix is orthogonal, which gives
strides, dilation and groups natively (Boissin et al. 2025, arXiv 2501.08120).

It differs from the public code: orthogonal matrices and projectors come from Cholesky factorisations in float64 instead
of a few Björck iterations, and the raw parameters start where the kernel is a single orthogonal tap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.core.checks import Size2d
from liplayers.core.registry import Family, register
from liplayers.errors import ArgumentError
from liplayers.layers.bases.kernel import KernelConv2d, LipschitzConvTranspose2d
from liplayers.linalg.orthogonal import cholesky_orthogonal, fill_orthogonal_, projector
from liplayers.linalg.stiefel import nearest_orthogonal

__all__ = ["AOCConv2d", "AOCConvTranspose2d", "BCOPConv2d"]


def compose_projector(kernel: Tensor, P: Tensor, axis: int, backwards: bool) -> Tensor:
    """`kernel` after the convolution with the taps (P, I − P) along an axis, or (I − P, P) if `backwards`.

    Args:
        kernel: (groups, out, in, kh, kw).
        P: (groups, in, in), a projector.
        axis: −2 or −1.

    Returns:
        (groups, out, in, kh, kw) with one more tap along the axis; a composition with an orthogonal convolution.
    """
    first = torch.einsum("goiab,gij->gojab", kernel, P)
    second = kernel - first
    if backwards:
        first, second = second, first
    after, before = ((0, 1, 0, 0), (1, 0, 0, 0)) if axis == -1 else ((0, 0, 0, 1), (0, 0, 1, 0))
    return F.pad(first, after) + F.pad(second, before)


class AOCConv2d(KernelConv2d):
    r"""Orthogonal convolution with an explicit k × k kernel: K = M_s ∘ Π_i(P_i, I − P_i), for every stride s ≤ k.

    M_s is a convolution of size and stride s whose matrix is orthogonal; each pair of taps (P, I − P) of a projector of
    rank ⌊c/2⌋ is an orthogonal convolution that enlarges the kernel by one, k − s of them along each axis. Exactly
    orthogonal (rows where out_channels ≤ in_channels·s², else columns) with circular padding of (k − 1)/2 and a stride
    that divides the image; a contraction with zero padding of any width. At stride 1 it is BCOP. Supports groups, even
    and non-square kernels, dilation (with stride, where they are coprime), kernels smaller than the stride (then a
    contraction). Signal gain at initialisation is 1 (one orthogonal block of s × s taps, one tap more along an axis
    where k − s is odd). Cost: Cholesky factorisations of c × c, independent of batch and image; runs and exports as a
    plain convolution.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: pixels from one position of the kernel to the next, an integer or a pair.
        padding: pixels around the image on each side, an integer or a pair; "same" (with stride 1 only) or "valid"
            (none).
        dilation: pixels from one tap of the kernel to the next, an integer or a pair; coprime with the stride, except
            along an axis where the kernel has one tap.
        groups: number of groups of channels that are mapped apart; it divides in_channels and out_channels.
        bias: whether b is there.
        padding_mode: what the padding holds, "zeros" or "circular".
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: what would exceed norm 1 (reflection, replication, circular padding beyond (k − 1)/2), dilation
            that shares a factor with the stride.
        ShapeError: at call, circular padding with a stride that does not divide the image.

    Source: Boissin et al. 2025, arXiv 2501.08120; Li et al. 2019, arXiv 1911.00937.

    >>> layer = AOCConv2d(4, 16, 4, stride=2, padding=1, padding_mode="circular")
    >>> x = torch.randn(1, 4, 8, 6)
    >>> bool((layer(x).norm() - x.norm()).abs() < 1e-4)
    True
    """

    factors: nn.Parameter | None

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
        inner = self._inner
        columns = inner * math.prod(self._block)
        self.raw = self.new_parameter((groups, out_channels // groups, columns), device, dtype)
        shape = (groups, len(self._steps), inner, inner // 2)
        self.factors = self.new_parameter(shape, device, dtype) if self._steps and inner > 1 else None
        self.bias = self.new_parameter((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        for s, d, b in zip(self.stride, self.dilation, self._block, strict=True):
            if math.gcd(s, d) > 1 and b > 1:
                raise ArgumentError(
                    f"{type(self).__name__}: dilation={self.dilation} with stride={self.stride}: taps would meet at "
                    f"one position; use coprime values, or AOLConv2d, which allows any"
                )

    @property
    def _block(self) -> tuple[int, int]:
        """Size of the strided part: what is left of the kernel, k − b + 1, is made of projectors."""
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        return min(kh, sh), min(kw, sw)

    @property
    def _missing(self) -> tuple[int, int]:
        """Taps that projectors have to add along each axis, k − b."""
        (kh, kw), (bh, bw) = self.kernel_size, self._block
        return kh - bh, kw - bw

    @property
    def _steps(self) -> list[tuple[int, bool]]:
        """Axis of each factor, and whether it shifts back: every second one, so that equal pairs cancel."""
        return [(axis, i % 2 == 1) for axis, n in zip((-2, -1), self._missing, strict=True) for i in range(n)]

    @property
    def _inner(self) -> int:
        """Channels of a group between the two parts: as many as keep the composition orthogonal."""
        return max(self.in_channels, self.out_channels // math.prod(self.stride)) // self.groups

    def reset_parameters(self) -> None:
        """Random orthogonal M; projectors in equal pairs, whose taps cancel to one; no bias."""
        for group in self.raw:
            fill_orthogonal_(group)
        if self.factors is not None:
            with torch.no_grad():
                nn.init.normal_(self.factors)
                for i, (_, backwards) in enumerate(self._steps):
                    if backwards:
                        self.factors[:, i] = self.factors[:, i - 1]
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """By `fitted`; without stride from M, the sum of the taps, which no projector changes."""
        M, *factors = (getattr(self, name) for name in self.raw_names)
        if self._block == (1, 1):
            sums = rearrange(weight.sum((2, 3)), "(g o) i -> g o i", g=self.groups)
            M = nearest_orthogonal(F.pad(sums, (0, self._inner - sums.shape[2])))
        return self.fitted(weight, [M, *factors])

    def map_weight(self, raw: Tensor, factors: Tensor | None = None) -> Tensor:
        bh, bw = self._block
        kernel = rearrange(cholesky_orthogonal(raw), "g o (i a b) -> g o i a b", a=bh, b=bw)
        if factors is None:  # a single channel inside has no projectors but 0 and 1: shifts
            top, left = (n // 2 for n in self._missing)
            kernel = F.pad(kernel, (left, self._missing[1] - left, top, self._missing[0] - top))
        else:
            projectors = projector(factors)
            for i, (axis, backwards) in enumerate(self._steps):
                kernel = compose_projector(kernel, projectors[:, i], axis, backwards)
        return rearrange(kernel[:, :, : self.in_channels // self.groups], "g o i a b -> (g o) i a b")


class BCOPConv2d(AOCConv2d):
    r"""Orthogonal convolution with an explicit k × k kernel, stride 1: an orthogonal matrix ∘ Π_i(P_i, I − P_i).

    The block convolution of 2(k − 1) pairs of complementary projectors. Exactly orthogonal with circular padding of
    (k − 1)/2, a contraction with zero padding. Supports groups, dilation, even and non-square kernels. Signal gain at
    initialisation is 1 (one orthogonal tap; along an axis of even k, two). Cost: Cholesky factorisations of c × c,
    independent of batch and image; runs and exports as a plain convolution.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: 1, the only value of this family.
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
        ArgumentError: a stride other than 1 (`AOCConv2d` has strides); what would exceed norm 1.

    Source: Li et al. 2019, arXiv 1911.00937.

    >>> layer = BCOPConv2d(4, 4, 3, padding=1, padding_mode="circular")
    >>> x = torch.randn(1, 4, 7, 5)
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
        geometry = (kernel_size, stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, *geometry, bias, padding_mode, device, dtype)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.stride != (1, 1):
            raise ArgumentError(f"BCOPConv2d: stride={self.stride}; it supports only stride 1, AOCConv2d every one")


class AOCConvTranspose2d(LipschitzConvTranspose2d):
    """The adjoint of an `AOCConv2d`, with the signature of `torch.nn.ConvTranspose2d`.

    A contraction, up to the border orthogonal. Stride, dilation, groups and output_padding as in torch; zero padding
    only. Signal gain at initialisation is 1 at most. Cost as `AOCConv2d`.

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
        dilation: pixels from one tap of the kernel to the next, an integer or a pair; coprime with the stride, except
            along an axis where the kernel has one tap.
        padding_mode: "zeros", the only value of transposed convolutions.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: a padding mode other than "zeros", output_padding that is too large, dilation that shares a
            factor with the stride.
        ShapeError: at call, another number of channels.

    Source: Boissin et al. 2025, arXiv 2501.08120.

    >>> AOCConvTranspose2d(8, 3, 4, stride=2, padding=1)(torch.randn(1, 8, 5, 5)).shape
    torch.Size([1, 3, 10, 10])
    """

    family = AOCConv2d

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


register(Family("bcop", conv=BCOPConv2d, orthogonal=frozenset({"conv"})))
register(Family("aoc", conv=AOCConv2d, conv_transpose=AOCConvTranspose2d, orthogonal=frozenset({"conv"})))
