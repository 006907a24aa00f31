"""BRO, block reflector orthogonal layers (Lai et al. 2025, arXiv 2505.15174).

It differs from the public code: the factorisation runs in float64 with columns normalised first, strides act by
pixel-unshuffling, rectangular layers start from a Gaussian rather than a quasi-residual factor, which would begin by
dropping the last inputs, and without `residual_depth` the noise of the start is the same at every depth of a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liplayers.core.checks import Size2d
from liplayers.core.registry import Family, register
from liplayers.errors import ArgumentError
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
from liplayers.linalg.orthogonal import block_reflector

__all__ = ["BROConv2d", "BROLinear"]

NOISE = 0.5  # of the start V = I + NOISE·P without `residual_depth`, P Gaussian with columns of norm about 1


def _check_rank_ratio(owner: object, rank_ratio: float) -> None:
    if isinstance(rank_ratio, bool) or not isinstance(rank_ratio, (int, float)) or not 0 < rank_ratio <= 1:
        raise ArgumentError(f"{type(owner).__name__}: rank_ratio={rank_ratio!r}; expected a number in (0, 1]")


def _rank(features: int, rank_ratio: float) -> int:
    return max(1, round(features * rank_ratio))


@torch.no_grad()
def _reset(module: BROLinear | BROConv2d, square: bool) -> None:
    raw, gain = module.raw, module.gain
    if gain is not None:
        start_near_identity_(raw, gain)
    else:
        nn.init.normal_(raw, std=1 / math.sqrt(raw.shape[0] * math.prod(raw.shape[2:])))
        if square:
            raw.copy_(near_identity(NOISE * raw))
    if module.bias is not None:
        module.bias.zero_()


class BROLinear(LipschitzLinear):
    r"""Orthogonal dense layer: W = I − 2V(VᵀV)⁻¹Vᵀ, V of shape n × r, n = max(in, out), cut to out × in.

    W reflects the r-dimensional span of V: symmetric, with r eigenvalues −1. Signal gain at initialisation: 1, or
    √(out/in) on average where out_features < in_features. Cost: one Cholesky factorisation of r × r and two products.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.
        rank_ratio: the rank of the reflection as a share of n, r/n in (0, 1]; at 1 the layer is constant, W = −I.
        residual_depth: d, the number of equal layers in the network: V = I + d^(−½)·γ·W for the parameters W, which
            starts at about 0, and γ, a gain for each row; None: V is the parameter.

    Shape:
        (*, in_features) → (*, out_features).

    Raises:
        ArgumentError: sizes that are not positive integers, a rank ratio outside (0, 1], a residual depth where
            in_features and out_features differ.

    Source: Lai et al. 2025, arXiv 2505.15174.

    >>> W = BROLinear(8, 5).weight
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
        rank_ratio: float = 0.5,
        residual_depth: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        _check_rank_ratio(self, rank_ratio)
        self.rank_ratio = rank_ratio
        self.residual_depth = check_residual_depth(
            self, residual_depth, in_features=in_features, out_features=out_features
        )
        n = max(in_features, out_features)
        self.raw = self.new_parameter((n, _rank(n, rank_ratio)), device, dtype)
        self.gain = self.new_parameter((n, 1), device, dtype) if residual_depth else None
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Quasi-residual V = I + noise where square, with little noise for a residual depth; Gaussian V elsewhere."""
        _reset(self, self.in_features == self.out_features)

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """The directions that the nearest reflection turns: eigenvectors of the least eigenvalues of (W + Wᵀ)/2."""
        n, rank = self.raw.shape
        square = F.pad(weight, (0, n - self.in_features, 0, n - self.out_features))
        V = torch.linalg.eigh(square + square.mT).eigenvectors[:, :rank]
        return [V] if self.gain is None else around_identity(V, self.gain, depth=self.residual_depth)

    def map_weight(self, raw: Tensor, gain: Tensor | None = None) -> Tensor:
        V = raw if gain is None else near_identity(raw, gain, depth=self.residual_depth)
        return block_reflector(V, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank_ratio={self.rank_ratio}" + residual_repr(self.residual_depth)


class BROConv2d(FourierConv2d):
    r"""Orthogonal convolution: the block reflector of each frequency of a raw kernel n × r × k × k.

    n = max(in_channels·s², out_channels), the map cut to its channels. Circular padding gives an orthogonal map of
    the (pixel-unshuffled) image; zero padding pads the image first and crops after, a contraction. The support is the
    whole image. Signal gain at initialisation is 1 up to the border. Cost: a Cholesky factorisation of r × r and two
    products for each frequency.

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
        rank_ratio: the rank of the reflection as a share of n, r/n in (0, 1]; at 1 the layer is constant.
        residual_depth: d, the number of equal layers in the network: V = I + d^(−½)·γ·W for the parameters W, which
            starts at about 0, and γ, a gain for each row; None: V is the parameter.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: dilation or groups other than 1, padding that would exceed norm 1, a bad rank ratio, a residual
            depth where in_channels·s² and out_channels differ.
        ShapeError: at call, circular padding with a stride that does not divide the image.

    Source: Lai et al. 2025, arXiv 2505.15174.

    >>> layer = BROConv2d(4, 4, 3, padding=1, padding_mode="circular")
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
        rank_ratio: float = 0.5,
        residual_depth: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        _check_rank_ratio(self, rank_ratio)
        self.rank_ratio = rank_ratio
        channels, kh, kw = self.unshuffled
        self.residual_depth = check_residual_depth(
            self, residual_depth, in_channels=channels, out_channels=out_channels
        )
        n = max(channels, out_channels)
        self.raw = self.new_parameter((n, _rank(n, rank_ratio), kh, kw), device, dtype)
        self.gain = self.new_parameter((n, 1, 1, 1), device, dtype) if residual_depth else None
        self.bias = self.new_parameter((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Quasi-residual V = I + noise where square, with little noise for a residual depth; Gaussian V elsewhere."""
        _reset(self, self.unshuffled[0] == self.out_channels)

    def map_weight(self, *raw_and_grid: Any) -> Tensor:
        *raw, grid = raw_and_grid
        V = raw[0] if self.gain is None else near_identity(*raw, depth=self.residual_depth)
        return block_reflector(transfer_matrix(V, grid), self.out_channels, self.unshuffled[0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank_ratio={self.rank_ratio}" + residual_repr(self.residual_depth)


register(Family("bro", linear=BROLinear, conv=BROConv2d, orthogonal=frozenset({"linear", "conv"})))
