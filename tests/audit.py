"""Measures what the layers promise, by means that share no code with them.

The norm of a map comes from its Jacobian in float64: dense for small inputs, by Golub–Kahan–Lanczos bidiagonalisation
with full reorthogonalisation for larger ones. Parameters are put where published libraries were seen to break.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from liplayers import FAMILIES
from liplayers.core.registry import ROLES
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError

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
    right, left, alphas, betas = [v], [], [], []
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
    _, pull = torch.func.vjp(one, point)
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


def executed_in_double(module: nn.Module) -> nn.Module:
    """A float64 copy that runs the same weights as `module`, rounded as they are."""
    double = copy.deepcopy(module).double()
    for ours, theirs in zip(double.modules(), module.modules(), strict=True):
        if isinstance(ours, ParametrizedModule):
            ours.effective = lambda *key, of=theirs: tree_map(_doubled, of.effective(*key))  # type: ignore[method-assign]
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


# Where to put the parameters ------------------------------------------------------------------------------------------


def _gaussian(p: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(p.shape, generator=g, dtype=torch.float64)


def _near_rank_one(p: Tensor, g: torch.Generator) -> Tensor:
    shape = [p.shape[0], p[0].numel()]
    column, row = torch.randn(shape[0], 1, generator=g).double(), torch.randn(1, shape[1], generator=g).double()
    return (column @ row).view(p.shape) + 1e-7 * _gaussian(p, g)


def _zero_rows(p: Tensor, g: torch.Generator) -> Tensor:
    value = _gaussian(p, g)
    value[::2] = 0
    return value


def _zero_columns(p: Tensor, g: torch.Generator) -> Tensor:
    value = _gaussian(p, g)
    value[:, ::2] = 0
    return value


def _shift(p: Tensor, g: torch.Generator) -> Tensor:
    """The identity on as many channels as there are, at the last tap."""
    value = torch.zeros(p.shape, dtype=torch.float64)
    corner = (-1,) * (p.dim() - 2)
    for i in range(min(p.shape[:2])):
        value[(i, i, *corner)] = 1
    return value


def _duplicates(p: Tensor, g: torch.Generator) -> Tensor:
    return _gaussian(p, g)[:1].expand(p.shape).clone()


def _duplicate_columns(p: Tensor, g: torch.Generator) -> Tensor:
    return _gaussian(p, g)[:, :1].expand(p.shape).clone()


def _mixed_scales(p: Tensor, g: torch.Generator) -> Tensor:
    rows = 10 ** (18 * torch.rand(p.shape[0], generator=g).double() - 9)
    return _gaussian(p, g) * rows.view(-1, *[1] * (p.dim() - 1))


def _mixed_columns(p: Tensor, g: torch.Generator) -> Tensor:
    columns = 10 ** (18 * torch.rand(p.shape[1], generator=g).double() - 9)
    return _gaussian(p, g) * columns.view(1, -1, *[1] * (p.dim() - 2))


MATRICES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "scale 1e-9": lambda p, g: 1e-9 * _gaussian(p, g),
    "scale 1e-3": lambda p, g: 1e-3 * _gaussian(p, g),
    "scale 1e3": lambda p, g: 1e3 * _gaussian(p, g),
    "scale 1e9": lambda p, g: 1e9 * _gaussian(p, g),
    "near rank one": _near_rank_one,
    "zero rows": _zero_rows,
    "zero columns": _zero_columns,
    "zeros": lambda p, g: torch.zeros(p.shape, dtype=torch.float64),
    "ones": lambda p, g: torch.ones(p.shape, dtype=torch.float64),
    "one-tap shift": _shift,
    "equal rows": _duplicates,
    "equal columns": _duplicate_columns,
    "mixed scales": _mixed_scales,
    "mixed column scales": _mixed_columns,
}
VECTORS = ("spread 50", "spread 800", "value 1e-9", "value 1e9", "value 1e18", "value -1e9", "value 0")


def _vector(name: str, p: Tensor, g: torch.Generator) -> Tensor:
    kind, number = name.split()
    if kind == "value":
        return torch.full(p.shape, float(number), dtype=torch.float64)
    signs = torch.randint(0, 2, p.shape, generator=g).double() * 2 - 1
    return signs * float(number)


@torch.no_grad()
def settings(module: nn.Module) -> Iterator[str]:
    """Put the parameters of `module` into one extreme state after another; yields the name of each.

    Matrices and kernels get every setting; then, with Gaussian ones, the vectors and scalars other than biases (gains,
    logarithms of multipliers) get theirs.
    """
    initial = copy.deepcopy(module.state_dict())
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for n, p in module.named_parameters() if p.dim() < 2 and not n.endswith("bias")]

    def fill(name: str, make: Callable[[Tensor, torch.Generator], Tensor], chosen: list) -> None:
        generator = torch.Generator().manual_seed(len(name))
        for p in chosen:
            p.copy_(make(p, generator))

    yield "as initialised"
    for name, make in MATRICES.items():
        module.load_state_dict(initial)
        fill(name, make, matrices)
        yield name
    for name in VECTORS if vectors else ():
        for matrix in ("gaussian", "one-tap shift"):
            module.load_state_dict(initial)
            fill(matrix, MATRICES[matrix], matrices)
            fill(name, lambda p, g, name=name: _vector(name, p, g), vectors)
            yield f"vectors {name}, matrices {matrix}"
    module.load_state_dict(initial)


# What to build --------------------------------------------------------------------------------------------------------


def of_role(*roles: str) -> list[tuple[str, str]]:
    """(family, role) for every registered family that has one of the roles."""
    return [(f.name, r) for f in FAMILIES.values() for r in roles if getattr(f, r) is not None]


EVERY = of_role(*ROLES)


def accepts(make: Callable, name: str) -> bool:
    """Whether a constructor takes an argument of that name."""
    return name in inspect.signature(make).parameters


def construct(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module | None:
    """The layer; None where the constructor refuses with an ArgumentError that names an argument that was given."""
    try:
        return make(*args, **kwargs)
    except ArgumentError as error:
        message = str(error)
        given = [*kwargs, "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "features"]
        assert any(name in message for name in given), f"names no argument: {message}"
        assert "\n" not in message
        return None


def example(family: str, role: str, dtype: torch.dtype | None = None, **kwargs: Any) -> tuple[nn.Module, tuple]:
    """A small layer of a family and the shape of one input; every family must be able to build it."""
    make = getattr(FAMILIES[family], role)
    torch.manual_seed(0)
    if role == "linear":
        return make(6, 4, dtype=dtype, **kwargs), (6,)
    if role in ("conv", "conv_transpose"):
        return make(3, 4, 3, padding=1, dtype=dtype, **kwargs), (3, 5, 6)
    return make(6, dtype=dtype, **kwargs), (6,) if role == "dense_block" else (6, 5, 6)


def is_block(role: str) -> bool:
    return role.endswith("_block")
