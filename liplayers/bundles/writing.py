"""Folders that are whole or not there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from liplayers.bundles.manifest import FILES
from liplayers.errors import OutputError
from liplayers.files import whole_file

__all__ = ["write_folder"]


def write_folder(folder: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write the files to a folder beside `folder` first, which then becomes it.

    Args:
        folder: the bundle's own.
        files: the content of each, by name.
        overwrite: whether a bundle that is there may be replaced; nothing else ever is.

    Raises:
        OutputError: the folder holds something, or cannot be written.
    """
    folder = folder.absolute()
    try:
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if folder.exists() and (there - FILES.keys() or not folder.is_dir()):
            raise OutputError(f"{folder}: holds something else than a bundle; choose another folder")
        if there and not overwrite:
            raise OutputError(f"{folder}: holds a bundle; choose another folder, or overwrite it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            new, old = Path(temporary) / "new", Path(temporary) / "old"
            new.mkdir()
            for name, content in files.items():
                with whole_file(new / name) as path:
                    path.write_bytes(content)
            if folder.exists():
                folder.replace(old)
            try:
                new.replace(folder)
            except OSError:
                if old.exists():
                    old.replace(folder)
                raise
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from None
