"""The linear matrix inequality behind LBDN, LDLT and Gershgorin networks, and the weights that solve it.

A network w_0 = x, w_l = σ(C_l w_{l−1} + b_l), y = A x + B w_n + b, where σ has slopes in [m, β], is 𝓛-Lipschitz if
there are positive diagonal Λ_l such that for all x, w_1, …, w_n, with v_l = C_l w_{l−1},

    𝓛²|x|² − |A x + B w_n|² − 2 Σ_l (w_l − m v_l)ᵀΛ_l(β v_l − w_l) ≥ 0.

The sum is nonnegative for differences of two trajectories, entry by entry. For an activation that is only 1-Lipschitz
on groups of channels (MaxMin on pairs) it is for m = −1, β = 1 and Λ_l equal within each group.

Every function works on (..., rows, columns), real or complex, batched over the leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from liplayers.linalg import upward
from liplayers.linalg.norms import frobenius_norm, gram_iteration_bound, unit_scale
from liplayers.linalg.orthogonal import to_double
from liplayers.linalg.verified import eigenvalues_exceed, entry_norm, product_gamma

__all__ = [
    "LARGEST",
    "ExplicitWeights",
    "Sector",
    "cholesky",
    "is_proven",
    "ldlt_weights",
    "limited",
    "lmi_matrix",
    "margin",
    "proven_lipschitz",
    "strict_contraction",
]


class Sector(NamedTuple):
    """The slopes [low, high] of an activation, low ≤ 0 < high."""

    low: float
    high: float


class ExplicitWeights(NamedTuple):
    """The weights of a network as it runs, and the multipliers that prove its bound.

    Attributes:
        inner: C_1 … C_n, (..., d_l, d_{l−1}).
        outgoing: B, (..., out, d_n).
        skip: A, (..., out, in), or None for zero.
        multipliers: the diagonals of Λ_1 … Λ_n, (d_l,).
    """

    inner: tuple[Tensor, ...]
    outgoing: Tensor
    skip: Tensor | None
    multipliers: tuple[Tensor, ...]

    def executed(self) -> tuple[Tensor, ...]:
        """What a forward pass needs: C_1 … C_n, B, and A where there is one."""
        return (*self.inner, self.outgoing, *(() if self.skip is None else (self.skip,)))

    def with_executed(self, values: Sequence[Tensor]) -> ExplicitWeights:
        """These multipliers with other weights, in the order of `executed`."""
        n = len(self.inner)
        return ExplicitWeights(
            tuple(values[:n]), values[n], None if self.skip is None else values[-1], self.multipliers
        )

    def shrunk(self, r: float, skip: float | None = None) -> ExplicitWeights:
        """C_l and B times r, A times `skip`, r by default.

        With all of them times r ≤ 1, the form (in the units of `lmi_matrix`, for m ≤ 0) is at least r times itself plus
        1 − r times the sum of squares: couplings are linear in r, and what is squared is subtracted.
        """
        A = None if self.skip is None else self.skip * (r if skip is None else skip)
        return ExplicitWeights(tuple(C * r for C in self.inner), self.outgoing * r, A, self.multipliers)


LARGEST = 1e3  # norm of V: VVᴴ + I has a condition of 1e6, which costs six digits of float64


def limited(V: Tensor) -> Tensor:
    """V in float64, shortened to a Frobenius norm of `LARGEST` where it is longer."""
    K, scale = unit_scale(to_double(V))
    norm = frobenius_norm(K)[..., None, None] * scale
    return K * (scale * LARGEST / norm.clamp_min(LARGEST))


def cholesky(S: Tensor) -> Tensor:
    """The lower factor; NaN where there is none, which only NaN or infinite entries lead to here."""
    L, failed = torch.linalg.cholesky_ex(S)
    return torch.where((failed != 0)[..., None, None], torch.nan, L)


def _ridged(S: Tensor) -> Tensor:
    """chol(S + I)."""
    return cholesky(S + torch.eye(S.shape[-1], dtype=S.dtype, device=S.device))


def _from_right(X: Tensor, L: Tensor) -> Tensor:
    """X L⁻ᴴ for a lower L."""
    return torch.linalg.solve_triangular(L.mH, X, upper=True, left=False)


def strict_contraction(V: Tensor) -> Tensor:
    """X = T⁻¹V with TTᴴ = VVᴴ + I, or V R⁻ᴴ with RRᴴ = VᴴV + I where that is smaller: ‖X‖ < 1; every such X is reached.

    >>> X = strict_contraction(torch.tensor([[3.0]], dtype=torch.float64))
    >>> round(X.item() ** 2, 3)
    0.9
    """
    if V.shape[-2] > V.shape[-1]:
        return _from_right(V, _ridged(V.mH @ V))
    return torch.linalg.solve_triangular(_ridged(V @ V.mH), V, upper=False)


def ldlt_weights(
    V_inner: Sequence[Tensor],
    V_outgoing: Tensor,
    multipliers: Sequence[Tensor],
    lipschitz: float,
    sector: Sector,
    skip: bool,
) -> ExplicitWeights:
    """Weights that satisfy the inequality, by a block LDLᵀ factorisation; all that satisfy it strictly are reached.

    The form without |A x + B w_n|² is positive definite, as it exceeds that square. It is block tridiagonal in x, w_1
    and so on, and the pivot of its block l is P_l = F_l⁻ᵀF_l⁻¹ before C_{l+1} enters. With ρ = (β + m)/(β − m),
    T_l T_lᵀ = ρ²V_l V_lᵀ + I, Y_l = T_l⁻¹V_l, M_l M_lᵀ = I − 4mβ/(β − m)² Y_lᵀY_l (the identity for m = 0),

        F_0 = I/𝓛,   C_l = √2/(β − m) Λ_l^(−½) Y_l M_l⁻ᵀ F_{l−1}⁻¹,   F_l = Λ_l^(−½) T_lᵀ/√2.

    Without skip B = X F_n⁻¹, X the strict contraction that V_B stands for. With it, A and B may be whatever the rest of
    the form, once w_1, …, w_{n−1} are minimised away, leaves in x and w_n: with [X_A X_B] from [V_A V_B],

        u_0 = M_1F_0ᵀ,   u_l = ρ M_{l+1}T_lY_l u_{l−1},   Σ_{l<n} u_lᵀu_l = L Lᵀ,
        A = X_A L⁻¹,   B = X_B F_n⁻¹ − √2 ρ A u_{n−1}ᵀY_nᵀΛ_n^½.

    For n = 1 and slopes in [0, 1], A = 𝓛X_A and B = X_B F_1⁻¹ − X_A CᵀΛ/𝓛: with X_A → I, X_B = 0 that is the SLL block
    𝓛x − CᵀΛσ(Cx + b)/𝓛, with X_A = 0 the sandwich layer.

    With skip and n > 1, V_1 … V_{n−1} are shortened to norms of `LARGEST`^(1/(n−1)) each, where a bound of their norm
    is above it: larger ones would leave A nothing. What is reached is what is possible within that.

    Args:
        V_inner: (..., d_l, d_{l−1}) for each layer.
        V_outgoing: (..., out, d_n), with skip [V_A V_B], (..., out, d_0 + d_n).
        multipliers: the diagonal of Λ_l, (d_l,), for each layer.
        lipschitz: 𝓛.
        sector: of the activations.
        skip: whether A is there.

    Returns:
        weights in float64 or complex128, as the matrices are.

    Source: Juston et al. 2025 (arXiv 2512.05915) for the factorisation without skip. Theirs with skip is not feasible;
    eliminating x with A first makes it so, but asks for C_l that would be feasible with B = 0, which SLL's are not.
    """
    m, beta = sector
    rho, scale, c = (beta + m) / (beta - m), math.sqrt(2) / (beta - m), 4 * m * beta / (beta - m) ** 2
    eye = torch.eye(V_inner[0].shape[-1], dtype=V_outgoing.dtype, device=V_outgoing.device)
    F = eye / lipschitz
    inner, past, u = [], [], F  # past: u_0, u_1, …; u becomes the next one
    growth = LARGEST ** (1 / max(1, len(V_inner) - 1))  # of u_l in each layer, lest they differ by more than `LARGEST`
    for i, (V, multiplier) in enumerate(zip(V_inner, multipliers, strict=True)):
        root = multiplier.sqrt().to(V.dtype)
        if skip and 1 < len(V_inner) != i + 1:
            V = V * (growth / gram_iteration_bound(V, iterations=3)[..., None, None].clamp_min(growth))
        T = _ridged(rho**2 * (V @ V.mH))
        X = Y = torch.linalg.solve_triangular(T, V, upper=False)
        if c != 0:
            M = _ridged(-c * (Y.mH @ Y))
            X, u = _from_right(Y, M), M @ u if skip else u
        inner.append(scale * torch.linalg.solve_triangular(F, X, upper=True, left=False) / root[:, None])
        F = T.mH / (math.sqrt(2) * root[:, None])
        if skip:
            past.append(u)
            coupling = rho * (Y @ u)
            u = T @ coupling
    X = strict_contraction(V_outgoing)
    if not skip:
        B = torch.linalg.solve_triangular(F, X, upper=True, left=False)
        return ExplicitWeights(tuple(inner), B, None, tuple(multipliers))
    A, B = _skip_and_outgoing(X, past, F, coupling, root)
    return ExplicitWeights(tuple(inner), B, A, tuple(multipliers))


def _skip_and_outgoing(
    X: Tensor, past: Sequence[Tensor], F: Tensor, coupling: Tensor, root: Tensor
) -> tuple[Tensor, Tensor]:
    """A and B of `ldlt_weights` from [X_A X_B], u_0 …, F_n, ρY_n u_{n−1} and Λ_n^½."""
    X_skip, X = X.split([X.shape[-1] - F.shape[-1], F.shape[-1]], -1)
    L = cholesky(sum((u.mH @ u for u in past[1:]), past[0].mH @ past[0]))
    A = torch.linalg.solve_triangular(L, X_skip, upper=False, left=False)
    B = torch.linalg.solve_triangular(F, X, upper=True, left=False) - math.sqrt(2) * (A @ coupling.mH) * root
    return A, B


def _units(weights: ExplicitWeights, lipschitz: float) -> list[Tensor]:
    """𝓛 and √2Λ_l^½, by which x and w_l are multiplied."""
    roots = [(2 * multiplier).sqrt() for multiplier in weights.multipliers]
    return [roots[0].new_tensor([lipschitz]), *roots]


def _in_units(weights: ExplicitWeights, lipschitz: float) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """C_l, B and A for x and w_l in their units."""
    units = _units(weights, lipschitz)
    inner = [units[i + 1][:, None] * C / units[i] for i, C in enumerate(weights.inner)]
    return inner, weights.outgoing / units[-1], None if weights.skip is None else weights.skip / units[0]


def lmi_matrix(weights: ExplicitWeights, lipschitz: float, sector: Sector) -> Tensor:
    """The matrix of the form above in (𝓛x, √2Λ_1^½ w_1, …, √2Λ_n^½ w_n): positive semidefinite is what has to be shown.

    Returns:
        (..., N, N), Hermitian, with N the sum of all sizes but the output's.
    """
    m, beta = sector
    inner, B, A = _in_units(weights, lipschitz)
    sizes = [inner[0].shape[-1], *(C.shape[-2] for C in inner)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    blocks = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    M = torch.eye(sum(sizes), dtype=B.dtype, device=B.device).expand(*B.shape[:-2], -1, -1).clone()
    for i, N in enumerate(inner):
        M[..., blocks[i], blocks[i]] += (m * beta) * (N.mH @ N)
        M[..., blocks[i + 1], blocks[i]] -= ((m + beta) / 2) * N
        M[..., blocks[i], blocks[i + 1]] -= ((m + beta) / 2) * N.mH
    ends = [(blocks[-1], B), *([(blocks[0], A)] if A is not None else [])]
    for rows, left in ends:
        for columns, right in ends:
            M[..., rows, columns] -= left.mH @ right
    return M


_TINY = 2.0**-200  # units between this and its inverse: the little that underflow takes is below a rounding of 1


def is_proven(weights: ExplicitWeights, lipschitz: float, sector: Sector) -> bool:
    """Whether the inequality is proven, for these weights and all that differ from them by 2⁻⁵² relatively.

    The units are what they were rounded to: Λ_l = units²/2 proves as well as any other, and 1 on the diagonal is exact.
    Then each entry of the matrix is a sum of at most four terms, with the absolute values of their factors in place of
    the factors off by γ_k: k counts the inner product, 2 roundings for a change of units and 2 for that of the weights,
    each twice in a product of two, 2 for m·β or (m + β)/2, and 4 for the sum; of complex numbers many more, for their
    division. The matrix of those values has a norm of at most 1 + Σ_l (|mβ|·n_l² + |m + β|·n_l) + (b + a)², n_l, b, a
    the `entry_norm` of C_l, B, A in their units. The eigenvalues of the matrix as computed have to exceed γ_k times it.
    """
    m, beta = sector
    inner, B, A = _in_units(weights, lipschitz)
    M = lmi_matrix(weights, lipschitz, sector)
    units = torch.cat(_units(weights, lipschitz))
    if not (((units > _TINY) & (units < 1 / _TINY)).all() and torch.isfinite(M).all()):
        return False
    norms = [entry_norm(C) for C in inner]
    ends = entry_norm(B) + (0.0 if A is None else entry_norm(A))
    size = 1 + sum(abs(m * beta) * n * n + abs(m + beta) * n for n in norms) + ends * ends
    longest = max(B.shape[-2], *(C.shape[-2] for C in inner))
    rounding = product_gamma(longest + 16, M) * size * (1 + 1e-9)
    return eigenvalues_exceed(M, rounding)


def proven_lipschitz(weights: ExplicitWeights, lipschitz: float, sector: Sector) -> float:
    """The least 𝓛/rⁿ⁺¹ on a geometric scale of 1 − r that the multipliers prove for weights as they run.

    Measured in r⁻ˡ times their unit, w_l obey the same equations with r·C_l, r·B and rⁿ⁺¹·A, and y is rⁿ⁺¹ times as
    large. These weights are rounded twice at most, which `is_proven` allows for.

    Returns:
        𝓛 itself where it holds; infinity where weights are not finite or nothing up to r = 1/2 is proven.
    """
    if is_proven(weights, lipschitz, sector):
        return lipschitz
    eta = 1e-12
    while eta < 1:
        r = 1 / (1 + eta)
        growth = Fraction(r) ** -(len(weights.inner) + 1)
        if is_proven(weights.shrunk(r, float(1 / growth)), lipschitz, sector):
            return upward.product(lipschitz, growth)
        eta *= 2
    return math.inf


def margin(size: int, dtype: torch.dtype) -> float:
    """The margin that weights are shrunk by, so that rounding them to `dtype` keeps the inequality.

    In the units of `lmi_matrix` every block that holds a weight has norm 1 at most, and rounding changes each entry by
    u relatively, so the block by u·√size: in all by less than 8u√size, which shrinking by as much makes up for.
    Factorising in float64 errs by less than 1e-10.
    """
    return 8 * math.sqrt(size) * max(torch.finfo(dtype).eps / 2, 1e-10)
