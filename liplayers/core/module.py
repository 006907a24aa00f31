"""The bases of every module: settings are fixed once it is constructed, and it states its Lipschitz bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.core.checks import DTYPES, check_dtype, check_shape
from liplayers.errors import SettledError

__all__ = ["LipschitzModule", "SettledModule"]

_TORCHS = frozenset(vars(nn.Module()))  # what torch itself changes in a module


_CHANGING = frozenset({"_kept"})


class SettledModule(nn.Module):
    """A module whose settings stay what the constructor made of them; its parameters and modules may change.

    Weights, kept weights, checks and bounds depend on the settings in too many ways to ask for them again at each use.
    Setting one a second time raises SettledError, so a constructor sets each once. Copies and pickles do not pass
    through here.
    """

    frozen_for_one_shape = False  # whether what `frozen` returns accepts inputs of one shape only

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_not_settled(name)
        if isinstance(getattr(type(self), name, None), property):  # nn.Module would register a parameter beside it
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._check_not_settled(name)
        super().__delattr__(name)

    def _check_not_settled(self, name: str) -> None:
        own = vars(self).get(name)
        settled = name in vars(self) and name not in _TORCHS | _CHANGING and not (callable(own) or torch.is_tensor(own))
        rule = getattr(type(self), name, None)
        if settled or (isinstance(rule, property) and rule.fset is None):
            raise SettledError(
                f"{type(self).__name__}: {name} cannot be changed after construction, since weights and bounds depend "
                f"on it: build a new layer"
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            check_dtype(self, param.dtype)
            held = self._parameters.get(name)
            check_shape(self, name, param, param.shape if held is None else held.shape)
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, param in self._parameters.items():
            value = state_dict.get(prefix + name)
            # what is one number now was a scalar, which cannot be sharded, in older checkpoints
            if param is not None and param.shape == (1,) and isinstance(value, Tensor) and value.dim() == 0:
                state_dict[prefix + name] = value[None]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def checked(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype in DTYPES:
                check_dtype(self, moved.dtype)
            return moved

        return super()._apply(checked, recurse)


class LipschitzModule(SettledModule):
    """A module that states a proven bound on its own ℓ2 Lipschitz constant."""

    weights_since = "0.1.0"  # the version of liplayers since which its parameters stand for the weights that they do

    def lipschitz_bound(self) -> float:
        """A proven upper bound on the Lipschitz constant of the map, in exact arithmetic on the exact weights.

        Exact weights are what the raw parameters stand for. Those that run are rounded to the layer's dtype: a bound
        that is 1 by construction may be exceeded by some units in the last place (4e-7 seen in float32). Half precision
        is counted here; for single and double, certificates are given for what `freeze` makes of a layer, whose bound
        is proven for the numbers that run.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement lipschitz_bound()")

    def lipschitz_estimate(self) -> float | Tensor:
        """What training takes for the bound: no proof, but cheap and tight, and differentiable where it is a tensor."""
        return self.lipschitz_bound()

    def check_parts(self) -> None:
        """Raise ArgumentError or UnknownBoundError where its parts allow no bound now; no norm is computed."""

    def constant_errors(self) -> dict[str, float]:
        """How far each buffer that stands for a constant is from it, by name; empty unless a layer says so.

        Upper bounds on the spectral norm of the difference between a buffer as it runs and the exact constant, where
        lipschitz_bound() is about the exact one.
        """
        return {}

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        """What `liplayers.freeze` puts in its place: plain modules with computed weights, its own children as they are.

        Equal to this one in eval mode on inputs of `shape` (without the batch; None where none, or several, are known).
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement frozen()")
