"""The norm of a map, by means that share no code with the layers.

It comes from the Jacobian in float64: dense for small inputs, by Golub–Kahan–Lanczos bidiagonalisation with full
reorthogonalisation for larger ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from liplayers.core.weights import ParametrizedModule

__all__ = [
    "affine_matrix",
    "computed_parts",
    "executed_in_double",
    "jacobian",
    "jacobians",
    "lanczos_norm",
    "matrix_norm",
    "operator_norm",
    "singular_values",
    "train_to_exceed",
    "worst_norm",
]

DENSE_LIMIT = 600
Map = Callable[[Tensor], Tensor]


def jacobians(fn: Map, x: Tensor) -> Tensor:
    """The Jacobians of `fn` at the inputs `x` (points, …), (points, outputs, inputs); `fn` maps batches, row by row."""
    with torch.no_grad():
        outputs = fn(x[:1]).numel()
    batch = x.detach().repeat_interleave(outputs, 0).requires_grad_()
    with torch.enable_grad():
        y = fn(batch).reshape(len(x), outputs, outputs)
        (rows,) = torch.autograd.grad(y.diagonal(dim1=1, dim2=2).sum(), batch)
    return rows.reshape(len(x), outputs, -1)


def jacobian(fn: Map, x: Tensor) -> Tensor:
    """The Jacobian of `fn` at one input `x` (no batch dimension), (outputs, inputs)."""
    return jacobians(fn, x[None])[0]


def affine_matrix(fn: Map, input_shape: tuple[int, ...]) -> Tensor:
    """The matrix of an affine map, (outputs, inputs): its values at the unit vectors, less that at 0."""
    unit = torch.eye(math.prod(input_shape), dtype=torch.float64)
    with torch.no_grad():
        y = fn(torch.cat([unit, torch.zeros_like(unit[:1])]).view(-1, *input_shape)).flatten(1)
    return (y[:-1] - y[-1]).mT


def matrix_norm(J: Tensor) -> float:
    """The largest norm of a stack of matrices; infinite where an entry is not finite."""
    return torch.linalg.matrix_norm(J, 2).max().item() if torch.isfinite(J).all() else math.inf


def lanczos_norm(apply: Map, adjoint: Map, v: Tensor, steps: int = 60) -> float:
    """The norm of a linear map on flat vectors: a lower bound, exact after as many steps as there are inputs."""
    v = v / v.norm()
    right, left = [v], list[Tensor]()
    alphas, betas = list[float](), list[float]()
    for _ in range(min(steps, v.numel())):
        u = apply(right[-1])
        u = _orthogonalised(u, left)
        alphas.append(u.norm().item())
        if alphas[-1] < 1e-300:
            betas.append(0.0)
            break
        left.append(u / alphas[-1])
        w = _orthogonalised(adjoint(left[-1]), right)
        betas.append(w.norm().item())
        if betas[-1] < 1e-13 * max(alphas):
            break
        right.append(w / betas[-1])
    B = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    B += torch.diag(torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64), 1)
    return torch.linalg.matrix_norm(B, 2).item()


def _orthogonalised(v: Tensor, basis: list[Tensor]) -> Tensor:
    if basis:
        Q = torch.stack(basis)
        for _ in range(2):
            v = v - Q.mT @ (Q @ v)
    return v


def operator_norm(fn: Map, input_shape: tuple[int, ...], at: Tensor | None = None) -> float:
    """The float64 norm of the derivative of `fn` at a point (for affine maps, of the map); exact for small inputs."""
    x = torch.zeros(input_shape, dtype=torch.float64) if at is None else at.detach().double()
    if x.numel() <= DENSE_LIMIT:
        return matrix_norm(jacobian(fn, x))

    def one(flat: Tensor) -> Tensor:
        return fn(flat.view(1, *input_shape)).flatten()

    point = x.flatten()
    pull = torch.func.vjp(one, point)[1]
    start = torch.randn(point.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return lanczos_norm(lambda v: torch.func.jvp(one, (point,), (v,))[1], lambda u: pull(u)[0], start)


def singular_values(fn: Map, input_shape: tuple[int, ...]) -> Tensor:
    """All singular values of an affine map, largest first."""
    return torch.linalg.svdvals(jacobian(fn, torch.zeros(input_shape, dtype=torch.float64)))


def worst_norm(module: nn.Module, input_shape: tuple[int, ...], nonlinear: bool, seed: int = 0) -> float:
    """The largest derivative norm found: anywhere for affine maps, at points of several scales for others."""
    if not nonlinear:
        return matrix_norm(affine_matrix(module, input_shape))
    generator = torch.Generator().manual_seed(seed)
    points = [torch.randn(input_shape, dtype=torch.float64, generator=generator) * s for s in (0.01, 1.0, 1.0, 100.0)]
    return matrix_norm(jacobians(module, torch.stack(points)))


def computed_parts(module: nn.Module) -> list[Any]:
    """Those whose weight is computed."""
    return [part for part in module.modules() if isinstance(part, ParametrizedModule)]


def executed_in_double(module: nn.Module) -> nn.Module:
    """A float64 copy that runs the same weights as `module`, rounded as they are."""
    double = copy.deepcopy(module).double()
    ours, theirs = computed_parts(double), computed_parts(module)
    for part, original in zip(ours, theirs, strict=True):
        part.effective = lambda *key, of=original: tree_map(_doubled, of.effective(*key))
    return double


def _doubled(value: Any) -> Any:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def train_to_exceed(module: nn.Module, input_shape: tuple[int, ...], steps: int = 40, lr: float = 0.1) -> float:
    """Gradient ascent of ‖f(x + h) − f(x)‖/‖h‖ over the parameters, x and h; returns the largest quotient seen."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, *input_shape)
    dtype = next(module.parameters()).dtype
    x = torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()
    h = torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([*module.parameters(), x, h], lr=lr)
    largest = 0.0
    for _ in range(steps):
        quotients = (module(x + h) - module(x)).flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)
        largest = max(largest, quotients.max().item())
        optimizer.zero_grad()
        (-quotients.clamp_min(1e-30).log().sum()).backward()  # dead units map to one point
        optimizer.step()
    return largest
