"""Activations that keep the Lipschitz constant, and the slope ranges that residual proofs need.

A slope range (m, β) says that (σ(a) − σ(b))/(a − b) ∈ [m, β] for each entry on its own. Sorting activations have
none: they are 1-Lipschitz as maps of the whole vector, which is not enough for SLL, CPL, Sandwich or LDLT.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from liplayers.errors import ArgumentError, UnknownNameError
from liplayers.layers.base import LipschitzModule, check_positive

__all__ = ["ACTIVATIONS", "Abs", "GroupSort", "MaxMin", "get_activation", "require_slope_range", "slope_range"]


class MaxMin(LipschitzModule):
    r"""(a, b) ↦ (max(a, b), min(a, b)) for the halves a, b of the channels: a gradient-norm-preserving activation.

    Channel i is paired with channel i + ⌊C/2⌋; of an odd number the last passes unchanged. It permutes the entries
    of its input, hence preserves norms. Signal gain 1.

    Args:
        dim: the channel dimension.

    Shape:
        any, unchanged.

    Source: Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> MaxMin()(torch.tensor([[1.0, 2.0, 3.0, 0.0, 9.0]]))
    tensor([[3., 2., 1., 0., 9.]])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[self.dim] // 2
        a, b, rest = x.split([half, half, x.shape[self.dim] - 2 * half], self.dim)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b), rest], self.dim)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class GroupSort(LipschitzModule):
    r"""Sort the channels within groups of `group_size` neighbours, ascending; a shorter last group is sorted too.

    Args:
        group_size: channels in a group; None sorts all of them.
        dim: the channel dimension.

    Shape:
        any, unchanged.

    Raises:
        ArgumentError: group_size below 1.

    Source: Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> GroupSort(3)(torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0]]))
    tensor([[1., 2., 3., 4., 5.]])
    """

    def __init__(self, group_size: int | None = 2, dim: int = 1) -> None:
        super().__init__()
        if group_size is not None:
            check_positive(self, group_size=group_size)
        self.group_size = group_size
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[self.dim]
        size = min(self.group_size or channels, channels)
        x = x.movedim(self.dim, -1)
        full = channels - channels % size
        groups = rearrange(x[..., :full], "... (g s) -> ... g s", s=size).sort(-1).values
        parts = [rearrange(groups, "... g s -> ... (g s)"), x[..., full:].sort(-1).values]
        return torch.cat(parts, -1).movedim(-1, self.dim)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, dim={self.dim}"


class Abs(LipschitzModule):
    """The absolute value of each entry; preserves norms, slope range [−1, 1].

    >>> Abs()(torch.tensor([-1.0, 2.0]))
    tensor([1., 2.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()

    def lipschitz_bound(self) -> float:
        return 1.0


# torch's Softplus is not here: above its threshold it turns linear with a small jump, so it is not even continuous.
_SLOPE_RANGES: dict[type[nn.Module], Callable] = {
    nn.Identity: lambda m: (1.0, 1.0),
    nn.ReLU: lambda m: (0.0, 1.0),
    nn.ReLU6: lambda m: (0.0, 1.0),
    nn.Hardtanh: lambda m: (0.0, 1.0),
    nn.Tanh: lambda m: (0.0, 1.0),
    nn.Sigmoid: lambda m: (0.0, 0.25),
    nn.LogSigmoid: lambda m: (0.0, 1.0),
    nn.Softsign: lambda m: (0.0, 1.0),
    nn.Softshrink: lambda m: (0.0, 1.0),
    nn.Tanhshrink: lambda m: (0.0, 1.0),
    nn.Hardsigmoid: lambda m: (0.0, 1 / 6),
    nn.ELU: lambda m: (min(0.0, m.alpha), max(1.0, m.alpha)),
    nn.CELU: lambda m: (0.0, 1.0) if m.alpha > 0 else None,
    nn.LeakyReLU: lambda m: (min(1.0, m.negative_slope), max(1.0, m.negative_slope)),
    Abs: lambda m: (-1.0, 1.0),
}


def slope_range(activation: nn.Module) -> tuple[float, float] | None:
    """The slope range (m, β) of an entrywise activation; None if it has none or none is known.

    >>> slope_range(nn.LeakyReLU(0.1)), slope_range(MaxMin())
    ((0.1, 1.0), None)
    """
    rule = _SLOPE_RANGES.get(type(activation))  # exact type: a subclass may compute something else
    return rule(activation) if rule else None


def require_slope_range(owner: object, activation: nn.Module, low: float = 0.0, high: float = 1.0) -> None:
    """Raise ArgumentError unless the activation's slopes are proven to lie in [low, high]."""
    got = slope_range(activation)
    if got is None or got[0] < low or got[1] > high:
        what = "no slope range" if got is None else f"slopes in [{got[0]:g}, {got[1]:g}]"
        raise ArgumentError(
            f"{type(owner).__name__}: activation={activation} has {what}, the proof needs [{low:g}, {high:g}]; "
            f"use nn.ReLU() or nn.Tanh()"
        )


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "maxmin": MaxMin,
    "groupsort": GroupSort,
    "fullsort": lambda: GroupSort(None),
    "abs": Abs,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


def get_activation(name: str | Callable[[], nn.Module]) -> nn.Module:
    """A new activation by name, or from a class or function.

    >>> get_activation("maxmin")
    MaxMin(dim=1)
    """
    if callable(name):
        return name()
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnknownNameError.of("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()
