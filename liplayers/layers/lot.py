"""LOT, layer-wise orthogonal training: the polar factor at each frequency (Xu et al. 2022, arXiv 2210.11620).

It differs from the public code: half the spectrum, float32, a scaled iteration on the matrix itself rather than one on
the inverse square root of its Gram matrix (which squares the condition number), and a contraction however few steps
are made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liplayers.core.checks import Size2d, check_positive
from liplayers.core.registry import Family, register
from liplayers.layers.bases.fourier import FourierConv2d
from liplayers.linalg.fourier import Grid, transfer_matrix
from liplayers.linalg.orthogonal import newton_schulz

__all__ = ["LOTConv2d"]


class LOTConv2d(FourierConv2d):
    r"""Orthogonal convolution: the polar factor P(PᴴP)^(−1/2) of each frequency's transfer matrix.

    Circular padding gives an orthogonal map of the (pixel-unshuffled) image; zero padding pads the image first and
    crops after, a contraction. The support is the whole image. Singular values of a frequency below ℓ times its
    largest have not converged and are damped, ℓ = 0.3, 0.03, 2e-3 for 5, 10, 13 iterations. Signal gain at
    initialisation is 1 up to the border. Cost: 2 products an iteration for each frequency, 3 backwards,
    5 or 6 iterations for well-conditioned P; the dense layer of this map is `BjorckLinear`.

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
        iterations: steps of the scaled Newton–Schulz recurrence, at most; it stops when it has converged.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: dilation or groups other than 1, padding that would exceed norm 1, iterations below 1.
        ShapeError: at call, circular padding with a stride that does not divide the image.

    Source: Xu, Li & Li 2022, arXiv 2210.11620.

    >>> layer = LOTConv2d(4, 4, 3, padding=1, padding_mode="circular")
    >>> x = torch.randn(1, 4, 7, 5)
    >>> bool((layer(x).norm() - x.norm()).abs() < 1e-4)
    True
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
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        check_positive(self, iterations=iterations)
        self.iterations = iterations
        channels, kh, kw = self.unshuffled
        self.raw = self.new_parameter((out_channels, channels, kh, kw), device, dtype)
        self.bias = self.new_parameter((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def map_weight(self, raw: Tensor, grid: Grid) -> Tensor:
        return newton_schulz(transfer_matrix(raw, grid), self.iterations)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"


register(Family("lot", conv=LOTConv2d, orthogonal=frozenset({"conv"})))
