"""Weights that are orthogonal because their optimiser keeps them so (the linear maps of LipNeXt, Hu et al. 2026,
arXiv 2601.18513; no public code).

The parameter is the weight: nothing is computed in the forward pass. `liplayers.training.ManifoldAdamW` and
`ManifoldMuon` move such parameters along the manifold; any other optimiser leaves it. In all cases the layers measure
how far the weight is from it and count that in their bound, so the bound is a proof whatever the optimiser did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.core.registry import Family, register
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.linalg.stiefel import near_isometry_bound, nearest_orthogonal

__all__ = ["ManifoldLinear", "OrthogonalParameter", "retract_"]


class OrthogonalParameter(nn.Parameter):
    """A matrix that is meant to keep orthonormal rows (wide, square) or columns (tall).

    Only the class tells it from other parameters: the optimisers of `liplayers.training.manifold` look for it.

    >>> import copy
    >>> type(copy.deepcopy(OrthogonalParameter(torch.eye(2)))).__name__
    'OrthogonalParameter'
    """

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return OrthogonalParameter, (self.data, self.requires_grad)  # torch's own would rebuild a plain Parameter


@torch.no_grad()
def retract_(W: Tensor) -> Tensor:
    """Put W (..., m, n) back on the manifold in place: its polar factor, computed in float64.

    >>> W = retract_(torch.eye(2, 3) + 0.1)
    >>> torch.allclose(W @ W.mT, torch.eye(2), atol=1e-6)
    True
    """
    return W.copy_(nearest_orthogonal(W))


class ManifoldModule(ParametrizedModule, abstract=True):
    """A module whose raw parameters are OrthogonalParameters, and stay so.

    torch replaces parameters by plain ones in `load_state_dict(assign=True)` and in some casts and moves; they are
    marked again, in place, since an optimizer may hold them already.
    """

    constant_estimate = False

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._mark()
        return result

    def _mark(self) -> None:
        for name in self.raw_names:
            parameter = self._parameters.get(name)
            if parameter is not None and type(parameter) is nn.Parameter:
                parameter.__class__ = OrthogonalParameter

    def raw_values(self) -> tuple[Tensor, ...]:
        """The parameters as they are: they run."""
        raw = (getattr(self, name) for name in self.raw_names)
        return tuple(p.to(torch.promote_types(p.dtype, torch.float32)) for p in raw)

    def retract_(self) -> None:
        """Put the weights back on the manifold; `ManifoldAdamW` and `ManifoldMuon` do so by themselves."""
        for name in self.raw_names:
            retract_(getattr(self, name))


class ManifoldLinear(ManifoldModule, LipschitzLinear):
    r"""Dense layer whose weight W is itself the parameter, orthogonal for as long as its optimiser keeps it so.

    Rows are orthonormal where out_features ≤ in_features, columns otherwise, as long as `ManifoldAdamW` or
    `ManifoldMuon` trains it; any other optimiser leaves the manifold. `lipschitz_bound()` is √(1 + ‖G − I‖) with a
    proven bound on the norm, G the Gram matrix of the weight that runs (or a bound of ‖W‖ itself where that is
    less): 1 up to rounding on the manifold, larger off it, a proof everywhere. Supports every size. Signal gain at
    initialisation: 1, or where out_features < in_features √(out/in) on average, and for the identity the share of the
    norm that it keeps. Cost: that of nn.Linear; a step of `ManifoldAdamW` multiplies it by matrices of the
    longer side and keeps two of these, one of `ManifoldMuon` by matrices of the shorter side, so that very wide layers
    are expensive to train.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether b is there.
        device: of the parameters.
        dtype: of the parameters.
        init: "orthogonal", a random frame, or "identity", which keeps the first features, drops those beyond
            out_features and appends zeros: stacks then begin as shallow networks, and fitted MNIST faster.

    Shape:
        (*, in_features) → (*, out_features).

    Raises:
        ArgumentError: sizes that are not positive integers, an unknown init.

    Source: Hu et al. 2026, arXiv 2601.18513.

    >>> layer = ManifoldLinear(8, 5)
    >>> layer.weight is layer.raw, layer.lipschitz_bound() < 1 + 1e-6
    (True, True)
    >>> ManifoldLinear(2, 3, bias=False, init="identity")(torch.tensor([5.0, 7.0])).tolist()
    [5.0, 7.0, 0.0]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: str = "orthogonal",
    ) -> None:
        super().__init__(in_features, out_features)
        if init not in ("orthogonal", "identity"):
            raise ArgumentError(f"ManifoldLinear: init={init!r}; expected 'orthogonal' or 'identity'")
        self.init = init
        self.raw = self.new_parameter((out_features, in_features), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """The parameter: what is written into it is the weight, and its drift from the manifold counts in the bound."""
        return self.raw

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        self.assign_weight(weight)

    def reset_parameters(self) -> None:
        """A random frame or the identity, no bias."""
        super().reset_parameters()
        if self.init == "identity":
            nn.init.eye_(self.raw)

    def raw_from_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """Its polar factor, the nearest orthogonal matrix."""
        return [nearest_orthogonal(weight)]

    def map_weight(self, raw: Tensor) -> Tensor:
        return raw

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init={self.init!r}"

    def lipschitz_bound(self) -> float:
        with torch.no_grad():
            return near_isometry_bound(self.weight.to(self.executed_dtype())).item()


register(Family("manifold", linear=ManifoldLinear))  # not "orthogonal": not for every value of its parameters
