"""Containers and affine layers with a known effect on the Lipschitz constant; `nn.Sequential` is known as it is.

A container states by `compose_bounds` how the bounds of its branches combine; `liplayers.lipschitz_bound` asks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from liplayers.core.checks import check_shape
from liplayers.core.module import LipschitzModule, SettledModule
from liplayers.core.precision import executed
from liplayers.errors import ArgumentError, ShapeError
from liplayers.linalg import upward

__all__ = ["Concatenate", "Container", "ConvexResidual", "Normalize", "Scale"]


class Container(SettledModule):
    """A module whose bound follows from those of its branches."""

    def branches(self) -> Sequence[nn.Module]:
        """The modules that are applied to the input."""
        raise NotImplementedError

    def compose_bounds(self, bounds: Sequence[float]) -> float:
        """The bound of the container, given one for each branch."""
        raise NotImplementedError


class ConvexResidual(Container):
    r"""Convex residual connection y = (1 − α)x + α·f(x), α = sigmoid(logit) in (0, 1), learned or fixed.

    1-Lipschitz where f is: the bound is (1 − α) + α·L. A plain x + f(x) would have 1 + L.

    Args:
        branch: f, which keeps the shape of its input.
        alpha: initial α.
        learnable: whether α is a parameter.

    Raises:
        ArgumentError: alpha outside (0, 1).

    Source: Serrurier et al. 2021 (arXiv 2006.06520) for convex combinations of 1-Lipschitz maps.

    >>> ConvexResidual(nn.ReLU(), alpha=0.5)(torch.tensor([-2.0, 2.0])).tolist()
    [-1.0, 2.0]
    """

    def __init__(self, branch: nn.Module, alpha: float = 0.5, learnable: bool = True) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ArgumentError(f"ConvexResidual: alpha={alpha!r}; expected a number strictly between 0 and 1")
        self.branch = branch
        self.logit = nn.Parameter(torch.tensor([math.log(alpha / (1 - alpha))]), requires_grad=learnable)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if y.shape != x.shape:
            raise ShapeError(
                f"ConvexResidual: the branch turned {tuple(x.shape)} into {tuple(y.shape)}; it must keep the shape"
            )
        alpha = self.logit.sigmoid().view(())  # as a scalar it takes the dtype of x
        return (1 - alpha) * x + alpha * y

    def branches(self) -> Sequence[nn.Module]:
        return [self.branch]

    def compose_bounds(self, bounds: Sequence[float]) -> float:
        logit = self.logit.detach()
        alpha = logit.double().sigmoid()
        pairs = [(1 - alpha, alpha)]
        # in half precision 1 − α is rounded as well, and the two weights that run need not sum to 1
        if torch.finfo(logit.dtype).bits < 32:
            alpha = logit.sigmoid()
            pairs = [(1 - alpha, alpha)]
        if torch.is_autocast_enabled(logit.device.type):
            low = torch.get_autocast_dtype(logit.device.type)
            pairs.append(((1 - alpha).to(low), alpha.to(low)))
        return max(upward.total(rest.item(), upward.product(weight.item(), bounds[0])) for rest, weight in pairs)

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        return FrozenResidual(self.branch, self.logit.sigmoid().view(()))


class FrozenResidual(Container):
    """y = (1 − α)x + α·f(x), α a buffer: `ConvexResidual`.

    Args:
        branch: f, which keeps the shape of its input.
        alpha: α, one number in (0, 1).
    """

    alpha: Tensor

    def __init__(self, branch: nn.Module, alpha: Tensor) -> None:
        super().__init__()
        self.branch = branch
        self.register_buffer("alpha", alpha.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if y.shape != x.shape:
            raise ShapeError(
                f"FrozenResidual: the branch turned {tuple(x.shape)} into {tuple(y.shape)}; it must keep the shape"
            )
        return (1 - self.alpha) * x + self.alpha * y

    def branches(self) -> Sequence[nn.Module]:
        return [self.branch]

    def compose_bounds(self, bounds: Sequence[float]) -> float:
        check_shape(self, "alpha", self.alpha, ())
        exact = (1 - self.alpha).double(), self.alpha.double()
        pairs = [exact, (executed(1 - self.alpha), executed(self.alpha))]
        return max(
            upward.total(abs(rest.item()), upward.product(abs(weight.item()), bounds[0])) for rest, weight in pairs
        )


class Concatenate(Container):
    r"""Concatenate the outputs of several branches on one input; the bound is √(Σ L_i²).

    Args:
        modules: the branches, at least one.
        dim: the dimension along which outputs are joined.

    >>> Concatenate([nn.Identity(), nn.Identity()])(torch.ones(1, 2))
    tensor([[1., 1., 1., 1.]])
    """

    def __init__(self, modules: Iterable[nn.Module], dim: int = 1) -> None:
        super().__init__()
        self.paths = nn.ModuleList(modules)
        if not self.paths:
            raise ArgumentError("Concatenate: no modules; expected at least one")
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([path(x) for path in self.paths], self.dim)

    def branches(self) -> Sequence[nn.Module]:
        return list(self.paths)

    def compose_bounds(self, bounds: Sequence[float]) -> float:
        return upward.hypot(*bounds)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Scale(LipschitzModule):
    """Multiply by a constant: y = factor·x, bound |factor|.

    Args:
        factor: any finite number.

    >>> Scale(3.0).lipschitz_bound()
    3.0
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
            raise ArgumentError(f"Scale: factor={factor!r}; expected a finite number")
        self.factor = float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def lipschitz_bound(self) -> float:
        return abs(self.factor)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Normalize(LipschitzModule):
    """Per-channel (x − mean)/std as part of the model; the bound is 1/min(std), in the norm of the pixels.

    Args:
        mean: one number for each channel, in the units of the input.
        std: one positive number for each channel, in the units of the input.

    Shape:
        (N, C, *) → the same.

    Raises:
        ArgumentError: lengths that differ, a std that is not positive.

    >>> Normalize([0.5, 0.5], [0.5, 0.25]).lipschitz_bound()
    4.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(std) or not all(s > 0 and math.isfinite(s) for s in std):
            raise ArgumentError(f"Normalize: mean={mean}, std={std}; expected as many positive stds as means")
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.get_default_dtype()))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(self.mean):
            raise ShapeError(f"Normalize: got shape {tuple(x.shape)}; expected (N, {len(self.mean)}, …)")
        check_shape(self, "mean", self.mean, (x.shape[1],))
        check_shape(self, "std", self.std, (x.shape[1],))
        shape = (-1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)

    def lipschitz_bound(self) -> float:
        return upward.quotient(1, self.std.double().abs().min().item())

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"
