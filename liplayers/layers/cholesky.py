"""Orthogonal layers by Cholesky factorisation, W = L⁻¹P with LLᵀ = PPᵀ (Hu et al. 2024, arXiv 2310.02513).

It differs from the public code: the factorisation runs in float64 on rows of unit norm, with a ridge of a few roundings
only, and a convolution per frequency is offered, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liplayers.core.checks import Size2d
from liplayers.core.registry import Family, register
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.layers.bases.fourier import FourierConv2d
from liplayers.linalg.fourier import Grid, transfer_matrix
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

    Shape:
        (*, in_features) → (*, out_features).

    Raises:
        ArgumentError: sizes that are not positive integers.

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
    ) -> None:
        super().__init__(in_features, out_features)
        self.raw = self.new_parameter((out_features, in_features), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """Its polar factor, the nearest orthogonal matrix."""
        return [nearest_orthogonal(weight)]

    def map_weight(self, raw: Tensor) -> Tensor:
        return cholesky_orthogonal(raw)


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

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: dilation or groups other than 1, and padding that would exceed norm 1.
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
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        channels, kh, kw = self.unshuffled
        self.raw = self.new_parameter((out_channels, channels, kh, kw), device, dtype)
        self.bias = self.new_parameter((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def map_weight(self, raw: Tensor, grid: Grid) -> Tensor:
        return cholesky_orthogonal(transfer_matrix(raw, grid))


register(Family("cholesky", linear=CholeskyLinear, conv=CholeskyConv2d, orthogonal=frozenset({"linear", "conv"})))
