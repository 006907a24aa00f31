"""LDLT networks: weights from a block LDLᵀ factorisation of the Lipschitz LMI (Juston et al. 2025, arXiv 2512.05915).

It differs from the public code, whose residual form reaches 1.36 to 1.58 times its promise and whose sequential form
holds for 𝓛 = 1 only. Skip and last weight are chosen together, after the inner weights, so everything that strictly
satisfies the LMI is reached (within limits that float64 sets), SLL blocks and sandwich layers among them. It takes any
𝓛 and any range of slopes (widened to hold 0), and learns the multipliers. Factorisations are in float64, and the bound
is proven for what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.core.registry import Family, register
from liplayers.layers.bases.lmi import Conv2dLMIBlock, DenseLMIBlock, Sizes, orthogonal_
from liplayers.linalg.fourier import transfer_matrix
from liplayers.linalg.lmi import ExplicitWeights, ldlt_weights, limited
from liplayers.linalg.orthogonal import to_double

__all__ = ["LDLTBlock", "LDLTConv2dBlock", "LDLTSequential"]

SCALE = 10.0  # V = 10·raw: an orthogonal raw matrix stands for a contraction with singular values 10/√101 = 0.995

Block = DenseLMIBlock | Conv2dLMIBlock


def _make_parameters(
    block: Block,
    skip: bool,
    taps: tuple[int, ...],
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """V_1 as `raw`, V_2 … V_n, [V_A V_B], the logarithms of the multipliers, and the biases."""
    for i, (old, new) in enumerate(pairwise(block.sizes), 1):
        block.register_parameter("raw" if i == 1 else f"raw_{i}", block.new_parameter((new, old, *taps), device, dtype))
    block.raw_out = block.new_parameter((block.outputs, block.sizes[-1] + skip * block.sizes[0], *taps), device, dtype)
    block.log_multiplier = block.new_parameter((block.multiplier_count(),), device, dtype)
    block.make_biases(bias, device, dtype)
    block.reset_parameters()


def _explicit(block: Block, matrices: Sequence[Tensor], logs: Tensor, skip: bool) -> ExplicitWeights:
    *inner, outgoing = (limited(SCALE * to_double(matrix)) for matrix in matrices)
    return ldlt_weights(inner, outgoing, block.multipliers(logs), block.lipschitz, block.sector, skip)


def _reset_skip(block: Block) -> None:
    """[V_A V_B] = [10 I, Q], V_l = 0.1 Q, then I: the skip keeps almost all, and no unit has saturated."""
    *inner, outgoing, logs = (block.get_parameter(name) for name in block.raw_names)
    block.start_layers(inner, 0.1 / SCALE, 1 / SCALE)
    skip = block.sizes[0]
    nn.init.zeros_(outgoing)
    orthogonal_(outgoing.data[:, skip:], 1 / SCALE)
    centre = tuple((n - 1) // 2 for n in outgoing.shape[2:])
    for i in range(min(block.outputs, skip)):
        outgoing.data[(i, i, *centre)] = 10 / SCALE
    nn.init.zeros_(logs)
    block.reset_biases()


class LDLTSequential(DenseLMIBlock):
    r"""LDLT-L, an 𝓛-Lipschitz network without skip: w_l = σ(C_l w_{l−1} + b_l), y = B w_n + b, whole layers at once.

    For slopes in [0, 1], C_l = √2 Λ_l^(−½) T_l⁻¹V_l F_{l−1}⁻¹ and B = T_{n+1}⁻¹V_{n+1}F_n⁻¹, T_l T_lᵀ = V_l V_lᵀ + I,
    F_0 = I/𝓛, F_l = Λ_l^(−½) T_lᵀ/√2; other slopes in `liplayers.linalg.lmi.ldlt_weights`. Every network that strictly
    satisfies the LMI is reached. Contraction with constant 𝓛 (1-Lipschitz for 𝓛 = 1). Signal gain at initialisation is
    0.7 for each of the first four layers of ReLU, and 1 for further ones, which start as identities, but 0.7 where
    their size changes; with MaxMin 0.99 for each. Cost: for each layer a Cholesky factorisation and two solves in
    float64 (two and three where the slopes are not in [0, β]).

    Args:
        features: size of each input.
        hidden_features: d_1 … d_n, one integer or several; default `out_features`.
        out_features: size of each output; default `features`.
        bias: whether b_l and b are there.
        activation: entrywise with known slopes, or MaxMin, GroupSort, Householder (whose groups share a multiplier);
            default ReLU. The weights are made for the slopes that it has now: the bound is refused if they grow.
        lipschitz: 𝓛, above 0.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (*, features) → (*, out_features).

    Raises:
        ArgumentError: sizes below 1, 𝓛 that is not positive, an activation without known slopes.

    Source: Juston et al. 2025, arXiv 2512.05915; slopes other than [0, 1] and the multipliers are derived here.

    >>> import torch
    >>> net = LDLTSequential(6, (9, 7), 3, lipschitz=2.0)
    >>> x, y = torch.randn(2, 6)
    >>> bool((net(x) - net(y)).norm() <= 2 * (x - y).norm()), net.lipschitz_bound()
    (True, 2.0)
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sizes | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        activation: nn.Module | None = None,
        lipschitz: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, hidden_features, out_features, activation, lipschitz)
        _make_parameters(self, False, (), bias, device, dtype)

    def reset_parameters(self) -> None:
        """Orthogonal V_l (identities after four layers), which make the inner weights the largest possible; no bias."""
        *inner, outgoing, logs = (self.get_parameter(name) for name in self.raw_names)
        low, high = self.sector
        balanced = (abs(high + low) / (high - low)) ** -0.5 if high + low else SCALE
        self.start_layers(inner, min(balanced, SCALE) / SCALE, 1 / SCALE)
        orthogonal_(outgoing, 1.0)
        nn.init.zeros_(logs)
        self.reset_biases()

    def map_weight(self, *raw: Tensor) -> ExplicitWeights:
        *matrices, logs = raw
        return _explicit(self, matrices, logs, False)


class LDLTBlock(DenseLMIBlock):
    r"""LDLT-R, an 𝓛-Lipschitz residual block: w_0 = x, w_l = σ(C_l w_{l−1} + b_l), y = A x + B w_n + b.

    C_l as in `LDLTSequential`; then [A B] is any strict contraction times a factor of what the LMI leaves for x and
    w_n: for one layer and slopes in [0, 1], C = √2 𝓛 Λ^(−½) X_1, A = 𝓛X_A, B = X_B F_1⁻¹ − X_A CᵀΛ/𝓛 (see
    `liplayers.linalg.lmi.ldlt_weights` for n layers). Every block that strictly satisfies the LMI is reached, up to
    norms of V_l of 1e3 (of 1e3^(1/(n−1)) for l < n): X_A → I, X_B = 0, 𝓛 = 1 is the SLL block x − CᵀΛσ(Cx + b), X_A = 0
    the sandwich layer. Contraction with constant 𝓛 (1-Lipschitz for
    𝓛 = 1). Signal gain at initialisation is 0.98. Cost: a Cholesky factorisation and two solves in float64 for each
    layer and for [A B].

    Args:
        features: size of each input.
        hidden_features: d_1 … d_n, one integer or several; default `out_features`.
        out_features: size of each output; default `features`.
        bias: whether b_l and b are there.
        activation: entrywise with known slopes, or MaxMin, GroupSort, Householder (whose groups share a multiplier);
            default ReLU. The weights are made for the slopes that it has now: the bound is refused if they grow.
        lipschitz: 𝓛, above 0.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (*, features) → (*, out_features).

    Raises:
        ArgumentError: sizes below 1, 𝓛 that is not positive, an activation without known slopes.

    Source: Juston et al. 2025, arXiv 2512.05915; this exact and complete form is derived here.

    >>> import torch
    >>> block = LDLTBlock(6, hidden_features=(9, 7))
    >>> x, y = torch.randn(2, 6)
    >>> bool((block(x) - block(y)).norm() <= (x - y).norm()), block.lipschitz_bound()
    (True, 1.0)
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sizes | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        activation: nn.Module | None = None,
        lipschitz: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, hidden_features, out_features, activation, lipschitz)
        _make_parameters(self, True, (), bias, device, dtype)

    def reset_parameters(self) -> None:
        """[V_A V_B] = [10 I, Q], V_l = 0.1 Q with orthogonal Q, Λ_l = I, no bias."""
        _reset_skip(self)

    def map_weight(self, *raw: Tensor) -> ExplicitWeights:
        *matrices, logs = raw
        return _explicit(self, matrices, logs, True)


class LDLTConv2dBlock(Conv2dLMIBlock):
    r"""Convolutional LDLT-R block: the algebra of `LDLTBlock` on the transfer matrices at each frequency.

    y = A ∗ x + B ∗ w_n + b with circular convolutions whose support is the whole image (zero padding: the image in a
    larger torus); the multipliers Λ_l are those of the channels. 𝓛-Lipschitz (1-Lipschitz for 𝓛 = 1) for every image
    size. Signal gain at initialisation is 0.98. Cost: the factorisations of `LDLTBlock` for each frequency, and n + 2
    transforms.

    Args:
        channels: channels of the image.
        hidden_channels: channels of w_1 … w_n, one integer or several; default `out_channels`.
        out_channels: channels of the output; default `channels`.
        kernel_size: size of the raw kernels in pixels, odd.
        stride: an integer; it acts by pixel-unshuffling: the output has ⌈H/s⌉ × ⌈W/s⌉ pixels.
        bias: whether b_l and b are there.
        padding_mode: what surrounds the image, "zeros" or "circular".
        activation: entrywise with known slopes, or MaxMin, GroupSort, Householder (whose groups share a multiplier);
            default ReLU. The weights are made for the slopes that it has now: the bound is refused if they grow.
        lipschitz: 𝓛, above 0.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, channels, H, W) → (N, out_channels, ⌈H/s⌉, ⌈W/s⌉).

    Raises:
        ArgumentError: sizes below 1, 𝓛 that is not positive, an activation without known slopes, an even kernel,
            another padding mode.
        ShapeError: at call, another number of channels; circular padding with a stride that does not divide the image.

    Source: Juston et al. 2025, arXiv 2512.05915, for dense blocks; per frequency, as in Wang & Manchester 2023,
    arXiv 2301.11526.

    >>> import torch
    >>> LDLTConv2dBlock(4, hidden_channels=6)(torch.randn(2, 4, 7, 5)).shape
    torch.Size([2, 4, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: Sizes | None = None,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        activation: nn.Module | None = None,
        lipschitz: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding_mode)
        super().__init__(channels, hidden_channels, out_channels, *geometry, activation, lipschitz)
        _make_parameters(self, True, (self.taps, self.taps), bias, device, dtype)

    def reset_parameters(self) -> None:
        """As `LDLTBlock`, at the centre tap."""
        _reset_skip(self)

    def map_weight(self, *raw_and_grid: Any) -> ExplicitWeights:
        *kernels, logs, grid = raw_and_grid
        return _explicit(self, [transfer_matrix(kernel.double(), grid) for kernel in kernels], logs, True)


register(Family("ldlt", dense_block=LDLTBlock, conv_block=LDLTConv2dBlock))
register(Family("ldlt_sequential", dense_block=LDLTSequential))
