"""What the commands print: text as it is, and nothing that goes wrong in printing may cost what it is about."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from liplayers.text import printable

__all__ = ["ForgivingOutput", "console", "forgiving", "progress_bar", "say"]


class ForgivingOutput(io.TextIOBase):
    """Standard output that takes any text, and does without a reader.

    What its encoding lacks is written as an escape. Once it cannot be written, because the reader has gone or the disk
    is full, the rest goes nowhere: the results are in files by then, or a training is going on.

    Attributes:
        lost: why it cannot be written, or None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    @property
    def _target(self) -> Any:
        stream = self._stream or sys.stdout
        return getattr(stream, "rich_proxied_file", stream)  # below rich's own, while a progress bar is shown

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._target, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._target is not None and self._target.isatty()

    def fileno(self) -> int:
        return self._target.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._target is not None:
            try:
                self._target.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self._target is not None:
            try:
                self._target.flush()
            except OSError as error:
                self._lose(error)

    def close(self) -> None:
        """Nothing: the stream belongs to others, and may be gone when Python ends."""

    def _lose(self, error: OSError) -> None:
        self.lost = error
        if not isinstance(error, BrokenPipeError):
            print(f"warning: standard output cannot be written ({error.strerror or error})", file=sys.stderr)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for what is buffered, and for those who write past this object
        os.close(nowhere)


@contextmanager
def forgiving() -> Iterator[ForgivingOutput]:
    """While this lasts, everything that is printed goes through the output given."""
    stdout = sys.stdout
    output = ForgivingOutput(stdout)
    if stdout is not None:  # None: closed by the shell, and what is printed goes nowhere
        sys.stdout = output
    try:
        yield output
    finally:
        output.flush()
        sys.stdout = stdout


console = Console(file=cast(IO[str], ForgivingOutput()), markup=False, emoji=False, highlight=False)


def say(line: object) -> None:
    """Print one line, however long."""
    console.print(printable(line), soft_wrap=True)


@contextmanager
def progress_bar(doing: str, total: int | None = None, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A bar while this lasts; gives what to call with how much is done and, where `total` is not known, of how much."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda done, total=total: bar.update(task, completed=done, total=total)
