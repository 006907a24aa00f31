"""Copies of a model to try things on, since the model itself may run in other threads at the same time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

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
    other = copy.deepcopy(model, shared)
    for own, copied in zip(model.modules(), other.modules(), strict=True):
        if "_kept" in vars(own):  # effective weights, which a copy would compute again
            vars(copied)["_kept"] = vars(own)["_kept"]
    return other


@contextmanager
def trial(model: Model) -> Iterator[Model]:
    """A twin in eval mode, and no gradients, for a trial run."""
    with torch.no_grad():
        yield twin(model).eval()
