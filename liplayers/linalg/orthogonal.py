"""Maps from a free matrix to an orthogonal one or to a contraction.

Every function works on (..., m, n), real or complex, batched over the leading dimensions. "Orthogonal" means
orthonormal columns where m ≥ n and orthonormal rows where m < n.

The error of a factorisation grows with the condition number of the free matrix, which training does not bound, and
would carry the result out of the unit ball. `_within_unit_ball` measures what is left of it and divides it away, so
that the returned map is a contraction whatever the free matrix was.

The maps by factorisation have derivatives of their own, a few products each, where autograd would go through the
factorisation once more; they can be differentiated once.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from numpy.polynomial import chebyshev
from torch import Tensor, nn

from liplayers.linalg import upward
from liplayers.linalg.norms import (
    differentiable_once,
    frobenius_norm,
    gram,
    gram_iteration_bound,
    minus_identity_,
    unit_rows,
)

__all__ = [
    "CAYLEY_LIMIT",
    "block_reflector",
    "cayley",
    "cayley_inverse",
    "cholesky_orthogonal",
    "fill_orthogonal_",
    "newton_schulz",
    "projector",
    "rotation",
    "skew_exponential",
    "skew_exponential_coefficients",
    "skew_logarithm",
    "skew_polynomial_bound",
    "to_double",
]

CAYLEY_LIMIT = 1e3


def to_double(x: Tensor) -> Tensor:
    """`x` in float64, or complex128 if it is complex."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _within_unit_ball(Q: Tensor, full_rank: bool) -> Tensor:
    """Divide an almost isometric Q by √(1 + δ), δ = ‖G − I‖_F of its Gram matrix; then ‖Q‖ ≤ 1.

    Where Q may lack rank, δ = ‖G² − G‖_F: an eigenvalue λ of G obeys |λ² − λ| ≤ δ, hence λ ≤ 1 + δ. The factor is 1 up
    to rounding in every well-conditioned case; the backward pass takes it as a constant (δ is at its minimum there).
    """
    with torch.no_grad():
        G = gram(Q)
        shrink = (1 + frobenius_norm(minus_identity_(G) if full_rank else G @ G - G)).rsqrt()
    return Q * shrink[..., None, None]


def _cholesky_of_gram(X: Tensor) -> Tensor:
    """The Cholesky factor of XXᴴ for rows of norm 1 or 0, ridged beyond the rounding of both sides' sums."""
    S = X @ X.mH
    S.diagonal(dim1=-2, dim2=-1).add_(16 * sum(X.shape[-2:]) * torch.finfo(S.dtype).eps)
    L, failed = torch.linalg.cholesky_ex(S)
    return torch.where((failed != 0)[..., None, None], torch.nan, L)  # only NaN or infinite entries get here


_FIRST = 5  # steps after which well-conditioned matrices have converged


@lru_cache
def _minimax_scales(steps: int) -> tuple[float, ...]:
    """The factor α of each step, for singular values from the smallest ℓ that gets within 1e-8 of 1 up to 1.

    α = √(3/(1 + ℓ + ℓ²)) makes the images of ℓ and 1 equal, and the least of all (Chen & Chow 2014); ℓ moves on to
    that image. As α ≤ √3, every step maps [0, 1] into itself.
    """

    def run(low: float) -> tuple[list[float], float]:
        scales = []
        for _ in range(steps):
            scales.append(math.sqrt(3 / (1 + low + low * low)))
            low = scales[-1] * low * (3 - (scales[-1] * low) ** 2) / 2
        return scales, low

    # ℓ as its decimal exponent; below −3 the image of 1, about 2.6ℓ, would drown in the rounding of float32
    below, above = -3.0, 0.0
    for _ in range(40):
        middle = (below + above) / 2
        below, above = (below, middle) if run(10**middle)[1] > 1 - 1e-8 else (middle, above)
    return tuple(run(10**above)[0])


def _newton_schulz_scales(iterations: int) -> tuple[float, ...]:
    """Scales for singular values near each other, a step for rounding, then scales for values further apart.

    A scaled step takes apart what has converged: without the one between them, a last digit would cost a second round.
    """
    first = _minimax_scales(min(_FIRST, iterations))
    return (*first, 1.0, *_minimax_scales(iterations - _FIRST - 1)) if iterations > _FIRST else first


class _NewtonSchulz(torch.autograd.Function):
    """W ← WT, T = aI − bWᴴW, for a tall W. The adjoint of a step is D ↦ DT − bW(WᴴD + DᴴW).

    The scale that W starts with is taken as a constant: on what has converged it has no effect.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(P: Tensor, iterations: int) -> tuple[Tensor, ...]:
        norm = gram_iteration_bound(P, iterations=2)[..., None, None]
        norm = torch.where(norm > 0, norm, 1)
        W = P / norm
        saved = []
        for step, alpha in enumerate(_newton_schulz_scales(iterations)):
            G = W.mH @ W
            if step >= _FIRST and _converged(G):
                break
            T = (-0.5 * alpha**3) * G
            T.diagonal(dim1=-2, dim2=-1).add_(1.5 * alpha)
            saved += [W, T]
            W = W @ T
        return W, norm, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.iterations = inputs[1]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        P, norm, *saved = ctx.saved_tensors
        D = gradient
        steps = list(zip(saved[::2], saved[1::2], _newton_schulz_scales(ctx.iterations), strict=False))
        for W, T, alpha in reversed(steps):
            S = W.mH @ D
            D = D @ T - W @ ((0.5 * alpha**3) * (S + S.mH))
        return differentiable_once(D / norm, P, gradient), None


def _converged(G: Tensor) -> bool:
    """Whether every Gram matrix is the identity up to rounding; not asked where nothing may depend on values."""
    if torch.compiler.is_compiling() or G.is_meta:
        return False
    error = frobenius_norm(minus_identity_(G.clone()))
    try:
        return bool((error <= 4 * G.shape[-1] ** 0.5 * torch.finfo(error.dtype).eps).all())
    except RuntimeError:  # under torch.func.vmap
        return False


def newton_schulz(P: Tensor, iterations: int = 13) -> Tensor:
    """The polar factor of P by scaled Newton–Schulz (Björck–Bowie) iteration, W ← αW(3I − α²WᵀW)/2.

    P is first divided by a proven upper bound on its norm, so each singular value starts in [0, 1]; each step maps
    [0, 1] into itself and pushes positive values towards 1. The result is a contraction after any number of
    iterations. The scales α of the first five steps are the best for singular values in [0.19, 1], those of the
    others for the widest interval [ℓ, 1] that they bring to 1: ℓ = 0.02, 1.2e-3 for 10, 13 iterations; smaller values
    are damped. Without scales (α = 1) values would grow by 3/2 a step only, with them by up to 2.6. It stops as soon as
    WᵀW = I up to rounding. The gradient is that of the polar factor where it has converged.

    Args:
        P: (..., m, n).
        iterations: at most so many.

    Returns:
        (..., m, n), with P's dtype.

    Source: Björck & Bowie 1971; Anil, Lucas & Grosse 2019 (arXiv 1811.05381); scales: Chen & Chow 2014.

    >>> W = newton_schulz(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> torch.allclose(W, torch.eye(2), atol=1e-6)
    True
    """
    if P.shape[-2] < P.shape[-1]:
        return newton_schulz(P.mH, iterations).mH
    entries = torch.view_as_real(P.resolve_conj()).flatten(-2) if P.is_complex() else P
    largest = entries.detach().abs().amax((-2, -1), keepdim=True)  # avoids overflow; the result does not depend on it
    return _NewtonSchulz.apply(P / torch.where(largest > 0, largest, 1), iterations)[0]


class _Cayley(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = P.shape[-1]
        scale = CAYLEY_LIMIT / frobenius_norm(P)[..., None, None].clamp_min(CAYLEY_LIMIT)
        U, V = (P * scale).split([n, P.shape[-2] - n], dim=-2)
        M = U - U.mH + V.mH @ V if P.shape[-2] > n else U - U.mH
        M.diagonal(dim1=-2, dim2=-1).add_(1)
        Z, failed = torch.linalg.inv_ex(M)
        W = minus_identity_(2 * Z)
        W = torch.cat([W, -2 * V @ Z], dim=-2) if P.shape[-2] > n else W
        W = _within_unit_ball(W, full_rank=True)
        return torch.where((failed != 0)[..., None, None], torch.nan, W), Z, scale  # only NaN or infinite P fails

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:  # type: ignore[override]
        P, Z, scale = ctx.saved_tensors
        n = P.shape[-1]
        to_upper, to_lower = gradient.split([n, P.shape[-2] - n], dim=-2)
        V = P[..., n:, :] * scale
        # dZ = −Z dA Z, dA = dU − dUᴴ + dVᴴV + VᴴdV
        to_Z = 2 * (to_upper - V.mH @ to_lower)
        to_A = -Z.mH @ to_Z @ Z.mH
        result = torch.cat([to_A - to_A.mH, V @ (to_A + to_A.mH) - 2 * to_lower @ Z.mH], dim=-2)
        # where P was scaled down, its length has no effect
        radial = torch.linalg.vecdot(P.flatten(-2), result.flatten(-2)).real[..., None, None]
        squared = torch.where(scale < 1, (CAYLEY_LIMIT / scale).square(), torch.inf)
        return differentiable_once(scale * (result - (radial / squared) * P), P, gradient)


def cayley(P: Tensor) -> Tensor:
    """The Cayley map of P = [U; V] (U square): A = U − Uᴴ + VᴴV, W = [(I + A)⁻¹(I − A); −2V(I + A)⁻¹].

    A wide P is mapped through its transpose. With Z = (I + A)⁻¹ the upper block is 2Z − I, so one inverse is all it
    takes; I + A is never singular, since its Hermitian part is I + VᴴV. P is scaled down to a Frobenius norm of
    `CAYLEY_LIMIT` where it is longer: beyond it the 1 in I + A drowns in the rounding of float32.

    Args:
        P: (..., m, n), any values.

    Returns:
        (..., m, n), orthogonal, with P's dtype.

    Source: Trockman & Kolter 2021 (arXiv 2104.07167).

    >>> W = cayley(torch.randn(5, 3, dtype=torch.float64))
    >>> torch.allclose(W.mT @ W, torch.eye(3, dtype=torch.float64))
    True
    """
    if P.shape[-2] < P.shape[-1]:
        return cayley(P.mH).mH
    return _Cayley.apply(P)[0]


def cayley_inverse(W: Tensor) -> Tensor:
    """P with cayley(P) = W, for an orthogonal W in float64 whose square block has no eigenvalue −1; near it elsewhere.

    From W = [2Z − I; −2VZ], Z = (I + A)⁻¹: A = Z⁻¹ − I, V = −½W₂Z⁻¹, and U is half of the skew part of A.

    >>> P = torch.tensor([[0.0, 0.4], [-0.4, 0.0], [0.3, 0.1]], dtype=torch.float64)
    >>> torch.allclose(cayley_inverse(cayley(P)), P)
    True
    """
    if W.shape[-2] < W.shape[-1]:
        return cayley_inverse(W.mH).mH
    n = W.shape[-1]
    eye = torch.eye(n, dtype=W.dtype, device=W.device)
    inverse = 2 * torch.linalg.pinv(eye + W[..., :n, :])
    U = (inverse - inverse.mH) / 4
    return torch.cat([U, W[..., n:, :] @ inverse / -2], -2)


class _Projector(torch.autograd.Function):
    """The block of the first rows and columns of V(VᴴV)⁻¹Vᴴ = YYᴴ, Y = XL⁻ᴴ, X = V with columns of norm 1, LLᴴ = XᴴX.

    dΠ = (I − Π) dV V⁺ + its adjoint, V⁺ = L⁻ᴴYᴴ.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(V: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        X, norms = unit_rows(V.mH)
        X = to_double(X)
        L = _cholesky_of_gram(X)
        Y = torch.linalg.solve_triangular(L, X, upper=False).mH.to(V.dtype)
        Y = _within_unit_ball(Y, full_rank=False)
        return Y[..., :rows, :] @ Y[..., :columns, :].mH, Y, L.to(V.dtype), norms.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.shape = inputs[1:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        V, Y, L, norms = ctx.saved_tensors
        rows, columns = ctx.shape
        n = Y.shape[-2]
        upper, lower = gradient @ Y[..., :columns, :], gradient.mH @ Y[..., :rows, :]
        # (G + Gᴴ)Y, G the gradient with zeros in what was cut off
        T = F.pad(upper, (0, 0, 0, n - rows)) + F.pad(lower, (0, 0, 0, n - columns))
        T = T - Y @ (Y.mH @ T)
        # a product with the reciprocal: complex division is slow
        result = torch.linalg.solve_triangular(L, T, upper=False, left=False) * norms.reciprocal()
        return differentiable_once(result, V, gradient), None, None


def projector(V: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
    """The orthogonal projector V(VᴴV)⁻¹Vᴴ onto the span of V, or the block of its first rows and columns.

    It is formed as YYᴴ with Y = V L⁻ᴴ, LLᴴ = VᴴV + ridge. The columns of V are normalised first (only their span
    matters), so the ridge of a few roundings is relative to each; it keeps rank-deficient V a contraction. The Gram
    matrix squares the condition number, so it is factorised in float64.

    Args:
        V: (..., n, r) with r ≤ n.
        rows, columns: at most n; all by default.

    Returns:
        (..., rows, columns) with V's dtype; the whole has its spectrum in [0, 1].

    >>> V = torch.randn(6, 3, dtype=torch.float64)
    >>> torch.allclose(projector(V) @ V, V)
    True
    """
    n = V.shape[-2]
    return _Projector.apply(V, n if rows is None else rows, n if columns is None else columns)[0]


def block_reflector(V: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
    """The block reflector I − 2V(VᴴV)⁻¹Vᴴ, or the block of its first rows and columns; see `projector`.

    Returns:
        (..., rows, columns), a contraction; orthogonal where rows or columns is n.

    Source: Lai et al. 2025 (arXiv 2505.15174).

    >>> W = block_reflector(torch.randn(6, 3, dtype=torch.float64))
    >>> torch.allclose(W @ W.mT, torch.eye(6, dtype=torch.float64))
    True
    """
    block = projector(V, rows, columns)
    return torch.eye(*block.shape[-2:], dtype=block.dtype, device=block.device) - 2 * block


class _CholeskyOrthogonal(torch.autograd.Function):
    """W = L⁻¹P for wide P: with E = L⁻¹dP and M = EWᴴ, dW = E − Φ(M + Mᴴ)W, Φ the lower triangle, half the diagonal."""

    generate_vmap_rule = True

    @staticmethod
    def forward(P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        X, norms = unit_rows(P)
        X = to_double(X)
        L = _cholesky_of_gram(X)
        W = torch.linalg.solve_triangular(L, X, upper=False).to(P.dtype)
        return _within_unit_ball(W, full_rank=False), L.to(P.dtype), norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:  # type: ignore[override]
        P, W, L, norms = ctx.saved_tensors
        K = (gradient @ W.mH).tril()
        diagonal = torch.diag_embed(K.diagonal(dim1=-2, dim2=-1))
        T = K + K.mH - 0.5 * (diagonal + diagonal.mH)
        result = torch.linalg.solve_triangular(L.mH, gradient - T @ W, upper=True) * norms.reciprocal()
        return differentiable_once(result, P, gradient)


def cholesky_orthogonal(P: Tensor) -> Tensor:
    """W = L⁻¹P with LLᴴ = PPᴴ + ridge: Gram–Schmidt on the rows of P, or on its columns where they are fewer.

    Rows are normalised first (W does not depend on their lengths), so the ridge of a few roundings is relative to
    each; the Gram matrix squares the condition number, so it is factorised in float64.

    Args:
        P: (..., m, n).

    Returns:
        (..., m, n), orthogonal, with P's dtype.

    Source: Hu et al. 2024 (arXiv 2310.02513).

    >>> W = cholesky_orthogonal(torch.randn(3, 5, dtype=torch.float64))
    >>> torch.allclose(W @ W.mT, torch.eye(3, dtype=torch.float64))
    True
    """
    if P.shape[-2] > P.shape[-1]:
        return cholesky_orthogonal(P.mH).mH
    return _CholeskyOrthogonal.apply(P)[0]


_NODES = 256  # of the fit, beyond the degree


@lru_cache
def skew_exponential_coefficients(degree: int, reach: float = 1.0, weight: float = 1.0) -> tuple[float, ...]:
    """c_0 … c_degree of a polynomial p with p(S) ≈ exp(S), a contraction for every skew S of norm at most `reach`.

    With p(iθ)exp(−iθ) = 1 + a + ib, a is what p lacks in length and b what it turns too far. The sum of weight²a² + b²
    over Chebyshev nodes in [0, reach] is the least; p is then divided by its largest |p(iθ)|. That is known from a grid
    θ = reach·cos φ of N points, where |p|² is in [m − d, m + d]: between them a trigonometric polynomial of degree
    2·degree is at most m + d/cos(2π·degree/N). The truncated series would err 2^degree times as much.

    Args:
        degree: of p.
        reach: largest norm of S. All errors grow with its power degree + 1.
        weight: of a. At 1, p is the nearest to exp: 1 − |p(iθ)| stays below 8e-4, 5e-6, 2e-8 for degree 4, 6, 8 and
            reach 1. A larger one brings |p| nearer to 1, and turns a little too far.

    >>> [round(c, 3) for c in skew_exponential_coefficients(4)]
    [1.0, 0.997, 0.499, 0.156, 0.04]
    """
    import numpy as np

    x = np.cos((np.arange(_NODES) + 0.5) * math.pi / (2 * _NODES))
    # cos θ and sin θ are even and odd: T_j with the factor 1 or i
    basis = chebyshev.chebvander(x, degree) * 1j ** (np.arange(degree + 1) % 2) * np.exp(-1j * reach * x)[:, None]
    system = np.concatenate([weight * basis.real, basis.imag])
    solution = np.linalg.lstsq(system, np.repeat([weight, 0.0], _NODES))[0]
    # (θ/reach)^j = (−i)^j (S/reach)^j: with the i of odd powers a sign (−1)^⌊j/2⌋
    powers = [float(c) * (-1) ** (j // 2) / reach**j for j, c in enumerate(chebyshev.cheb2poly(solution))]
    N = 64 * degree
    theta = reach * np.cos(np.arange(N) * 2 * math.pi / N)
    squares = np.abs(sum(c * (1j * theta) ** j for j, c in enumerate(powers))) ** 2
    middle, half = float(squares.max() + squares.min()) / 2, float(squares.max() - squares.min()) / 2
    largest = math.sqrt(middle + half / math.cos(2 * math.pi * degree / N) + 1e-15)
    return tuple(c / largest for c in powers)


@lru_cache
def skew_polynomial_bound(coefficients: tuple[float, ...], norm: float = 1.0) -> float:
    """At least ‖p(S)‖ for p = Σ_j c_j Sʲ and every skew S of at most that norm, the coefficients taken as exact.

    S is normal with its spectrum in i[−norm, norm], and |p(iθ)|² is a polynomial in θ². On [0, norm²] it is at most the
    largest of its Bernstein coefficients, in exact fractions; halving the interval where that is inside brings them
    closer to the polynomial, fourfold each time.

    >>> skew_polynomial_bound((1.0, 1.0)), 0.9999999 < skew_polynomial_bound(skew_exponential_coefficients(7)) < 1
    (1.4142135623730951, True)
    """
    if not math.isfinite(norm):
        return math.inf
    c, n = [Fraction(x) for x in coefficients], len(coefficients) - 1
    powers = [Fraction(0)] * (n + 1)  # of θ²: i^(j − k) is ±1 for the even j + k, and the odd ones cancel
    for j in range(n + 1):
        for k in range(j % 2, n + 1, 2):
            powers[(j + k) // 2] += (-1) ** (abs(j - k) // 2) * c[j] * c[k] * Fraction(norm) ** (j + k)
    bernstein = [
        sum((math.comb(i, j) * powers[j] / math.comb(n, j) for j in range(i + 1)), start=Fraction(0))
        for i in range(n + 1)
    ]
    return upward.root(_largest_value(bernstein, halvings=24))


def _largest_value(bernstein: list[Fraction], halvings: int) -> Fraction:
    """Of a polynomial on an interval, from above; exactly where a coefficient at an end is the largest."""
    largest = max(bernstein)
    if not halvings or largest in (bernstein[0], bernstein[-1]):
        return largest
    left, right, row = [], [], bernstein
    while row:  # de Casteljau's triangle has the coefficients of both halves along its edges
        left.append(row[0])
        right.append(row[-1])
        row = [(a + b) / 2 for a, b in pairwise(row)]
    return max(_largest_value(half, halvings - 1) for half in (left, right[::-1]))


def skew_exponential(S: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """p(S) ≈ exp(S) for skew-Hermitian S, a contraction up to the reach of `skew_exponential_coefficients`.

    Three coefficients at a time, by Horner in S³: 1 + ⌈degree/3⌉ products.

    >>> S = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> torch.allclose(skew_exponential(S, skew_exponential_coefficients(7)), torch.linalg.matrix_exp(S), atol=1e-5)
    True
    """
    square = S @ S
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    powers = (eye, S, square, S @ square)

    def combine(some: tuple[float, ...]) -> Tensor:
        return sum((c * power for c, power in zip(some[1:], powers[1:], strict=False)), some[0] * powers[0])

    top = 3 * ((len(coefficients) - 2) // 3)
    value = combine(coefficients[top:])
    for start in range(top - 3, -1, -3):
        value = combine(coefficients[start : start + 3]) + powers[3] @ value
    return value


_ROTATION = skew_exponential_coefficients(10)  # at import: torch.compile does not trace numpy


def rotation(S: Tensor) -> Tensor:
    """exp(S) of a skew-Hermitian S, divided by a quarter of a proven bound of its norm where that is above 4.

    p(S/4)⁴ with the polynomial of degree 10: five products and two squarings. Every rotation has a logarithm of norm
    at most π, and the bound (Gram iteration) exceeds the norm by n^(1/32) at most: the shortening loses no rotation of
    n up to 2000.

    >>> S = torch.tensor([[0.0, 3.0], [-3.0, 0.0]])
    >>> torch.allclose(rotation(S), torch.linalg.matrix_exp(S), atol=1e-5)
    True
    """
    quarter = S / gram_iteration_bound(S, iterations=4)[..., None, None].clamp_min(4)
    root = skew_exponential(quarter, _ROTATION)
    square = root @ root
    return _within_unit_ball(square @ square, full_rank=True)


def skew_logarithm(Q: Tensor) -> Tensor:
    """The skew S of norm π at most with exp(S) = Q, for a rotation Q (n, n) without repeated eigenvalues −1.

    >>> S = torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=torch.float64)
    >>> torch.allclose(skew_logarithm(torch.linalg.matrix_exp(S)), S)
    True
    """
    values, vectors = torch.linalg.eig(Q)
    logarithm = torch.linalg.solve(vectors, vectors * (1j * values.angle()), left=False).real
    return (logarithm - logarithm.mT) / 2


def fill_orthogonal_(raw: Tensor) -> Tensor:
    """`nn.init.orthogonal_` for every dtype (its QR knows no half precision)."""
    Q = torch.empty(raw.shape, dtype=torch.promote_types(raw.dtype, torch.float32), device=raw.device)
    with torch.no_grad():
        return raw.copy_(nn.init.orthogonal_(Q))
