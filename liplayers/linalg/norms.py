"""Spectral norms of matrices: proven upper bounds, and lower bounds that are named so."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "differentiable_once",
    "frobenius_norm",
    "gram",
    "gram_iteration_bound",
    "minus_identity_",
    "rounded_up",
    "row_distances",
    "spectral_norm_bound",
    "spectral_norm_lower_bound",
    "unit_rows",
    "unit_scale",
]


def gram(W: Tensor) -> Tensor:
    """The Gram matrix of W on its shorter side, WᴴW or WWᴴ; its largest eigenvalue is ‖W‖²."""
    return W @ W.mH if W.shape[-2] < W.shape[-1] else W.mH @ W


def minus_identity_(G: Tensor) -> Tensor:
    """G − I, in place."""
    G.diagonal(dim1=-2, dim2=-1).sub_(1)
    return G


def frobenius_norm(W: Tensor) -> Tensor:
    """‖W‖_F of (..., m, n); over real and imaginary parts, since torch's norm of complex entries is slow."""
    entries = torch.view_as_real(W.resolve_conj()).flatten(-3) if W.is_complex() else W.flatten(-2)
    return torch.linalg.vector_norm(entries, dim=-1).reshape(W.shape[:-2])  # torch 2.11 on meta keeps a size of 1


class _DifferentiableOnce(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(result: Tensor, *inputs: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        raise NotImplementedError("this gradient was written out by hand and cannot be differentiated again")


def differentiable_once(result: Tensor, *inputs: Tensor) -> Tensor:
    """`result`, the gradient of a function of `inputs`, which raises where it is to be differentiated again.

    torch's `once_differentiable` does not see the levels of torch.func, where a second derivative would silently lack
    its parts.
    """
    if not torch.is_grad_enabled():
        return result
    return _DifferentiableOnce.apply(result, *inputs)


def unit_scale(P: Tensor) -> tuple[Tensor, Tensor]:
    """P divided by its largest entry, squares of which might not be floats, and that entry (1 for zeros)."""
    largest = P.detach().abs().amax()
    scale = torch.where(largest > 0, largest, 1)
    return P / scale, scale


def unit_rows(P: Tensor) -> tuple[Tensor, Tensor]:
    """P (..., m, n) with rows of norm 1, and what they were divided by, (..., m, 1), real; rows of zeros stay, by 1."""
    entries = torch.view_as_real(P.resolve_conj()).flatten(-2) if P.is_complex() else P
    largest = entries.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)  # squares of tiny or huge entries would not be floats
    entries = entries / scale
    norm = torch.linalg.vector_norm(entries, dim=-1, keepdim=True)
    norm = torch.where(norm > 0, norm, 1)
    entries = entries / norm
    return torch.view_as_complex(entries.unflatten(-1, (-1, 2))) if P.is_complex() else entries, norm * scale


class _GramIteration(torch.autograd.Function):
    """The bound is the Schatten norm (Σσ^q)^(1/q), q = 2^(T+1), whose gradient is W(WᴴW)^(q/2−1) up to a factor.

    That power is the product of the iterates; the factor follows from ⟨gradient, W⟩ = bound.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(W: Tensor, iterations: int) -> tuple[Tensor, ...]:
        norm = frobenius_norm(W)
        zero = norm == 0
        scale = torch.where(zero, 1, norm)
        G = W / scale[..., None, None]
        iterates = []
        log_ratio = torch.zeros_like(scale)  # of the bound to the Frobenius norm: small, so its rounding is too
        for step in range(1, iterations + 1):
            G = gram(G)
            norm = torch.where(zero, 1, frobenius_norm(G))
            G = G / norm[..., None, None]
            iterates.append(G)
            log_ratio = log_ratio + norm.log() / 2**step
        return torch.where(zero, 0, scale * log_ratio.exp()), scale, *iterates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        W, bound, scale, *iterates = ctx.saved_tensors
        unit = W / scale[..., None, None]
        D = unit
        for G in iterates:
            D = G @ D if W.shape[-2] < W.shape[-1] else D @ G
        inner = (unit.conj() * D).real.sum((-2, -1))
        factor = gradient * bound / scale / torch.where(inner > 0, inner, 1)
        return differentiable_once(D * factor[..., None, None], W, gradient), None


def gram_iteration_bound(W: Tensor, iterations: int = 8) -> Tensor:
    """Upper bound on the spectral norm by Gram iteration: ‖W‖ ≤ ‖G_T‖_F^(1/2^T), G_0 = W, G_{t+1} = G_tᴴG_t.

    Each step halves the logarithm of the overestimate: at most n^(1/2^(T+1)) in all. The iterates are rescaled to
    unit Frobenius norm so that they neither overflow nor vanish. Differentiable once.

    Args:
        W: (..., m, n).
        iterations: T ≥ 0; 0 gives the Frobenius norm.

    Returns:
        (...), real.

    Source: Delattre et al. 2023 (arXiv 2305.16173).

    >>> round(gram_iteration_bound(torch.diag(torch.tensor([2.0, 1.0])), 6).item(), 4)
    2.0
    """
    return _GramIteration.apply(W, iterations)[0]


def spectral_norm_bound(W: Tensor) -> Tensor:
    """Upper bound on the spectral norm, the least of Gram iteration, √(‖W‖₁‖W‖_∞) and the Frobenius norm, in float64.

    Args:
        W: (..., m, n), real.

    Returns:
        (...), float64.

    >>> spectral_norm_bound(torch.eye(3)).item()
    1.0
    """
    W = W.detach().double()
    absolute = W.abs()
    mixed = (absolute.sum(-1).amax(-1) * absolute.sum(-2).amax(-1)).sqrt()
    return torch.stack([gram_iteration_bound(W, 10), mixed, torch.linalg.matrix_norm(W)]).amin(0)


def spectral_norm_lower_bound(W: Tensor, iterations: int = 100, generator: torch.Generator | None = None) -> Tensor:
    """Lower bound on the spectral norm by power iteration: ‖Wv‖ for a unit vector v. Never a certificate.

    >>> W = torch.diag(torch.tensor([2.0, 1.0]))
    >>> bool(spectral_norm_lower_bound(W) <= 2.0001)
    True
    """
    v = torch.randn(*W.shape[:-2], W.shape[-1], 1, dtype=W.dtype, device=W.device, generator=generator)
    for _ in range(iterations):
        v = W.mH @ (W @ v)
        v = v / torch.linalg.matrix_norm(v, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    return torch.linalg.vector_norm(W @ v, dim=(-2, -1))


def row_distances(weight: Tensor) -> Tensor:
    """‖w_y − w_j‖ for all pairs of rows, (K, K), zeros on the diagonal; differentiable, gradient 0 at equal rows.

    Off the diagonal they are upper bounds: of d squares of differences, their sum, its root and what follows, a
    distance keeps 1 − (d/2 + 5)u, and underflow takes less than d·√tiny from it, where the largest weight is around 1.

    >>> row_distances(torch.eye(2))
    tensor([[0.0000, 1.4142],
            [1.4142, 0.0000]])
    """
    largest = weight.detach().abs().amax()
    scale = torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1)  # a power of two: exact
    unit = weight / scale
    numbers, features = torch.finfo(weight.dtype), weight.shape[-1]
    distances = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    above = distances * (1 + (features / 2 + 5) * numbers.eps) + features * math.sqrt(numbers.tiny)
    return rounded_up(scale * above)


def rounded_up(constants: Tensor) -> Tensor:
    """The next floats above those of a square matrix, zeros on its diagonal, with the gradient that it had."""
    above = torch.nextafter(constants, torch.full_like(constants, math.inf)) - constants
    off_diagonal = 1 - torch.eye(len(constants), dtype=constants.dtype, device=constants.device)
    return (constants + torch.where(constants.isfinite(), above, 0).detach()) * off_diagonal
