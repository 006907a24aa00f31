"""The registered families, by name and role; `liplayers.testing` holds what measures them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from liplayers import FAMILIES
from liplayers.core.registry import ROLES
from liplayers.testing.subject import Subject


def of_role(*roles: str) -> list[tuple[str, str]]:
    """(family, role) for every registered family that has one of the roles."""
    return [(f.name, r) for f in FAMILIES.values() for r in roles if getattr(f, r) is not None]


EVERY = of_role(*ROLES)


def example(family: str, role: str, dtype: torch.dtype | None = None, **kwargs: Any) -> tuple[nn.Module, tuple]:
    """A small layer of a family and the shape of one input; every family must be able to build it."""
    return Subject(getattr(FAMILIES[family], role), role).example(dtype, **kwargs)
