"""Proven enclosures of the norms of matrices and convolutions, the rounding of their computation included.

What the proofs assume: IEEE float64 with rounding to nearest, subnormal numbers not flushed, cos and sin within 4 units
in the last place, and matrix products and sums in the usual arithmetic: any order, with or without fused multiply-add,
three or four real products for a complex one. Nothing is assumed of LAPACK; its results are verified by products.

Notation: u = 2⁻⁵³, γ_n = nu/(1 − nu), K the weight scaled by a power of two so that its largest entry is in [1/2, 1),
|K| the matrix of the sums of the absolute taps. Everything is computed from the lags A_q of K*K (or KK*, the smaller),
for a matrix the one Gram matrix. Their errors form a convolution dominated entry by entry by γ_n|K|ᵀ|K|, n the length
of the inner products, hence of norm at most γ_n·size, size = min(‖|K|‖_F², ‖|K|‖₁‖|K|‖_∞).

‖K‖² is at most (q over the lags, ω over all frequencies, σ the exact A_q's symbol Σ_q A_q e^(−i⟨ω, q⟩))

- entries: size, since ‖K‖ ≤ ‖|K|‖;
- row sums: √(‖Σ_q|A_q|‖₁‖Σ_q|A_q|‖_∞) + γ_n·size;
- residual: c + Σ_q ‖A_q − c·δ_q·I‖_F + γ_n·size for any c, here the mean of A_0's diagonal;
- eigenvalues of σ(ω), enclosed in [a, b] for all ω of a grid (a matrix has one ω). The entries of σ are polynomials
  of degree k − 1 in each e^(iω), so by M. Riesz' inequality the norm of any combination of them keeps at least
  κ = ∏cos(π(k − 1)/N) of its supremum on N points along each axis, and K's own symbol keeps κ' = ∏cos(π(k − 1)/2N):
  ‖K‖² ≤ min(b/κ'², (a + b)/2 + (b − a)/2κ).

and at least max_i (A_0)_ii − γ_n·size (mean over ω of σ_ii), and any Rayleigh quotient of any σ(ω).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from liplayers.errors import ArgumentError, NonFiniteError, ShapeError
from liplayers.linalg import upward
from liplayers.linalg.convolution import autocorrelation, grid_slack, polyphase
from liplayers.linalg.fourier import Grid, transfer_matrix
from liplayers.linalg.norms import frobenius_norm

__all__ = [
    "Enclosure",
    "Real",
    "conv_norm_enclosure",
    "eigenvalues_exceed",
    "entry_norm",
    "largest_norm_enclosure",
    "norm_enclosure",
    "product_gamma",
    "weighted_row_sum_norm",
]

Real = TypeVar("Real", float, Tensor)

_U = 2.0**-53
_UNDERFLOW = 2.0**-400  # of the square of a norm ≥ 1/2: more than is lost by roots of squares that are no floats
_CHUNK = 2**20  # entries of the matrices that are factorised at a time, so that they stay in the cache


@dataclass(frozen=True)
class Enclosure:
    """lower ≤ norm ≤ upper, both proven, and the method that gave the upper end."""

    lower: float
    upper: float
    method: str


def norm_enclosure(W: Tensor, tolerance: float = 1e-6) -> Enclosure:
    """Enclosure of the spectral norm of a matrix, from cheap to tight until upper/lower − 1 ≤ tolerance.

    Computed on the CPU; half and single precision are converted to float64, exactly. The tightest method comes within
    n²·10⁻¹⁶ or so.

    Args:
        W: (m, n), real.
        tolerance: relative; 0 tries everything.

    Raises:
        NonFiniteError: W contains NaN or infinity.
        ShapeError: W is not a matrix.
        ArgumentError: W is not a real floating-point tensor.

    Source: S. M. Rump, Verification of positive definiteness, BIT 46, 2006; here with the factorisation's residual
    computed in place of LAPACK's error analysis.

    >>> found = norm_enclosure(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    >>> found.lower <= 5 <= found.upper, found.upper - found.lower < 1e-12
    (True, True)
    """
    if W.dim() != 2:
        raise ShapeError(f"norm_enclosure: W has the shape {tuple(W.shape)}; expected two dimensions")
    return _enclosure("norm_enclosure: W", W[None, :, :, None, None], tolerance, (1, 1))


def largest_norm_enclosure(W: Tensor, tolerance: float = 1e-6) -> Enclosure:
    """Enclosure of the largest spectral norm of several matrices, max_b ‖W_b‖; otherwise as `norm_enclosure`.

    Args:
        W: (..., m, n), real or complex.
        tolerance: relative; 0 tries everything.

    Raises:
        NonFiniteError: W contains NaN or infinity.
        ShapeError: W has fewer than two dimensions.
        ArgumentError: W is not a floating-point tensor.

    >>> found = largest_norm_enclosure(torch.tensor([[[1.0]], [[3.0 + 4.0j]]]))
    >>> found.lower <= 5 <= found.upper, found.upper - found.lower < 1e-12
    (True, True)
    """
    name = "largest_norm_enclosure: W"
    if W.dim() < 2:
        raise ShapeError(f"{name} has the shape {tuple(W.shape)}; expected two dimensions or more")
    return _enclosure(name, W.reshape(-1, *W.shape[-2:])[..., None, None], tolerance, (1, 1), complex_too=True)


def entry_norm(W: Tensor) -> float:
    """At least the norm of every matrix whose entries are no larger than those of W: min(‖W‖_F, √(‖W‖₁‖W‖_∞)).

    For what rounding may do to a weight; of a kernel, with the sums of the absolute taps as W.

    Args:
        W: (..., m, n), real or complex and finite; of several matrices the largest norm.

    >>> entry_norm(torch.tensor([[3.0, -4.0]])) >= 5
    True
    """
    K, exponent = _scaled_down(W.reshape(-1, *W.shape[-2:])[..., None, None])
    return _scaled(_root_above(_size(K)), exponent, math.inf) if K.any() else 0.0


def product_gamma(n: int, like: Tensor) -> float:
    """ε with |fl(XY) − XY| ≤ ε|X||Y| for inner products of length n, of the dtype of `like`: float64 or complex128."""
    return _gamma(8 * (2 * n + 8)) if like.is_complex() else _gamma(n + 2)


def eigenvalues_exceed(G: Tensor, bound: float) -> bool:
    """Whether every eigenvalue of Hermitian matrices is proven to be at least `bound`.

    G − tI is factorised for a t that exceeds the bound by twice what the rounding of a factorisation may cost.

    Args:
        G: (..., p, p), float64 or complex128; its lower triangle is read.

    >>> eigenvalues_exceed(torch.eye(3, dtype=torch.float64), 0.999), eigenvalues_exceed(torch.eye(3).double(), 1.0)
    (True, False)
    """
    A = G.tril(-1).reshape(-1, *G.shape[-2:])
    A = A + A.mH
    diagonal = G.diagonal(dim1=-2, dim2=-1).real.reshape(len(A), -1)
    t = bound + 2 * product_gamma(G.shape[-1], G) * diagonal.clamp_min(0).sum(-1).amax().item()
    A.diagonal(dim1=-2, dim2=-1).copy_(diagonal - t)
    L, failed = torch.linalg.cholesky_ex(A)
    return not failed.any() and upward.total(bound, _below_zero(A, L), -t) <= 0


def conv_norm_enclosure(
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    tolerance: float = 1e-6,
    grid: int | None = None,
) -> Enclosure:
    """Enclosure of the norm of torch's conv2d with `weight` on the infinite grid, which is its supremum over images.

    The upper end holds for every image size, for zero padding of any width, and for circular padding of at most k − 1
    in all along each axis, k the span of the dilated kernel, where the stride divides the image. The lower end is one
    of the supremum: large images approach it, a small one may stay below.

    Args:
        weight: (out, in/groups, kh, kw), real, as torch holds it.
        tolerance: relative; 0 tries everything.
        grid: frequencies N along each axis; at least 4(k − 1) are taken, k the taps of the polyphase kernel. By
            default 32(k − 1), which exceeds the norm by 2.4e-3 at most, but no more than 64, nor than 32 for more
            than 128 channels on the smaller side.

    Raises:
        NonFiniteError: the weight contains NaN or infinity.
        ShapeError: the weight has not four dimensions, or groups do not divide its outputs.
        ArgumentError: the weight is not a real floating-point tensor, or the grid is not positive.

    >>> found = conv_norm_enclosure(torch.ones(1, 1, 3, 3) / 9)
    >>> found.lower <= 1.0000001, found.upper < 1.01
    (True, True)
    """
    name = "conv_norm_enclosure: weight"
    if weight.dim() != 4 or groups < 1 or weight.shape[0] % groups:
        raise ShapeError(
            f"{name} has the shape {tuple(weight.shape)} with groups={groups}; "
            f"expected (out, in/groups, kh, kw), groups a divisor of out"
        )
    if grid is not None and grid < 1:
        raise ArgumentError(f"conv_norm_enclosure: grid={grid}; expected an integer of at least 1")
    kernel = rearrange(weight.detach(), "(g o) i a b -> g o i a b", g=groups)
    # a common factor reads a sublattice; then dilation permutes, shifts and stretches the phases, which keeps the norm
    sh, sw = (s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True))
    kernel = polyphase(kernel, (sh, sw))
    most = 64 if min(kernel.shape[1:3]) <= 128 else 32
    height, width = (max(4 * (k - 1), grid or min(most, 32 * (k - 1)), 1) for k in kernel.shape[-2:])
    return _enclosure(name, kernel, tolerance, (height, width))


def weighted_row_sum_norm(weight: Tensor, steps: int = 50) -> float:
    """At least the norm of a convolution of stride 1, as `conv_norm_enclosure`, by what SLL and AOL are normalised by.

    ‖K‖² ≤ max_i (Su)_i/u_i + γ_n·size for any u > 0 (Collatz and Wielandt), S = Σ_q|A_q| of KK*, which is symmetric; u
    goes from 1 towards Perron's vector. Tight where S is that of a normalised kernel.

    Args:
        weight: (out, in, kh, kw), real and finite.
        steps: how often u is multiplied by S.

    >>> weighted_row_sum_norm(torch.eye(2)[..., None, None]) - 1 < 1e-14
    True
    """
    K, exponent = _scaled_down(weight[None])
    absolute = autocorrelation(K, "out")[0].abs().sum((2, 3))
    S = torch.maximum(absolute, absolute.mT)
    u, least = torch.ones_like(S[:, :1]), math.inf
    for _ in range(steps):
        v = S @ u
        least = min(least, (v / u).amax().item())
        u = (v / v.amax().clamp_min(1e-100)).clamp_min(1e-100)
    error = _up(product_gamma(K[0, 0].numel(), K) * _size(K), 1)
    square = _up(least, absolute.shape[0] + 4 * K.shape[-2] * K.shape[-1] + 8) + error
    return _scaled(_root_above(_up(square, 1)), exponent, math.inf)


def _enclosure(name: str, kernel: Tensor, tolerance: float, grid: Grid, complex_too: bool = False) -> Enclosure:
    """Of the stride-1 convolution with a kernel (groups, out, in, kh, kw) on the infinite grid; complex for one tap."""
    if not (kernel.is_floating_point() or (complex_too and kernel.is_complex())):
        kind = "floating-point or complex" if complex_too else "real floating-point"
        raise ArgumentError(f"{name} has the dtype {kernel.dtype}; expected a {kind} dtype")
    if not torch.isfinite(kernel).all():
        raise NonFiniteError(f"{name} contains NaN or infinity; its norm cannot be enclosed")
    K, exponent = _scaled_down(kernel)
    if not K.any():
        return Enclosure(0.0, 0.0, "zero")
    lags = autocorrelation(K, "in" if K.shape[2] <= K.shape[1] else "out")
    size = _size(K)
    inner = max(K.shape[1:3]) * K.shape[-2] * K.shape[-1]
    rounding = product_gamma(inner, K)
    low, bounds = _direct_bounds(lags, size, rounding)
    high, method = min((bound, method) for method, bound in bounds.items())
    if high > low * (1 + tolerance) ** 2:
        bottom, top = _symbol_bounds(lags, size, rounding, grid)
        low = max(low, bottom)
        if top < high:
            high, method = top, "Cholesky" if lags.shape[-2:] == (1, 1) else f"symbol on {grid[0]} × {grid[1]}"
    lower = math.nextafter(math.sqrt(max(0.0, low - 2 * _UNDERFLOW)), 0)
    return Enclosure(_scaled(lower, exponent, 0.0), _scaled(_root_above(high), exponent, math.inf), method)


def _scaled_down(kernel: Tensor) -> tuple[Tensor, int]:
    """On the CPU in float64, times 2^−exponent: the largest real or imaginary part is in [1/2, 1), exactly."""
    K = kernel.detach().cpu().to(torch.complex128 if kernel.is_complex() else torch.float64)
    parts = torch.view_as_real(K.resolve_conj()) if K.is_complex() else K
    exponent = math.frexp(parts.abs().amax().item() if K.numel() else 0.0)[1]
    half = -exponent // 2  # one factor might not be a float
    return K * 2.0**half * 2.0 ** (-exponent - half), exponent


def _root_above(square: float) -> float:
    """√x from above, x at most `square` but for what underflow took from it."""
    return math.nextafter(math.sqrt(_up(square + _UNDERFLOW, 1)), math.inf)


def _scaled(value: float, exponent: int, towards: float) -> float:
    """value·2^exponent, rounded in a direction."""
    try:
        return math.nextafter(math.ldexp(value, exponent), towards)
    except OverflowError:
        return math.nextafter(math.inf, towards)


def _up(x: Real, roundings: int) -> Real:
    """At least the exact value of what was computed as x, a positive expression, by so many roundings in a row."""
    return x * (1 + (roundings + 2) * 2 * _U)


def _gamma(n: int) -> float:
    """At least γ_n, for n < 8·10¹²."""
    return 1.001 * n * _U


def _size(K: Tensor) -> float:
    """At least min(‖|K|‖_F², ‖|K|‖₁‖|K|‖_∞), the largest of all groups."""
    _, out, channels, kh, kw = K.shape
    absolute = K.abs().sum((3, 4))
    mixed = _up(absolute.sum(1).amax(-1) * absolute.sum(2).amax(-1), out + channels + 2 * kh * kw)
    square = _up(absolute.square().sum((1, 2)), out * channels + 2 * kh * kw)
    return torch.minimum(mixed, square).amax().item()


def _direct_bounds(lags: Tensor, size: float, rounding: float) -> tuple[float, dict[str, float]]:
    """A lower bound of ‖K‖², and upper bounds by method, that need no eigenvalues."""
    error = _up(rounding * size, 1)
    n = lags[0].numel()
    centre = lags[..., lags.shape[-2] // 2, lags.shape[-1] // 2]
    diagonal = centre.diagonal(dim1=-2, dim2=-1).real
    mean = diagonal.mean(-1)
    residual = lags.clone()
    residual[..., lags.shape[-2] // 2, lags.shape[-1] // 2].diagonal(dim1=-2, dim2=-1).sub_(mean[:, None])
    absolute = lags.abs().sum((3, 4))  # the computed lags are symmetric only to rounding: rows and columns
    distance = residual.abs().square().sum((1, 2)).sqrt().sum((1, 2))
    bounds = {
        "entries": size,
        "row sums": _up((absolute.sum(1).amax(-1) * absolute.sum(2).amax(-1)).sqrt().amax().item(), n + 8) + error,
        "residual": _up((mean + distance).amax().item(), n + 12) + error,
    }
    low = diagonal.amax().item()
    return low - _up(error + low * _U, 2), {method: _up(bound, 1) for method, bound in bounds.items()}


def _symbol_bounds(lags: Tensor, size: float, rounding: float, grid: Grid) -> tuple[float, float]:
    """Lower and upper bound of ‖K‖² from the eigenvalues of the symbol of the lags on a grid."""
    taps = lags.shape[-2] * lags.shape[-1]
    if taps == 1:
        symbol = lags[..., 0, 0]
    else:
        # an exponential is a product of two, of angles below 2π to 3u relatively, cos and sin to 8u: 128u in all
        symbol = transfer_matrix(lags, grid).flatten(0, 2)
        rounding = rounding + _gamma(8 * (2 * taps + 8) + 128)
    error = _up(rounding * size, 1)
    below = symbol.tril(-1)
    G = below + below.mH + torch.diag_embed(symbol.diagonal(dim1=-2, dim2=-1).real).to(symbol.dtype)
    low, high, bottom = _eigenvalues(G)
    high, bottom = _up(high + error, 1), max(0.0, bottom - _up(error, 1))
    low -= _up(error, 1)
    if taps == 1:
        return low, high
    kernel_slack = _up(grid_slack(tuple((n + 1) // 2 for n in lags.shape[-2:]), grid), 16)
    gram_slack = _up(grid_slack(tuple(lags.shape[-2:]), grid), 16)
    around_middle = _up(high * (1 + gram_slack) / 2, 4) - bottom * (gram_slack - 1) / 2 * (1 - 8 * _U)
    return low, min(_up(high * kernel_slack**2, 3), _up(around_middle, 2))


def _eigenvalues(G: Tensor) -> tuple[float, float, float]:
    """For Hermitian matrices (B, p, p): lower and upper bound of the largest eigenvalue of all, lower of the least."""
    parts = G.split(max(1, _CHUNK // G[0].numel()))
    values = torch.cat([torch.linalg.eigvalsh(part) for part in parts])
    largest, index = values[:, -1].max(0)
    high = max(_largest_eigenvalue_bound(part, largest.item()) for part in parts)
    least = values[:, 0].amin().item()
    bottom = 0.0
    if least > 0.5 * largest.item():
        bottom = -max(_largest_eigenvalue_bound(-part, -least) for part in parts)
    return _rayleigh_quotient(G[index]), high, bottom


def _largest_eigenvalue_bound(G: Tensor, guess: float) -> float:
    """Upper bound on the largest eigenvalue of Hermitian matrices (B, p, p), close to `guess` if that is close to it.

    With A = fl(sI − G) and any matrix L, s − λ_max(G) ≥ λ_min(A) − u·max|A_ii| ≥ −‖A − LL*‖ − u·max|A_ii|, and the
    computed LL* is off by at most γ‖L‖_F². L is A's Cholesky factor for the smallest s that has one, tried from the
    guess upwards.
    """
    p = G.shape[-1]
    scale = max(abs(guess), G.diagonal(dim1=-2, dim2=-1).real.abs().amax().item())
    margin = 8 * p * _U * scale
    while True:
        s = guess + margin
        A = -G
        A.diagonal(dim1=-2, dim2=-1).add_(s)
        L, failed = torch.linalg.cholesky_ex(A)
        if not failed.any():
            break
        margin *= 8
    return math.nextafter(s + _below_zero(A, L), math.inf)


def _below_zero(A: Tensor, L: Tensor) -> float:
    """How far below 0 the eigenvalues of matrices of the diagonal fl(s − G_ii) may be, L nearly their Cholesky factor.

    That is ‖A − LL*‖ + u·max|A_ii|, with what the computation of LL* may be off by.
    """
    p = A.shape[-1]
    product_error = product_gamma(p, A) * frobenius_norm(L).square()
    distance = frobenius_norm(A - L @ L.mH)
    diagonal_error = _U * A.diagonal(dim1=-2, dim2=-1).real.abs().amax(-1)
    return _up((distance + product_error + diagonal_error).amax().item(), 4 * p * p + 16)


def _rayleigh_quotient(G: Tensor) -> float:
    """Lower bound on the largest eigenvalue of a Hermitian matrix, (p, p): v*Gv/v*v less its rounding error.

    With g = γ_{8(2p + 8)}: Gv and the sum v*(Gv) are off by g|v|ᵀ|G||v| ≤ g‖G‖_F‖v‖² each, ‖v‖² and the ratio by less.
    """
    v = torch.linalg.eigh(G).eigenvectors[:, -1]
    quotient = ((v.conj() * (G @ v)).real.sum() / v.abs().square().sum()).item()
    error = 10 * _gamma(8 * (2 * len(v) + 8)) * frobenius_norm(G).item()
    return math.nextafter(quotient - error, -math.inf)
