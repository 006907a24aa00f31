"""Orthogonal layers by Cholesky factorisation, W = L⁻¹P with LLᵀ = PPᵀ (Hu et al. 2024, arXiv 2310.02513).

It differs from the public code: the factorisation runs in float64 on rows of unit norm, with a ridge of a few roundings
only, and a convolution per frequency is offered, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liplayers.core.checks import Size2d
from liplayers.core.registry import Family, register
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.layers.bases.fourier import FourierConv2d
from liplayers.layers.bases.near_identity import (
    around_identity,
    check_residual_depth,
    near_identity,
    residual_repr,
    start_near_identity_,
)
from liplayers.linalg.fourier import transfer_matrix
from liplayers.linalg.orthogonal import cholesky_orthogonal
from liplayers.linalg.stiefel import nearest_orthogonal

__all__ = ["CholeskyConv2d", "CholeskyLinear"]


class CholeskyLinear(LipschitzLinear):
    r"""Orthogonal dense layer: W = L⁻¹P with LLᵀ = PPᵀ + ridge, or the same on the columns if they are fewer.

    It is Gram–Schmidt: it reaches every orthogonal matrix, both components of square ones. Signal gain at
    initialisation: 1, or √(out/in) on average where out_features < in_features. Cost: one Cholesky factorisation of the
    shorter side.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.
        residual_depth: d, the number of equal layers in the network: P = I + d^(−½)·γ·W for the parameters W, which
            starts at about 0, and γ, a gain for each row; None: P is the parameter.

    Shape:
        (*, in_features) → (*, out_features).

    Raises:
        ArgumentError: sizes that are not positive integers, a residual depth where in_features and out_features differ.

    Source: Hu et al. 2024, arXiv 2310.02513.

    >>> import torch
    >>> W = CholeskyLinear(8, 5).weight
    >>> torch.allclose(W @ W.T, torch.eye(5), atol=1e-5)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        residual_depth: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.residual_depth = check_residual_depth(
            self, residual_depth, in_features=in_features, out_features=out_features
        )
        self.raw = self.new_parameter((out_features, in_features), device, dtype)
        self.gain = self.new_parameter((out_features, 1), device, dtype) if residual_depth else None
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """An orthogonal raw matrix, no bias; W of a residual depth small and Gaussian."""
        super().reset_parameters()
        if self.gain is not None:
            start_near_identity_(self.raw, self.gain)

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """Its polar factor, the nearest orthogonal matrix."""
        P = nearest_orthogonal(weight)
        return [P] if self.gain is None else around_identity(P, self.gain, depth=self.residual_depth)

    def map_weight(self, raw: Tensor, gain: Tensor | None = None) -> Tensor:
        return cholesky_orthogonal(raw if gain is None else near_identity(raw, gain, depth=self.residual_depth))

    def extra_repr(self) -> str:
        return super().extra_repr() + residual_repr(self.residual_depth)


class CholeskyConv2d(FourierConv2d):
    r"""Orthogonal convolution: `CholeskyLinear`'s map of the transfer matrix of each frequency.

    Circular padding gives an orthogonal map of the (pixel-unshuffled) image; zero padding pads the image first and
    crops after, a contraction. The support is the whole image. Signal gain at initialisation is 1 up to the border.
    Cost: a Cholesky factorisation of the smaller channel count for each frequency.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: an integer or a pair; it acts by pixel-unshuffling, with the kernel ⌈k/s⌉ on the unshuffled image.
        padding: pixels around the image on each side, an integer or a pair; "same" (with stride 1 only) or "valid"
            (none).
        dilation: 1, the only value of this family.
        groups: 1, the only value of this family.
        bias: whether b is there.
        padding_mode: what the padding holds, "zeros" or "circular".
        device: of the parameters.
        dtype: of the parameters.
        residual_depth: d, the number of equal layers in the network: P = I + d^(−½)·γ·W for the parameters W, which
            starts at about 0, and γ, a gain for each row; None: P is the parameter.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: dilation or groups other than 1, padding that would exceed norm 1, a residual depth where
            in_channels·s² and out_channels differ.
        ShapeError: at call, circular padding with a stride that does not divide the image.

    Source: Hu et al. 2024, arXiv 2310.02513 (dense); per frequency: this library.

    >>> import torch
    >>> layer = CholeskyConv2d(4, 4, 3, padding=1, padding_mode="circular")
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
        *,
        residual_depth: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        channels, kh, kw = self.unshuffled
        self.residual_depth = check_residual_depth(
            self, residual_depth, in_channels=channels, out_channels=out_channels
        )
        self.raw = self.new_parameter((out_channels, channels, kh, kw), device, dtype)
        self.gain = self.new_parameter((out_channels, 1, 1, 1), device, dtype) if residual_depth else None
        self.bias = self.new_parameter((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """One orthogonal centre tap, no bias; W of a residual depth small and Gaussian."""
        super().reset_parameters()
        if self.gain is not None:
            start_near_identity_(self.raw, self.gain)

    def map_weight(self, *raw_and_grid: Any) -> Tensor:
        *raw, grid = raw_and_grid
        P = raw[0] if self.gain is None else near_identity(*raw, depth=self.residual_depth)
        return cholesky_orthogonal(transfer_matrix(P, grid))

    def extra_repr(self) -> str:
        return super().extra_repr() + residual_repr(self.residual_depth)


register(Family("cholesky", linear=CholeskyLinear, conv=CholeskyConv2d, orthogonal=frozenset({"linear", "conv"})))
