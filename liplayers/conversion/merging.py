"""Where values meet: sums and concatenations that stay within the largest bound of what they take.

They are plain modules with several inputs. `lipschitz_bound` sees the arithmetic in them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from liplayers.core.checks import check_share
from liplayers.errors import ArgumentError

__all__ = ["ConvexSum", "ScaledCat"]


class ConvexSum(nn.Module):
    r"""y = (1 − α)a + αb: of what x + f(x) was, a convex combination, with the bound (1 − α)L_a + αL_b.

    Args:
        alpha: α, or where it starts from.
        learnable: whether α = sigmoid(logit) of a parameter.

    Shape:
        two tensors of one shape → the same.

    Raises:
        ArgumentError: alpha outside [0, 1]; outside (0, 1) where it is learned.

    Source: Serrurier et al. 2021 (arXiv 2006.06520) for convex combinations of 1-Lipschitz maps.

    >>> ConvexSum(0.25)(torch.tensor([0.0]), torch.tensor([4.0]))
    tensor([1.])
    """

    logit: nn.Parameter | None

    def __init__(self, alpha: float = 0.5, learnable: bool = False) -> None:
        super().__init__()
        check_share(self, "alpha", alpha, 0, 1)
        if learnable and alpha in (0, 1):
            raise ArgumentError(f"ConvexSum: alpha={alpha!r} is learned; expected a number strictly between 0 and 1")
        self.alpha = float(alpha)
        self.logit = nn.Parameter(torch.tensor([math.log(alpha / (1 - alpha))])) if learnable else None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        alpha = self.alpha if self.logit is None else self.logit.sigmoid().view(())
        return (1 - alpha) * a + alpha * b

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}" if self.logit is None else "learnable=True"


class ScaledCat(nn.Module):
    """Concatenation of n values divided by √n: within the bound L where each of them is, as √(Σ L²/n) ≤ L.

    Args:
        parts: n.
        dim: the dimension along which they are joined.

    Shape:
        n tensors → one.

    >>> ScaledCat(4)(*torch.ones(4, 1, 1))
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """

    def __init__(self, parts: int, dim: int = 1) -> None:
        super().__init__()
        self.parts = parts
        self.dim = dim
        self.factor = math.nextafter(1 / math.sqrt(parts), 0)  # below it, so that no rounding leaves a bound above L

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, self.dim) * self.factor

    def extra_repr(self) -> str:
        return f"parts={self.parts}, dim={self.dim}"
