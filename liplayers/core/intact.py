"""Whether a module computes what its class says. Every bound that goes by a type rests on that."""

from __future__ import annotations

import inspect
from collections import OrderedDict

import torch
from torch import nn

from liplayers.errors import UnknownBoundError

__all__ = ["is_changed", "require_intact", "walks_otherwise"]

_CALL = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattribute__", "__getattr__")
_WALK = ("__iter__", "__len__", "__getitem__", "__contains__", "keys", "values", "items")


def _static(kind: type, name: str) -> object:
    return next((vars(cls)[name] for cls in kind.__mro__ if name in vars(cls)), None)


# as torch has them, before anyone could put others in their place
_TORCHS = {base for kind in vars(nn).values() if inspect.isclass(kind) for base in kind.__mro__}
_FORWARDS = {kind: vars(kind)["forward"] for kind in _TORCHS if "forward" in vars(kind)}
_WALKS = {kind: [_static(kind, name) for name in _WALK] for kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict)}
_TENSORS = [_static(kind, "__torch_function__") for kind in (torch.Tensor, nn.Parameter)]


def is_changed(module: nn.Module) -> bool:
    """Whether something beside the forward of its class may change what it computes."""
    everywhere = torch.nn.modules.module
    hooked = module._forward_hooks or module._forward_pre_hooks
    hooked = hooked or everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    kind = type(module)
    hides_method = any(inspect.isroutine(_static(kind, name)) for name in vars(module))
    called_otherwise = any(_static(kind, name) is not _static(nn.Module, name) for name in _CALL)
    compiled = getattr(module, "_compiled_call_impl", None)
    # what torch.compile makes of a module counts as the module; anything else in its place does not
    replaced = compiled is not None and inspect.unwrap(compiled) != module._call_impl
    computes = next(base for base in kind.__mro__ if "forward" in vars(base))
    replaced |= computes in _FORWARDS and _FORWARDS[computes] is not vars(computes)["forward"]
    tensors = [*module._parameters.values(), *module._buffers.values()]
    reinterpreted = any(t is not None and _static(type(t), "__torch_function__") not in _TENSORS for t in tensors)
    return bool(hooked) or hides_method or called_otherwise or replaced or reinterpreted or walks_otherwise(module)


def walks_otherwise(module: nn.Module) -> bool:
    """Whether a container of modules may run others than those that it holds, or in another order."""
    base = next((base for base in _WALKS if isinstance(module, base)), None)
    if base is None:
        return False
    overrides = [_static(type(module), name) for name in _WALK] != _WALKS[base]
    return overrides or type(module._modules) not in (dict, OrderedDict)


def require_intact(module: nn.Module, parts: bool = True) -> None:
    """Raise UnknownBoundError where a module, or what is in it, is changed; without `parts`, only containers in it."""
    for name, part in module.named_modules():
        of = f" of its {name} ({type(part).__name__})" if name else ""
        if walks_otherwise(part):
            raise UnknownBoundError(f"overridden methods{of} may run others than the modules that it holds")
        if (parts or part is module) and is_changed(part):
            raise UnknownBoundError(
                f"a forward hook, or a replaced forward, method, tensor or __call__{of}, may change what it computes"
            )
