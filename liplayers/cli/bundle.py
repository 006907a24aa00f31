"""The command that makes a bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from liplayers.bundles import save_bundle
from liplayers.commands import bundle_command
from liplayers.commands.entry import bundle_options
from liplayers.commands.output import say
from liplayers.commands.quoting import command, hydra_override
from liplayers.errors import LipschitzError
from liplayers.text import one_line

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m liplayers.cli.bundle` and `liplayers-bundle`."""
    options = bundle_options(arguments)
    try:
        bundle = save_bundle(**vars(options))
    except LipschitzError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    size = sum(map(len, bundle.files.values()))
    say(f"{bundle.place}: {size / 1e6:.1f} MB")
    say(f"verify it: {command('certify', hydra_override('bundle', options.folder), 'verify=true')}")
    return 0


if __name__ == "__main__":
    sys.exit(bundle_command())
