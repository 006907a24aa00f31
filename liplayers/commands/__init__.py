"""The commands as they are started: hydra, `--help`, and every error as one line.

Nothing here imports torch, which takes seconds, before there is something to do; what is done is in `cli`.
"""

import sys
from types import ModuleType

from liplayers.errors import MissingPackageError
from liplayers.extras import extra


def train_command() -> None:
    """`python train.py` and `liplayers-train`."""
    _entry().train_command()


def certify_command() -> None:
    """`python certify.py` and `liplayers-certify`."""
    _entry().certify_command()


def audit_command() -> None:
    """`liplayers-audit`: certify, then attack what was certified."""
    _entry().audit_command()


def front_command() -> int:
    """`liplayers-front`."""
    return _entry().front_command()


def bundle_command() -> int:
    """`liplayers-bundle`: a bundle of a finished run."""
    return _entry().bundle_command()


def _entry() -> ModuleType:
    """What the commands are, where the packages are there; else one line, and exit status 1."""
    try:
        with extra("train"):
            from liplayers.commands import entry
    except MissingPackageError as error:
        sys.exit(f"error: {error}")
    return entry
