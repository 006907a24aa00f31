"""Matrix exponentials of skew maps, dense and SOC convolutions (Singla & Feizi 2021, arXiv 2105.11417).

It differs from the public code: the series is not the truncated Taylor series, which exceeds norm 1, but a polynomial
that stays below it for kernels of norm 1.43 at most, and is closer to an orthogonal map with fewer terms. Kernels are
shortened where their estimated norm is above 1.4 (there it is always near 1.3), and the norm is proven afterwards; with
circular padding the exponential is taken at each frequency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.core.checks import Size2d, check_positive
from liplayers.core.registry import Family, register
from liplayers.errors import ArgumentError
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.layers.bases.fourier import FourierConv2d
from liplayers.linalg.convolution import polynomial, symbol_norm_estimate
from liplayers.linalg.fourier import Grid, transfer_matrix
from liplayers.linalg.norms import unit_scale
from liplayers.linalg.orthogonal import rotation, skew_exponential, skew_exponential_coefficients, skew_logarithm
from liplayers.linalg.verified import skew_polynomial_conv_bound
from liplayers.modules.frozen import FrozenPolynomialConv2d, Placement, image_size

__all__ = ["ExponentialLinear", "SOCConv2d"]


MOST_TERMS = 12  # the polynomial's coefficients lose their accuracy far beyond
LONGEST = 1.4  # of L, by the estimate
REACH = 1.43  # of the polynomial, if the estimate is 2 % too low
LENGTH_WEIGHT = 200.0  # of the polynomial's norm against its angle: with 6 terms by 8e-7 and 2e-4


class ExponentialLinear(LipschitzLinear):
    r"""Orthogonal dense layer: W = exp(P − Pᵀ), P of max(in, out) square, cut to out × in.

    It reaches all rotations (determinant 1); P − Pᵀ is shortened where its norm may be above 4. Signal gain at
    initialisation: 1, or √(out/in) on average where out_features < in_features. Cost: twelve products of max(in, out),
    twice that backwards.

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

    Source: Lezcano-Casado & Martínez-Rubio 2019, arXiv 1901.08428; Singla & Feizi 2021, arXiv 2105.11417.

    >>> W = ExponentialLinear(8, 5).weight
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
        n = max(in_features, out_features)
        self.raw = self.new_parameter((n, n), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian P: a rotation by angles of up to about 2.8; no bias."""
        nn.init.normal_(self.raw, std=1 / math.sqrt(len(self.raw)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """Half the logarithm of the nearest rotation, completed where the weight is a part of one."""
        n = len(self.raw)
        U, _, Vh = torch.linalg.svd(F.pad(weight, (0, n - self.in_features, 0, n - self.out_features)))
        turned = torch.ones(n, dtype=U.dtype, device=U.device)
        turned[-1] = torch.linalg.det(U @ Vh).sign()
        return [skew_logarithm(U * turned @ Vh) / 2]

    def map_weight(self, raw: Tensor) -> Tensor:
        return rotation(raw - raw.mT)[: self.out_features, : self.in_features]


class SOCConv2d(FourierConv2d):
    r"""Orthogonal convolution: p(L) ≈ exp(L), L = K − Kᵀ the skew part of a free kernel, shortened to norm 1.4 at most.

    p is a polynomial of degree `terms` with |p(iθ)| ≤ 1 on [−1.43, 1.43]; with 6 terms 1 − |p| < 1e-6 there, and it
    turns by 2e-4 too far at most. L is divided by an estimate of its norm, which proves nothing; `lipschitz_bound()`
    is proven from the norm of the L that runs. It is at most 1 up to 1.43, and with 6 terms as far as 4. L acts on
    max(in_channels·s², out_channels) channels of the (pixel-unshuffled) image, zeros appended or outputs cut. Zero
    padding, too, keeps L skew and the layer orthogonal, where the output has the size of the image (padding
    (k − 1)/2, a stride that divides it); what is padded beyond that is embedded, what is less is cropped. With zero
    padding L is applied `terms` times, with circular padding p is formed at each frequency. Signal gain at
    initialisation is 1. Cost: with zero padding `terms` convolutions (the costliest of all families); with circular
    padding 1 + ⌈terms/3⌉ products for each frequency; power iteration at 4(k − 1) × 4(k − 1) frequencies. The bound
    takes seconds at 128 channels and minutes at 512.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair; an even kernel has the symmetric support of the
            next odd one.
        stride: an integer or a pair; it acts by pixel-unshuffling, with the kernel ⌈k/s⌉ on the unshuffled image.
        padding: pixels around the image on each side, an integer or a pair; "same" (with stride 1 only) or "valid"
            (none).
        dilation: 1, the only value of this family.
        groups: 1, the only value of this family.
        bias: whether b is there.
        padding_mode: what the padding holds, "zeros" or "circular".
        device: of the parameters.
        dtype: of the parameters.
        terms: degree of the polynomial, at most 12.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: dilation or groups other than 1, padding that would exceed norm 1, terms outside 1 … 12.
        ShapeError: at call, circular padding with a stride that does not divide the image.

    Source: Singla & Feizi 2021, arXiv 2105.11417.

    >>> layer = SOCConv2d(4, 4, 3, padding=1)
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
        terms: int = 6,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        check_positive(self, terms=terms)
        if terms > MOST_TERMS:
            raise ArgumentError(f"SOCConv2d: terms={terms!r}; expected at most {MOST_TERMS}, which is exact to 1e-10")
        self.terms = terms
        self.coefficients = skew_exponential_coefficients(terms, REACH, LENGTH_WEIGHT)
        channels, kh, kw = self.unshuffled
        n = max(channels, out_channels)
        self.raw = self.new_parameter((n, n, kh, kw), device, dtype)
        self.bias = self.new_parameter((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian K, no bias."""
        nn.init.normal_(self.raw, std=0.25 / math.sqrt(self.raw[0].numel()))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    weights_since = "0.2.0"  # before L was shortened by a bound, to norm 1

    def lipschitz_bound(self) -> float:
        """Of the polynomial, for the proven norm of the L that runs, whatever it was estimated to be."""
        L = self.effective()
        return skew_polynomial_conv_bound(self.coefficients, L) if L.isfinite().all() else math.inf

    def lipschitz_estimate(self) -> float:
        return 1.0

    def skew_kernel(self, raw: Tensor) -> Tensor:
        """L = K − Kᵀ, shortened to an estimated norm of 1.4 at most."""
        kh, kw = raw.shape[-2:]
        K = F.pad(raw, (1 - kw % 2, 0, 1 - kh % 2, 0))  # odd, its centre where that of `raw` is
        L = K - rearrange(K, "o i a b -> i o a b").flip(-2, -1)
        unit, scale = unit_scale(L)
        return L / (symbol_norm_estimate(unit[None])[0] * (scale / LONGEST)).clamp_min(1)

    def map_weight(self, raw: Tensor, grid: Grid | None = None) -> Tensor:
        """W(ω) on a grid; without one L itself."""
        L = self.skew_kernel(raw)
        if grid is None:
            return L
        rotations = skew_exponential(transfer_matrix(L, grid), self.coefficients)
        return rotations[..., : self.out_channels, : self.unshuffled[0]]

    def rounded(self, weight: Tensor) -> Tensor:
        return weight  # in float32 at least, as images are transformed

    def frame(self, size: tuple[int, int], out: tuple[int, int]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
        """The zeros that extend the image, only where the output reaches beyond it, and where the output begins."""
        pads, start = [], []
        sizes = zip(size, self.kernel_size, self.pads, self.stride, out, strict=True)
        for n, k, (before, _), s, m in sizes:
            shift = before - (k - 1) // 2
            top = max(0, shift)
            start.append(max(0, -shift) // s)
            missing = max(0, s * (start[-1] + m) - n - top)
            pads.append((top, missing + -(n + top + missing) % s))
        return pads, (start[0], start[1])

    def convolve(self, x: Tensor, out: tuple[int, int]) -> Tensor:
        if self.padding_mode == "circular":
            return super().convolve(x, out)
        pads, (top, left) = self.frame((x.shape[-2], x.shape[-1]), out)
        x = self.unshuffle(x, pads)
        x = F.pad(x, (0, 0, 0, 0, 0, len(self.raw) - x.shape[1]))
        L = self.effective().to(x.dtype)
        y = polynomial(self.coefficients, L, x)
        return y[:, : self.out_channels, top : top + out[0], left : left + out[1]]

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        if self.padding_mode == "circular":
            return super().frozen(shape)
        image = image_size(shape)
        out = self.output_size(*image)
        pads, start = self.frame(image, out)
        placement = Placement(image, (pads[0], pads[1]), self.stride, start, out)
        channels = (self.in_channels, self.out_channels)
        return FrozenPolynomialConv2d(self.effective(), self.coefficients, *channels, self.bias, placement)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, terms={self.terms}"


register(Family("soc", linear=ExponentialLinear, conv=SOCConv2d, orthogonal=frozenset({"linear", "conv"})))
