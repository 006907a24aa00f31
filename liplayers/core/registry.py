"""The families by name: what the audit suite, the models' layer choices and the documentation iterate over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from liplayers.errors import ArgumentError, UnknownNameError

__all__ = ["FAMILIES", "ROLES", "Family", "get_layer", "register"]

ROLES = ("linear", "conv", "conv_transpose", "dense_block", "conv_block")


@dataclass(frozen=True)
class Family:
    """One family of layers.

    `linear`, `conv` and `conv_transpose` have the signatures of nn.Linear, nn.Conv2d and nn.ConvTranspose2d;
    `dense_block(features)` and `conv_block(channels)` keep the shape of their input. `orthogonal` lists the roles whose
    map is orthogonal for all parameters of full rank (for "conv", with circular padding).
    """

    name: str
    linear: Callable[..., nn.Module] | None = None
    conv: Callable[..., nn.Module] | None = None
    conv_transpose: Callable[..., nn.Module] | None = None
    dense_block: Callable[..., nn.Module] | None = None
    conv_block: Callable[..., nn.Module] | None = None
    orthogonal: frozenset[str] = frozenset()


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known by its name; called once at the end of each family's file."""
    if family.name in FAMILIES:
        raise ArgumentError(f"family {family.name!r} is registered already")
    FAMILIES[family.name] = family


def get_layer(name: str | Callable[..., nn.Module], role: str) -> Callable[..., nn.Module]:
    """The layer class of a family for a role; a callable is returned as it is.

    Args:
        name: a registered family ("bro"), or a class or function to use instead.
        role: one of "linear", "conv", "conv_transpose", "dense_block", "conv_block".

    Raises:
        UnknownNameError: no family of that name has that role.

    >>> get_layer("aol", "linear").__name__
    'AOLLinear'
    """
    if role not in ROLES:
        raise UnknownNameError.of("layer role", role, ROLES)
    if callable(name):
        return name
    known = {family.name: getattr(family, role) for family in FAMILIES.values() if getattr(family, role)}
    if isinstance(name, str) and name in FAMILIES and name not in known:
        raise UnknownNameError(f"family {name!r} has no {role} layer; these have one: {', '.join(known)}")
    if not isinstance(name, str) or name not in known:
        raise UnknownNameError.of(f"{role} layer", name, known)
    return known[name]
