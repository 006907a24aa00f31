"""Files that are whole or not there, and folders that one process writes to at a time."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from liplayers.errors import OutputError
from liplayers.extras import extra

with extra("train"):
    from filelock import FileLock, Timeout

__all__ = ["held", "save_tensors", "whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path of a file beside `path`, which becomes `path` at the end and is removed if anything is raised.

    Beside it, since from another file system a move is a copy. Whatever ends the process, `path` is the file that it
    was or the new one; only a process that is killed leaves the other behind.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # a name must not outlive a power cut without its content
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def save_tensors(content: Any, path: Path) -> None:
    """`torch.save`, which raises the OSError of a disk that is full and not a RuntimeError about positions."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextmanager
def held(folder: Path, work: str, patience: float = 0.0) -> Iterator[None]:
    """Keep a folder for one piece of work, such as "training"; it must exist.

    The lock is the system's and ends with the process, however that ends.

    Args:
        patience: seconds to wait for another process.

    Raises:
        OutputError: another process, which the message names, holds it for the same work.
    """
    lock, note = FileLock(folder / f".{work}.lock"), folder / f".{work}.holder"
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        try:
            holder = note.read_text(encoding="utf-8")
        except OSError:  # it has only just begun
            holder = "another process"
        raise OutputError(f"{folder}: {holder} is {work} there; wait for its end, or choose another output=…") from None
    try:
        since = datetime.now().astimezone()
        note.write_text(f"process {os.getpid()} on {platform.node()}, since {since:%Y-%m-%d %H:%M:%S %z},", "utf-8")
        yield
    finally:
        for file in (note, Path(lock.lock_file)):
            with suppress(OSError):  # some systems keep a file that is open
                file.unlink()
        lock.release()
