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
  ‖K‖² ≤ min(b/κ'², (a + b)/2 + (b − a)/2κ);
- eigenvalues of σ(ω) near the supremum M = ‖K‖². With c at most the mean of M and the least of all, xᴴ(σ − cI)x, x
  the eigenvector of M, is, on a line through the supremum, a function of exponential type that is bounded by M − c,
  its value there. So after a step δ it keeps cos(τ) of it, τ = Σ_j|δ_j|(k_j − 1) ≤ π/2 (Duffin and Schaeffer 1938): the
  point of a lattice next to the supremum keeps κ'' = cos(Σ_j π(k_j − 1)/N_j). Points that are proven to have less than
  c + κ''(l − c), l a lower bound of M, are not next to it; the cells of the others are divided again.
  ‖K‖² ≤ c + (b − c)/κ'', b over the others.

and at least max_i (A_0)_ii − γ_n·size (mean over ω of σ_ii), and any Rayleigh quotient of any σ(ω).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from liplayers.errors import ArgumentError, NonFiniteError, ShapeError
from liplayers.linalg import upward
from liplayers.linalg.convolution import autocorrelation, grid_slack, polyphase
from liplayers.linalg.fourier import Grid, exponentials
from liplayers.linalg.norms import frobenius_norm
from liplayers.linalg.orthogonal import skew_polynomial_bound

__all__ = [
    "Enclosure",
    "Real",
    "conv_norm_enclosure",
    "eigenvalues_exceed",
    "entry_norm",
    "largest_norm_enclosure",
    "norm_enclosure",
    "product_gamma",
    "skew_polynomial_conv_bound",
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
        grid: frequencies N along each axis of the first grid; at least 4(k − 1) are taken, k the taps of the polyphase
            kernel, by default 8(k − 1). Around the largest it is made finer, up to 64 times: the bound then exceeds
            the norm by 2e-5. Where many are nearly as large it stops earlier: 1e-3 or so.

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
    height, width = (max(4 * (k - 1), grid or 8 * (k - 1), 1) for k in kernel.shape[-2:])
    return _enclosure(name, kernel, tolerance, (height, width))


def skew_polynomial_conv_bound(coefficients: tuple[float, ...], kernel: Tensor) -> float:
    """At least ‖p(L)‖ for p = Σ_j c_j Lʲ and the convolution L with a skew kernel, for images of every size.

    With zero padding L is a compression of the convolution on the infinite grid, with circular padding it is block
    diagonal in values of its symbol: it is skew and not longer. Where bounds that need no eigenvalues prove a
    contraction they are enough.

    Args:
        coefficients: c_0, c_1, …
        kernel: (n, n, kh, kw), skew: L_ij(t) = −L_ji(−t), of odd sides.

    Raises:
        NonFiniteError: the kernel contains NaN or infinity.

    >>> bound = skew_polynomial_conv_bound((1.0, 1.0), torch.tensor([[[[-1.0, 0.0, 1.0]]]]))
    >>> round(bound, 3)  # 1 + 2i·sin(ω)
    2.236
    """
    bound = skew_polynomial_bound(coefficients, conv_norm_enclosure(kernel, tolerance=math.inf).upper)
    return bound if bound <= 1 else skew_polynomial_bound(coefficients, conv_norm_enclosure(kernel).upper)


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
        bottom, top, grid = _symbol_bounds(lags, size, rounding, grid)
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


class _Symbol:
    """The symbol of lags at points of a lattice 2π·p/N, and what its entries are off by."""

    def __init__(self, lags: Tensor, size: float, rounding: float) -> None:
        self.taps = lags.shape[-2:]
        self.matrices = rearrange(lags, "g o i a b -> (a b) (g o i)").to(torch.complex128)
        self.shape = lags.shape[:3]
        # an exponential is a product of two, of angles below 2π to 3u relatively, cos and sin to 8u: 128u in all
        several = 0.0 if self.taps == (1, 1) else _gamma(8 * (2 * math.prod(self.taps) + 8) + 128)
        self.error = _up((rounding + several) * size, 1)
        self.real = lags if self.taps == (1, 1) else None

    def at(self, points: Tensor, lattice: Grid) -> Iterator[Tensor]:
        """The Hermitian matrices at points (n, 2), of all groups for each point, (n·groups, p, p), in parts."""
        if self.real is not None:
            yield _hermitian(self.real[..., 0, 0])
            return
        for part in points.split(max(1, _CHUNK // math.prod(self.shape))):
            axes = zip(part.unbind(1), self.taps, lattice, strict=True)
            basis = [exponentials(index, taps, size, torch.float64) for index, taps, size in axes]
            symbol = (basis[0][:, :, None] * basis[1][:, None, :]).flatten(1) @ self.matrices
            yield _hermitian(symbol.unflatten(1, self.shape).flatten(0, 1))

    def largest(self, points: Tensor, lattice: Grid) -> tuple[Tensor, Tensor]:
        """Computed largest and least eigenvalues at each point."""
        values = [torch.linalg.eigvalsh(G) for G in self.at(points, lattice)]
        found = torch.cat(values).view(len(points), -1, self.shape[1])
        return found[..., -1].amax(1), found[..., 0].amin(1)

    def above(self, points: Tensor, lattice: Grid, guess: float) -> float:
        """A proven bound of the largest eigenvalue at the points; close to `guess` if that is close to it."""
        return _up(max(_largest_eigenvalue_bound(G, guess) for G in self.at(points, lattice)) + self.error, 1)

    def below(self, points: Tensor, lattice: Grid, guess: float) -> float:
        """A proven bound of the least eigenvalue at the points, at least 0."""
        above = max(_largest_eigenvalue_bound(-G, -guess) for G in self.at(points, lattice))
        return max(0.0, -_up(above, 1) - _up(self.error, 1))

    def attained(self, point: Tensor, lattice: Grid) -> float:
        """A proven lower bound of the largest eigenvalue at a point, by a Rayleigh quotient."""
        found = [_rayleigh_quotient(matrix) for G in self.at(point[None], lattice) for matrix in G]
        return max(found) - _up(self.error, 1)


def _hermitian(G: Tensor) -> Tensor:
    below = G.tril(-1)
    return below + below.mH + torch.diag_embed(G.diagonal(dim1=-2, dim2=-1).real).to(G.dtype)


def _symbol_bounds(lags: Tensor, size: float, rounding: float, grid: Grid) -> tuple[float, float, Grid]:
    """Lower and upper bound of ‖K‖² from the eigenvalues of the symbol of the lags, and the finest lattice used.

    On the grid and, where the supremum may be, on lattices that are twice as fine each.
    """
    symbol = _Symbol(lags, size, rounding)
    taps = tuple((n + 1) // 2 for n in symbol.taps)
    if taps == (1, 1):
        grid = (1, 1)  # the symbol does not depend on the frequency
    # of a real kernel −ω has the conjugate of ω
    points = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1] // 2 + 1))
    low = high = 0.0
    count = len(points)
    for level in range(_LEVELS):
        values, least = symbol.largest(points, grid)
        low = max(low, symbol.attained(points[values.argmax()], grid))
        if level == 0:
            high = symbol.above(points, grid, values.max().item())
            if taps == (1, 1):
                return low, high, grid
            bottom = symbol.below(points, grid, least.min().item())
            slack = _up(grid_slack(tuple(symbol.taps), grid), 16)
            middle, half = (high + bottom) / 2, (high - bottom) / 2
            centre = (max(0.0, middle - half * slack - 8 * _U * high) + low) / 2
            high = min(_up(high * _up(grid_slack(taps, grid), 16) ** 2, 3), _up(middle + half * slack, 8))
        kept = _kept_nearby(tuple(symbol.taps), grid)
        least_near = centre + kept * (low - centre) - 8 * _U * low
        near = values > least_near - 1e-9 * low
        if not near.all() and symbol.above(points[~near], grid, values[~near].max().item()) >= least_near:
            near[:] = True
        if kept > 0:
            top = symbol.above(points[near], grid, values.max().item())
            high = min(high, _up(centre + (top - centre) / kept, 8))
        finer = (2 * grid[0], 2 * grid[1])
        children = _children(points[near], finer)
        count += len(children)
        if high <= low * (1 + 1e-6) or count > _MOST_POINTS or count * lags.shape[1] ** 3 > _MOST_WORK:
            break
        points, grid = children, finer
    return low, high, grid


_LEVELS = 7
_MOST_POINTS = 4096
_MOST_WORK = 2.0**36  # points times n³: some minutes of a CPU


def _kept_nearby(taps: tuple[int, ...], lattice: Grid) -> float:
    """At most the share of its supremum that a symbol has in norm at the point of the lattice nearest to it."""
    angle = sum(math.pi * (k - 1) / (2 * N) for k, N in zip(taps, lattice, strict=True))
    return max(0.0, math.cos(_up(angle, 8)) * (1 - 8 * _U))


def _children(points: Tensor, lattice: Grid) -> Tensor:
    """The points of a lattice twice as fine in the cells around the given ones, one of each pair ±ω."""
    offsets = torch.arange(-1, 2)
    around = 2 * points[:, None] + torch.cartesian_prod(offsets, offsets)
    sizes = torch.tensor(lattice)
    found = around.flatten(0, 1) % sizes
    opposite = -found % sizes
    order = found[:, 0] * lattice[1] + found[:, 1] > opposite[:, 0] * lattice[1] + opposite[:, 1]
    return torch.where(order[:, None], opposite, found).unique(dim=0)


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
