"""Copies of a model to try things on, since the model itself may run in other threads at the same time."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from liplayers.errors import UnknownBoundError

__all__ = ["Model", "private_copy", "twin"]

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """Other modules over the same tensors: hooks, modes and attributes set on them are seen by nobody else.

    `modules()` of both have the same order. Whatever the modules hold beside modules, containers and functions bound to
    them is shared, too.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> twin(model)[0] is model[0], twin(model)[0].weight is model[0].weight
    (False, True)
    """
    held = (leaf for module in model.modules() for leaf in tree_leaves(dict(vars(module))))
    shared = {id(leaf): leaf for leaf in held if not isinstance(leaf, (nn.Module, MethodType, partial))}
    return _copied(model, shared)


def private_copy(model: Model) -> Model:
    """A copy for code that may write to what it holds: it shares the memory of parameters only, without gradients.

    Raises:
        UnknownBoundError: it cannot be copied.
    """
    shared: dict[int, object] = {}
    try:
        with torch.inference_mode(False):
            for p in model.parameters():
                alias = p.detach().clone() if p.is_inference() else p.detach()
                shared[id(p)] = nn.Parameter(alias, requires_grad=False)
            return _copied(model, shared)
    except UnknownBoundError:
        raise
    except Exception as error:  # of the user's attributes: anything may come out
        raise UnknownBoundError(f"it cannot be copied for a trial run ({' '.join(str(error).split())})") from None


def _copied(model: Model, memo: dict[int, object]) -> Model:
    other = copy.deepcopy(model, memo)
    for own, copied in zip(model.modules(), other.modules(), strict=True):
        if type(copied) is not type(own):  # a __deepcopy__ of its own
            raise UnknownBoundError(f"a copy of it has {type(copied).__name__} in the place of {type(own).__name__}")
        if "_kept" in vars(own):  # effective weights, which a copy would compute again
            vars(copied)["_kept"] = vars(own)["_kept"]
    return other
