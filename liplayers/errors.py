"""The one family of exceptions: every error is a `LipschitzError` and also the matching builtin.

A message is one line that names the thing, says what was got and what was expected, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "ArgumentError",
    "AuditError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DataNotFoundError",
    "ExportError",
    "LipschitzError",
    "MissingPackageError",
    "NonFiniteError",
    "Obstacle",
    "OutputError",
    "RefutedError",
    "SettledError",
    "ShapeError",
    "UnknownBoundError",
    "UnknownNameError",
    "VerificationError",
]


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


class Obstacle(NamedTuple):
    """A module about which no bound is known: its path, empty for the whole model, its type, why, and what would do."""

    path: str
    type: str
    reason: str
    instead: str = ""

    def __str__(self) -> str:
        use = f"; use {self.instead}" if self.instead else ""
        return f"{self.path or 'the model'} ({self.type}): {self.reason}{use}"


class UnknownBoundError(LipschitzError, TypeError):
    """A module about which no Lipschitz bound is known; it never counts as 1.

    Attributes:
        obstacles: all that were found, where a whole model was looked at.
    """

    obstacles: tuple[Obstacle, ...] = ()

    @classmethod
    def of(cls, obstacles: Sequence[Obstacle]) -> UnknownBoundError:
        """The error that names them all, each on a line of its own below their number."""
        own_mend = ("pass input_shape", "model.eval()", ": write ")
        text = (
            str(obstacles[0])
            if len(obstacles) == 1
            else "\n".join([f"{len(obstacles)} obstacles", *map(str, obstacles)])
        )
        if not all(any(mend in obstacle.reason for mend in own_mend) or obstacle.instead for obstacle in obstacles):
            text += "; " if len(obstacles) == 1 else "\n"
            text += (
                "replace it, give it a lipschitz_bound() by deriving from LipschitzModule, "
                "or state its bound with liplayers.register_bound"
            )
        error = cls(text)
        error.obstacles = tuple(obstacles)
        return error


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


class AuditError(LipschitzError, AssertionError):
    """A layer that does not keep what it promises, found by `liplayers.testing`; one line for each failed check."""
