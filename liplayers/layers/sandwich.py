"""Sandwich layers and LBDN, Lipschitz-bounded deep networks (Wang & Manchester 2023, arXiv 2301.11526).

It differs from the public code: Ψ is limited, so that Ψ and Ψ⁻¹ are both numbers of the layer's dtype, A and B start
at equal size, and the bound is proven again for the weights that run.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from liplayers.core.registry import Family, register
from liplayers.errors import ArgumentError
from liplayers.layers.bases.lmi import LARGEST, SMALLEST, Conv2dLMIBlock, DenseLMIBlock, Sizes, orthogonal_
from liplayers.linalg.fourier import Grid, transfer_matrix
from liplayers.linalg.lmi import ExplicitWeights
from liplayers.linalg.orthogonal import cayley, to_double

__all__ = ["LBDN", "SandwichBlock", "SandwichConv2dBlock"]

Block = DenseLMIBlock | Conv2dLMIBlock


def _reset_pair(raw: Tensor, gain: float) -> None:
    """U = 0, V = gain·Q: A = (1 − gain²)/(1 + gain²) I, B = −2 gain/(1 + gain²) Qᵀ, for a square Q."""
    nn.init.zeros_(raw)
    orthogonal_(raw.data[:, raw.shape[0] :], gain)


BALANCED = 1 - math.sqrt(2)  # A and B of equal size: √2 A and √2 B are orthogonal


def _pair(raw: Tensor) -> tuple[Tensor, Tensor]:
    """[A B] with AAᴴ + BBᴴ = I from a wide matrix, A square."""
    A, B = cayley(to_double(raw)).split([raw.shape[-2], raw.shape[-1] - raw.shape[-2]], -1)
    return A, B


def _sandwich(block: Block, raw: Tensor, logs: Tensor) -> ExplicitWeights:
    (multiplier,) = block.multipliers(logs)
    psi = (multiplier / block.lipschitz).sqrt().to(raw.dtype)
    A, B = _pair(raw)
    scale = math.sqrt(2 * block.lipschitz)
    return ExplicitWeights((scale * B / psi[:, None],), scale * A.mH * psi, None, (multiplier,))


def _with_output_bias(block: Block, text: str) -> str:
    hidden_only = block.bias is None and block.hidden_bias is not None
    return text.removesuffix(", bias=False") + ", output_bias=False" if hidden_only else text


class SandwichBlock(DenseLMIBlock):
    r"""Sandwich layer, a dense 𝓛-Lipschitz layer with its activation inside: y = √(2𝓛) AᵀΨσ(√(2𝓛) Ψ⁻¹B x + b).

    [A B] with AAᵀ + BBᵀ = I is the Cayley transform of a free matrix, Ψ a free positive diagonal; for σ with slopes in
    [0, 1]. 1-Lipschitz for 𝓛 = 1. Signal gain at initialisation is that of the activation, 0.7 for ReLU: √2A and √2B
    are orthogonal. A stack of n has 0.7ⁿ: beyond ten or so use `LBDN`, which starts better. Cost: one inverse of the
    outputs' size, in float64.

    Args:
        features: size of each input.
        out_features: size of each output; default `features`.
        bias: whether b is there.
        activation: entrywise with slopes in [0, 1]; default ReLU.
        lipschitz: 𝓛, above 0.
        output_bias: False leaves out the bias of the output alone, as in the paper.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (*, features) → (*, out_features).

    Raises:
        ArgumentError: an activation without proven slopes in [0, 1] (MaxMin, abs, GELU, SiLU), sizes below 1, 𝓛 that is
            not positive.

    Source: Wang & Manchester 2023, arXiv 2301.11526.

    >>> import torch
    >>> layer = SandwichBlock(6, 9)
    >>> x, y = torch.randn(2, 6)
    >>> bool((layer(x) - layer(y)).norm() <= (x - y).norm()), layer.lipschitz_bound()
    (True, 1.0)
    """

    unit_slopes_only = True

    def __init__(
        self,
        features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        activation: nn.Module | None = None,
        lipschitz: float = 1.0,
        output_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, None, out_features, activation, lipschitz)
        self.raw = self.new_parameter((self.outputs, self.outputs + features), device, dtype)
        self.log_multiplier = self.new_parameter((self.multiplier_count(),), device, dtype)
        self.make_biases(bias, device, dtype)
        if not output_bias:
            self.bias = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """√2A = I, √2B orthogonal, Ψ = I, no bias."""
        _reset_pair(self.raw, BALANCED)
        nn.init.zeros_(self.log_multiplier)
        self.reset_biases()

    def map_weight(self, raw: Tensor, log_multiplier: Tensor) -> ExplicitWeights:
        return _sandwich(self, raw, log_multiplier)

    def _arguments(self) -> str:
        return _with_output_bias(self, super()._arguments())


class SandwichConv2dBlock(Conv2dLMIBlock):
    r"""Sandwich layer for images: the dense layer's algebra on the transfer matrices at each frequency.

    y = √(2𝓛) Aᵀ ∗ Ψσ(√(2𝓛) Ψ⁻¹B ∗ x + b), 𝓛-Lipschitz (1-Lipschitz for 𝓛 = 1) for every image size; the support of A
    and B is the whole image (zero padding: the image in a larger torus). Signal gain at initialisation is that of the
    activation, 0.7 for ReLU. Cost: one inverse for each frequency, and three transforms.

    Args:
        channels: channels of the image.
        out_channels: channels of the output; default `channels`.
        kernel_size: size of the raw kernel in pixels, odd.
        stride: an integer; it acts by pixel-unshuffling: the output has ⌈H/s⌉ × ⌈W/s⌉ pixels.
        bias: whether b is there.
        padding_mode: what surrounds the image, "zeros" or "circular".
        activation: entrywise with slopes in [0, 1]; default ReLU.
        lipschitz: 𝓛, above 0.
        output_bias: False leaves out the bias of the output alone, as in the paper.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, channels, H, W) → (N, out_channels, ⌈H/s⌉, ⌈W/s⌉).

    Raises:
        ArgumentError: an activation without proven slopes in [0, 1] (MaxMin, abs, GELU, SiLU), sizes below 1, 𝓛 that is
            not positive, an even kernel, another padding mode.
        ShapeError: at call, another number of channels; circular padding with a stride that does not divide the image.

    Source: Wang & Manchester 2023, arXiv 2301.11526.

    >>> import torch
    >>> SandwichConv2dBlock(4, 8, stride=2)(torch.randn(2, 4, 7, 5)).shape
    torch.Size([2, 8, 4, 3])
    """

    unit_slopes_only = True

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        activation: nn.Module | None = None,
        lipschitz: float = 1.0,
        output_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, None, out_channels, kernel_size, stride, padding_mode, activation, lipschitz)
        shape = (self.outputs, self.outputs + self.sizes[0], self.taps, self.taps)
        self.raw = self.new_parameter(shape, device, dtype)
        self.log_multiplier = self.new_parameter((self.multiplier_count(),), device, dtype)
        self.make_biases(bias, device, dtype)
        if not output_bias:
            self.bias = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """√2A = I, √2B one orthogonal tap, Ψ = I, no bias."""
        _reset_pair(self.raw, BALANCED)
        nn.init.zeros_(self.log_multiplier)
        self.reset_biases()

    def map_weight(self, raw: Tensor, log_multiplier: Tensor, grid: Grid) -> ExplicitWeights:
        return _sandwich(self, transfer_matrix(raw.double(), grid), log_multiplier)

    def _arguments(self) -> str:
        return _with_output_bias(self, super()._arguments())


class LBDN(DenseLMIBlock):
    r"""Lipschitz-bounded deep network: sandwich layers in network form, neighbours sharing parameters.

    w_l = σ(C_l w_{l−1} + b_l), y = C_{n+1}w_n + b with C_1 = √(2γ) Ψ_1⁻¹B_1, C_l = 2 Ψ_l⁻¹B_l A_{l−1}ᵀΨ_{l−1},
    C_{n+1} = √(2γ) B_{n+1}A_nᵀΨ_n, where [A_l B_l] with A_l A_lᵀ + B_l B_lᵀ = I is the Cayley transform of a free
    matrix and Ψ_l a free positive diagonal; for σ with slopes in [0, 1]. `explicit_weights` gives C_l. γ-Lipschitz
    (1-Lipschitz for γ = 1). Signal gain at initialisation is that of the activation, 0.7 for ReLU, for each of the
    first four layers, and 1 for further ones, which start as identities, but 0.7 where their size changes. Cost: one
    inverse and one product for each layer, in float64.

    Args:
        features: size of each input.
        hidden_features: d_1 … d_n, one integer or several; default `out_features`.
        out_features: size of each output; default `features`.
        bias: whether b_l and b are there.
        activation: entrywise with slopes in [0, 1]; default ReLU.
        lipschitz: γ, above 0.
        learnable: whether γ is a parameter, as its logarithm; the bound is then γ's value at the time.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (*, features) → (*, out_features).

    Raises:
        ArgumentError: an activation without proven slopes in [0, 1] (MaxMin, abs, GELU, SiLU), sizes below 1, γ that is
            not positive.

    Source: Wang & Manchester 2023, arXiv 2301.11526.

    >>> net = LBDN(6, (9, 7), 3, lipschitz=5.0)
    >>> [tuple(C.shape) for C in net.explicit_weights().inner], net.lipschitz_bound()
    ([(9, 6), (7, 9)], 5.0)
    """

    unit_slopes_only = True

    def __init__(
        self,
        features: int,
        hidden_features: Sizes | None = None,
        out_features: int | None = None,
        bias: bool = True,
        *,
        activation: nn.Module | None = None,
        lipschitz: float = 1.0,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, hidden_features, out_features, activation, lipschitz)
        if not isinstance(learnable, bool):
            raise ArgumentError(f"LBDN: learnable={learnable!r}; expected True or False")
        self.learnable = learnable
        self.constant_estimate = not learnable
        for i, (old, new) in enumerate(pairwise(self.sizes), 1):
            self.register_parameter(
                "raw" if i == 1 else f"raw_{i}", self.new_parameter((new, new + old), device, dtype)
            )
        self.raw_out = self.new_parameter((self.outputs, self.outputs + self.sizes[-1]), device, dtype)
        self.log_multiplier = self.new_parameter((self.multiplier_count(),), device, dtype)
        self.log_lipschitz = self.new_parameter((1,), device, dtype) if learnable else None
        self.make_biases(bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """√2A_l = I, √2B_l orthogonal (identities after four layers), B_{n+1} orthogonal, Ψ_l = I, no bias."""
        *pairs, last = (self.get_parameter(name) for name in self.raw_names if name.startswith("raw"))
        for p in pairs:
            nn.init.zeros_(p)
        self.start_layers([p.data[:, len(p) :] for p in pairs], BALANCED, BALANCED)
        _reset_pair(last, -1.0)
        nn.init.zeros_(self.log_multiplier)
        if self.log_lipschitz is not None:
            nn.init.constant_(self.log_lipschitz, math.log(self.lipschitz))
        self.reset_biases()

    def map_weight(self, *raw: Tensor) -> ExplicitWeights:
        gamma = self._gamma(raw[-1]) if self.learnable else self.lipschitz
        *matrices, logs = raw[:-1] if self.learnable else raw
        psi = [multiplier.sqrt() for multiplier in self.multipliers(logs)]
        pairs = [_pair(matrix) for matrix in matrices]
        end = math.sqrt(2) * gamma**0.5
        (A, B), *further, (_, last) = pairs
        inner = [end * B / psi[0][:, None]]
        for (next_A, B), below, scale in zip(further, psi, psi[1:], strict=False):
            inner.append(2 / scale[:, None] * (B @ A.mT) * below)
            A = next_A
        return ExplicitWeights(
            tuple(inner), end * (last @ A.mT) * psi[-1], None, tuple(gamma * p.square() for p in psi)
        )

    @staticmethod
    def _gamma(logarithm: Tensor) -> Tensor:
        return logarithm.double().clamp(math.log(SMALLEST), math.log(LARGEST)).exp()

    def target(self) -> float:
        return self.lipschitz if self.log_lipschitz is None else self._gamma(self.log_lipschitz).item()

    def extra_repr(self) -> str:
        return super().extra_repr() + (", learnable=True" if self.learnable else "")


register(Family("sandwich", dense_block=SandwichBlock, conv_block=SandwichConv2dBlock))
register(Family("lbdn", dense_block=LBDN))
