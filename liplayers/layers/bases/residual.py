"""What the residual blocks share: y = x − Vᵀσ(Wx + b), dense and convolutional, activation checks and bounds.

A family states the pair (W, V) as a function of its raw parameters and proves that the block is 1-Lipschitz for every
σ with slopes in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.core.checks import check_image, check_odd_kernel, check_positive
from liplayers.core.precision import exact_precision
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError
from liplayers.layers.bases.kernel import wrap
from liplayers.linalg.convolution import orthogonal_taps_
from liplayers.linalg.orthogonal import fill_orthogonal_
from liplayers.modules.activations import require_slope_range


class _Block(ParametrizedModule):
    activation: nn.Module
    bias: nn.Parameter | None

    map_pair: Callable[..., tuple[Tensor, Tensor]]
    """(*raw parameters) → W and V, (hidden, in) or (hidden, in, kh, kw), before they are cast to the layer's dtype."""

    def compute_effective(self) -> tuple[Tensor, Tensor]:
        incoming, outgoing = self.map_pair(*self.raw_values())
        return incoming.to(self.raw.dtype), outgoing.to(self.raw.dtype)

    def _finish(
        self,
        hidden: int,
        bias: bool,
        activation: nn.Module | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.activation = nn.ReLU() if activation is None else activation
        require_slope_range(self, self.activation)
        self._make_raw(device, dtype)
        self.bias = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal W (of a convolution: one orthogonal tap), no bias."""
        orthogonal_taps_(self.raw, (1, 1)) if self.raw.dim() == 4 else fill_orthogonal_(self.raw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def check_parts(self) -> None:
        require_slope_range(self, self.activation)  # it may have been replaced since construction

    def _proven_bound(self) -> float:
        self.check_parts()
        dtype = self.executed_dtype()
        if torch.finfo(dtype).bits >= 32:
            return 1.0
        with torch.no_grad(), exact_precision(self.raw_device):
            incoming, outgoing = (w.double() for w in self.map_pair(*self.raw_values()))
            low_in, low_out = (w.to(self.raw.dtype).to(dtype).double() for w in (incoming, outgoing))

            def norm(w: Tensor) -> Tensor:  # of the map: for a convolution, the sum of its taps' norms
                return torch.linalg.matrix_norm(w, dim=(0, 1)).sum()

            excess = norm(low_out - outgoing) * norm(low_in) + norm(outgoing) * norm(low_in - incoming)
        return 1.0 + excess.item()


class DenseBlock(_Block):
    """Base of the dense residual blocks; arguments as `SLLBlock` documents them."""

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
        super().__init__()
        hidden_features = features if hidden_features is None else hidden_features
        check_positive(self, features=features, hidden_features=hidden_features)
        self.features = features
        self.hidden_features = hidden_features
        self._finish(hidden_features, bias, activation, device, dtype)

    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"raw": (self.hidden_features, self.features)}

    def forward(self, x: Tensor) -> Tensor:
        incoming, outgoing = self.effective()
        return x - self.activation(F.linear(x, incoming, self.bias)) @ outgoing.to(x.dtype)

    def lipschitz_bound(self) -> float:
        return self._proven_bound()

    def extra_repr(self) -> str:
        return f"features={self.features}, hidden_features={self.hidden_features}, bias={self.bias is not None}"


class Conv2dBlock(_Block):
    """Base of the convolutional residual blocks; arguments as `SLLConv2dBlock` documents them."""

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
        super().__init__()
        hidden_channels = channels if hidden_channels is None else hidden_channels
        check_positive(self, channels=channels, hidden_channels=hidden_channels)
        check_odd_kernel(self, kernel_size)
        if padding_mode not in ("zeros", "circular"):
            raise ArgumentError(f"{type(self).__name__}: padding_mode={padding_mode!r}; expected 'zeros' or 'circular'")
        self.channels = channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        self.padding_mode = padding_mode
        self._finish(hidden_channels, bias, activation, device, dtype)

    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"raw": (self.hidden_channels, self.channels, self.kernel_size, self.kernel_size)}

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
        adjoint = rearrange(outgoing, "h c a b -> c h a b").flip(-2, -1)
        return x - F.conv2d(wrap(self, hidden, pads), adjoint)

    def lipschitz_bound(self) -> float:
        return self._proven_bound()

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, hidden_channels={self.hidden_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )
