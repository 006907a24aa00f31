"""Maps from a free matrix to an orthogonal one or to a contraction.

Every function works on (..., m, n), real or complex, batched over the leading dimensions. "Orthogonal" means
orthonormal columns where m ≥ n and orthonormal rows where m < n.

The error of a factorisation grows with the condition number of the free matrix, which training does not bound, and
would carry the result out of the unit ball. `_within_unit_ball` measures what is left of it and divides it away, so
that the returned map is a contraction whatever the free matrix was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liplayers.linalg.norms import gram, gram_iteration_bound

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
        defect = G - torch.eye(G.shape[-1], dtype=G.dtype, device=G.device) if full_rank else G @ G - G
        shrink = (1 + torch.linalg.matrix_norm(defect)).rsqrt()
    return Q * shrink[..., None, None]


def newton_schulz(P: Tensor, iterations: int = 12) -> Tensor:
    """The polar factor of P by Newton–Schulz (Björck–Bowie) iteration, W ← W(3I − WᵀW)/2.

    P is first divided by a proven upper bound on its norm, so each singular value starts in [0, 1]; the iteration
    maps [0, 1] into itself and pushes every positive value towards 1. The result is a contraction after any number
    of iterations, and orthogonal once they have converged.

    Args:
        P: (..., m, n).
        iterations: at least 0; small singular values grow by 3/2 in each.

    Returns:
        (..., m, n), with P's dtype.

    Source: Björck & Bowie 1971; Anil, Lucas & Grosse 2019 (arXiv 1811.05381).

    >>> W = newton_schulz(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> torch.allclose(W, torch.eye(2), atol=1e-6)
    True
    """
    scale = P.detach().abs().amax((-2, -1), keepdim=True)  # the result does not depend on it; avoids overflow
    P = P / torch.where(scale > 0, scale, 1)
    norm = gram_iteration_bound(P, iterations=2)[..., None, None]
    W = P / torch.where(norm > 0, norm, 1)
    transpose = W.shape[-2] < W.shape[-1]
    W = W.mH if transpose else W
    for _ in range(iterations):
        W = 1.5 * W - 0.5 * (W @ (W.mH @ W))
    return W.mH if transpose else W


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
    n = P.shape[-1]
    norm = torch.linalg.matrix_norm(P)[..., None, None]
    U, V = (P * (CAYLEY_LIMIT / norm.clamp_min(CAYLEY_LIMIT))).split([n, P.shape[-2] - n], dim=-2)
    eye = torch.eye(n, dtype=U.dtype, device=U.device)
    Z, failed = torch.linalg.inv_ex(eye + U - U.mH + V.mH @ V)
    Z = torch.where((failed != 0)[..., None, None], torch.nan, Z)  # only NaN or infinite P gets here
    W = torch.cat([2 * Z - eye, -2 * V @ Z], dim=-2) if P.shape[-2] > n else 2 * Z - eye
    return _within_unit_ball(W, full_rank=True)


def block_reflector(V: Tensor) -> Tensor:
    """The factor Y of the block reflector I − 2V(VᴴV)⁻¹Vᴴ = I − 2YYᴴ.

    Y = V L⁻ᴴ with LLᴴ = VᴴV + ridge. The columns of V are normalised first (the reflector only depends on their
    span), so the ridge of a few roundings is relative to each; it keeps rank-deficient V a contraction. The Gram matrix
    squares the condition number, so it is factorised in float64.

    Args:
        V: (..., n, r) with r ≤ n.

    Returns:
        Y, (..., n, r), with ‖Y‖ ≤ 1, so that I − 2YYᴴ has its spectrum in [−1, 1].

    Source: Lai et al. 2025 (arXiv 2505.15174).

    >>> Y = block_reflector(torch.randn(6, 3, dtype=torch.float64))
    >>> W = torch.eye(6, dtype=torch.float64) - 2 * Y @ Y.mT
    >>> torch.allclose(W @ W.mT, torch.eye(6, dtype=torch.float64))
    True
    """
    r = V.shape[-1]
    X = to_double(V)
    largest = X.detach().abs().amax(-2, keepdim=True)
    X = X / torch.where(largest > 0, largest, 1)
    norms = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
    X = X / torch.where(norms > 0, norms, 1)
    eye = torch.eye(r, dtype=X.dtype, device=X.device)
    ridge = 16 * r * torch.finfo(torch.float64).eps
    L, failed = torch.linalg.cholesky_ex(X.mH @ X + ridge * eye)
    L = torch.where((failed != 0)[..., None, None], torch.nan, L)  # only NaN or infinite V gets here
    Y = torch.linalg.solve_triangular(L, X.mH, upper=False).mH
    return _within_unit_ball(Y, full_rank=False).to(V.dtype)
