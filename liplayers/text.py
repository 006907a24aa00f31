"""Text for a terminal, a table or a plot, where names of files and of classes may hold anything."""

from __future__ import annotations

import json
from typing import Any, NoReturn

__all__ = ["one_line", "printable", "strict_json"]


def printable(text: object) -> str:
    r"""Every character that does not print as itself as its escape: a name must not break a line or move the cursor.

    >>> print(printable("a\n\x1b[2J[b] ü"))
    a\n\x1b[2J[b] ü
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return printable(" ".join(filter(None, map(str.strip, str(error).splitlines()))))


def strict_json(text: str | bytes) -> Any:
    """What JSON says that can be read in one way only.

    Raises:
        ValueError: no JSON, an object with the same key twice, NaN or infinity, or nested too deeply.

    >>> strict_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object with the same key twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
