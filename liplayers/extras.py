"""Packages that not all of liplayers needs: the extras, installed as in `pip install 'liplayers[train]'`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from liplayers.errors import MissingPackageError

__all__ = ["extra"]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports: an error says which package is missing, and the extra of liplayers that installs it.

    Raises:
        MissingPackageError: in place of a ModuleNotFoundError about another package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "liplayers"):
            raise
        raise MissingPackageError(f"{package} is not installed: pip install 'liplayers[{name}]'") from None
