"""Björck orthonormalisation: the polar factor by Newton–Schulz (Anil, Lucas & Grosse 2019, arXiv 1811.05381).

It differs from the public code: P is divided by a proven bound of its norm, so that every number of iterations gives a
contraction, and each step is scaled for the fastest worst case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liplayers.core.checks import Size2d, check_positive
from liplayers.core.registry import Family, register
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.layers.bases.kernel import LipschitzConvTranspose2d
from liplayers.layers.rko import RKOConv2d
from liplayers.linalg.orthogonal import newton_schulz
from liplayers.linalg.stiefel import nearest_orthogonal

__all__ = ["BjorckConv2d", "BjorckConvTranspose2d", "BjorckLinear"]


class BjorckLinear(LipschitzLinear):
    r"""Orthogonal dense layer: the polar factor of P, the nearest orthogonal matrix, by W ← αW(3I − α²WᵀW)/2.

    P is divided by a proven upper bound of its norm first, so W is a contraction however few iterations are made;
    singular values below ℓ times the largest have not converged and are damped, ℓ = 0.3, 0.03, 2e-3 for 5, 10, 13
    iterations. Signal gain at initialisation: 1, or √(out/in) on average where out_features < in_features. Cost: 2
    products an iteration, 3 backwards; 5 or 6 iterations for well-conditioned P.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.
        iterations: steps of the scaled Newton–Schulz recurrence, at most; it stops when it has converged.

    Shape:
        (*, in_features) → (*, out_features).

    Raises:
        ArgumentError: sizes or iterations that are not positive integers.

    Source: Björck & Bowie 1971; Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> W = BjorckLinear(8, 5).weight
    >>> torch.allclose(W @ W.T, torch.eye(5), atol=1e-5)
    True
    """

    batched = False  # it stops when it has converged

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        iterations: int = 13,
    ) -> None:
        super().__init__(in_features, out_features)
        check_positive(self, iterations=iterations)
        self.iterations = iterations
        self.raw = self.new_parameter((out_features, in_features), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """Its polar factor, the nearest orthogonal matrix."""
        return [nearest_orthogonal(weight)]

    def map_weight(self, raw: Tensor) -> Tensor:
        return newton_schulz(raw, self.iterations)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"


class BjorckConv2d(RKOConv2d):
    r"""Convolution with a kernel matrix orthogonalised by Björck iteration, divided by an estimate of its norm.

    `RKOConv2d` with `newton_schulz` in place of Cholesky: the kernel matrix is the nearest orthogonal one to the raw
    matrix. Orthogonal where kernel_size = stride (patches); elsewhere its norm is about 1, and `lipschitz_bound()`
    proves what it is. Every stride, dilation and group count. Signal gain at initialisation is 1 (one orthogonal tap).
    Cost: 2 products of the kernel matrix an iteration, Chebyshev iteration at 4(k − 1) × 4(k − 1) frequencies.

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
        iterations: steps of the scaled Newton–Schulz recurrence, at most; it stops when it has converged.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: what would exceed norm 1 (reflection, replication, circular padding beyond (k − 1)/2).
        ShapeError: at call, circular padding with a stride that does not divide the image.

    Source: Serrurier et al. 2021, arXiv 2006.06520; Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> BjorckConv2d(3, 8, 3, padding="same")(torch.randn(1, 3, 9, 7)).shape
    torch.Size([1, 8, 9, 7])
    """

    batched = False  # it stops when it has converged

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
        *,
        iterations: int = 13,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, *geometry, bias, padding_mode, device, dtype)
        check_positive(self, iterations=iterations)
        self.iterations = iterations

    def orthogonalise(self, matrix: Tensor) -> Tensor:
        return newton_schulz(matrix, self.iterations)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"


class BjorckConvTranspose2d(LipschitzConvTranspose2d):
    """The adjoint of a `BjorckConv2d`, a contraction with the signature of `torch.nn.ConvTranspose2d`.

    Stride, dilation, groups and output_padding as in torch; zero padding only. Signal gain at initialisation is 1 at
    most. Cost as `BjorckConv2d`.

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

    Source: Serrurier et al. 2021, arXiv 2006.06520; Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> BjorckConvTranspose2d(8, 3, 4, stride=2, padding=1)(torch.randn(1, 8, 5, 5)).shape
    torch.Size([1, 3, 10, 10])
    """

    family = BjorckConv2d

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


register(
    Family(
        "bjorck",
        linear=BjorckLinear,
        conv=BjorckConv2d,
        conv_transpose=BjorckConvTranspose2d,
        orthogonal=frozenset({"linear"}),
    )
)
