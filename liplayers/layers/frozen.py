"""What `liplayers.freeze` makes of layers that torch has no module for: plain weights, and a bound of their own.

Every weight is a parameter without a gradient, or a child from torch; nothing is computed from raw parameters. Bounds
are proven for the weights as they are, whatever they were computed from, and however they are cast or changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.errors import ArgumentError, ShapeError, UnknownBoundError
from liplayers.layers.activations import TIED, Householder, fold, require_slope_range, tied_channels
from liplayers.layers.base import LipschitzModule, exact_precision
from liplayers.layers.containers import Container
from liplayers.layers.lmi import require_sector
from liplayers.layers.soc import polynomial
from liplayers.linalg.convolution import autocorrelation, row_sum_bound
from liplayers.linalg.fourier import fourier_multiply
from liplayers.linalg.lmi import ExplicitWeights, Sector, proven_lipschitz
from liplayers.linalg.norms import frobenius_norm, gram, gram_iteration_bound, minus_identity_
from liplayers.linalg.verified import conv_norm_enclosure

Size = tuple[int, int]


def constant(value: Tensor) -> nn.Parameter:
    """A weight of a frozen module: a copy of `value`, without a gradient."""
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


def _executed(weight: Tensor) -> Tensor:
    """In float64, what runs: rounded to autocast's dtype inside its context."""
    device = weight.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return weight.detach().to(low).double()


@dataclass(frozen=True)
class Placement:
    """How an image of one size is embedded before a convolution, and what is cut out of the result.

    Attributes:
        image: height and width of the input.
        pads: zeros (before, after) for height and width.
        stride: the padded image is pixel-unshuffled by it.
        start, out: where the output begins in the result, negative on a torus, and its size.
    """

    image: Size
    pads: tuple[Size, Size]
    stride: Size
    start: Size
    out: Size


class _PlacedConv2d(LipschitzModule):
    """A linear map of images of one size, between an embedding and a crop."""

    in_channels: int
    placement: Placement
    bias: nn.Parameter | None

    def convolve(self, x: Tensor) -> Tensor:
        """The embedded batch of images → the output, cropped."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        place = self.placement
        if x.dim() not in (3, 4) or tuple(x.shape[-3:]) != (self.in_channels, *place.image):
            raise ShapeError(
                f"{type(self).__name__}: got an input of shape {tuple(x.shape)}; it is frozen for "
                f"(N, {self.in_channels}, {place.image[0]}, {place.image[1]}): freeze again with another input_shape"
            )
        image = x if x.dim() == 4 else x[None]
        image = F.pad(image.to(torch.promote_types(x.dtype, torch.float32)), (*place.pads[1], *place.pads[0]))
        image = rearrange(image, "n c (h a) (w b) -> n (c a b) h w", a=place.stride[0], b=place.stride[1])
        with exact_precision(x.device):
            y = self.convolve(image).to(x.dtype)
        y = y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
        return y if x.dim() == 4 else y[0]

    def _crop(self, y: Tensor) -> Tensor:
        (top, left), (height, width) = self.placement.start, self.placement.out
        return y[..., top : top + height, left : left + width]

    def extra_repr(self) -> str:
        return f"image={self.placement.image}, out={self.placement.out}, stride={self.placement.stride}"


class FrozenFourierConv2d(_PlacedConv2d):
    """y = crop(irfft2(W(ω)·rfft2(embed(x)))) + b on a fixed grid, for images of one size.

    Args:
        transfer: W(ω), (H, W//2 + 1, out, in·s²), complex; held as pairs of real numbers in `transfer`.
        bias: (out,) or None.
        grid: (H, W), the size of the torus.
        placement: of image and output on it.

    Shape:
        (N, in, *placement.image) → (N, out, *placement.out).

    Raises:
        ShapeError: at call, another size of image.
    """

    def __init__(self, transfer: Tensor, bias: Tensor | None, grid: Size, placement: Placement) -> None:
        super().__init__()
        self.transfer = constant(torch.view_as_real(transfer.resolve_conj()))
        self.bias = None if bias is None else constant(bias)
        self.in_channels = transfer.shape[-1] // math.prod(placement.stride)
        self.grid = grid
        self.placement = placement

    def matrices(self) -> Tensor:
        """W(ω), complex."""
        pairs = self.transfer.to(torch.promote_types(self.transfer.dtype, torch.float32))
        return torch.view_as_complex(pairs)

    def convolve(self, x: Tensor) -> Tensor:
        (top, left), (height, width) = self.placement.start, self.placement.out
        bottom, right = top + height, left + width
        if min(top, left) >= 0 and bottom <= self.grid[0] and right <= self.grid[1]:
            return self._crop(self._multiply(x, (bottom, right)))
        return self._multiply(x, self.grid).roll((-top, -left), (-2, -1))[..., :height, :width]

    def _multiply(self, x: Tensor, size: Size) -> Tensor:
        if not torch.compiler.is_compiling():
            return fourier_multiply(x, self.matrices(), self.grid, size)
        X = torch.fft.rfft2(x, s=self.grid).permute(2, 3, 1, 0)  # one piece, so that the batch may be of any size
        y = torch.fft.irfft2((self.matrices() @ X).permute(3, 2, 0, 1), s=self.grid)
        return y[..., : size[0], : size[1]]

    def lipschitz_bound(self) -> float:
        """The largest norm of the transfer matrices; embedding and cropping are contractions."""
        W = self.matrices().detach().to(torch.complex128)
        # tight for unitary matrices, up to the rounding of their Gram matrices
        rounding = 4 * max(W.shape[-2:]) * torch.finfo(W.dtype).eps * frobenius_norm(W).square()
        near = (1 + gram_iteration_bound(minus_identity_(gram(W)), 2) + rounding).sqrt()
        return torch.minimum(near, gram_iteration_bound(W, 10)).amax().item()


class FrozenPolynomialConv2d(_PlacedConv2d):
    """y = crop(Σ_j c_j Lʲ embed(x)) + b, L a zero-padded convolution with a skew kernel: `SOCConv2d` with zero padding.

    Args:
        kernel: of L, (n, n, kh, kw), both odd.
        coefficients: c_0, c_1, …, from `skew_exponential_coefficients`.
        in_channels: of the image; zeros fill them up to n after the pixel-unshuffling.
        out_channels: the first of n that are kept.
        bias: (out,) or None.
        placement: of image and output.

    Shape:
        (N, in, *placement.image) → (N, out, *placement.out).

    Raises:
        ShapeError: at call, another size of image.
    """

    def __init__(
        self,
        kernel: Tensor,
        coefficients: tuple[float, ...],
        in_channels: int,
        out_channels: int,
        bias: Tensor | None,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.kernel = constant(kernel)
        self.coefficients = coefficients
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.bias = None if bias is None else constant(bias)
        self.placement = placement

    def convolve(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, len(self.kernel) - x.shape[1]))
        return self._crop(polynomial(self.coefficients, self.kernel.to(x.dtype), x)[:, : self.out_channels])

    def lipschitz_bound(self) -> float:
        """1 for a skew L of norm 1; beyond, |p(iθ)| grows by its derivative at most."""
        L = self.kernel.detach().double()
        if not torch.equal(L, -L.transpose(0, 1).flip(-2, -1)):
            raise UnknownBoundError("its kernel is not skew-symmetric")
        norm = row_sum_bound(L[None])[0].item()
        slope = sum(j * abs(c) * norm ** (j - 1) for j, c in enumerate(self.coefficients) if j)
        return 1.0 + slope * max(0.0, norm - 1)


class _FrozenBlock(LipschitzModule):
    """y = A x + B w_n, w_0 = x, w_l = σ(C_l w_{l−1}), biases included: `skip`, `outgoing` and `inner` are the maps."""

    def __init__(
        self, inner: Sequence[nn.Module], activation: nn.Module, outgoing: nn.Module, skip: nn.Module | None
    ) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)
        self.activation = activation
        self.outgoing = outgoing
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        w = x
        for layer in self.inner:
            w = self.activation(layer(w))
        y = self.outgoing(w)
        return y if self.skip is None else y + self.skip(x)


class FrozenResidualBlock(_FrozenBlock):
    """y = x − Vᵀσ(Wx + b), as an nn.Linear or nn.Conv2d for W and another for −Vᵀ: `SLLBlock`, `CPLBlock`, and conv.

    Its bound is proven for W and V as they are. With S = diag(s), V = SW + E, κ = ‖S^½W‖²/2 and slopes in [0, 1], the
    spectrum of I − WᵀSDW is in [1 − 2κ, 1], so that L ≤ max(1, 2κ − 1) + ‖S^−½E‖‖S^½W‖, for zero and circular padding.
    """

    def lipschitz_bound(self) -> float:
        require_slope_range(self, self.activation)
        W, V = (_executed(weight) for weight in (self.inner[0].weight, self.outgoing.weight))  # type: ignore[arg-type]
        V = -V.transpose(0, 1).flip(tuple(range(2, V.dim())))
        rows, outgoing = W.flatten(1), V.flatten(1)
        s = (rows * outgoing).sum(1) / rows.square().sum(1)
        root = torch.where(s.isfinite() & (s > 0), s, 1).sqrt()[:, None]
        s = torch.where(s.isfinite() & (s > 0), s, 0)[:, None]
        norm = _conv_norm((s.sqrt() * rows).view_as(W))
        rest = _conv_norm(((outgoing - s * rows) / root).view_as(W))
        return max(1.0, norm**2 - 1) + rest * _conv_norm((root * rows).view_as(W))


def _conv_norm(W: Tensor) -> float:
    """The norm of the map with a dense weight or a kernel, from above."""
    kernel = W if W.dim() == 4 else W[..., None, None]
    norm = conv_norm_enclosure(kernel).upper
    return min(norm, math.sqrt(_perron_bound(autocorrelation(kernel[None], "out")[0].abs().sum((2, 3)))))


def _perron_bound(A: Tensor, steps: int = 50) -> float:
    """The spectral radius of a symmetric A ≥ 0 from above: max_i (Au)_i/u_i, for every u > 0 (Collatz–Wielandt)."""
    A = A[A.any(1)][:, A.any(1)]
    u, least = torch.ones_like(A[:1].sum(0)), math.inf if len(A) else 0.0
    for _ in range(steps if len(A) else 0):
        v = A @ u
        least = min(least, (v / u).amax().item())
        u = (v / v.amax()).clamp_min(1e-100)
    return least


class FrozenLMIBlock(_FrozenBlock):
    """A block that multipliers Λ_l prove by a linear matrix inequality: Sandwich, LBDN, LDLT, Gershgorin.

    Args:
        inner, outgoing, skip: nn.Linear, or `FrozenFourierConv2d` on one grid, where the inequality is shown at each
            frequency.
        activation: with channels in dimension 1.
        multipliers: the diagonals of Λ_l, kept in float64 as `multiplier_1`, …; they prove and do not run.
        lipschitz: 𝓛, what the weights were made for.
        sector: the slopes that they were made for.
    """

    def __init__(
        self,
        inner: Sequence[nn.Module],
        activation: nn.Module,
        outgoing: nn.Module,
        skip: nn.Module | None,
        multipliers: Sequence[Tensor],
        lipschitz: float,
        sector: Sector,
    ) -> None:
        super().__init__(inner, activation, outgoing, skip)
        for i, multiplier in enumerate(multipliers, 1):
            self.register_buffer(f"multiplier_{i}", multiplier.detach().clone())
        self.lipschitz = lipschitz
        self.sector = sector

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.outgoing, nn.Linear) and x.dim() != 2:  # the activation acts on dimension 1
            y = super().forward(x.reshape(-1, x.shape[-1]))
            return y.view(*x.shape[:-1], y.shape[-1])
        if isinstance(self.outgoing, FrozenFourierConv2d) and x.dim() == 3:
            return super().forward(x[None])[0]
        return super().forward(x)

    def lipschitz_bound(self) -> float:
        require_sector(self, self.activation, self.sector)
        multipliers = [self.get_buffer(f"multiplier_{i}").double() for i in range(1, len(self.inner) + 1)]
        for multiplier in multipliers:
            groups = tied_channels(self.activation, len(multiplier))
            if groups is not None and len(set(zip(groups, multiplier.tolist(), strict=True))) > len(set(groups)):
                raise ArgumentError(
                    f"{type(self).__name__}: activation={self.activation} couples channels whose multipliers differ; "
                    f"build a new layer with this activation"
                )
        layers = [*self.inner, self.outgoing, *(() if self.skip is None else (self.skip,))]
        executed = [_matrices(layer) for layer in layers]
        n = len(self.inner)
        found = 0.0  # what is proven at each row of frequencies is proven at all of them for the largest constant
        for row in zip(*executed, strict=True):
            weights = ExplicitWeights(row[:n], row[n], None if self.skip is None else row[n + 1], tuple(multipliers))
            found = max(found, proven_lipschitz(weights, self.lipschitz, self.sector))
        if found == math.inf:
            raise UnknownBoundError("its multipliers prove no bound for its weights, which were changed")
        return found


def _matrices(layer: nn.Module) -> Tensor:
    """What a layer multiplies by, in float64, over rows of frequencies: one row for a dense layer."""
    if isinstance(layer, FrozenFourierConv2d):
        return layer.matrices().detach().to(torch.complex128)
    return _executed(layer.weight)[None]  # type: ignore[arg-type]


class FrozenHouseholder(LipschitzModule):
    """`Householder` with its mirrors v as a buffer, (order, 2, ⌊C/2⌋); its bound is max(1, 2‖v‖² − 1) for each fold."""

    mirrors: Tensor

    def __init__(self, mirrors: Tensor, channels: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mirrors", mirrors.detach().clone())
        self.channels = channels
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[self.dim] != self.channels:
            raise ShapeError(
                f"FrozenHouseholder: got an input of shape {tuple(x.shape)}; expected {self.channels} channels in "
                f"dimension {self.dim}"
            )
        return fold(x, self.mirrors, self.dim)

    def lipschitz_bound(self) -> float:
        if not self.mirrors.numel():
            return 1.0
        squares = self.mirrors.double().square().sum(1).amax(1)
        return (2 * squares - 1).clamp_min(1).prod().item()

    def extra_repr(self) -> str:
        return f"channels={self.channels}, order={len(self.mirrors)}, dim={self.dim}"


TIED[FrozenHouseholder] = TIED[Householder]


class FrozenResidual(Container):
    """y = (1 − α)x + α·f(x), α a buffer: `Residual`."""

    alpha: Tensor

    def __init__(self, branch: nn.Module, alpha: Tensor) -> None:
        super().__init__()
        self.branch = branch
        self.register_buffer("alpha", alpha.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if y.shape != x.shape:
            raise ShapeError(
                f"FrozenResidual: the branch turned {tuple(x.shape)} into {tuple(y.shape)}; it must keep the shape"
            )
        return (1 - self.alpha) * x + self.alpha * y

    def branches(self) -> Sequence[nn.Module]:
        return [self.branch]

    def compose_bounds(self, bounds: Sequence[float]) -> float:
        exact = (1 - self.alpha).double(), self.alpha.double()
        pairs = [exact, (_executed(1 - self.alpha), _executed(self.alpha))]
        return max(abs(rest.item()) + abs(weight.item()) * bounds[0] for rest, weight in pairs)
