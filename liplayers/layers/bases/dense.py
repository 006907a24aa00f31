"""Base of the dense families."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liplayers.core.checks import check_positive
from liplayers.core.weights import ParametrizedModule
from liplayers.linalg.orthogonal import fill_orthogonal_
from liplayers.modules.frozen import plain_linear

__all__ = ["LipschitzLinear"]


class LipschitzLinear(ParametrizedModule, abstract=True):
    """Base of the dense families: y = Wx + b with W = `map_weight(*raw parameters)`, (out, in), ‖W‖ ≤ 1.

    A family's constructor has the arguments of `torch.nn.Linear`, calls this one with the sizes, makes `raw`, what else
    is mapped and `bias`, in this order, and calls `reset_parameters`.

    Args:
        in_features: size of each input.
        out_features: size of each output.
    """

    has_weight = True
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        check_positive(self, in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features

    def reset_parameters(self) -> None:
        """An orthogonal raw matrix, no bias."""
        fill_orthogonal_(self.raw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.bias)

    def lipschitz_bound(self) -> float:
        if torch.finfo(self.executed_dtype()).bits >= 32:
            return 1.0
        ((exact, run),) = self.exact_and_executed()
        return 1.0 + torch.linalg.matrix_norm(run - exact).item()

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        return plain_linear(self.effective(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
