"""CPL, convex potential layers: residual gradient steps (Meunier et al. 2022, arXiv 2110.12690).

It differs from the public code. ‖W‖ of a dense block is a proven upper bound (Gram iteration). That of a convolution is
a tight estimate on the symbol, and the bound of the block is proven for the kernels that run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.core.registry import Family, register
from liplayers.layers.bases.residual import Conv2dBlock, DenseBlock
from liplayers.linalg.convolution import orthogonal_taps_, symbol_norm_estimate
from liplayers.linalg.norms import gram_iteration_bound, unit_scale
from liplayers.linalg.orthogonal import fill_orthogonal_

__all__ = ["CPLBlock", "CPLConv2dBlock"]

FURTHER = 0.1  # norm of initial hidden units beyond the number of inputs: orthogonal ones would cancel the signal


def _reset(block: DenseBlock | Conv2dBlock) -> None:
    inputs = block.raw.shape[1]
    first, further = block.raw.data[:inputs], block.raw.data[inputs:]
    orthogonal_taps_(first, (1, 1)) if first.dim() == 4 else fill_orthogonal_(first)
    nn.init.normal_(further, std=FURTHER / math.sqrt(block.raw[0].numel()))
    if block.bias is not None:
        nn.init.zeros_(block.bias)


def _outgoing(K: Tensor, norm: Tensor, scale: Tensor) -> Tensor:
    """(2/‖W‖²)W for W = scale·K."""
    return K * (2 / (scale * torch.where(norm > 0, norm, 1).square()))


class CPLBlock(DenseBlock):
    r"""Dense residual block, 1-Lipschitz: y = x − (2/‖W‖²)Wᵀσ(Wx + b), ‖W‖ by a proven upper bound.

    For σ with slopes in [0, 1] the Jacobian is I − (2/‖W‖²)WᵀDW with 0 ≤ D ≤ I, whose spectrum is in [−1, 1]. Signal
    gain at initialisation is 1, down to 0.8 for sixteen times as many hidden units as inputs. Cost: 8 products of Gram
    matrices.

    Args:
        features: size of input and output.
        hidden_features: rows of W; default `features`.
        bias: whether b is there.
        activation: entrywise with slopes in [0, 1]; default ReLU.
        device: of the parameters.
        dtype: of the parameters.

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

    def __init__(
        self,
        features: int,
        hidden_features: int | None = None,
        bias: bool = True,
        *,
        activation: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, hidden_features, activation)
        self.raw = self.new_parameter((self.hidden_features, features), device, dtype)
        self.bias = self.new_parameter((self.hidden_features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As many orthonormal hidden units as there are inputs, small further ones; no bias."""
        _reset(self)

    def map_weight(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        K, scale = unit_scale(raw)
        return raw, _outgoing(K, gram_iteration_bound(K), scale)


class CPLConv2dBlock(Conv2dBlock):
    r"""Convolutional residual block: y = x − (2/‖K‖²)K⊤ ∗ σ(K ∗ x + b), ‖K‖ by a tight estimate.

    It would be 1-Lipschitz for ‖K‖ itself. `lipschitz_bound()` is proven for the kernels that run, about 1, for zero
    and circular padding and every image size. Signal gain at initialisation is 1, down to 0.8 for sixteen times as many
    hidden units as inputs. Cost: Chebyshev iteration on the symbol at 4(k − 1) × 4(k − 1) frequencies.

    Args:
        channels: channels of input and output.
        hidden_channels: channels of the hidden layer; default `channels`.
        kernel_size: size of the kernel in pixels; odd, so that the image keeps its size with padding (k − 1)/2.
        bias: whether b is there.
        padding_mode: what surrounds the image, "zeros" or "circular".
        activation: entrywise with slopes in [0, 1]; default ReLU.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, channels, H, W) → the same.

    Raises:
        ArgumentError: an even kernel, another padding mode, an activation without proven slopes in [0, 1].
        ShapeError: at call, another number of channels.

    Source: Meunier et al. 2022, arXiv 2110.12690.

    >>> CPLConv2dBlock(4, hidden_channels=6)(torch.randn(2, 4, 7, 5)).shape
    torch.Size([2, 4, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None = None,
        kernel_size: int = 3,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        activation: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, hidden_channels, kernel_size, padding_mode, activation)
        shape = (self.hidden_channels, channels, kernel_size, kernel_size)
        self.raw = self.new_parameter(shape, device, dtype)
        self.bias = self.new_parameter((self.hidden_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As many orthonormal hidden units as there are inputs, small further ones; no bias."""
        _reset(self)

    weights_since = "0.2.0"  # before the step was for a bound of ‖K‖

    def lipschitz_bound(self) -> float:
        """Proven for the kernels that run: about 1, whatever the estimate of ‖K‖ was."""
        self.check_parts()
        frozen: Any = self.frozen(None)
        return frozen.lipschitz_bound()

    def lipschitz_estimate(self) -> float:
        return 1.0

    def map_weight(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        K, scale = unit_scale(raw)
        return raw, _outgoing(K, symbol_norm_estimate(K[None])[0], scale)


register(Family("cpl", dense_block=CPLBlock, conv_block=CPLConv2dBlock))
