"""How a table was standardised, and what rounding in that leaves of a certified radius."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Scaling"]


@dataclass(frozen=True)
class Scaling:
    """How the features of a table were standardised: (x − mean)/std in float64, or None where they came so.

    A certified ℓ2 radius R of the standardised features, less what `radius` takes off, lets feature j alone move by
    R·std_j of its own unit.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def radius(self, radius: Tensor, inputs: Tensor) -> Tensor:
        """What is left of certified radii where reading and standardising round: it holds for the file's own numbers.

        Args:
            radius: (N,) float64, certified for the inputs.
            inputs: (N, d), the standardised features as computed.

        Returns:
            (N,): r such that every table row x' with ‖(x' − x)/std‖₂ ≤ r, read and standardised, is within the given
            radius of x, read and standardised. The same where there is no mean and std.
        """
        if self.mean is None or self.std is None:
            return radius
        # Of z = (x − mean)/std three steps make ẑ: x is read within 8u (pandas before 3.1 does not round to nearest),
        # |x| ≤ std·|z| + |mean|; the difference and the quotient are rounded. So |ẑ − z| ≤ 11u|z| + (1 + 3u)c, with
        # c = (8u|mean| + 2⁻¹⁰⁷⁴)/std + 2⁻¹⁰⁷⁴. It counts at x and at x', ‖z'‖ ≤ ‖z‖ + r: R may be r(1 + 12u) + 23u‖ẑ‖ +
        # 3‖c‖. The rest pays for rounding here and in R·std.
        u = torch.finfo(torch.float64).eps / 2
        mean, std = (torch.tensor(column, dtype=torch.float64) for column in (self.mean, self.std))
        c = (8 * u * mean.abs() + 2.0**-1074) / std + 2.0**-1074
        error = 24 * u * inputs.double().abs().sum(1) + 4 * c.sum()
        return ((radius - error) * (1 - 32 * u)).clamp_min(0)
