"""Orthogonal layers by the Cayley transform, dense and per frequency (Trockman & Kolter 2021, arXiv 2104.07167).

It differs from the public code in that the half spectrum is enough, odd and non-square images work, zero padding is
offered, and what rounding leaves beyond norm 1 (much, once the gain is large) is divided away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liplayers.core.checks import Size2d
from liplayers.core.registry import Family, register
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.layers.bases.fourier import FourierConv2d
from liplayers.linalg.fourier import Grid, transfer_matrix
from liplayers.linalg.orthogonal import cayley, cayley_inverse
from liplayers.linalg.stiefel import nearest_orthogonal

__all__ = ["CayleyConv2d", "CayleyLinear"]


def _rescale(raw: Tensor, gain: Tensor) -> Tensor:
    """raw·gain/‖raw‖_F."""
    norm = torch.linalg.vector_norm(raw)
    return raw * (gain / torch.where(norm > 0, norm, 1))


def _reset(module: CayleyLinear | CayleyConv2d) -> None:
    fan = module.raw.shape[0] + module.raw.shape[1]
    nn.init.normal_(module.raw, std=math.sqrt(2 / (fan * math.prod(module.raw.shape[2:]))))
    norm = torch.linalg.vector_norm(module.raw.detach().float()).to(module.raw.dtype)
    module.gain.data.fill_(norm)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class CayleyLinear(LipschitzLinear):
    r"""Orthogonal dense layer: A = U − Uᵀ + VᵀV for gain·P/‖P‖_F = [U; V], W = [(I+A)⁻¹(I−A); −2V(I+A)⁻¹].

    Columns are orthonormal where out_features ≥ in_features, rows otherwise. Square weights stay in the component of
    the orthogonal group without the eigenvalue −1. Signal gain at initialisation: 1, or √(out/in) on average where
    out_features < in_features. Cost: one inverse of the shorter side.

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

    Source: Trockman & Kolter 2021, arXiv 2104.07167.

    >>> W = CayleyLinear(8, 5).weight
    >>> torch.allclose(W @ W.T, torch.eye(5), atol=1e-5)
    True
    """

    gain: nn.Parameter

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
        self.gain = self.new_parameter((1,), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian P, the gain equal to its norm, no bias."""
        _reset(self)

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """Of its polar factor."""
        P = cayley_inverse(nearest_orthogonal(weight))
        return [P, torch.linalg.vector_norm(P)[None]]

    def map_weight(self, raw: Tensor, gain: Tensor) -> Tensor:
        return cayley(_rescale(raw, gain))


class CayleyConv2d(FourierConv2d):
    r"""Orthogonal convolution: the Cayley transform of each frequency's transfer matrix.

    Circular padding gives an orthogonal map of the (pixel-unshuffled) image; zero padding pads the image first and
    crops after, a contraction. The support is the whole image. Signal gain at initialisation is 1 up to the border.
    Cost: an inverse of the smaller channel count for each frequency.

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

    Source: Trockman & Kolter 2021, arXiv 2104.07167.

    >>> layer = CayleyConv2d(4, 4, 3, padding=1, padding_mode="circular")
    >>> x = torch.randn(1, 4, 7, 5)
    >>> bool((layer(x).norm() - x.norm()).abs() < 1e-4)
    True
    """

    gain: nn.Parameter

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
        self.gain = self.new_parameter((1,), device, dtype)
        self.bias = self.new_parameter((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian P, the gain equal to its norm, no bias."""
        _reset(self)

    def map_weight(self, raw: Tensor, gain: Tensor, grid: Grid) -> Tensor:
        return cayley(transfer_matrix(_rescale(raw, gain), grid))


register(Family("cayley", linear=CayleyLinear, conv=CayleyConv2d, orthogonal=frozenset({"linear", "conv"})))
