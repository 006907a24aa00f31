"""SLL, SDP-based Lipschitz layers: residual blocks with a diagonal multiplier (Araujo et al. 2023, arXiv 2303.03169).

It differs from the public code: the ratio q_j/q_i is formed from its logarithm, with no ε on one side, hidden units are
normalised first, and those of weight zero drop out instead of dividing by zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liplayers.core.registry import Family, register
from liplayers.layers.bases.residual import Conv2dBlock, DenseBlock
from liplayers.linalg.convolution import autocorrelation
from liplayers.linalg.norms import unit_rows

__all__ = ["SLLBlock", "SLLConv2dBlock"]


_LARGEST_EXPONENT = 60.0  # a unit with a ratio beyond it would count for nothing; its gradients would not be floats


def _outgoing(K: Tensor, absolute_gram: Tensor, norms: Tensor, log_q: Tensor) -> Tensor:
    """2T⁻¹W: T_i = Σ_j |G_ij| q_j/q_i, with K and G those of W with its units (rows) divided by their `norms`.

    In terms of K the multipliers are q_i·norm_i and T_i ≥ 1 for every unit that is not zero: nothing underflows. A
    unit whose T is zero or infinite is dropped, which corresponds to T_i = ∞.
    """
    log_q = log_q + norms.log()
    exponent = log_q[None, :] - log_q[:, None]
    T = (absolute_gram * exponent.clamp_max(_LARGEST_EXPONENT).exp()).sum(1)
    usable = (T > 0) & ~((exponent > _LARGEST_EXPONENT) & (absolute_gram > 0)).any(1)
    inverse = torch.where(usable, 1 / torch.where(usable, T, 1), 0)
    factor = (2 * inverse / norms).to(K.dtype)
    return K * factor.view(-1, *[1] * (K.dim() - 1))


class SLLBlock(DenseBlock):
    r"""Dense residual block, 1-Lipschitz: y = x − 2W T⁻¹σ(Wᵀx + b), T = diag(Σ_j |WᵀW|_ij q_j/q_i), q = exp(log_q).

    T − WᵀW is diagonally dominant after scaling by q, hence positive semidefinite, for every W and q. Signal gain at
    initialisation is 1, 0.7 to 0.9 for more hidden units than inputs. Cost: one Gram matrix of the hidden units.

    Args:
        features: size of input and output.
        hidden_features: columns of W; default `features`.
        bias: whether b is there.
        activation: entrywise with slopes in [0, 1]; default ReLU.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (*, features) → (*, features).

    Raises:
        ArgumentError: an activation without proven slopes in [0, 1] (MaxMin, abs, GELU, SiLU), sizes below 1.

    Source: Araujo et al. 2023, arXiv 2303.03169.

    >>> block = SLLBlock(6, hidden_features=9)
    >>> x, y = torch.randn(2, 6)
    >>> bool((block(x) - block(y)).norm() <= (x - y).norm() * (1 + 1e-5))
    True
    """

    log_q: nn.Parameter

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
        self.log_q = self.new_parameter((self.hidden_features,), device, dtype)
        self.bias = self.new_parameter((self.hidden_features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal W, q = 1, no bias."""
        super().reset_parameters()
        nn.init.zeros_(self.log_q)

    def map_weight(self, raw: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        K, norms = unit_rows(raw)
        return raw, _outgoing(K, (K @ K.mT).abs(), norms[:, 0], log_q)


class SLLConv2dBlock(Conv2dBlock):
    r"""Convolutional residual block, 1-Lipschitz: y = x − 2 K⊤ ∗ (T⁻¹σ(K ∗ x + b)), T from K's autocorrelation.

    T_i = Σ_j (q_j/q_i) Σ_lags |(K ⋆ K)_ij|; holds for zero and circular padding and every image size. Signal gain at
    initialisation is 1, 0.7 to 0.9 for more hidden units than inputs. Cost: one autocorrelation of the kernel.

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

    Source: Araujo et al. 2023, arXiv 2303.03169.

    >>> SLLConv2dBlock(4, hidden_channels=6)(torch.randn(2, 4, 7, 5)).shape
    torch.Size([2, 4, 7, 5])
    """

    log_q: nn.Parameter

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
        self.log_q = self.new_parameter((self.hidden_channels,), device, dtype)
        self.bias = self.new_parameter((self.hidden_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """One orthogonal tap, q = 1, no bias."""
        super().reset_parameters()
        nn.init.zeros_(self.log_q)

    def map_weight(self, raw: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        rows, norms = unit_rows(raw.flatten(1))
        K = rows.view_as(raw)
        return raw, _outgoing(K, autocorrelation(K[None], "out")[0].abs().sum((-2, -1)), norms[:, 0], log_q)


register(Family("sll", dense_block=SLLBlock, conv_block=SLLConv2dBlock))
