"""What the networks designed by a linear matrix inequality share: w_l = σ(C_l w_{l−1} + b_l), y = A x + B w_n + b.

A family states its explicit weights, with the multipliers that prove them, as a function of raw parameters. Here they
are shrunk by what rounding to the layer's dtype can cost, and then they run. Their bound is proven again for the
weights that run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.core.checks import check_image, check_odd_kernel, check_positive, check_transformed
from liplayers.core.precision import exact_precision
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError, ShapeError
from liplayers.linalg.convolution import orthogonal_taps_
from liplayers.linalg.fourier import Grid, fast_size, fourier_multiply
from liplayers.linalg.lmi import ExplicitWeights, Sector, margin, proven_lipschitz
from liplayers.linalg.orthogonal import fill_orthogonal_
from liplayers.modules.activations import Householder, require_sector, require_slope_range, sector, tied_channels
from liplayers.modules.frozen import FrozenFourierConv2d, FrozenLMIBlock, Placement, image_size, plain_linear

__all__ = [
    "LARGEST_EXPONENT",
    "ROTATED",
    "Conv2dLMIBlock",
    "DenseLMIBlock",
    "LMIBlock",
    "Sizes",
    "hidden_sizes",
    "identity_",
    "orthogonal_",
]

Sizes = int | Sequence[int]
LARGEST_EXPONENT = 15.0  # multipliers up to e^±15: beyond it float32 holds one end of a ratio of weights only
ROTATED = 4  # hidden layers that start as random rotations, which halve what a ReLU passes on; further ones keep it
SMALLEST, LARGEST = 1e-20, 1e20  # of 𝓛: beyond them weights of float32 underflow or overflow


class LMIBlock(ParametrizedModule, abstract=True):
    """The sizes, the sector of the activation, the biases and the bound of a dense or convolutional block.

    `map_weight` returns weights in float64 that satisfy the inequality. A family's constructor calls that of
    `DenseLMIBlock` or `Conv2dLMIBlock`, makes what is mapped, then the biases by `make_biases`, and calls
    `reset_parameters`.
    """

    unit_slopes_only = False  # whether the family's proof needs slopes in [0, 1]
    activation: nn.Module
    sizes: tuple[int, ...]  # d_0, d_1, …, d_n
    outputs: int
    log_multiplier: nn.Parameter
    hidden_bias: nn.Parameter | None
    bias: nn.Parameter | None
    reset_parameters: Callable[[], None]

    def _configure(self, sizes: Sequence[int], outputs: int, activation: nn.Module | None, lipschitz: float) -> None:
        number = isinstance(lipschitz, (int, float)) and not isinstance(lipschitz, bool)
        if not number or not SMALLEST <= lipschitz <= LARGEST:
            raise ArgumentError(
                f"{type(self).__name__}: lipschitz={lipschitz!r}; expected a number from {SMALLEST:g} to {LARGEST:g}"
            )
        if not isinstance(activation, nn.Module | None):
            raise ArgumentError(
                f"{type(self).__name__}: activation={activation!r}; expected a module such as nn.ReLU()"
            )
        self._lipschitz = float(lipschitz)
        self.sizes = tuple(sizes)
        self.outputs = outputs
        self.activation = nn.ReLU() if activation is None else activation
        if self.unit_slopes_only:
            require_slope_range(self, self.activation)
        self._sector = Sector(0.0, 1.0) if self.unit_slopes_only else Sector(*sector(self, self.activation))
        self._groups = self._tied()

    @property
    def lipschitz(self) -> float:
        """𝓛, as constructed: the weights are made for it."""
        return self._lipschitz

    @property
    def sector(self) -> Sector:
        """The range of slopes that the weights are made for."""
        return self._sector

    def _tied(self) -> list[list[int] | None]:
        """For each hidden layer the group of each channel, whose multipliers are equal; None where all are free."""
        if isinstance(self.activation, Householder) and set(self.sizes[1:]) != {self.activation.channels}:
            raise ArgumentError(
                f"{type(self).__name__}: activation={self.activation} for hidden sizes {self.sizes[1:]}; expected one "
                f"of as many channels"
            )
        return [tied_channels(self.activation, size) for size in self.sizes[1:]]

    def make_biases(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """b_1 … b_n in one vector, and b."""
        self.hidden_bias = self.new_parameter((sum(self.sizes[1:]),), device, dtype) if bias else None
        self.bias = self.new_parameter((self.outputs,), device, dtype) if bias else None

    def explicit_weights(self, *grid: Grid) -> ExplicitWeights:
        """The weights in float64, before they are shrunk and rounded; of a convolution, on a grid of frequencies."""
        return self.exact_weight(*grid)

    def start_layers(self, matrices: Sequence[Tensor], gain: float, kept: float) -> None:
        """Orthogonal matrices for the hidden layers, of singular values `gain`.

        Those after the first `ROTATED` are `kept` times the identity, which has to stand for C_l = I, where they are
        square and the slopes are in [0, β]. What has passed one ReLU then passes the others unchanged. Rotations would
        leave 2^(−n/2) of it after n layers.
        """
        for i, matrix in enumerate(matrices):
            orthogonal_(matrix, gain)
            if i >= ROTATED and matrix.shape[0] == matrix.shape[1] and self.sector.low == 0:
                identity_(matrix, kept)

    def reset_biases(self) -> None:
        """Zero."""
        for bias in (self.hidden_bias, self.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def multiplier_count(self) -> int:
        """How many multipliers are free."""
        groups = zip(self._groups, self.sizes[1:], strict=True)
        return sum(size if group is None else max(group) + 1 for group, size in groups)

    def multipliers(self, logarithms: Tensor) -> tuple[Tensor, ...]:
        """The diagonals of Λ_1 … Λ_n from the logarithms of the free ones."""
        free = logarithms.double().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
        found = []
        for group, size in zip(self._groups, self.sizes[1:], strict=True):
            count = size if group is None else max(group) + 1
            part, free = free[:count], free[count:]
            found.append(part if group is None else part[torch.tensor(group, device=part.device)])
        return tuple(found)

    def rounded(self, weight: ExplicitWeights) -> tuple[Tensor, ...]:
        """The weights, with the margin for their rounding, in the dtype that they run in."""
        dtype = self.raw.dtype
        at_least_single = torch.promote_types(dtype, torch.float32)
        executed = weight.shrunk(1 - margin(max(*self.sizes, self.outputs), at_least_single)).executed()
        # transforms exist in single precision at least
        transformed = torch.complex128 if at_least_single == torch.float64 else torch.complex64
        return tuple(w.to(transformed if w.is_complex() else dtype) for w in executed)

    def check_parts(self) -> None:
        """The activation may have been replaced, or its parameters trained, since construction."""
        require_sector(self, self.activation, self.sector)
        if self._tied() != self._groups:
            raise ArgumentError(
                f"{type(self).__name__}: activation={self.activation} couples other channels than the one that the "
                f"weights are made for; build a new layer with this activation"
            )

    def hidden_biases(self) -> Sequence[Tensor | None]:
        """b_1 … b_n."""
        return [None] * (len(self.sizes) - 1) if self.hidden_bias is None else self.hidden_bias.split(self.sizes[1:])

    def _frozen(self, layers: Sequence[nn.Module], multipliers: Sequence[Tensor], lipschitz: float) -> nn.Module:
        n = len(self.sizes) - 1
        skip = layers[n + 1] if len(layers) > n + 1 else None
        return FrozenLMIBlock(layers[:n], self.activation, layers[n], skip, multipliers, lipschitz, self.sector)

    def _arguments(self) -> str:
        text = "" if isinstance(self.activation, nn.ReLU) else f", activation={self.activation}"
        text += "" if self.lipschitz == 1 else f", lipschitz={self.lipschitz:g}"
        return text + (", bias=False" if self.bias is None else "")


class DenseLMIBlock(LMIBlock, abstract=True):
    """Base of the dense forms.

    Args:
        features: size of each input.
        hidden_features: d_1 … d_n, one integer or several; default `out_features`.
        out_features: size of each output; default `features`.
        activation: one that the proof of the family covers; default ReLU.
        lipschitz: 𝓛, above 0.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sizes | None,
        out_features: int | None,
        activation: nn.Module | None,
        lipschitz: float,
    ) -> None:
        super().__init__()
        out_features = features if out_features is None else out_features
        check_positive(self, features=features, out_features=out_features)
        hidden = hidden_sizes(self, "hidden_features", hidden_features, out_features)
        self.features = features
        self.hidden_features = hidden
        self.out_features = out_features
        self._configure((features, *hidden), out_features, activation, lipschitz)

    def forward(self, x: Tensor) -> Tensor:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # activations act on dimension 1
        weights = self.effective()
        n = len(self.sizes) - 1
        w = flat
        for C, b in zip(weights[:n], self.hidden_biases(), strict=True):
            w = self.activation(F.linear(w, C, b))
        y = F.linear(w, weights[n], self.bias)
        if len(weights) > n + 1:
            y = y + F.linear(flat, weights[n + 1])
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def lipschitz_bound(self) -> float:
        """Proven for the weights as they run, here and now; `lipschitz` unless they run in half precision."""
        self.check_parts()
        dtype = self.executed_dtype()
        with torch.no_grad(), exact_precision(self.raw_device):
            run = [w.to(dtype).double() for w in self.effective()]
            return proven_lipschitz(self.explicit_weights().with_executed(run), self.target(), self.sector)

    def target(self) -> float:
        """The Lipschitz constant that the weights are made for."""
        return self.lipschitz

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        biases = [*self.hidden_biases(), self.bias, None]
        layers = [plain_linear(weight, bias) for weight, bias in zip(self.effective(), biases, strict=False)]
        return self._frozen(layers, self.explicit_weights().multipliers, self.target())

    def extra_repr(self) -> str:
        hidden = self.hidden_features[0] if len(self.hidden_features) == 1 else self.hidden_features
        text = f"features={self.features}, hidden_features={hidden}"
        text += "" if self.out_features == self.features else f", out_features={self.out_features}"
        return text + self._arguments()


class Conv2dLMIBlock(LMIBlock, abstract=True):
    """Base of the convolutional forms: the inequality at each frequency of a torus, with multipliers for each channel.

    The image, with zeros for zero padding, is pixel-unshuffled by the stride and put on the torus; embedding and
    cropping are contractions. As the activation acts on each pixel, the multipliers are the same at all frequencies,
    and the sum of the forms over the frequencies is the form of the whole. Parameters and bound do not depend on the
    size of the image.

    Args:
        channels: channels of the image.
        hidden_channels: channels of w_1 … w_n, one integer or several; default `out_channels`.
        out_channels: channels of the output; default `channels`.
        kernel_size: size of the raw kernels in pixels, odd.
        stride: an integer; it acts by pixel-unshuffling: the output has ⌈H/s⌉ × ⌈W/s⌉ pixels.
        padding_mode: what surrounds the image, "zeros" or "circular".
        activation: one that the proof of the family covers; default ReLU.
        lipschitz: 𝓛, above 0.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: Sizes | None,
        out_channels: int | None,
        kernel_size: int,
        stride: int,
        padding_mode: str,
        activation: nn.Module | None,
        lipschitz: float,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        check_positive(self, channels=channels, out_channels=out_channels, stride=stride)
        check_odd_kernel(self, kernel_size)
        hidden = hidden_sizes(self, "hidden_channels", hidden_channels, out_channels)
        if padding_mode not in ("zeros", "circular"):
            raise ArgumentError(f"{type(self).__name__}: padding_mode={padding_mode!r}; expected 'zeros' or 'circular'")
        self.channels = channels
        self.hidden_channels = hidden
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding_mode = padding_mode
        self._configure((channels * stride**2, *hidden), out_channels, activation, lipschitz)

    @property
    def taps(self) -> int:
        """The side of the kernels on the pixel-unshuffled image."""
        return math.ceil(self.kernel_size / self.stride)

    def forward(self, x: Tensor) -> Tensor:
        check_image(self, x, self.channels)
        check_transformed(self, x, self.raw.dtype)
        image = x if x.dim() == 4 else x[None]
        with exact_precision(x.device):
            y = self.run(image.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        return y if x.dim() == 4 else y[0]

    def place(self, image: Grid) -> tuple[tuple[Grid, Grid], Grid, Grid]:
        """For images of this size: zeros (before, after) for height and width, the size of the output, and the grid."""
        s = self.stride
        height, width = image
        if self.padding_mode == "circular" and (height % s or width % s):
            raise ShapeError(
                f"{type(self).__name__}: circular padding with stride {s} on an image of {image} exceeds "
                f"the bound; the stride must divide the size: crop or pad the image, or use 'zeros'"
            )
        size = (math.ceil(height / s), math.ceil(width / s))
        pad = 0 if self.padding_mode == "circular" else len(self.sizes) * (self.taps // 2)
        grid = size if not pad else (fast_size(size[0] + pad), fast_size(size[1] + pad))
        return ((0, -height % s), (0, -width % s)), size, grid

    def run(self, x: Tensor) -> Tensor:
        pads, size, grid = self.place((x.shape[-2], x.shape[-1]))
        x = F.pad(x, (*pads[1], *pads[0]))
        x = rearrange(x, "n c (h a) (w b) -> n (c a b) h w", a=self.stride, b=self.stride)
        weights = self.effective(grid)
        n = len(self.sizes) - 1
        w = x
        for C, b in zip(weights[:n], self.hidden_biases(), strict=True):
            w = fourier_multiply(w, C, grid, grid)
            w = self.activation(w if b is None else w + b.to(w.dtype)[:, None, None])
        y = fourier_multiply(w, weights[n], grid, size)
        if len(weights) > n + 1:
            y = y + fourier_multiply(x, weights[n + 1], grid, size)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(self.outputs, 1, 1)

    def lipschitz_bound(self) -> float:
        """`lipschitz`: the margin keeps the inequality for the weights as rounded, at every size."""
        self.check_parts()
        return self.lipschitz

    frozen_for_one_shape = True

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        image = image_size(shape)
        s = (self.stride, self.stride)
        pads, size, grid = self.place(image)
        whole = Placement(grid, ((0, 0), (0, 0)), (1, 1), (0, 0), grid)
        first = Placement(image, pads, s, (0, 0), grid)
        last = Placement(grid, ((0, 0), (0, 0)), (1, 1), (0, 0), size)
        skip = Placement(image, pads, s, (0, 0), size)
        places = [first, *[whole] * (len(self.sizes) - 2), last, skip]
        biases = [*self.hidden_biases(), self.bias, None]
        weights = zip(self.effective(grid), biases, places, strict=False)
        layers = [FrozenFourierConv2d(transfer, bias, grid, place) for transfer, bias, place in weights]
        multipliers = self.explicit_weights((1, 1)).multipliers  # the same at every frequency of every grid
        return self._frozen(layers, multipliers, self.lipschitz)

    def extra_repr(self) -> str:
        hidden = self.hidden_channels[0] if len(self.hidden_channels) == 1 else self.hidden_channels
        text = f"channels={self.channels}, hidden_channels={hidden}"
        text += "" if self.out_channels == self.channels else f", out_channels={self.out_channels}"
        text += f", kernel_size={self.kernel_size}" + ("" if self.stride == 1 else f", stride={self.stride}")
        return text + f", padding_mode={self.padding_mode!r}" + self._arguments()


def hidden_sizes(owner: object, name: str, value: Sizes | None, default: int) -> tuple[int, ...]:
    """One size or several as a tuple, each checked."""
    given = default if value is None else value
    sizes = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ArgumentError(
            f"{type(owner).__name__}: {name}={value!r}; expected an integer of at least 1, or several in a list"
        )
    return sizes


def orthogonal_(raw: Tensor, gain: float) -> None:
    """A matrix, or one tap of a kernel, with singular values `gain`."""
    orthogonal_taps_(raw, (1, 1)) if raw.dim() == 4 else fill_orthogonal_(raw)
    raw.data.mul_(gain)


def identity_(raw: Tensor, gain: float) -> None:
    """`gain` times the identity as a square matrix, or as the centre tap of a kernel."""
    tap = raw.data.zero_()
    for k in raw.shape[:1:-1]:
        tap = tap[..., (k - 1) // 2]
    tap.diagonal().fill_(gain)
