"""Base of the dense families."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from liplayers.core.checks import check_positive
from liplayers.core.precision import exact_precision
from liplayers.core.weights import ParametrizedModule
from liplayers.linalg.orthogonal import fill_orthogonal_


class LipschitzLinear(ParametrizedModule):
    """Base of the dense families: y = Wx + b with W = `map_weight(raw)`, ‖W‖ ≤ 1.

    The arguments are those of `torch.nn.Linear`. Subclasses implement `map_weight`, and may change `reset_parameters`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        self._make_raw(device, dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"raw": (self.out_features, self.in_features)}

    def reset_parameters(self) -> None:
        """An orthogonal raw matrix, no bias."""
        fill_orthogonal_(self.raw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    map_weight: Callable[..., Tensor]
    """(*raw parameters) → the contraction W, (out, in), that they stand for."""

    def compute_effective(self) -> Tensor:
        return self.map_weight(*self.raw_values()).to(self.raw.dtype)

    @property
    def weight(self) -> Tensor:
        """The effective weight, (out_features, in_features)."""
        return self.effective()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective(), self.bias)

    def lipschitz_bound(self) -> float:
        dtype = self.executed_dtype()
        if torch.finfo(dtype).bits >= 32:
            return 1.0
        return 1.0 + low_precision_excess(self, dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def low_precision_excess(module: LipschitzLinear, dtype: torch.dtype) -> float:
    """‖W_executed − W‖_F, what rounding the weight to bfloat16 or float16 can add to its norm."""
    with torch.no_grad(), exact_precision(module.raw_device):
        exact = module.map_weight(*module.raw_values()).double()
        return torch.linalg.matrix_norm(exact.to(module.raw.dtype).to(dtype).double() - exact).item()
