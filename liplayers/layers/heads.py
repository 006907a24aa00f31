"""Last layers: the pairwise Lipschitz constants of logit differences are what a certificate divides by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liplayers.layers.base import LipschitzLinear
from liplayers.linalg.norms import unit_rows
from liplayers.linalg.verified import norm_enclosure

__all__ = ["NormalizedLinear", "row_distances"]


def row_distances(weight: Tensor) -> Tensor:
    """‖w_y − w_j‖ for all pairs of rows, (K, K), zeros on the diagonal; differentiable, gradient 0 at equal rows.

    Off the diagonal they are upper bounds: of d squares of differences, their sum, its root and what follows, a
    distance keeps 1 − (d/2 + 5)u, and underflow takes less than d·√tiny from it, where the largest weight is around 1.

    >>> row_distances(torch.eye(2))
    tensor([[0.0000, 1.4142],
            [1.4142, 0.0000]])
    """
    largest = weight.detach().abs().amax()
    scale = torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1)  # a power of two: exact
    unit = weight / scale
    numbers, features = torch.finfo(weight.dtype), weight.shape[-1]
    distances = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    above = distances * (1 + (features / 2 + 5) * numbers.eps) + features * math.sqrt(numbers.tiny)
    return rounded_up(scale * above)


def rounded_up(constants: Tensor) -> Tensor:
    """The next floats above those of a square matrix, zeros on its diagonal, with the gradient that it had."""
    above = torch.nextafter(constants, torch.full_like(constants, math.inf)) - constants
    off_diagonal = 1 - torch.eye(len(constants), dtype=constants.dtype, device=constants.device)
    return (constants + torch.where(constants.isfinite(), above, 0).detach()) * off_diagonal


class NormalizedLinear(LipschitzLinear):
    r"""Last layer with unit rows: W = P/‖p_k‖, y = Wx + b.

    Each logit is 1-Lipschitz, the map of all of them is not: its bound is that of ‖W‖, up to √K. Certificates use
    ‖w_y − w_j‖ for each pair. Rows of zeros stay zero.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.

    Source: Singla, Singla & Feizi 2022, arXiv 2108.04062 ("last layer normalization").

    >>> NormalizedLinear(4, 10).weight.norm(dim=1).allclose(torch.ones(10))
    True
    """

    constant_bound = False
    range_exponent = 0.8  # nothing is squared here

    def map_weight(self, raw: Tensor) -> Tensor:
        return unit_rows(raw)[0]

    def lipschitz_bound(self) -> float:
        with torch.no_grad():
            return norm_enclosure(self.weight.to(self.executed_dtype())).upper
