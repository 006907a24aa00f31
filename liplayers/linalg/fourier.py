"""Convolutions in the frequency domain: kernels ↔ half-spectrum transfer matrices.

A circular convolution on an H × W grid is block diagonal in the Fourier basis, one (out × in) matrix for each
frequency. For real images the frequencies with 0 ≤ w ≤ W/2 determine the rest.
"""

from __future__ import annotations

import math

import torch
from einops import einsum
from torch import Tensor


def _dft(taps: int, frequencies: int, size: int, like: Tensor) -> Tensor:
    """exp(−2πi·f·(t − centre)/size) as (taps, frequencies)."""
    t = torch.arange(taps, device=like.device) - (taps - 1) // 2
    f = torch.arange(frequencies, device=like.device)
    # the product is reduced modulo the size while it is an exact integer: no error grows with f·t
    angle = (t[:, None] * f[None, :] % size).to(like.dtype) * (-2 * math.pi / size)
    return torch.polar(torch.ones_like(angle), angle)


def transfer_matrix(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The transfer matrices of the circular convolution with `kernel` on a grid of `size`.

    K̂(ω) = Σ_t K_t exp(−i⟨ω, t⟩), taps counted from the kernel's centre. A kernel larger than the grid wraps around.

    Args:
        kernel: (..., out, in, kh, kw), real.
        size: the grid (H, W).

    Returns:
        (..., H, W//2 + 1, out, in), complex.

    >>> transfer_matrix(torch.ones(1, 1, 1, 1), (4, 5)).shape
    torch.Size([4, 3, 1, 1])
    """
    kh, kw = kernel.shape[-2:]
    rows = _dft(kh, size[0], size[0], kernel)
    columns = _dft(kw, size[1] // 2 + 1, size[1], kernel)
    partial = einsum(kernel.to(rows.dtype), columns, "... o i a b, b w -> ... o i a w")
    return einsum(partial, rows, "... o i a w, a h -> ... h w o i")


def spectrum(x: Tensor) -> Tensor:
    """Half spectrum of real images, frequencies first: (B, C, H, W) → (H, W//2 + 1, C, B)."""
    return torch.fft.rfft2(x).permute(2, 3, 1, 0)


def from_spectrum(X: Tensor, size: tuple[int, int]) -> Tensor:
    """Inverse of `spectrum` for images of `size`: (H, W//2 + 1, C, B) → (B, C, H, W)."""
    return torch.fft.irfft2(X.permute(3, 2, 0, 1), s=size)
