"""What the residual blocks share: y = x − Vᵀσ(Wx + b), dense and convolutional, activation checks and bounds.

A family states the pair (W, V) as a function of its raw parameters and proves that the block is 1-Lipschitz for every
σ with slopes in [0, 1].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.core.checks import check_image, check_odd_kernel, check_positive
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError
from liplayers.layers.bases.kernel import wrap
from liplayers.linalg.convolution import orthogonal_taps_
from liplayers.linalg.orthogonal import fill_orthogonal_
from liplayers.modules.activations import require_slope_range
from liplayers.modules.frozen import FrozenResidualBlock, filled, plain_linear

__all__ = ["Conv2dBlock", "DenseBlock", "ResidualBlock", "adjoint_kernel"]


class ResidualBlock(ParametrizedModule, abstract=True):
    """Base of the dense and the convolutional blocks.

    `map_weight` returns W and V, (hidden, in) or (hidden, in, kh, kw). A family's constructor calls this one, makes
    `raw`, what else is mapped and `bias`, in this order, and calls `reset_parameters`.

    Args:
        activation: entrywise with slopes in [0, 1]; default ReLU.
    """

    bias: nn.Parameter | None

    def __init__(self, activation: nn.Module | None) -> None:
        super().__init__()
        self.activation = nn.ReLU() if activation is None else activation
        require_slope_range(self, self.activation)

    def reset_parameters(self) -> None:
        """Orthogonal W (of a convolution: one orthogonal tap), no bias."""
        orthogonal_taps_(self.raw, (1, 1)) if self.raw.dim() == 4 else fill_orthogonal_(self.raw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def check_parts(self) -> None:
        require_slope_range(self, self.activation)  # it may have been replaced since construction

    def bound_as_executed(self) -> float:
        """1, and what rounding W and V to half precision can add."""
        self.check_parts()
        if torch.finfo(self.executed_dtype()).bits >= 32:
            return 1.0
        (incoming, low_in), (outgoing, low_out) = self.exact_and_executed()

        def norm(w: Tensor) -> Tensor:  # of the map: for a convolution, the sum of its taps' norms
            return torch.linalg.matrix_norm(w, dim=(0, 1)).sum()

        excess = norm(low_out - outgoing) * norm(low_in) + norm(outgoing) * norm(low_in - incoming)
        return 1.0 + excess.item()


class DenseBlock(ResidualBlock, abstract=True):
    """Base of the dense residual blocks.

    Args:
        features: size of input and output.
        hidden_features: hidden units; default `features`.
        activation: entrywise with slopes in [0, 1]; default ReLU.
    """

    def __init__(self, features: int, hidden_features: int | None, activation: nn.Module | None) -> None:
        super().__init__(activation)
        hidden_features = features if hidden_features is None else hidden_features
        check_positive(self, features=features, hidden_features=hidden_features)
        self.features = features
        self.hidden_features = hidden_features

    def forward(self, x: Tensor) -> Tensor:
        incoming, outgoing = self.effective()
        return x - self.activation(F.linear(x, incoming, self.bias)) @ outgoing.to(x.dtype)

    def lipschitz_bound(self) -> float:
        return self.bound_as_executed()

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        W, V = self.effective()
        return FrozenResidualBlock(
            [plain_linear(W, self.bias)], self.activation, plain_linear(-V.mT, None), nn.Identity()
        )

    def extra_repr(self) -> str:
        return f"features={self.features}, hidden_features={self.hidden_features}, bias={self.bias is not None}"


class Conv2dBlock(ResidualBlock, abstract=True):
    """Base of the convolutional residual blocks.

    Args:
        channels: channels of input and output.
        hidden_channels: channels of the hidden layer; default `channels`.
        kernel_size: size of the kernel in pixels; odd, so that the image keeps its size with padding (k − 1)/2.
        padding_mode: what surrounds the image, "zeros" or "circular".
        activation: entrywise with slopes in [0, 1]; default ReLU.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None,
        kernel_size: int,
        padding_mode: str,
        activation: nn.Module | None,
    ) -> None:
        super().__init__(activation)
        hidden_channels = channels if hidden_channels is None else hidden_channels
        check_positive(self, channels=channels, hidden_channels=hidden_channels)
        check_odd_kernel(self, kernel_size)
        if padding_mode not in ("zeros", "circular"):
            raise ArgumentError(f"{type(self).__name__}: padding_mode={padding_mode!r}; expected 'zeros' or 'circular'")
        self.channels = channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        self.padding_mode = padding_mode

    def forward(self, x: Tensor) -> Tensor:
        check_image(self, x, self.channels)
        incoming, outgoing = self.effective()
        pad = self.kernel_size // 2
        if self.padding_mode == "zeros":
            hidden = self.activation(F.conv2d(x, incoming, self.bias, padding=pad))
            return x - F.conv_transpose2d(hidden, outgoing, padding=pad)
        pads = ((pad, pad), (pad, pad))
        hidden = self.activation(F.conv2d(wrap(self, x, pads), incoming, self.bias))
        # the adjoint of a circular convolution is the circular one with the flipped, transposed kernel
        return x - F.conv2d(wrap(self, hidden, pads), adjoint_kernel(outgoing))

    def lipschitz_bound(self) -> float:
        return self.bound_as_executed()

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        W, V = self.effective()
        mode: Any = self.padding_mode

        def conv(kernel: Tensor, bias: Tensor | None) -> nn.Conv2d:
            out, channels, k, _ = kernel.shape
            plain = nn.Conv2d(channels, out, k, padding=k // 2, bias=False, padding_mode=mode, device="meta")
            return filled(plain, kernel, bias)

        return FrozenResidualBlock([conv(W, self.bias)], self.activation, conv(-adjoint_kernel(V), None), nn.Identity())

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, hidden_channels={self.hidden_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


def adjoint_kernel(kernel: Tensor) -> Tensor:
    """The kernel of the adjoint, flipped and transposed, for an odd kernel that keeps the image's size."""
    return rearrange(kernel, "h c a b -> c h a b").flip(-2, -1)
