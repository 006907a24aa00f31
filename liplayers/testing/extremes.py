"""Where to put the raw parameters of a layer: the places where published libraries were seen to break."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["MATRICES", "VECTORS", "settings"]


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


#: Settings of matrices and kernels.
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
#: Settings of vectors and scalars.
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
            fill(name, partial(_vector, name), vectors)
            yield f"vectors {name}, matrices {matrix}"
    module.load_state_dict(initial)
