"""A spatial shift of groups of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from liplayers.core.checks import check_share
from liplayers.core.module import LipschitzModule
from liplayers.errors import ShapeError

__all__ = ["SpatialShift2d"]

_DIRECTIONS = ((-1, -2), (1, -2), (-1, -1), (1, -1))  # (shift, axis): up, down, left, right


class SpatialShift2d(LipschitzModule):
    r"""Circular shift by one pixel of channel groups: the first group up, then down, left, right; the rest stays.

    Orthogonal, a permutation of the entries; supports every image size and number of channels. Each group has
    max(1, min(round(ratio·C), ⌊C/4⌋)) channels; fewer than four channels are shifted one in each direction as far as
    they go. Cost: one copy of the image. Signal gain at initialisation, and always, is 1.

    Args:
        ratio: share of the channels that moves in each direction, up to 1/4.

    Shape:
        (N, C, H, W) or (C, H, W), unchanged.

    Raises:
        ArgumentError: a ratio outside [0, 1/4].
        ShapeError: at call, fewer than three dimensions.

    Source: Hu et al. 2026, arXiv 2601.18513.

    >>> SpatialShift2d()(torch.tensor([[[1.0], [2.0], [3.0]]])).flatten().tolist()
    [2.0, 3.0, 1.0]
    """

    def __init__(self, ratio: float = 1 / 16) -> None:
        super().__init__()
        check_share(self, "ratio", ratio, 0, 0.25)
        self.ratio = ratio

    def group_sizes(self, channels: int) -> list[int]:
        """The channels that move up, down, left and right, and those that stay."""
        size = max(1, min(round(self.ratio * channels), channels // 4))
        moving = [max(0, min(size, channels - i * size)) for i in range(4)]
        return [*moving, channels - sum(moving)]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4):
            raise ShapeError(f"SpatialShift2d: got an input of shape {tuple(x.shape)}; expected (N, C, H, W)")
        *moving, rest = x.split(self.group_sizes(x.shape[-3]), -3)
        shifted = [g.roll(shift, axis) for g, (shift, axis) in zip(moving, _DIRECTIONS, strict=True)]
        return torch.cat([*shifted, rest], -3)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"ratio={self.ratio:g}"
