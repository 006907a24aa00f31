"""The methods: each is a function (features, num_classes, width, depth) → classifier, and one line in `METHODS`.

The blocks of Sandwich, LDLT and Gershgorin take the features to the width; before SLL's, which keep the size of their
input, they are padded with zeros or, where there are more of them than the width, mapped by an orthogonal layer.

The budget is the number of parameters of AOL's model at the reference width on the same set. Every other method takes
the width whose model is nearest to it; of two as near, the smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from torch import nn

from liplayers.core.checks import check_positive
from liplayers.errors import UnknownNameError
from liplayers.models import blockmlp, mlp

Method = Callable[[int, int, int, int], nn.Sequential]
REFERENCE = "aol"


def dense(linear: str, features: int, classes: int, width: int, depth: int) -> nn.Sequential:
    """`depth` dense layers with MaxMin after each."""
    return mlp((features,), classes, linear=linear, width=width, depth=depth, mean=None)


def blocks(block: str, features: int, classes: int, width: int, depth: int) -> nn.Sequential:
    """`depth` blocks of one hidden layer with ReLU."""
    return blockmlp((features,), classes, block=block, width=width, depth=depth, mean=None)


def whole(block: str, features: int, classes: int, width: int, depth: int) -> nn.Sequential:
    """One block of `depth` hidden layers with ReLU."""
    return blockmlp((features,), classes, block=block, width=width, depth=1, layers=depth, mean=None)


METHODS: dict[str, Method] = {
    "aol": partial(dense, "aol"),
    "cayley": partial(dense, "cayley"),
    "sll": partial(blocks, "sll"),
    "sandwich": partial(blocks, "sandwich"),
    "ldlt_sequential": partial(whole, "ldlt_sequential"),
    "ldlt": partial(blocks, "ldlt"),
    "gershgorin": partial(blocks, "gershgorin"),
}


def known_methods(names: Iterable[str] | None) -> list[str]:
    """The methods of these names in the order of `METHODS`, all for None.

    Raises:
        UnknownNameError: no method of that name.
    """
    wanted = list(METHODS if names is None else names)
    for name in wanted:
        if name not in METHODS:
            raise UnknownNameError.of("method", name, METHODS)
    return [name for name in METHODS if name in wanted]


def method_order(name: str) -> tuple[int, str]:
    """To sort by: as in `METHODS`, then names that are not there."""
    return (list(METHODS).index(name) if name in METHODS else len(METHODS)), name


def count_parameters(method: str, features: int, num_classes: int, width: int, depth: int) -> int:
    """
    >>> count_parameters("aol", features=2, num_classes=3, width=4, depth=1)  # 2·4 + 4 and 4·3 + 3
    27
    """
    with torch.device("meta"):
        return sum(p.numel() for p in METHODS[method](features, num_classes, width, depth).parameters())


@cache
def matched_width(method: str, features: int, num_classes: int, width: int, depth: int) -> int:
    """The width in 1 … 2·`width` at which `method` has most nearly as many parameters as AOL at `width`."""
    check_positive(matched_width, width=width, depth=depth)
    if method == REFERENCE:
        return width
    budget = count_parameters(REFERENCE, features, num_classes, width, depth)
    widths = range(1, 2 * width + 1)
    return min(widths, key=lambda w: abs(count_parameters(method, features, num_classes, w, depth) - budget))
