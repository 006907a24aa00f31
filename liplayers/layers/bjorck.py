"""Björck orthonormalisation: the polar factor by Newton–Schulz (Anil, Lucas & Grosse 2019, arXiv 1811.05381).

The convolution orthogonalises the kernel as a matrix ("RKO") and divides by a proven bound; it takes the lesser of
the overlap factor of Serrurier et al. 2021 (arXiv 2006.06520) and the row-sum bound of the kernel's autocorrelation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from liplayers.layers.base import LipschitzLinear, check_positive
from liplayers.layers.conv import KernelConv2d
from liplayers.layers.registry import Family, register
from liplayers.linalg.convolution import overlap, polyphase, row_sum_bound
from liplayers.linalg.orthogonal import newton_schulz

__all__ = ["BjorckConv2d", "BjorckLinear"]


class BjorckLinear(LipschitzLinear):
    r"""Dense layer with orthonormal rows or columns: the polar factor of P, W ← W(3I − WᵀW)/2 repeated.

    P is divided by a proven upper bound of its norm first, so W is a contraction however few iterations are made;
    directions whose singular value is below (2/3)^iterations of the largest have not converged and are damped.
    Signal gain at initialisation is 1.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        iterations: of the Newton–Schulz recurrence.

    Shape:
        (*, in_features) → (*, out_features).

    Raises:
        ArgumentError: sizes or iterations that are not positive integers.

    Source: Björck & Bowie 1971; Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> W = BjorckLinear(8, 5).weight
    >>> torch.allclose(W @ W.T, torch.eye(5), atol=1e-5)
    True
    """

    def __init__(self, *args: Any, iterations: int = 8, **kwargs: Any) -> None:
        check_positive(self, iterations=iterations)
        super().__init__(*args, **kwargs)
        self.iterations = iterations

    def map_weight(self, raw: Tensor) -> Tensor:
        return newton_schulz(raw, self.iterations)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"


class BjorckConv2d(KernelConv2d):
    r"""Convolution with an orthogonal kernel matrix, divided by a proven bound on its norm.

    The kernel as an out × (in·kh·kw) matrix is orthogonalised (`newton_schulz`), then divided by
    min(√(⌈k_h/s_h⌉⌈k_w/s_w⌉), row-sum bound of the autocorrelation). Orthogonal where kernel_size = stride
    (patches), a contraction elsewhere. Signal gain at initialisation is 1 (one orthogonal tap). With dilation d the
    overlap of an axis is ⌈k·gcd(s, d)/s⌉.

    Args:
        in_channels … dtype: as in `torch.nn.Conv2d`; padding_mode "zeros" or "circular".
        iterations: of the Newton–Schulz recurrence.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H', W'), sizes as torch's.

    Raises:
        ArgumentError: what would exceed norm 1 (reflection, replication, circular padding beyond (k − 1)/2).
        ShapeError: at call, circular padding with a stride that does not divide the image.

    Source: Serrurier et al. 2021, arXiv 2006.06520; Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> BjorckConv2d(3, 8, 3, padding="same")(torch.randn(1, 3, 9, 7)).shape
    torch.Size([1, 8, 9, 7])
    """

    def __init__(self, *args: Any, iterations: int = 8, **kwargs: Any) -> None:
        check_positive(self, iterations=iterations)
        super().__init__(*args, **kwargs)
        self.iterations = iterations

    def map_kernel(self, raw: Tensor) -> Tensor:
        matrix = newton_schulz(rearrange(raw, "g o i a b -> g o (i a b)"), self.iterations)
        kernel = matrix.reshape(raw.shape)
        sizes = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        overlaps = [overlap(*size) for size in sizes]  # not a map object: torch.compile breaks the graph there
        bound = row_sum_bound(polyphase(kernel, self.stride, self.dilation))
        return kernel / torch.clamp(bound, torch.finfo(kernel.dtype).tiny, math.sqrt(math.prod(overlaps)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"


register(Family("bjorck", linear=BjorckLinear, conv=BjorckConv2d, orthogonal=frozenset({"linear"})))
