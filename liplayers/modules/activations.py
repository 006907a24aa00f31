"""Activations that keep the Lipschitz constant, and the slope ranges that residual proofs need.

A slope range (m, β) says that (σ(a) − σ(b))/(a − b) ∈ [m, β] for each entry on its own. Sorting activations have
none: they are 1-Lipschitz as maps of the whole vector, which is not enough for SLL, CPL or Sandwich; LDLT takes them
with multipliers that are equal within each group (`sector`, `tied_channels`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.core.checks import check_positive
from liplayers.core.intact import is_changed
from liplayers.core.module import LipschitzModule
from liplayers.core.precision import executed
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError, ShapeError, UnknownNameError
from liplayers.linalg import upward
from liplayers.linalg.lmi import Sector

__all__ = [
    "ACTIVATIONS",
    "Abs",
    "BetaAbs",
    "GroupSort",
    "Householder",
    "MaxMin",
    "get_activation",
    "require_slope_range",
    "slope_range",
]


def _sort2(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.maximum(a, b), torch.minimum(a, b)


class _Sort2(torch.autograd.Function):
    """Maximum and minimum. Their derivatives are computed by arithmetic, in a tenth of torch's time on a CPU.

    A tie is not swapped, so the derivative is orthogonal there as well; torch's averages the two.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return _sort2(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        swapped = inputs[1] > inputs[0]
        ctx.save_for_backward(swapped)
        ctx.save_for_forward(swapped)

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        swapped = ctx.saved_tensors[0].to(first.dtype)
        return torch.lerp(first, second, swapped), torch.lerp(second, first, swapped)  # exact at 0 and 1

    jvp = backward  # the derivative is symmetric


PAIRS = ("halves", "neighbours")


class MaxMin(LipschitzModule):
    r"""(a, b) ↦ (max(a, b), min(a, b)) for pairs (a, b) of channels: a gradient-norm-preserving activation.

    Channel i is paired with channel i + ⌊C/2⌋, or 2i with 2i + 1; of an odd number the last passes unchanged. It
    permutes the entries of its input, hence preserves norms; 1-Lipschitz as a map of the pair, without a slope range.
    Any number of channels and dimensions. Cost: two elementwise operations. Signal gain at initialisation: 1, as
    always.

    Args:
        dim: the channel dimension.
        pairs: "halves", channel i with i + ⌊C/2⌋, so that the first half holds the maxima; or "neighbours", 2i with
            2i + 1, so that each part of the channels holds maxima and minima.

    Shape:
        any, unchanged.

    Raises:
        UnknownNameError: other pairs.

    Source: Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> x = torch.tensor([[1.0, 2.0, 3.0, 0.0, 9.0]])
    >>> MaxMin()(x), MaxMin(pairs="neighbours")(x)
    (tensor([[3., 2., 1., 0., 9.]]), tensor([[2., 1., 3., 0., 9.]]))
    """

    def __init__(self, dim: int = 1, pairs: str = "halves") -> None:
        super().__init__()
        if pairs not in PAIRS:
            raise UnknownNameError.of("pairs", pairs, PAIRS)
        self.dim = dim
        self.pairs = pairs

    def forward(self, x: Tensor) -> Tensor:
        # plain operations where nothing differentiates, and for compilers, which take no function with a jvp
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x, Tensor)
        if not traced and self.pairs == "neighbours" and x.stride(self.dim) == 1:  # keeps the format channels_last
            return self._sorted(x.movedim(self.dim, -1), -1, traced).movedim(-1, self.dim)
        return self._sorted(x, self.dim, traced)

    def _sorted(self, x: Tensor, dim: int, traced: bool) -> Tensor:
        records = not traced and torch.is_grad_enabled() and x.requires_grad
        sort = _Sort2.apply if records else _sort2
        half = x.shape[dim] // 2
        if self.pairs == "halves":
            a, b, rest = x.split([half, half, x.shape[dim] - 2 * half], dim)
            parts = [*sort(a, b)]
        else:
            paired, rest = x.split([2 * half, x.shape[dim] - 2 * half], dim)
            inner = dim if dim < 0 else dim + 1  # of the two in a pair
            a, b = paired.unflatten(dim, (half, 2)).unbind(inner)
            pairs = torch.cat([each.unsqueeze(inner) for each in sort(a, b)], inner)
            parts = [pairs.flatten(inner - 1, inner)]
        # an empty part would undo the memory format channels_last
        parts += [rest] if traced or rest.shape[dim] else []
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.pairs == "halves" else f", pairs={self.pairs!r}")


class GroupSort(LipschitzModule):
    r"""Sort the channels within groups of `group_size` neighbours, ascending; a shorter last group is sorted too.

    y = Px with a permutation P that depends on x: norm-preserving, 1-Lipschitz by the rearrangement inequality, without
    a slope range. Cost: one sort of each group. Signal gain at initialisation: 1, as always.

    Args:
        group_size: channels in a group; None sorts all of them.
        dim: the channel dimension.

    Shape:
        any, unchanged.

    Raises:
        ArgumentError: group_size below 1.

    Source: Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> GroupSort(3)(torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0]]))
    tensor([[1., 2., 3., 4., 5.]])
    """

    def __init__(self, group_size: int | None = 2, dim: int = 1) -> None:
        super().__init__()
        if group_size is not None:
            check_positive(self, group_size=group_size)
        self.group_size = group_size
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[self.dim]
        size = min(self.group_size or channels, channels)
        x = x.movedim(self.dim, -1)
        full = channels - channels % size
        groups = rearrange(x[..., :full], "... (g s) -> ... g s", s=size).sort(-1).values
        parts = [rearrange(groups, "... g s -> ... (g s)"), x[..., full:].sort(-1).values]
        return torch.cat(parts, -1).movedim(-1, self.dim)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, dim={self.dim}"


class Abs(LipschitzModule):
    """The absolute value of each entry, y = |x|; 1-Lipschitz, preserves norms, slope range [−1, 1].

    Any shape. Cost: one elementwise operation. Signal gain at initialisation: 1, as always.

    Source: Anil, Lucas & Grosse 2019, arXiv 1811.05381.

    >>> Abs()(torch.tensor([-1.0, 2.0]))
    tensor([1., 2.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()

    def lipschitz_bound(self) -> float:
        return 1.0


class BetaAbs(LipschitzModule):
    r"""β-abs: y_i = |x_i| on the first round(βC) channels, y_i = x_i on the rest.

    Nonlinear and 1-Lipschitz, preserves norms, slope range [−1, 1]; any shape, no parameters. β = 0 is the identity,
    β = 1 is `Abs`, and β = ½ is `MaxMin` between two rotations by 45° where C is even. Cost: one elementwise operation
    on a part of the channels. Signal gain at initialisation: 1, as always.

    Args:
        beta: the share of the channels, in [0, 1]; halves of a channel are rounded to the even number.
        dim: the channel dimension.

    Shape:
        any, unchanged.

    Raises:
        ArgumentError: beta outside [0, 1].

    Source: Hu et al. 2026, arXiv 2601.18513.

    >>> BetaAbs(0.5)(torch.tensor([[-1.0, -2.0, -3.0, -4.0]]))
    tensor([[ 1.,  2., -3., -4.]])
    """

    def __init__(self, beta: float = 0.5, dim: int = 1) -> None:
        super().__init__()
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
            raise ArgumentError(f"BetaAbs: beta={beta!r}; expected a number in [0, 1]")
        self.beta = beta
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[self.dim]
        folded = round(self.beta * channels)
        head, rest = x.split([folded, channels - folded], self.dim)
        return torch.cat([head.abs(), rest], self.dim)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"beta={self.beta}, dim={self.dim}"


class Householder(ParametrizedModule):
    r"""Learnable Householder activation: pairs of channels are folded along lines through the origin.

    A fold with angle θ, v = (sin θ/2, −cos θ/2), takes z = (a, b) to z + 2·max(0, −vᵀz)·v: the identity on the side
    vᵀz ≥ 0 of the line at angle θ/2, the reflection (cos θ, sin θ; sin θ, −cos θ) on the other. The two agree on the
    line. Nonlinear and 1-Lipschitz, without a slope range; it preserves norms up to the rounding of v. That is done in
    float32 at least whatever the input's precision, and v is shortened by more than its rounding error: ‖v‖ ≤ 1, so
    that I − 2vvᵀ with its eigenvalues 1 and 1 − 2‖v‖² ≥ −1 is a contraction, and the bound 1, for every finite θ.

    `order` folds follow each other. θ = π/2 is `MaxMin`, where the first fold starts; each further one starts where it
    halves the wedge that the folds before it leave (at π/2 it would meet no input). The paper's order 2 has three
    angles, for four sectors of which opposite ones add up to π; two folds are those with two neighbours equal.

    Channel i is paired with channel i + ⌊C/2⌋ as in `MaxMin`; of an odd number the last passes unchanged. Any number
    of dimensions. Cost: about seven elementwise operations a fold on half the channels. Signal gain at initialisation:
    1, as for every θ.

    Args:
        channels: C.
        order: the number of folds.
        dim: the channel dimension.
        device: of the parameter `theta`.
        dtype: of the parameter `theta`.

    Shape:
        any with C channels, unchanged.

    Raises:
        ArgumentError: channels or order below 1.
        ShapeError: an input with another number of channels.

    Source: Singla, Singla & Feizi 2022, arXiv 2108.04062.

    >>> Householder(3)(torch.tensor([[1.0, 4.0, -9.0]])).detach().round(decimals=4)
    tensor([[ 4.,  1., -9.]])
    """

    def __init__(
        self,
        channels: int,
        order: int = 1,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, channels=channels, order=order)
        self.channels = channels
        self.order = order
        self.dim = dim
        self.theta = self.new_parameter((order, channels // 2), device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """θ = π/2, 3π/2, 2π, …: each fold halves the wedge that is left."""
        for k, angles in enumerate(self.theta.detach()):
            angles.fill_(math.pi * (2.5 - 2 / 2**k))

    def map_weight(self, theta: Tensor) -> Tensor:
        half_angle = theta.double() / 2
        v = torch.stack([half_angle.sin(), -half_angle.cos()], 1)
        return ((1 - 3 * torch.finfo(theta.dtype).eps) * v).to(theta.dtype)  # sin and cos are off by 2ε at most

    def rounded(self, weight: Tensor) -> Tensor:
        return weight  # it runs in float32 at least

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[self.dim] != self.channels:
            raise ShapeError(
                f"Householder: got an input of shape {tuple(x.shape)}; expected {self.channels} channels in "
                f"dimension {self.dim}"
            )
        return fold(x, self.effective(), self.dim)

    def lipschitz_bound(self) -> float:
        return 1.0

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        return FrozenHouseholder(self.effective(), self.channels, self.dim)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, order={self.order}, dim={self.dim}"


class FrozenHouseholder(LipschitzModule):
    """`Householder` with its mirrors v as a buffer, (order, 2, ⌊C/2⌋); its bound is max(1, 2‖v‖² − 1) for each fold.

    Args:
        mirrors: v, (order, 2, ⌊C/2⌋).
        channels: C.
        dim: the channel dimension.
    """

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
        if not self.mirrors.isfinite().all():
            return math.inf
        folds = [pairs.T.tolist() for pairs in self.mirrors.double()]
        squares = (max(Fraction(p) ** 2 + Fraction(q) ** 2 for p, q in pairs) for pairs in folds)
        return upward.product(*(max(Fraction(1), 2 * square - 1) for square in squares))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, order={len(self.mirrors)}, dim={self.dim}"


def fold(x: Tensor, mirrors: Tensor, dim: int) -> Tensor:
    """x with its pairs of channels folded along v, one fold after the other; `mirrors`: v as (order, 2, ⌊C/2⌋)."""
    half = mirrors.shape[-1]
    a, b, rest = x.split([half, half, x.shape[dim] - 2 * half], dim)
    behind = [1] * (x.dim() - 1 - dim % x.dim())
    for p, q in mirrors.view(len(mirrors), 2, half, *behind):
        excess = 2 * F.relu(-(p * a + q * b))  # the distance to the mirror image, 0 on the side that stays
        a, b = a + excess * p, b + excess * q
    return torch.cat([a.to(x.dtype), b.to(x.dtype), rest], dim)


Slopes = tuple[float, float]


def _hull(*slopes: float) -> Slopes | None:
    """The least range that contains the given slopes; None where one is not finite."""
    return (min(slopes), max(slopes)) if all(map(math.isfinite, slopes)) else None


def _prelu(module: nn.PReLU) -> Slopes | None:
    """The range of all channels, for the weight as it is now. A block asks again for each bound."""
    weights = (module.weight.detach(), executed(module.weight))
    return _hull(1.0, *(slope for w in weights for slope in w.flatten().tolist()))


def _rrelu(module: nn.RReLU) -> Slopes | None:
    """In training the slopes are drawn anew for each call: then it is not even a function."""
    return None if module.training else _hull(1.0, (module.lower + module.upper) / 2)


# Infimum and supremum of the derivative (the mean value theorem makes them those of the difference quotients). For
# GELU, the derivative at ∓√2; else at the two roots of the second derivative, found in 40 digits with mpmath: ±1.418504
# (GELU with tanh), ±2.399357 (SiLU), −2.256376 and 1.490571 (Mish). Rounded outward in the seventh decimal.
_GELU = {"none": (-0.1289042, 1.1289042), "tanh": (-0.1289931, 1.1289931)}
_SILU = (-0.0998394, 1.0998394)
_MISH = (-0.1125262, 1.0884982)
_SELU = (0.0, 1.7580994)  # scale·α on the left of 0, where the slope jumps to scale = 1.0507…

# Not here: Threshold and Hardshrink, which jump, and torch's Softplus, which is log1p(exp(βx))/β up to its threshold
# and x beyond, a jump down by log1p(exp(−threshold))/β: 2e-9 in float64 with the defaults.
SLOPE_RANGES: dict[type[nn.Module], Callable[..., Slopes | None]] = {
    nn.Identity: lambda m: (1.0, 1.0),
    nn.ReLU: lambda m: (0.0, 1.0),
    nn.ReLU6: lambda m: (0.0, 1.0),
    nn.Hardtanh: lambda m: (0.0, 1.0),
    nn.Tanh: lambda m: (0.0, 1.0),
    nn.Sigmoid: lambda m: (0.0, 0.25),
    nn.LogSigmoid: lambda m: (0.0, 1.0),
    nn.Softsign: lambda m: (0.0, 1.0),
    nn.Softshrink: lambda m: (0.0, 1.0),
    nn.Tanhshrink: lambda m: (0.0, 1.0),
    nn.Hardsigmoid: lambda m: (0.0, upward.quotient(1, 6)),
    nn.Hardswish: lambda m: (-0.5, 1.5),  # (2x + 3)/6 for |x| < 3
    nn.ELU: lambda m: _hull(0.0, 1.0, m.alpha),
    nn.CELU: lambda m: (0.0, 1.0) if 0 < m.alpha < math.inf else None,
    nn.SELU: lambda m: _SELU,
    nn.GELU: lambda m: _GELU.get(m.approximate),
    nn.SiLU: lambda m: _SILU,
    nn.Mish: lambda m: _MISH,
    nn.LeakyReLU: lambda m: _hull(1.0, m.negative_slope),
    nn.PReLU: _prelu,
    nn.RReLU: _rrelu,
    Abs: lambda m: (-1.0, 1.0),
    BetaAbs: lambda m: (-1.0, 1.0),
}


def slope_range(activation: nn.Module) -> Slopes | None:
    """The slope range (m, β) of an entrywise activation; None if it has none, none is known, or a hook may change it.

    It holds for the parameters, the mode and the autocast context that the activation is in.

    >>> slope_range(nn.LeakyReLU(0.1)), slope_range(MaxMin())
    ((0.1, 1.0), None)
    """
    rule = SLOPE_RANGES.get(type(activation))  # exact type: a subclass may compute something else
    return rule(activation) if rule and not is_changed(activation) else None


def sector(owner: object, activation: nn.Module) -> Slopes:
    """The range [m, β], widened to hold 0, with (w − mv)ᵀΛ(βv − w) ≥ 0 for differences v of the input, w of the output.

    For entrywise activations that is their slope range, with any diagonal Λ > 0; for MaxMin, GroupSort and Householder
    [−L, L], L their bound as they are, with Λ equal within each group (`tied_channels`): there the form is
    L²|Λ^½v|² − |Λ^½w|².

    Raises:
        ArgumentError: neither is known, the channels are not dimension 1, no slope is positive, or a hook may change
            what the activation computes.

    >>> sector(None, nn.LeakyReLU(-0.1)), sector(None, MaxMin())
    ((-0.1, 1.0), (-1.0, 1.0))
    """
    if type(activation) in (*TIED, BetaAbs) and activation.dim != 1:
        raise ArgumentError(f"{type(owner).__name__}: activation={activation}; expected its channels in dim=1")
    if isinstance(activation, LipschitzModule) and type(activation) in TIED and not is_changed(activation):
        bound = activation.lipschitz_bound()
        return -bound, bound
    slopes = slope_range(activation)
    if slopes is None or slopes[1] <= 0:
        mode = "in training mode " if isinstance(activation, nn.RReLU) and activation.training else ""
        raise ArgumentError(
            f"{type(owner).__name__}: activation={activation} has {mode}no known range of slopes with a positive end; "
            f"use nn.ReLU(), nn.Tanh(), nn.GELU(), Abs() or MaxMin()"
        )
    return min(slopes[0], 0.0), slopes[1]


def halves(channels: int, half: int) -> list[int]:
    """Channel i with channel i + half for i < half; each of the others is alone."""
    return [i % half for i in range(2 * half)] + list(range(half, channels - half))


def _neighbours(channels: int, size: int) -> list[int]:
    return [i // size for i in range(channels)]


def _max_min(activation: MaxMin, channels: int) -> list[int]:
    return halves(channels, channels // 2) if activation.pairs == "halves" else _neighbours(channels, 2)


TIED: dict[type[nn.Module], Callable[[Any, int], list[int]]] = {
    MaxMin: _max_min,
    GroupSort: lambda activation, channels: _neighbours(channels, activation.group_size or channels),
    Householder: lambda activation, channels: halves(channels, activation.theta.shape[-1]),
    FrozenHouseholder: lambda activation, channels: halves(channels, activation.mirrors.shape[-1]),
}


def tied_channels(activation: nn.Module, channels: int) -> list[int] | None:
    """The number of the group that each channel belongs to; None for an entrywise activation.

    >>> tied_channels(MaxMin(), 5), tied_channels(GroupSort(2), 5), tied_channels(nn.ReLU(), 5)
    ([0, 1, 0, 1, 2], [0, 0, 1, 1, 2], None)
    """
    return TIED[type(activation)](activation, channels) if type(activation) in TIED else None


def require_slope_range(owner: object, activation: nn.Module, low: float = 0.0, high: float = 1.0) -> None:
    """Raise ArgumentError unless the activation's slopes are proven to lie in [low, high]."""
    got = slope_range(activation)
    if got is None or got[0] < low or got[1] > high:
        what = "no slope range" if got is None else f"slopes in [{got[0]:g}, {got[1]:g}]"
        raise ArgumentError(
            f"{type(owner).__name__}: activation={activation} has {what}, the proof needs [{low:g}, {high:g}]; "
            f"use nn.ReLU() or nn.Tanh()"
        )


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "maxmin": MaxMin,
    "maxmin_neighbours": partial(MaxMin, pairs="neighbours"),
    "groupsort": GroupSort,
    "fullsort": lambda: GroupSort(None),
    "abs": Abs,
    "beta_abs": BetaAbs,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


def get_activation(name: str | Callable[[], nn.Module]) -> nn.Module:
    """A new activation by name, or from a class or function.

    >>> get_activation("maxmin")
    MaxMin(dim=1)
    """
    if isinstance(name, nn.Module):
        raise ArgumentError(
            f"activation={name}: expected a name, a class or a function, which makes one for each place"
        )
    if callable(name):
        return name()
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnknownNameError.of("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def require_sector(owner: object, activation: nn.Module, made_for: Sector) -> None:
    """Raise ArgumentError unless the activation's sector lies in the one that the weights of `owner` are made for."""
    low, high = sector(owner, activation)
    if low < made_for.low or high > made_for.high:
        raise ArgumentError(
            f"{type(owner).__name__}: activation={activation} has slopes in [{low:g}, {high:g}], the weights are made "
            f"for [{made_for.low:g}, {made_for.high:g}]; build a new layer with this activation"
        )
