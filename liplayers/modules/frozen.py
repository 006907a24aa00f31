"""What `liplayers.freeze` makes of layers that torch has no module for: plain weights, and a bound of their own.

Every weight is a parameter without a gradient, or a child from torch; nothing is computed from raw parameters. Bounds
are proven for the weights as they are, whatever they were computed from, and however they are cast or changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.core.intact import require_intact
from liplayers.core.module import LipschitzModule
from liplayers.core.precision import exact_precision, executed
from liplayers.errors import ArgumentError, ShapeError, UnknownBoundError
from liplayers.linalg import upward
from liplayers.linalg.convolution import polynomial
from liplayers.linalg.fourier import CHUNK, isometric_dft, isometric_dft_error
from liplayers.linalg.lmi import ExplicitWeights, Sector, proven_lipschitz
from liplayers.linalg.norms import frobenius_norm
from liplayers.linalg.verified import (
    conv_norm_enclosure,
    entry_norm,
    largest_norm_enclosure,
    skew_polynomial_conv_bound,
    weighted_row_sum_norm,
)
from liplayers.modules.activations import require_sector, require_slope_range, tied_channels

__all__ = [
    "FrozenFourierConv2d",
    "FrozenLMIBlock",
    "FrozenPolynomialConv2d",
    "FrozenResidualBlock",
    "Placement",
    "Size",
    "constant",
    "filled",
    "image_size",
    "plain_linear",
]

Size = tuple[int, int]


def constant(value: Tensor) -> nn.Parameter:
    """A weight of a frozen module: a copy of `value`, without a gradient."""
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


def filled(module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A module of torch, built on the meta device without a bias, with these weights."""
    module.weight = constant(weight)
    module.bias = None if bias is None else constant(bias)
    return module


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear with copies of these weights."""
    out_features, in_features = weight.shape
    return filled(nn.Linear(in_features, out_features, bias=False, device="meta"), weight, bias)


def image_size(shape: Sequence[int] | None) -> Size:
    """Height and width of the images that a layer is to be frozen for.

    Raises:
        ArgumentError: they are not known.
    """
    if shape is None:
        raise ArgumentError("its weights depend on the size of the image; call freeze(model, input_shape=(C, H, W))")
    return shape[-2], shape[-1]


@dataclass(frozen=True)
class Placement:
    """How an image of one size is embedded before a convolution, and what is cut out of the result.

    Attributes:
        image: height and width of the input.
        pads: zeros (before, after) for height and width.
        stride: the padded image is pixel-unshuffled by it.
        start, out: where the output begins in the result, negative on a torus, and its size.

    Raises:
        ShapeError: numbers that are not integers, empty images, negative padding, a stride that does not divide.
    """

    image: Size
    pads: tuple[Size, Size]
    stride: Size
    start: Size
    out: Size

    def __post_init__(self) -> None:
        numbers = [*self.image, *self.pads[0], *self.pads[1], *self.stride, *self.start, *self.out]
        padded = [n + before + after for n, (before, after) in zip(self.image, self.pads, strict=True)]
        if (
            any(type(n) is not int for n in numbers)
            or min(*self.image, *self.stride, *self.out) < 1
            or min(*self.pads[0], *self.pads[1]) < 0
            or any(n % s for n, s in zip(padded, self.stride, strict=True))
        ):
            raise ShapeError(
                f"{self}: expected integers, sizes and stride of at least 1, padding of at least 0, and a stride that "
                f"divides the padded image"
            )

    @property
    def embedded(self) -> Size:
        """Height and width of the padded, pixel-unshuffled image."""
        (height, top, bottom), (width, left, right) = ((n, *p) for n, p in zip(self.image, self.pads, strict=True))
        return (height + top + bottom) // self.stride[0], (width + left + right) // self.stride[1]


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
        y = y if self.bias is None else y + self.bias.to(y.dtype).view(y.shape[1], 1, 1)
        return y if x.dim() == 4 else y[0]

    def _crop(self, y: Tensor) -> Tensor:
        (top, left), (height, width) = self.placement.start, self.placement.out
        return y[..., top : top + height, left : left + width]

    def extra_repr(self) -> str:
        return f"image={self.placement.image}, out={self.placement.out}, stride={self.placement.stride}"


class FrozenFourierConv2d(_PlacedConv2d):
    """y = crop(F⁻¹ W(ω) F embed(x)) + b on a fixed grid, F the unitary DFT as matrix products, for images of one size.

    Along each axis F and F⁻¹ are reduced to the rows and columns that image and output have on the grid, which embeds
    and crops. Along the width the spectrum is that of real signals, half of it, scaled to keep the norm.

    Args:
        transfer: W(ω), (H, W//2 + 1, out, in·s²), complex; held as pairs of real numbers in `transfer`.
        bias: (out,) or None.
        grid: (H, W), the size of the torus.
        placement: of image and output on it.

    Shape:
        (N, in, *placement.image) → (N, out, *placement.out).

    Raises:
        ShapeError: an image or an output larger than the grid, which would meet itself on it, or transfer matrices
            for another grid; at call, another size of image.
    """

    width_in: Tensor  # (w, 2·(W//2 + 1)), from pixels to pairs of real numbers
    height_in: Tensor  # (H, h, 2), complex as the next one
    height_out: Tensor  # (h', H, 2)
    width_out: Tensor  # (2·(W//2 + 1), w')

    def __init__(self, transfer: Tensor, bias: Tensor | None, grid: Size, placement: Placement) -> None:
        super().__init__()
        for what, sizes in (("an image", placement.embedded), ("an output", placement.out)):
            if any(type(size) is not int or n > size for n, size in zip(sizes, grid, strict=True)):
                raise ShapeError(f"FrozenFourierConv2d: {what} of {sizes} does not fit on the grid {grid}")
        if tuple(transfer.shape[:-2]) != (grid[0], grid[1] // 2 + 1):
            raise ShapeError(
                f"FrozenFourierConv2d: transfer is of shape {tuple(transfer.shape)}; expected "
                f"({grid[0]}, {grid[1] // 2 + 1}, out, in) for the grid {grid}"
            )
        self.transfer = constant(torch.view_as_real(transfer.resolve_conj()))
        self.bias = None if bias is None else constant(bias)
        self.in_channels = transfer.shape[-1] // math.prod(placement.stride)
        self.grid = grid
        self.placement = placement
        self._place_transforms()

    def _transforms(self) -> dict[str, Tensor]:
        """The four matrices in float64."""
        place, (height, width) = self.placement, self.grid
        h, w = place.embedded
        rows, columns = (torch.arange(first, first + n) for first, n in zip(place.start, place.out, strict=True))
        return {
            "width_in": torch.view_as_real(isometric_dft(torch.arange(w), width, half=True).T).flatten(1),
            "height_in": torch.view_as_real(isometric_dft(torch.arange(h), height)),
            "height_out": torch.view_as_real(isometric_dft(rows, height).mH.resolve_conj()),
            "width_out": torch.view_as_real(isometric_dft(columns, width, half=True).T).flatten(1).T,
        }

    def _place_transforms(self) -> None:
        dtype = torch.promote_types(self.transfer.dtype, torch.float32)
        for name, matrix in self._transforms().items():
            matrix = matrix.to(self.transfer.device, dtype).contiguous()
            self.register_buffer(name, matrix, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place_transforms()  # in the precision of the new dtype, where a cast would keep that of the old one
        return self

    def matrices(self) -> Tensor:
        """W(ω), complex."""
        pairs = self.transfer.to(torch.promote_types(self.transfer.dtype, torch.float32))
        return torch.view_as_complex(pairs)

    def convolve(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling() or len(x) <= CHUNK:
            return self._image(self.matrices() @ self._spectrum(x))
        X = torch.cat([self._spectrum(part) for part in x.split(CHUNK)], -1)
        return torch.cat([self._image(part) for part in (self.matrices() @ X).split(CHUNK, -1)])

    def _spectrum(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → (H, W//2 + 1, C, B)."""
        X = torch.view_as_complex((x @ self.width_in).unflatten(-1, (-1, 2)))
        return _along_height(self.height_in, X.permute(2, 3, 1, 0))

    def _image(self, X: Tensor) -> Tensor:
        """(H, W//2 + 1, C, B) → (B, C, h', w')."""
        Y = _along_height(self.height_out, X).permute(3, 2, 0, 1).contiguous()
        return torch.view_as_real(Y).flatten(-2) @ self.width_out

    def check_parts(self) -> None:
        for name, exact in self._transforms().items():
            run = self.get_buffer(name)
            allowed = 16 * torch.finfo(run.dtype).eps  # entries are 1 at most, and rounded once or twice
            if run.shape != exact.shape or not (run.detach().cpu().double() - exact).abs().max() <= allowed:
                raise UnknownBoundError(f"its {name} is not the transform that it was made with: freeze again")

    def lipschitz_bound(self) -> float:
        """The largest norm of the transfer matrices, for the exact DFT: its reductions are contractions."""
        self.check_parts()
        return largest_norm_enclosure(self.matrices()).upper

    def constant_errors(self) -> dict[str, float]:
        """For each of the four matrices, its distance as it runs from the exact one, by way of float64."""
        errors = {}
        for name, matrix in self._transforms().items():
            distance = frobenius_norm((self.get_buffer(name).detach().cpu().double() - matrix).flatten(1)).item()
            rounding = upward.product(distance, 1 + 2.0**-50 * matrix.numel())
            errors[name] = upward.total(
                rounding, isometric_dft_error(max(matrix.shape))
            )  # of as many positions at most
        return errors


def _along_height(transform: Tensor, X: Tensor) -> Tensor:
    """A complex matrix (m, h) in real pairs times X, (h, ...)."""
    return (torch.view_as_complex(transform) @ X.flatten(1)).unflatten(1, X.shape[1:])


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
        if not all(map(math.isfinite, coefficients)):
            raise ArgumentError(f"FrozenPolynomialConv2d: coefficients={coefficients}; expected finite numbers")
        end = (start + n for start, n in zip(placement.start, placement.out, strict=True))
        if min(placement.start) < 0 or any(n > size for n, size in zip(end, placement.embedded, strict=True)):
            raise ShapeError(f"FrozenPolynomialConv2d: {placement}: its output lies beyond the padded image")
        self.kernel = constant(kernel)
        self.coefficients = tuple(map(float, coefficients))
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.bias = None if bias is None else constant(bias)
        self.placement = placement

    def convolve(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, len(self.kernel) - x.shape[1]))
        return self._crop(polynomial(self.coefficients, self.kernel.to(x.dtype), x)[:, : self.out_channels])

    def lipschitz_bound(self) -> float:
        """The largest |p(iθ)| for |θ| up to the norm of a skew L."""
        L = self.kernel.detach().double()
        if not all(k % 2 for k in L.shape[2:]):
            raise UnknownBoundError("its kernel has even sides: its powers would not keep the image's size")
        if not torch.equal(L, -L.transpose(0, 1).flip(-2, -1)):
            raise UnknownBoundError("its kernel is not skew-symmetric")
        return skew_polynomial_conv_bound(self.coefficients, L)


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

    def check_parts(self) -> None:
        require_intact(self)


class FrozenResidualBlock(_FrozenBlock):
    """y = x − Vᵀσ(Wx + b), as an nn.Linear or nn.Conv2d for W and another for −Vᵀ: `SLLBlock`, `CPLBlock`, and conv.

    Its bound is proven for W and V as they are. With S = diag(s), V = SW + E, κ = ‖S^½W‖²/2 and slopes in [0, 1], the
    spectrum of I − WᵀSDW is in [1 − 2κ, 1], so that L ≤ max(1, 2κ − 1) + ‖T⁻¹E‖‖TW‖ for any diagonal T > 0, for zero
    and circular padding. T is S^½ to a power of two, which multiplies exactly.

    Args:
        inner: W and b, one nn.Linear or nn.Conv2d.
        activation: entrywise with slopes in [0, 1].
        outgoing: −Vᵀ, of the same type.
        skip: nn.Identity.
    """

    def check_parts(self) -> None:
        super().check_parts()
        require_slope_range(self, self.activation)
        _check_adjoint_places([*self.inner, self.outgoing])
        if type(self.skip) is not nn.Identity:
            raise UnknownBoundError("its skip is not the identity")

    def lipschitz_bound(self) -> float:
        self.check_parts()
        W, V = (executed(weight) for weight in (self.inner[0].weight, self.outgoing.weight))  # type: ignore[arg-type]
        V = -V.transpose(0, 1).flip(tuple(range(2, V.dim())))
        if not (W.isfinite().all() and V.isfinite().all()):
            return math.inf
        if V.shape != W.shape:
            raise UnknownBoundError(f"its weights are of shapes {tuple(W.shape)} and, transposed, {tuple(V.shape)}")
        rows, outgoing = W.flatten(1), V.flatten(1)
        s = (rows * outgoing).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
        s = torch.where(s.isfinite() & (s > 0), s, 0)
        root = s.sqrt()
        T = torch.where(s > 0, root / torch.frexp(root).mantissa, 1)
        inner, product = root * rows, s * rows
        E = outgoing - product
        # 2⁻⁵² for each rounding: of the products and the difference, and of the root, by which the norm is multiplied
        norm = upward.product(_rounded_norm(inner.view_as(W), inner.view_as(W)), 1 + 2.0**-51)
        rest = _rounded_norm((E / T).view_as(W), ((E.abs() + product.abs()) / T).view_as(W))
        beyond = upward.product(rest, _rounded_norm((T * rows).view_as(W), torch.zeros_like(W)))
        return upward.total(max(1.0, upward.total(upward.product(norm, norm), -1)), beyond)


def _check_adjoint_places(layers: Sequence[nn.Module]) -> None:
    """Raise UnknownBoundError unless W and V are dense, or convolutions of odd size that keep the image's, both alike.

    The types and settings are read as they are now, since anyone may change those of torch's modules.
    """
    kinds = {type(layer) for layer in layers}
    if len(layers) != 2 or (kinds != {nn.Linear} and kinds != {nn.Conv2d}):
        raise UnknownBoundError(f"it consists of {layers}; expected two nn.Linear or two nn.Conv2d")
    modes = set()
    for conv in layers:
        if isinstance(conv, nn.Conv2d):
            sizes = conv.weight.shape[2:]
            pads = tuple(k // 2 for k in sizes)
            around = (pads[1], pads[1], pads[0], pads[0])  # what circular padding runs
            runs = tuple(conv._reversed_padding_repeated_twice)
            geometry = (conv.stride, conv.dilation, conv.groups, conv.padding, runs)
            if not all(k % 2 for k in sizes) or geometry != ((1, 1), (1, 1), 1, pads, around):
                raise UnknownBoundError(f"{conv} does not keep the size of the image")
            modes.add(conv.padding_mode)
    if not modes <= {"zeros", "circular"} or len(modes) > 1:
        raise UnknownBoundError(f"its convolutions pad by {' and '.join(sorted(modes))}")


def _rounded_norm(weight: Tensor, rounded: Tensor) -> float:
    """An upper bound of the norm of a dense map or a convolution, for entries off by 2⁻⁵² of those of `rounded`.

    Underflow, of a product or of a tiny entry times a power of two, takes less than 2⁻⁵⁰⁰ from each entry.
    """
    kernel, rounded = (w if w.dim() == 4 else w[..., None, None] for w in (weight, rounded))
    lost = upward.product(2.0**-52, entry_norm(rounded.abs().sum((2, 3))))
    norm = min(conv_norm_enclosure(kernel).upper, weighted_row_sum_norm(kernel))
    return upward.total(norm, lost, 2.0**-500 * weight.numel())


class FrozenLMIBlock(_FrozenBlock):
    """A block that multipliers Λ_l prove by a linear matrix inequality: Sandwich, LBDN, LDLT, Gershgorin.

    Args:
        inner: the maps to the hidden layers: nn.Linear, or `FrozenFourierConv2d` on one grid, where the inequality is
            shown at each frequency.
        activation: with channels in dimension 1.
        outgoing: B, of the same type.
        skip: A, of the same type; None for none.
        multipliers: the diagonals of Λ_l, kept in float64 as `multiplier_1`, …; they are for the proof and do not run.
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

    def check_parts(self) -> None:
        super().check_parts()
        _check_one_grid(self.inner, self.outgoing, self.skip)
        require_sector(self, self.activation, self.sector)

    def lipschitz_bound(self) -> float:
        self.check_parts()
        multipliers = [self.get_buffer(f"multiplier_{i}").double() for i in range(1, len(self.inner) + 1)]
        for multiplier in multipliers:
            groups = tied_channels(self.activation, len(multiplier))
            if groups is not None and len(set(zip(groups, multiplier.tolist(), strict=True))) > len(set(groups)):
                raise ArgumentError(
                    f"{type(self).__name__}: activation={self.activation} couples channels whose multipliers differ; "
                    f"build a new layer with this activation"
                )
        layers = [*self.inner, self.outgoing, *(() if self.skip is None else (self.skip,))]
        matrices = [_matrices(layer) for layer in layers]
        n = len(self.inner)
        found = 0.0  # what is proven at each row of frequencies is proven at all of them for the largest constant
        for row in zip(*matrices, strict=True):
            weights = ExplicitWeights(row[:n], row[n], None if self.skip is None else row[n + 1], tuple(multipliers))
            found = max(found, proven_lipschitz(weights, self.lipschitz, self.sector))
        if found == math.inf:
            raise UnknownBoundError("its multipliers prove no bound for its weights, which were changed")
        return found


def _check_one_grid(inner: nn.ModuleList, outgoing: nn.Module, skip: nn.Module | None) -> None:
    """Raise UnknownBoundError unless all layers are nn.Linear, or multiply at each frequency of one grid.

    Between its ends such a network stays on the grid. Only then does what is shown at each frequency hold for the
    whole.
    """
    layers = [*inner, outgoing, *(() if skip is None else (skip,))]
    kinds = {type(layer) for layer in layers}
    if kinds == {nn.Linear}:
        return
    if kinds != {FrozenFourierConv2d}:
        raise UnknownBoundError(f"it consists of {', '.join(sorted(kind.__name__ for kind in kinds))}")
    places, grid = [layer.placement for layer in layers], layers[0].grid
    none = ((0, 0), (0, 0))
    begin = [(place.image, place.pads, place.stride) for place in places]
    end = [(place.start, place.out) for place in places]
    n = len(inner)
    if (
        any(layer.grid != grid for layer in layers)
        or any(place != (grid, none, (1, 1)) for place in begin[1 : n + 1])
        or any(place != ((0, 0), grid) for place in end[:n])
        or (skip is not None and (begin[-1], end[-1]) != (begin[0], end[n]))
    ):
        raise UnknownBoundError("its layers are not placed on one grid: freeze again")


def _matrices(layer: nn.Module) -> Tensor:
    """What a layer multiplies by, in float64, over rows of frequencies: one row for a dense layer."""
    if isinstance(layer, FrozenFourierConv2d):
        return layer.matrices().detach().to(torch.complex128)
    return executed(layer.weight)[None]  # type: ignore[arg-type]
