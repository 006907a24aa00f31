"""Commands to paste: settings as a POSIX shell hands them to hydra, and hydra takes them as they were."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from liplayers.errors import ArgumentError

__all__ = ["command", "hydra_override"]


def hydra_override(key: str, value: str | os.PathLike[str]) -> str:
    r"""`key=value` as one word of a POSIX shell; hydra then sets `key` to exactly this text.

    It is quoted only where it must be: for hydra, which reads text without quotes in a grammar of its own, and for the
    shell. Characters that cannot be shown are written as octal bytes, by printf.

    Raises:
        ArgumentError: no command line can say it: NUL, what is no name of a file, or `???`, hydra's sign for a value
            that is missing.

    >>> print(hydra_override("ckpt", "runs/demo/best.ckpt"))
    ckpt=runs/demo/best.ckpt
    >>> print(hydra_override("ckpt", "runs/a=b,c [1]/best.ckpt"), hydra_override("output", "2024"))
    'ckpt="runs/a=b,c [1]/best.ckpt"' 'output="2024"'
    """
    text = os.fspath(value)
    if text == "???" or "\0" in text or not _encodable(text, sys.getfilesystemencoding(), "surrogateescape"):
        raise ArgumentError(f"{key}={text!r}: no command line can set this; expected another text")
    return _shell_word(f"{key}={text if _is_plain(text) else _quoted(text)}")


def command(name: str, *overrides: str) -> str:
    """The command `name` ("train", "certify") started as the running one was, with words of `hydra_override`."""
    running = Path(sys.argv[0])
    if running.name.startswith("liplayers-"):
        program = f"liplayers-{name}"
    else:
        script = running.with_name(f"{name}.py") if running.name in ("train.py", "certify.py") else Path(f"{name}.py")
        program = f"python {_shell_word(str(script))}"
    return " ".join((program, *overrides))


def _is_plain(text: str) -> bool:
    """Whether hydra takes the text for itself without quotes."""
    try:
        return "${" not in text and OverridesParser.create().parse_override(f"key={text}").value() == text
    except HydraException:
        return False


def _quoted(text: str) -> str:
    """In hydra's quotes; of `${` and the backslashes before it omegaconf takes each one after a backslash as it is."""
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(escaped, Quote.double).with_quotes()


def _shell_word(text: str) -> str:
    """Quoted for the shell where it must be."""
    if text.isprintable() and _encodable(text, getattr(sys.stdout, "encoding", None) or "utf-8"):
        return shlex.quote(text)
    shown = "".join(
        {"%": "%%", "\\": "\\\\"}.get(char, char) if char.isascii() and char.isprintable() else _octal(char)
        for char in text
    )
    return f'"$(printf {shlex.quote(shown)})"'


def _octal(char: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(char))


def _encodable(text: str, encoding: str, errors: str = "strict") -> bool:
    try:
        text.encode(encoding, errors)
    except UnicodeEncodeError:
        return False
    return True
