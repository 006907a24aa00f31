"""Last layers: the pairwise Lipschitz constants of logit differences are what a certificate divides by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.linalg.norms import unit_rows
from liplayers.linalg.verified import norm_enclosure

__all__ = ["NormalizedLinear"]


class NormalizedLinear(LipschitzLinear):
    r"""Last layer with unit rows: W = P/‖p_k‖, y = Wx + b.

    Each logit is 1-Lipschitz, the map of all of them is not: its bound is that of ‖W‖, up to √K. Certificates use
    ‖w_y − w_j‖ for each pair. Rows of zeros stay zero.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.

    Source: Singla, Singla & Feizi 2022, arXiv 2108.04062 ("last layer normalization").

    >>> NormalizedLinear(4, 10).weight.norm(dim=1).allclose(torch.ones(10))
    True
    """

    constant_estimate = False
    range_exponent = 0.8  # nothing is squared here

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.raw = self.new_parameter((out_features, in_features), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """The weight itself, which is rescaled."""
        return [weight]

    def map_weight(self, raw: Tensor) -> Tensor:
        return unit_rows(raw)[0]

    def lipschitz_bound(self) -> float:
        with torch.no_grad():
            return norm_enclosure(self.weight.to(self.executed_dtype())).upper
