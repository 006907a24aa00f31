"""CPL, convex potential layers: residual gradient steps (Meunier et al. 2022, arXiv 2110.12690).

Differs from the public code in that ‖W‖ is a proven upper bound (Gram iteration; for convolutions on the symbol)
instead of a power iteration, which estimates from below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liplayers.layers.blocks import Conv2dBlock, DenseBlock
from liplayers.layers.registry import Family, register
from liplayers.linalg.convolution import symbol_norm_bound
from liplayers.linalg.norms import gram_iteration_bound

__all__ = ["CPLBlock", "CPLConv2dBlock"]


def _unit_scale(raw: Tensor) -> tuple[Tensor, Tensor]:
    """raw divided by its largest entry, whose square might not be a float, and that entry (1 for zeros)."""
    largest = raw.detach().abs().amax()
    scale = torch.where(largest > 0, largest, 1)
    return raw / scale, scale


def _outgoing(K: Tensor, norm: Tensor, scale: Tensor) -> Tensor:
    """(2/‖W‖²)W for W = scale·K."""
    return K * (2 / (scale * torch.where(norm > 0, norm, 1).square()))


class CPLBlock(DenseBlock):
    r"""Dense residual block, 1-Lipschitz: y = x − (2/‖W‖²)Wᵀσ(Wx + b), ‖W‖ by a proven upper bound.

    For σ with slopes in [0, 1] the Jacobian is I − (2/‖W‖²)WᵀDW with 0 ≤ D ≤ I, whose spectrum is in [−1, 1]. Signal
    gain at initialisation is 1/√2 or more in the mean (half of the hidden units reflect with ReLU). Cost: 8 products of
    Gram matrices.

    Args:
        features: size of input and output.
        hidden_features: rows of W; default `features`.
        bias: whether b is there.
        activation: entrywise with slopes in [0, 1]; default ReLU.
        device, dtype: of the parameters.

    Shape:
        (*, features) → (*, features).

    Raises:
        ArgumentError: an activation without proven slopes in [0, 1] (MaxMin, abs, GELU, SiLU), sizes below 1.

    Source: Meunier et al. 2022, arXiv 2110.12690.

    >>> block = CPLBlock(6, hidden_features=9)
    >>> x, y = torch.randn(2, 6)
    >>> bool((block(x) - block(y)).norm() <= (x - y).norm() * (1 + 1e-5))
    True
    """

    def map_pair(self, raw: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        K, scale = _unit_scale(raw)
        return raw, _outgoing(K, gram_iteration_bound(K), scale)


class CPLConv2dBlock(Conv2dBlock):
    r"""Convolutional residual block, 1-Lipschitz: y = x − (2/‖K‖²)K⊤ ∗ σ(K ∗ x + b), ‖K‖ by a proven upper bound.

    The bound holds for zero and circular padding and every image size. Signal gain at initialisation is 1/√2 or more
    in the mean (one orthogonal tap). Cost: Gram iteration on the symbol at 8(k − 1) × 8(k − 1) frequencies.

    Args:
        channels: of input and output.
        hidden_channels: default `channels`.
        kernel_size: odd, so that the image keeps its size with padding (k − 1)/2.
        bias, padding_mode: as in `torch.nn.Conv2d`; "zeros" or "circular".
        activation: entrywise with slopes in [0, 1]; default ReLU.
        device, dtype: of the parameters.

    Shape:
        (N, channels, H, W) → the same.

    Raises:
        ArgumentError: an even kernel, another padding mode, an activation without proven slopes in [0, 1].
        ShapeError: at call, another number of channels.

    Source: Meunier et al. 2022, arXiv 2110.12690.

    >>> CPLConv2dBlock(4, hidden_channels=6)(torch.randn(2, 4, 7, 5)).shape
    torch.Size([2, 4, 7, 5])
    """

    def map_pair(self, raw: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        K, scale = _unit_scale(raw)
        return raw, _outgoing(K, symbol_norm_bound(K[None])[0], scale)


register(Family("cpl", dense_block=CPLBlock, conv_block=CPLConv2dBlock))
