"""Modules of torch's with `torch.nn.utils.parametrizations`, whose weight is computed whenever it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from liplayers.errors import UnknownBoundError

__all__ = ["plain_type", "require_constant", "unknown_parametrization", "without_parametrizations"]

Model = TypeVar("Model", bound=nn.Module)

_KNOWN = (parametrizations._Orthogonal, parametrizations._SpectralNorm, parametrizations._WeightNorm)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    if is_parametrized(module):
        for parts in module.parametrizations.children():  # type: ignore[union-attr, operator]
            yield from (part for name, part in parts.named_children() if name.isdigit())


def unknown_parametrization(module: nn.Module) -> str | None:
    """The type of a parametrization that may give other weights at each call; None without one."""
    return next((type(part).__name__ for part in _parts(module) if type(part) not in _KNOWN), None)


def require_constant(module: nn.Module) -> None:
    """Raise UnknownBoundError where a weight may be another one at each call.

    orthogonal, weight_norm, and spectral_norm in evaluation mode are functions of tensors.
    """
    unknown = unknown_parametrization(module)
    if unknown is not None:
        raise UnknownBoundError(
            f"its parametrization {unknown} is not known: call torch.nn.utils.parametrize.remove_parametrizations"
        )
    if any(isinstance(part, parametrizations._SpectralNorm) and part.training for part in _parts(module)):
        raise UnknownBoundError("its spectral normalization changes at each call in training: call model.eval()")


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The type of a module below its parametrizations, if it has any."""
    return type(module).__mro__[1] if is_parametrized(module) else type(module)


@torch.no_grad()
def without_parametrizations(model: Model) -> Model:
    """The same module, with each parametrized weight as it is now, in the mode that it is in."""
    for module in [*model.modules()]:
        if is_parametrized(module):
            # torch's remove_parametrizations would change the class, which copies share
            plain, names = plain_type(module), [*module.parametrizations]  # type: ignore[union-attr, misc]
            weights = {name: nn.Parameter(getattr(module, name).detach().clone()) for name in names}
            del module._modules["parametrizations"]
            module.__class__ = plain
            for name, weight in weights.items():
                module.register_parameter(name, weight)
    return model
