"""Oracles in exact rational arithmetic."""

from __future__ import annotations

from flint import fmpq
from torch import Tensor

Rows = list[list[fmpq]]


def rational(x: float) -> fmpq:
    return fmpq(*x.as_integer_ratio())


def rows_of(W: Tensor) -> Rows:
    """A matrix of floats as rationals; a complex one as the real matrix (A, −B; B, A), which has the same norm."""
    if W.is_complex():
        real, imaginary = rows_of(W.real), rows_of(W.imag)
        above = [a + [-x for x in b] for a, b in zip(real, imaginary, strict=True)]
        return above + [b + a for a, b in zip(real, imaginary, strict=True)]
    return [[rational(x) for x in row] for row in W.double().tolist()]


def is_positive_definite(A: Rows) -> bool:
    """Whether the pivots of the exact LDLᵀ of a symmetric matrix are positive."""
    A, n = [row[:] for row in A], len(A)
    for k in range(n):
        if A[k][k] <= 0:
            return False
        for i in range(k + 1, n):
            factor = A[i][k] / A[k][k]
            for j in range(k + 1, n):
                A[i][j] -= factor * A[k][j]
    return True


def exceeds_norm(s: float, W: Tensor | Rows) -> bool:
    """Whether s > ‖W‖: s²I − WᵀW is positive definite."""
    rows = rows_of(W) if isinstance(W, Tensor) else W
    n = len(rows[0])
    A = [[-sum((row[i] * row[j] for row in rows), fmpq(0)) for j in range(n)] for i in range(n)]
    for i in range(n):
        A[i][i] += rational(s) ** 2
    return is_positive_definite(A)
