"""The one family of exceptions: every error is a `LipschitzError` and also the matching builtin.

A message is one line that names the thing, says what was got and what was expected, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LipschitzError(Exception):
    """Base class of every error that liplayers raises on purpose."""


class ArgumentError(LipschitzError, ValueError):
    """An argument that the called function or layer cannot honour."""


class SettledError(LipschitzError, AttributeError):
    """A setting of a layer that was assigned after construction."""


class ShapeError(LipschitzError, ValueError):
    """A tensor or image of a shape that does not fit."""


class NonFiniteError(LipschitzError, ValueError):
    """NaN or infinity where a number is needed."""


class UnknownBoundError(LipschitzError, TypeError):
    """A module about which no Lipschitz bound is known; it never counts as 1."""


class UnknownNameError(LipschitzError, LookupError):
    """A name that is not registered."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """The error for an unknown `name`, with the nearest known ones."""
        known = sorted(known)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        return cls(f"unknown {kind} {name!r}: {hint}")


class ConfigError(LipschitzError, ValueError):
    """A configuration that cannot be composed or does not fit together."""


class DataError(LipschitzError, ValueError):
    """Data that cannot be used: unreadable, not finite, out of range, of the wrong shape."""


class DataNotFoundError(DataError, FileNotFoundError):
    """Data files that are not where they were looked for."""


class CheckpointError(LipschitzError, ValueError):
    """A checkpoint that is missing, truncated, or was not written by liplayers."""


class OutputError(LipschitzError, OSError):
    """A file or folder that cannot be written."""


class ExportError(LipschitzError, RuntimeError):
    """A model that cannot be exported, or whose export computes something else."""


class MissingPackageError(LipschitzError, ImportError):
    """An optional package that is not installed."""


class VerificationError(LipschitzError, ValueError):
    """A report that does not agree with what is computed again."""


class RefutedError(LipschitzError, AssertionError):
    """A certified point that fell to an attack: a proof is wrong."""
