"""The Stiefel manifold of matrices with orthonormal rows or columns: gradient, steps along it, retraction, drift.

Every function works on (..., m, n), real, batched over the leading dimensions. Moves act on the longer side of the
matrix, the only side whose rotations reach every orthonormal frame: a wide or square X becomes X·exp(A), a tall one
the transpose of the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liplayers.linalg.norms import gram, gram_iteration_bound, minus_identity_, spectral_norm_bound
from liplayers.linalg.orthogonal import newton_schulz

__all__ = [
    "drift",
    "fast_polar_factor",
    "near_isometry_bound",
    "nearest_orthogonal",
    "rotate",
    "skew_gradient",
    "tangent",
]

_NEAR = 0.1  # drift below which the norm is at most 5 % above 1 and one product tells it best
# (a, b, c) of p(x) = ax + bx³ + cx⁵: the first is the minimax approximation of 1 on [0.03, 1], each other one that on
# what those before it make of this, with a tenth more at the upper end: beyond it they grow fast, and products round
_TO_ONE = ((7.3625, -20.7434, 15.1606), (2.8895, -1.8778, 0.3441), (2.1077, -1.3547, 0.3105))
_MARGIN = 1.1
_ORDERS = ((0.05, 2), (0.25, 3), (1.0, 4))  # (‖A‖_F up to which, terms of the series)


def skew_gradient(X: Tensor, G: Tensor) -> Tensor:
    """The gradient of f along the curves X·exp(A) of a wide X: S = (XᵀG − GᵀX)/2, G = ∂f/∂X.

    d/dt f(X·exp(tA)) at t = 0 is ⟨G, XA⟩ = ⟨XᵀG, A⟩, which for skew A is ⟨S, A⟩: f falls fastest along A = −S. X·exp(A)
    stays on the manifold since exp(A) is orthogonal: (X exp(A))(X exp(A))ᵀ = XXᵀ.

    Args:
        X, G: (..., m, n) with m ≤ n.

    Returns:
        (..., n, n), exactly skew.

    >>> S = skew_gradient(torch.eye(2, 3), torch.randn(2, 3))
    >>> torch.equal(S, -S.mT)
    True
    """
    M = X.mT @ G
    return (M - M.mT) / 2


def rotate(X: Tensor, A: Tensor) -> Tensor:
    """X·exp(A): the series up to order 2, 3, 4 where ‖A‖_F ≤ 0.05, 0.25, 1, the matrix exponential beyond.

    The order is that of the longest A of the batch. The series of order k is off by at most ‖A‖^(k+1)/(k+1)!.

    Args:
        X: (..., m, n).
        A: (..., n, n), skew.

    Source: Hu et al. 2026 (arXiv 2601.18513), as reported; no public code.

    >>> X = rotate(torch.eye(2), torch.tensor([[0.0, 3.0], [-3.0, 0.0]]))
    >>> torch.allclose(X @ X.mT, torch.eye(2), atol=1e-6)
    True
    """
    length = torch.linalg.matrix_norm(A).amax().item() if A.numel() else 0.0
    if _ORDERS[-1][0] < length < math.inf:
        return X @ torch.linalg.matrix_exp(A)
    order = next((k for limit, k in _ORDERS if length <= limit), 2)  # NaN and infinity: any order hands them on
    term, moved = X, X
    for k in range(1, order + 1):
        term = term @ A / k
        moved = moved + term
    return moved


def tangent(X: Tensor, G: Tensor) -> Tensor:
    """The part of G that a frame X with orthonormal rows can move along: T = G − ½(GXᵀ + XGᵀ)X, so that TXᵀ is skew.

    The nearest tangent vector to G in the Frobenius norm.

    Args:
        X, G: (..., m, n) with m ≤ n.

    >>> X = torch.eye(2, 3)
    >>> tangent(X, torch.tensor([[5.0, 1.0, 7.0], [3.0, 5.0, 9.0]]))
    tensor([[ 0., -1.,  7.],
            [ 1.,  0.,  9.]])
    """
    # the second product is the first one's transpose, and on CPUs cheaper than adding that
    return G - (G @ X.mT + X @ G.mT) @ X / 2


def fast_polar_factor(T: Tensor) -> Tensor:
    """The polar factor of T from nine products, roughly: singular values of 4 % to 100 % of a bound become 0.9 to 1.1.

    Three odd polynomials of degree five, after a division by 1.1·‖TTᵀ‖_F^½ ≥ ‖T‖; the first product gives it. For the
    direction of a step, not for weights; works in bfloat16. Zero gives zero.

    Args:
        T: (..., m, n) with m ≤ n.

    Source: Amsel et al. 2025, arXiv 2505.16932 (composed minimax polynomials); Jordan et al. 2024 (Muon).

    >>> (fast_polar_factor(torch.diag(torch.tensor([9.0, -3.0, 1.0]))).diagonal().abs() - 1).abs().max() < 0.1
    tensor(True)
    """
    largest = T.abs().amax((-2, -1), keepdim=True)
    X = (T / torch.where(largest > 0, largest, 1)).reshape(-1, *T.shape[-2:])
    G = X @ X.mT
    scale = _MARGIN * torch.linalg.matrix_norm(G)[..., None, None].sqrt()
    scale = torch.where(scale > 0, scale, 1)
    X, G = X / scale, G / scale.square()
    for i, (a, b, c) in enumerate(_TO_ONE):
        G = X @ X.mT if i else G
        P = torch.baddbmm(G, G, G, beta=b, alpha=c)
        X = torch.baddbmm(X, P, X, beta=a)
    return X.reshape(T.shape)


def nearest_orthogonal(W: Tensor) -> Tensor:
    """The polar factor of W, the nearest matrix with orthonormal rows or columns, in float64.

    Newton–Schulz where that converges (near the manifold always), the singular value decomposition elsewhere: a W
    without full rank gets one of its several nearest. NaN and infinity give NaN.

    Args:
        W: (..., m, n).

    Returns:
        (..., m, n), float64.

    >>> nearest_orthogonal(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])) @ torch.eye(3).double()[0]
    tensor([1., 0.], dtype=torch.float64)
    """
    W = W.detach().double()
    Q = newton_schulz(W)
    failed = drift(Q) > 1e-10
    if failed.any():
        safe = torch.where(failed[..., None, None], W, 0)  # the others may hold NaN
        U, _, Vh = torch.linalg.svd(safe, full_matrices=False)
        Q = torch.where(failed[..., None, None], U @ Vh, Q)
    return 1.5 * Q - 0.5 * (Q @ (Q.mT @ Q))  # squares what is left


def drift(W: Tensor) -> Tensor:
    """‖G − I‖_F, G the Gram matrix of W on its shorter side: 0 on the manifold.

    >>> drift(2 * torch.eye(1, 3)).item()
    3.0
    """
    return torch.linalg.matrix_norm(_excess(W))


def near_isometry_bound(W: Tensor) -> Tensor:
    """Upper bound on the spectral norm, tight to rounding for W near the manifold: ‖W‖² = λ_max(G) ≤ 1 + ‖G − I‖.

    ‖G − I‖ is bounded by Gram iteration, whose overestimate, n^(1/8) at most, is then one of the drift and not of
    the norm. Far off the manifold it is the lesser of this and `spectral_norm_bound`.

    Args:
        W: (..., m, n).

    Returns:
        (...), float64; infinite where W is not finite.

    >>> near_isometry_bound(torch.eye(3, 5)).item(), round(near_isometry_bound(7 * torch.eye(3)).item(), 6)
    (1.0, 7.0)
    """
    W = W.detach().double()
    excess = gram_iteration_bound(_excess(W), iterations=2)
    bound = (1 + excess).sqrt()
    if not (excess <= _NEAR).all():
        bound = torch.minimum(bound, spectral_norm_bound(W))
    return torch.where(bound.isfinite(), bound, math.inf)


def _excess(W: Tensor) -> Tensor:
    return minus_identity_(gram(W))
