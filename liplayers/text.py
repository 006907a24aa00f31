"""Text for a terminal, a table or a plot, where names of files and of classes may hold anything."""

from __future__ import annotations

__all__ = ["one_line", "printable"]


def printable(text: object) -> str:
    r"""Every character that does not print as itself as its escape: a name must not break a line or move the cursor.

    >>> print(printable("a\n\x1b[2J[b] ü"))
    a\n\x1b[2J[b] ü
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return printable(" ".join(filter(None, map(str.strip, str(error).splitlines()))))
