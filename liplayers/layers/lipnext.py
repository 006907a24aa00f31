"""The LipNeXt block: orthogonal maps at each pixel around a shift of channel groups (Hu et al. 2026, arXiv 2601.18513).

No public code exists. Here the two orthogonal maps are parameters on the manifold (see manifold.py), and what they
drift from it is counted in the block's bound.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liplayers.core.checks import Size2d, check_positive, check_share, pair
from liplayers.core.intact import require_intact
from liplayers.core.registry import Family, register
from liplayers.errors import ShapeError, UnknownBoundError
from liplayers.layers.manifold import ManifoldModule
from liplayers.linalg.orthogonal import fill_orthogonal_
from liplayers.linalg.stiefel import near_isometry_bound
from liplayers.modules.activations import BetaAbs
from liplayers.modules.frozen import constant, filled
from liplayers.modules.offsets import PositionEmbedding
from liplayers.modules.shift import SpatialShift2d

__all__ = ["LipNeXtBlock"]


class LipNeXtBlock(ManifoldModule):
    r"""y = σ(M Rᵀ S(R(x + p)) + b) at each pixel: R and M orthogonal, S a spatial shift, σ = β-abs.

    Without R (`rotate=False`) it is σ(M S(x + p) + b): the M of the block before turns the channels already, at half
    the cost.

    A nonlinear 1-Lipschitz map while R and M are orthogonal, as they are at initialisation and under `ManifoldAdamW`;
    it preserves norms of differences wherever σ does not fold. With any optimiser the bound is ‖M Rᵀ‖·‖R‖, each a
    proven bound of the matrix that runs (`near_isometry_bound`). S is `SpatialShift2d`, and σ takes the absolute value
    of the first round(β·channels) channels. Supports every image size without p, one size with it. Signal gain at
    initialisation is 1. Cost: two 1 × 1 convolutions (one without R) and a copy; M Rᵀ is multiplied once.

    Args:
        channels: channels of input and output.
        image_size: height and width of the images (an integer or a pair), for which a position embedding p is learned;
            None for none.
        shift_ratio: share of the channels that moves in each direction, up to 1/4.
        beta: share of the channels that σ folds.
        rotate: whether R is there.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, channels, H, W) → the same.

    Raises:
        ArgumentError: sizes below 1, shares out of range.
        ShapeError: at call, another number of channels, or another image size than image_size.

    Source: Hu et al. 2026, arXiv 2601.18513.

    >>> block = LipNeXtBlock(8, image_size=(7, 5))
    >>> block(torch.randn(2, 8, 7, 5)).shape
    torch.Size([2, 8, 7, 5])
    """

    rotation: nn.Parameter | None
    mixing: nn.Parameter
    run_as_they_are = frozenset({"bias", "position"})

    def __init__(
        self,
        channels: int,
        image_size: Size2d | None = None,
        *,
        shift_ratio: float = 1 / 16,
        beta: float = 0.5,
        rotate: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, channels=channels)
        check_share(self, "shift_ratio", shift_ratio, 0, 0.25)
        check_share(self, "beta", beta, 0, 1)
        self.channels = channels
        self.image_size = None if image_size is None else pair(self, "image_size", image_size, 1)
        self.beta = beta
        self.shift = SpatialShift2d(shift_ratio)
        self.activation = BetaAbs(beta, dim=-3)

        self.rotation = self.new_parameter((channels, channels), device, dtype) if rotate else None
        self.mixing = self.new_parameter((channels, channels), device, dtype)
        shape = None if self.image_size is None else (channels, *self.image_size)
        self.position = None if shape is None else self.new_parameter(shape, device, dtype)
        self.bias = self.new_parameter((channels,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """R and M orthogonal, no position embedding, no bias."""
        for name in self.raw_names:
            fill_orthogonal_(getattr(self, name))
        for parameter in (self.position, self.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def map_weight(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """R and M Rᵀ, or M alone: what acts before the shift, and after it."""
        if self.rotation is None:
            return raw
        rotation, mixing = raw
        return rotation, mixing @ rotation.mT

    def _check_input(self, x: Tensor) -> None:
        size = self.image_size or x.shape[-2:]
        if x.dim() not in (3, 4) or x.shape[-3] != self.channels or x.shape[-2:] != torch.Size(size):
            expected = "H, W" if self.image_size is None else "{}, {}".format(*self.image_size)
            raise ShapeError(
                f"LipNeXtBlock: got an input of shape {tuple(x.shape)}; expected (N, {self.channels}, {expected})"
            )

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        *before, mixed = self.effective()
        y = x if self.position is None else x + self.position
        for rotation in before:
            y = F.conv2d(y, rotation[:, :, None, None])
        y = F.conv2d(self.shift(y), mixed[:, :, None, None], self.bias)
        return self.activation(y)

    def check_parts(self) -> None:
        if (type(self.shift), type(self.activation)) != (SpatialShift2d, BetaAbs):
            raise UnknownBoundError("its shift or activation was replaced: build a new block")
        require_intact(self.shift)
        require_intact(self.activation)

    def lipschitz_bound(self) -> float:
        self.check_parts()
        dtype = self.executed_dtype()
        with torch.no_grad():
            return math.prod(near_isometry_bound(W.to(dtype)).item() for W in self.effective())

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        def pointwise(matrix: Tensor, bias: Tensor | None) -> nn.Conv2d:
            plain = nn.Conv2d(self.channels, self.channels, 1, bias=False, device="meta")
            return filled(plain, matrix[:, :, None, None], bias)

        *before, mixed = self.effective()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if self.position is not None:
            parts["position"] = PositionEmbedding(self.position.shape, device="meta")
            parts["position"].position = constant(self.position)
        for rotation in before:
            parts["rotation"] = pointwise(rotation, None)
        parts["shift"] = self.shift
        parts["mixing"] = pointwise(mixed, self.bias)
        parts["activation"] = self.activation
        return nn.Sequential(parts)

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, image_size={self.image_size}, shift_ratio={self.shift.ratio:g}, "
            f"beta={self.beta:g}"
            + ("" if self.rotation is not None else ", rotate=False")
            + f", bias={self.bias is not None}"
        )


register(Family("lipnext", conv_block=LipNeXtBlock))
