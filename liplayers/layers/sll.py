"""SLL, SDP-based Lipschitz layers: residual blocks with a diagonal multiplier (Araujo et al. 2023, arXiv 2303.03169).

Differs from the public code: the ratio q_j/q_i is formed from its logarithm, with no ε on one side, hidden units are
normalised first, and those of weight zero drop out instead of dividing by zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.errors import ArgumentError, ShapeError
from liplayers.layers.activations import require_slope_range
from liplayers.layers.base import ParametrizedModule, check_positive, fill_orthogonal_
from liplayers.layers.conv import wrap
from liplayers.layers.registry import Family, register
from liplayers.linalg.convolution import autocorrelation, orthogonal_taps_

__all__ = ["SLLBlock", "SLLConv2dBlock"]


_LARGEST_EXPONENT = 60.0  # a unit with a ratio beyond it would count for nothing; its gradients would not be floats


def _outgoing(K: Tensor, absolute_gram: Tensor, norms: Tensor, log_q: Tensor) -> Tensor:
    """2T⁻¹W: T_i = Σ_j |G_ij| q_j/q_i, with K and G those of W with its units (rows) divided by their `norms`.

    In terms of K the multipliers are q_i·norm_i and T_i ≥ 1 for every unit that is not zero: nothing underflows. A
    unit whose T is zero or infinite is dropped, which corresponds to T_i = ∞.
    """
    log_q = log_q.double() + norms.double().log()
    exponent = log_q[None, :] - log_q[:, None]
    G = absolute_gram.double()
    T = (G * exponent.clamp_max(_LARGEST_EXPONENT).exp()).sum(1)
    usable = (T > 0) & ~((exponent > _LARGEST_EXPONENT) & (G > 0)).any(1)
    inverse = torch.where(usable, 1 / torch.where(usable, T, 1), 0)
    factor = (2 * inverse / norms).to(K.dtype)
    return K * factor.view(-1, *[1] * (K.dim() - 1))


class _SLL(ParametrizedModule):
    raw_names = ("raw", "log_q")
    activation: nn.Module
    raw: nn.Parameter
    log_q: nn.Parameter

    def _absolute_gram(self, K: Tensor) -> Tensor:
        raise NotImplementedError

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Wᵀ and 2T⁻¹Wᵀ, the two maps that the block runs, before they are cast to the layer's dtype."""
        raw, log_q = self.raw_values()
        rows = raw.flatten(1)
        largest = rows.detach().abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, largest, 1)  # squares of tiny or huge entries would not be floats
        rows = rows / scale
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        norm = torch.where(norm > 0, norm, 1)
        K = (rows / norm).view_as(raw)
        return raw, _outgoing(K, self._absolute_gram(K), (norm * scale)[:, 0], log_q)

    def compute_effective(self) -> tuple[Tensor, Tensor]:
        incoming, outgoing = self._pair()
        return incoming.to(self.raw.dtype), outgoing.to(self.raw.dtype)

    def _proven_bound(self) -> float:
        require_slope_range(self, self.activation)  # it may have been replaced since construction
        dtype = self.executed_dtype()
        if torch.finfo(dtype).bits >= 32:
            return 1.0
        with torch.no_grad(), torch.autocast(self.raw_device.type, enabled=False):
            incoming, outgoing = (w.double() for w in self._pair())
            low_in, low_out = (w.to(self.raw.dtype).to(dtype).double() for w in (incoming, outgoing))

            def norm(w: Tensor) -> Tensor:  # of the map: for a convolution, the sum of its taps' norms
                return torch.linalg.matrix_norm(w, dim=(0, 1)).sum()

            excess = norm(low_out - outgoing) * norm(low_in) + norm(outgoing) * norm(low_in - incoming)
        return 1.0 + excess.item()


class SLLBlock(_SLL):
    r"""Dense residual block, 1-Lipschitz: y = x − 2W T⁻¹σ(Wᵀx + b), T = diag(Σ_j |WᵀW|_ij q_j/q_i), q = exp(log_q).

    T − WᵀW is diagonally dominant after scaling by q, hence positive semidefinite, for every W and q. Signal gain at
    initialisation is 1/√2 or more in the mean (half of the hidden units reflect with ReLU).

    Args:
        features: size of input and output.
        hidden_features: columns of W; default `features`.
        bias: whether b is there.
        activation: entrywise with slopes in [0, 1]; default ReLU.
        device, dtype: of the parameters.

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
        self.activation = nn.ReLU() if activation is None else activation
        require_slope_range(self, self.activation)
        self.raw = nn.Parameter(torch.empty(hidden_features, features, device=device, dtype=dtype))
        self.log_q = nn.Parameter(torch.empty(hidden_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal W, q = 1, no bias."""
        fill_orthogonal_(self.raw)
        nn.init.zeros_(self.log_q)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _absolute_gram(self, K: Tensor) -> Tensor:
        return (K @ K.mT).abs()

    def forward(self, x: Tensor) -> Tensor:
        incoming, outgoing = self.effective()
        return x - self.activation(F.linear(x, incoming, self.bias)) @ outgoing.to(x.dtype)

    def lipschitz_bound(self) -> float:
        return self._proven_bound()

    def extra_repr(self) -> str:
        return f"features={self.features}, hidden_features={self.hidden_features}, bias={self.bias is not None}"


class SLLConv2dBlock(_SLL):
    r"""Convolutional residual block, 1-Lipschitz: y = x − 2 K⊤ ∗ (T⁻¹σ(K ∗ x + b)), T from K's autocorrelation.

    T_i = Σ_j (q_j/q_i) Σ_lags |(K ⋆ K)_ij|; holds for zero and circular padding and every image size. Signal gain at
    initialisation is 1/√2 or more in the mean (one orthogonal tap).

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

    Source: Araujo et al. 2023, arXiv 2303.03169.

    >>> SLLConv2dBlock(4, hidden_channels=6)(torch.randn(2, 4, 7, 5)).shape
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
        super().__init__()
        hidden_channels = channels if hidden_channels is None else hidden_channels
        check_positive(self, channels=channels, hidden_channels=hidden_channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ArgumentError(f"SLLConv2dBlock: kernel_size={kernel_size}; expected an odd number")
        if padding_mode not in ("zeros", "circular"):
            raise ArgumentError(f"SLLConv2dBlock: padding_mode={padding_mode!r}; expected 'zeros' or 'circular'")
        self.channels = channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        self.padding_mode = padding_mode
        self.activation = nn.ReLU() if activation is None else activation
        require_slope_range(self, self.activation)
        shape = (hidden_channels, channels, kernel_size, kernel_size)
        self.raw = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.log_q = nn.Parameter(torch.empty(hidden_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """One orthogonal tap, q = 1, no bias."""
        orthogonal_taps_(self.raw, (1, 1))
        nn.init.zeros_(self.log_q)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _absolute_gram(self, K: Tensor) -> Tensor:
        return autocorrelation(K[None], "out")[0].abs().sum((-2, -1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4) or x.shape[-3] != self.channels:
            raise ShapeError(
                f"SLLConv2dBlock: got an input of shape {tuple(x.shape)}; expected (N, {self.channels}, H, W)"
            )
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


register(Family("sll", dense_block=SLLBlock, conv_block=SLLConv2dBlock))
