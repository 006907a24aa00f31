"""Gershgorin residual blocks: the Lipschitz LMI by diagonal dominance (Juston et al. 2025, arXiv 2502.21279).

The baseline that LDLT improves on: feasible for all free matrices, but the row sums over-constrain, as its paper says.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from liplayers.core.registry import Family, register
from liplayers.layers.bases.lmi import DenseLMIBlock, Sizes, orthogonal_
from liplayers.linalg.lmi import ExplicitWeights
from liplayers.linalg.orthogonal import to_double

__all__ = ["GershgorinBlock"]

ROW_SUM = 1.9  # of |C_l|; it has to stay below 2
FLOOR = 1e-9  # multipliers, as a share of the largest: a unit of no effect would have none


class GershgorinBlock(DenseLMIBlock):
    r"""Residual block w_0 = x, w_l = σ(C_l w_{l−1} + b_l), y = A x + B w_n + b whose LMI is diagonally dominant.

    From free Ã, B̃, C̃_l: the rows of C_l are 1.9 c̃/(1 + ‖c̃‖₁), r_l = |C_l|1; then backward through the layers
    λ_n = (|B̃ᵀB̃|1 + |B̃ᵀÃ|1)/(2 − r_n), λ_l = |C_{l+1}|ᵀλ_{l+1}/(2 − r_l), and
    h = |ÃᵀÃ|1 + |C_1|ᵀλ_1 + |ÃᵀB̃|1; A = sÃ, B = sB̃, Λ = s²λ with s = 𝓛/√max h; for σ with slopes in [0, 1]. Contraction
    with constant 𝓛 (1-Lipschitz for 𝓛 = 1). Signal gain at initialisation is 0.98 for one hidden layer and 0.45
    for five or more, of which those after the fourth start as identities where d_l = d_{l−1}. Cost: three products, in
    float64.

    Args:
        features: size of each input.
        hidden_features: d_1 … d_n, one integer or several; default `out_features`.
        out_features: size of each output; default `features`.
        bias: whether b_l and b are there.
        activation: entrywise with slopes in [0, 1]; default ReLU.
        lipschitz: 𝓛, above 0.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (*, features) → (*, out_features).

    Raises:
        ArgumentError: an activation without proven slopes in [0, 1] (MaxMin, abs, GELU, SiLU), sizes below 1, 𝓛 that is
            not positive.

    Source: Juston et al. 2025, arXiv 2502.21279.

    >>> import torch
    >>> block = GershgorinBlock(6, hidden_features=(9, 7))
    >>> x, y = torch.randn(2, 6)
    >>> bool((block(x) - block(y)).norm() <= (x - y).norm()), block.lipschitz_bound()
    (True, 1.0)
    """

    unit_slopes_only = True

    def __init__(
        self,
        features: int,
        hidden_features: Sizes | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        activation: nn.Module | None = None,
        lipschitz: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, hidden_features, out_features, activation, lipschitz)
        self.raw = self.new_parameter((self.outputs, features), device, dtype)
        for i, (old, new) in enumerate(pairwise(self.sizes), 1):
            self.register_parameter(f"raw_{i}", self.new_parameter((new, old), device, dtype))
        self.raw_out = self.new_parameter((self.outputs, self.sizes[-1]), device, dtype)
        self.make_biases(bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ã = I, orthogonal C̃_l (C_l = I after four layers), a small B̃, no bias."""
        first, *inner, last = (self.get_parameter(name) for name in self.raw_names)
        orthogonal_(first, 1.0)
        self.start_layers(inner, 1.0, 1 / (ROW_SUM - 1))
        orthogonal_(last, 0.01 / math.sqrt(self.sizes[-1]))
        nn.init.eye_(first)
        self.reset_biases()

    def map_weight(self, *raw: Tensor) -> ExplicitWeights:
        A, *inner, B = map(to_double, raw)
        largest = torch.maximum(A.detach().abs().amax(), B.detach().abs().amax())
        unit = torch.where(largest > 0, largest, 1)  # s does not change, and no product overflows
        A, B = A / unit, B / unit
        rows = [C.abs().sum(-1, keepdim=True) for C in inner]
        C = [ROW_SUM * W / (1 + row) for W, row in zip(inner, rows, strict=True)]
        coupling = (A.mT @ B).abs()
        multiplier = ((B.mT @ B).abs().sum(-1) + coupling.sum(0)) / (2 - C[-1].abs().sum(-1))
        found = [multiplier + FLOOR]
        for weight, above in zip(reversed(C[:-1]), reversed(C[1:]), strict=True):
            found.insert(0, above.abs().mT @ found[0] / (2 - weight.abs().sum(-1)) + FLOOR)
        h = ((A.mT @ A).abs().sum(-1) + C[0].abs().mT @ found[0] + coupling.sum(-1)).amax()
        s = self.lipschitz * torch.where(h > 0, h, 1).rsqrt()
        return ExplicitWeights(tuple(C), s * B, s * A, tuple(s.square() * m for m in found))


register(Family("gershgorin", dense_block=GershgorinBlock))
