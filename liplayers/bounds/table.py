"""The norm of each explicit weight in a model, enclosed from both sides."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import nn

from liplayers.errors import NonFiniteError
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.layers.bases.kernel import KernelConv2d
from liplayers.linalg.verified import Enclosure, conv_norm_enclosure, norm_enclosure

__all__ = ["NormRow", "norm_table"]


@dataclass(frozen=True)
class NormRow:
    """One layer: where it is, its type, the proven lower ≤ norm ≤ upper, the method, and the time that it took."""

    path: str
    type: str
    lower: float
    upper: float
    method: str
    seconds: float


def norm_table(model: nn.Module) -> list[NormRow]:
    """Proven enclosures of the norms of the weights as they are stored, rounding included.

    One row for each nn.Linear and nn.Conv2d, and for each of our layers that runs one matrix or kernel; a module in
    several places is listed once. A convolution's norm is that on the infinite grid: no image of any size exceeds it
    with zero padding, large ones approach it. What other padding adds is counted by `lipschitz_bound`, not here.

    Args:
        model: any module.

    Raises:
        NonFiniteError: a weight contains NaN or infinity; named by its path.

    >>> [row] = norm_table(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> row.path, row.type, row.lower <= row.upper
    ('0', 'Linear', True)
    """
    rows = []
    for path, module in model.named_modules():
        start = time.perf_counter()
        try:
            found = _weight_enclosure(module)
        except NonFiniteError as error:
            raise NonFiniteError(f"{path or 'the model'} ({type(module).__name__}): {error}") from None
        if found is not None:
            seconds = time.perf_counter() - start
            rows.append(NormRow(path, type(module).__name__, found.lower, found.upper, found.method, seconds))
    return rows


def _weight_enclosure(module: nn.Module) -> Enclosure | None:
    if type(module) is nn.Linear or isinstance(module, LipschitzLinear):
        return norm_enclosure(module.weight)
    if type(module) is nn.Conv2d or isinstance(module, KernelConv2d):
        (sh, sw), (dh, dw) = module.stride, module.dilation
        return conv_norm_enclosure(module.weight, (sh, sw), (dh, dw), module.groups)
    return None
