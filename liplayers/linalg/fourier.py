"""Convolutions in the frequency domain: kernels ↔ half-spectrum transfer matrices.

A circular convolution on an H × W grid is block diagonal in the Fourier basis, one (out × in) matrix for each
frequency. For real images the frequencies with 0 ≤ w ≤ W/2 determine the rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from liplayers.linalg import upward

__all__ = [
    "CHUNK",
    "Grid",
    "exponentials",
    "fast_size",
    "fourier_multiply",
    "isometric_dft",
    "isometric_dft_error",
    "transfer_matrix",
]

CHUNK = 16  # images transformed at a time on the CPU: their spectra are transposed while they are in its cache


Grid = tuple[int, int]


def fast_size(size: int) -> int:
    """The smallest integer of at least `size` without prime factors above 11, which transforms quickly.

    >>> fast_size(33), fast_size(34)
    (33, 35)
    """
    while True:
        rest = size
        for factor in (2, 3, 5, 7, 11):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def exponentials(frequencies: Tensor, taps: int, size: int, dtype: torch.dtype) -> Tensor:
    """exp(−2πi·f·(t − centre)/size) for the taps t of a kernel, (frequencies, taps).

    Args:
        frequencies: (n,), integers.
        taps: how many.
        size: of the torus.
        dtype: of the angles, real.

    >>> exponentials(torch.tensor([2]), 3, 4, torch.float64).real.round()
    tensor([[-1.,  1., -1.]], dtype=torch.float64)
    """
    t = torch.arange(taps, device=frequencies.device) - (taps - 1) // 2
    # the product is reduced modulo the size while it is an exact integer: no error grows with f·t
    angle = (frequencies[:, None] * t[None, :] % size).to(dtype) * (-2 * math.pi / size)
    return torch.polar(torch.ones_like(angle), angle)


def isometric_dft(positions: Tensor, size: int, half: bool = False) -> Tensor:
    """The columns of the unitary DFT for some positions of a signal, whose norm it keeps.

    exp(−2πi·f·t/N)·√(c_f/N) for the frequencies f and the positions t. c_f is 1; for the half spectrum of real signals,
    f ≤ N/2, it is 2 where the frequency −f is another one. In float64: angles are reduced while they are integers.

    Args:
        positions: (n,), integers, taken modulo the size.
        size: N.
        half: whether for the half spectrum.

    Returns:
        (N or N//2 + 1, n), complex128.

    >>> F = isometric_dft(torch.arange(3), 4, half=True)
    >>> torch.allclose((F.mH @ F).real, torch.eye(3, dtype=torch.float64))
    True
    """
    f = torch.arange(size // 2 + 1 if half else size, device=positions.device)
    count = 1 + (half & (2 * f % size != 0))
    angle = (f[:, None] * positions % size).double() * (-2 * math.pi / size)
    return torch.polar((count.double() / size).sqrt()[:, None].expand_as(angle), angle)


def isometric_dft_error(n: int) -> float:
    """Upper bound on the error of `isometric_dft` at n positions, in the Frobenius norm.

    With u = 2⁻⁵³ an angle below 2π is off by 3u relatively, less than 19u; cos and sin by 4 units in the last place, 8u
    at most; √(c/N) and the product with it by 2.5u relatively: each part by less than 32u·√(c/N). Over the frequencies
    c/N adds up to 1 in each of the n columns, for both parts.

    >>> isometric_dft_error(32) < 1e-13
    True
    """
    return upward.product(32 * 2.0**-53, upward.root(2 * n))


def transfer_matrix(kernel: Tensor, size: Grid) -> Tensor:
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
    out, channels, kh, kw = kernel.shape[-4:]
    rows = exponentials(torch.arange(size[0], device=kernel.device), kh, size[0], kernel.dtype)
    columns = exponentials(torch.arange(size[1] // 2 + 1, device=kernel.device), kw, size[1], kernel.dtype)
    basis = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (H·K, kh·kw)
    taps = rearrange(kernel, "... o i a b -> ... (a b) (o i)").to(basis.dtype)
    return (basis @ taps).unflatten(-1, (out, channels)).unflatten(-3, (size[0], -1))


def _joined(chunks: list[Tensor], dim: int) -> Tensor:
    return torch.cat(chunks, dim) if len(chunks) > 1 else chunks[0]


def _spectrum(x: Tensor, grid: Grid) -> Tensor:
    """Half spectrum of real images at the origin of a grid of zeros: (B, C, h, w) → (H, W//2 + 1, C, B)."""
    if not len(x):  # MKL refuses to transform no image
        return torch.view_as_complex(x.new_zeros(grid[0], grid[1] // 2 + 1, x.shape[1], 0, 2))
    step = CHUNK if x.device.type == "cpu" else max(1, len(x))
    chunks = [torch.fft.rfft2(part, s=grid).permute(2, 3, 1, 0) for part in x.split(step)]
    return _joined(chunks, -1).contiguous()


def _from_spectrum(X: Tensor, grid: Grid, size: Grid) -> Tensor:
    """The first h × w pixels of the images with the half spectrum X: (H, W//2 + 1, C, B) → (B, C, h, w)."""
    if not X.shape[-1]:
        return X.real.new_zeros(0, X.shape[2], *size)
    step = CHUNK if X.device.type == "cpu" else max(1, X.shape[-1])
    chunks = [torch.fft.irfft2(part.permute(3, 2, 0, 1), s=grid) for part in X.split(step, -1)]
    return _joined([image[..., : size[0], : size[1]] for image in chunks], 0).contiguous()


def _multiply(x: Tensor, transfer: Tensor, grid: Grid, size: Grid) -> Tensor:
    return _from_spectrum(transfer @ _spectrum(x, grid), grid, size)


class _FourierMultiply(torch.autograd.Function):
    """`_multiply` with its adjoint written out: torch's derivative of rfft2 transforms the whole complex spectrum.

    The adjoints of rfft2 and irfft2 are each other's up to a factor for each frequency, which cancels in the gradient
    of x: it is the convolution with the adjoint transfer matrices.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, transfer: Tensor, grid: Grid, size: Grid) -> tuple[Tensor, Tensor]:
        X = _spectrum(x, grid)
        return _from_spectrum(transfer @ X, grid, size), X

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, transfer, ctx.grid, ctx.size = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros for the spectrum
        ctx.save_for_backward(x, transfer, output[1])
        ctx.save_for_forward(x, transfer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gradient is None:
            return None, None, None, None
        x, transfer, X = ctx.saved_tensors
        G = _spectrum(gradient, ctx.grid)
        size = (x.shape[-2], x.shape[-1])
        grad_x = _from_spectrum(transfer.mH @ G, ctx.grid, size) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        if torch.is_grad_enabled():
            X = _spectrum(x, ctx.grid)  # in terms of x, so that this may be differentiated again
        return grad_x, G @ X.mH * _multiplicity(ctx.grid, gradient), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, d_transfer: Tensor | None, *_: None) -> tuple[Tensor, None]:  # type: ignore[override]
        x, transfer = ctx.saved_tensors
        parts = []
        if dx is not None:
            parts.append(_multiply(dx, transfer, ctx.grid, ctx.size))
        if d_transfer is not None:
            parts.append(_multiply(x, d_transfer, ctx.grid, ctx.size))
        return sum(parts[1:], parts[0]), None


def _multiplicity(grid: Grid, like: Tensor) -> Tensor:
    """How often each frequency of the half spectrum stands in the whole one, over H·W, as (W//2 + 1, 1, 1)."""
    height, width = grid
    share = torch.full((width // 2 + 1, 1, 1), 2 / (height * width), dtype=like.dtype, device=like.device)
    share[:: width // 2 if width % 2 == 0 else width].fill_(1 / (height * width))  # the frequency 0, and ½
    return share


def fourier_multiply(x: Tensor, transfer: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Circular convolution with given transfer matrices, irfft2(Ŵ(ω)·rfft2(x)), of images at the origin of a grid.

    Args:
        x: (B, in, h, w), real; zeros fill it up to the grid.
        transfer: (H, W//2 + 1, out, in), complex, of a real convolution: Ŵ(−ω) is the conjugate of Ŵ(ω).
        grid: (H, W), at least (h, w).
        size: how many rows and columns of the result to keep, from the origin.

    Returns:
        (B, out, *size).

    >>> x = torch.randn(2, 3, 4, 5)
    >>> y = fourier_multiply(x, torch.eye(3, dtype=torch.cfloat).expand(6, 4, 3, 3), (6, 6), (4, 5))
    >>> torch.allclose(y, x, atol=1e-6)
    True
    """
    if torch.compiler.is_compiling():
        return _multiply(x, transfer, grid, size)
    return _FourierMultiply.apply(x, transfer, grid, size)[0]
