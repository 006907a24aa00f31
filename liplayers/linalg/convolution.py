"""Explicit convolution kernels: polyphase form, autocorrelation, and proven norm bounds.

A kernel is (groups, out, in, kh, kw); out and in count the channels of one group. Each bound holds for every image
size, for zero padding of any width, and for circular padding whose output is no larger than its input; these maps are
compressions of the convolution on the infinite grid, whose norm is the supremum of ‖K̂(ω)‖ over all frequencies.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from liplayers.linalg.fourier import transfer_matrix
from liplayers.linalg.norms import gram_iteration_bound

__all__ = [
    "autocorrelation",
    "grid_slack",
    "orthogonal_taps_",
    "overlap",
    "polynomial",
    "polyphase",
    "row_sum_bound",
    "symbol_norm_bound",
    "tap_phases",
]


def overlap(kernel_size: int, stride: int, dilation: int = 1) -> int:
    """The largest number of taps that one input position meets, along one axis: ⌈k·gcd(s, d)/s⌉.

    >>> overlap(3, 1), overlap(3, 2), overlap(2, 2), overlap(3, 2, dilation=2)
    (3, 2, 1, 3)
    """
    return math.ceil(kernel_size * math.gcd(stride, dilation) / stride)


def tap_phases(kernel_size: int, stride: int, dilation: int = 1) -> list[int]:
    """The residue modulo the stride of the input position that each tap reads, along one axis."""
    return [t * dilation % stride for t in range(kernel_size)]


def polyphase(kernel: Tensor, stride: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> Tensor:
    """The stride-1 kernel on pixel-unshuffled input that acts as `kernel` with stride and dilation does.

    Args:
        kernel: (groups, out, in, kh, kw).

    Returns:
        (groups, out, in·s_h·s_w, ⌈k'_h/s_h⌉, ⌈k'_w/s_w⌉), k' the dilated size.

    >>> polyphase(torch.randn(1, 8, 3, 4, 4), (2, 2)).shape
    torch.Size([1, 8, 12, 2, 2])
    """
    if dilation != (1, 1):
        g, o, i, kh, kw = kernel.shape
        spread = kernel.new_zeros(g, o, i, dilation[0] * (kh - 1) + 1, dilation[1] * (kw - 1) + 1)
        spread[..., :: dilation[0], :: dilation[1]] = kernel
        kernel = spread
    if stride == (1, 1):
        return kernel
    kh, kw = kernel.shape[-2:]
    kernel = F.pad(kernel, (0, -kw % stride[1], 0, -kh % stride[0]))
    return rearrange(kernel, "g o i (a sh) (b sw) -> g o (i sh sw) a b", sh=stride[0], sw=stride[1])


def autocorrelation(kernel: Tensor, side: str) -> Tensor:
    """All lags of K*K (`side="in"`) or KK* (`side="out"`) of a stride-1 kernel.

    Returns:
        (groups, n, n, 2·kh − 1, 2·kw − 1), n the number of channels of that side.
    """
    groups, (kh, kw) = kernel.shape[0], kernel.shape[-2:]
    if kh == kw == 1:
        K = kernel[..., 0, 0].mH if side == "in" else kernel[..., 0, 0]
        return (K @ K.mH)[..., None, None]  # complex matrices are kernels of one tap, too
    K = rearrange(kernel, "g o i a b -> g i o a b") if side == "in" else kernel
    images = rearrange(K, "g n c a b -> n (g c) a b")
    filters = rearrange(K, "g n c a b -> (g n) c a b")
    lags = F.conv2d(images, filters, padding=(kh - 1, kw - 1), groups=groups)
    return rearrange(lags, "n (g m) a b -> g m n a b", g=groups)


def row_sum_bound(kernel: Tensor) -> Tensor:
    """Upper bound √(max_i Σ_j Σ_lags |autocorrelation|) on the norm of a stride-1 convolution, the AOL bound.

    Differentiable. Exact for kernels of one orthogonal tap.

    Returns:
        (groups,).
    """
    side = "in" if kernel.shape[2] <= kernel.shape[1] else "out"
    square = autocorrelation(kernel, side).abs().sum((2, 3, 4)).amax(1)
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)  # gradient 0 at 0, not NaN


def grid_slack(taps: tuple[int, ...], grid: tuple[int, int]) -> float:
    """How much larger than on the grid the norm of the symbol of a kernel of kh × kw taps may be between its points.

    ‖K̂‖ is the supremum of trigonometric polynomials of degree (k − 1)/2 along each axis, which keep at least
    cos(π(k − 1)/2N) of their maximum at the nearest of N points.
    """
    kept = [math.cos(math.pi * (k - 1) / (2 * N)) for k, N in zip(taps, grid, strict=True)]
    return 1 / (kept[0] * kept[1])  # of a generator torch.compile would break the graph


def symbol_norm_bound(kernel: Tensor, density: int = 8, iterations: int = 7) -> Tensor:
    """Upper bound on the norm of a stride-1 convolution from its symbol on a grid, by Gram iteration; differentiable.

    The grid has N = density·(k − 1) points along each axis: the bound exceeds the norm by up to 4 % for density 8
    (for images of infinite size, and but for the overestimate of the Gram iteration, n^(1/2^(iterations + 1))). The
    gradient is that of the largest frequency. Never above `row_sum_bound`, which is exact for orthogonal taps.

    Args:
        kernel: (groups, out, in, kh, kw).

    Returns:
        (groups,).

    Source: Gram iteration, Delattre et al. 2023 (arXiv 2305.16173).

    >>> round(symbol_norm_bound(torch.ones(1, 1, 1, 3, 3) / 9).item(), 2)
    1.0
    """
    kh, kw = kernel.shape[-2:]
    grid = max(1, density * (kh - 1)), max(1, density * (kw - 1))
    transfer = transfer_matrix(kernel, grid).flatten(1, 2)
    with torch.no_grad():
        largest = gram_iteration_bound(transfer, iterations).argmax(1)
    index = largest[:, None, None, None].expand(-1, 1, *transfer.shape[-2:])
    chosen = transfer.gather(1, index)[:, 0]
    symbol = gram_iteration_bound(chosen, iterations) * grid_slack(kernel.shape[-2:], grid)
    return torch.minimum(symbol, row_sum_bound(kernel))


def orthogonal_taps_(weight: Tensor, stride: tuple[int, int], groups: int = 1) -> Tensor:
    """Fill a kernel (out, in/groups, kh, kw) with an orthogonal block of min(k, s) taps at its centre, else zeros.

    The convolution is then an isometry (or the adjoint of one) of pixel-unshuffled images: signals neither grow nor
    vanish through deep stacks.
    """
    with torch.no_grad():
        weight.zero_()
        block = [min(k, s) for k, s in zip(weight.shape[-2:], stride, strict=True)]
        start = [(k - b) // 2 for k, b in zip(weight.shape[-2:], block, strict=True)]
        out, channels = weight.shape[0] // groups, weight.shape[1]
        for group in range(groups):
            Q = torch.empty(out, channels * block[0] * block[1], dtype=torch.float32, device=weight.device)
            torch.nn.init.orthogonal_(Q)
            Q = rearrange(Q, "o (i a b) -> o i a b", a=block[0], b=block[1]).to(weight.dtype)
            for a, b in product(range(block[0]), range(block[1])):
                weight[group * out : (group + 1) * out, :, start[0] + a, start[1] + b] = Q[..., a, b]
    return weight


def polynomial(coefficients: tuple[float, ...], L: Tensor, x: Tensor) -> Tensor:
    """Σ_j c_j Lʲx by Horner's rule, L a convolution with zero padding that keeps the size of the image."""
    *rest, last = coefficients
    y = last * x
    for c in reversed(rest):
        y = F.conv2d(y, L, padding=(L.shape[-2] // 2, L.shape[-1] // 2)) + c * x
    return y
