"""What benchmarks that train share: images in memory, proofs of a network, kept results, a bar, exit statuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from benchmarks.timing import machine
from liplayers.certification import Certificates, CertifiedNetwork, certify
from liplayers.certification.report import json_writer, write_outputs
from liplayers.data import Split
from liplayers.errors import DataError, LipschitzError

Result = dict[str, Any]
Tick = Callable[[], object]

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Images:
    """The splits, in memory, with what names them."""

    name: str
    train: Split
    val: Split
    test: Split
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.train.input_shape

    def record(self) -> dict[str, Any]:
        sizes = {which: len(getattr(self, which)) for which in ("train", "val", "test")}
        return {"name": self.name, **sizes, "test_sha256": self.test.fingerprint()}


def generated_images(image_size: int) -> Images:
    """Noise with labels, a few images for each split."""
    generator = torch.Generator().manual_seed(0)

    def split() -> Split:
        return Split(torch.rand(12, 3, image_size, image_size, generator=generator), torch.arange(12) % 3)

    return Images("noise", split(), split(), split(), 3)


def certified(network: nn.Module, images: Images, rows: Split, mode: str) -> Certificates:
    """Of all samples of a split."""
    batches = (rows[part] for part in torch.arange(len(rows)).split(EVALUATION_BATCH))
    return certify(CertifiedNetwork(network, images.input_shape, images.num_classes, mode=mode), batches)


class Results:
    """Result files in a folder, each made once: what was interrupted goes on.

    Args:
        folder: where they are.
        load: reads the images; called when the first result is missing.
    """

    def __init__(self, folder: Path, load: Callable[[], Images]) -> None:
        self.folder = folder
        self.load = cache(load)
        write_outputs(folder, {})  # fails now rather than after the first training if the folder cannot be written

    def result(self, name: str, recipe: Result, make: Callable[[Images], Result]) -> Result:
        """From the file of that name; made and written first where there is none.

        Raises:
            DataError: the file is no result, or one of another recipe.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            images = self.load()
            shared = {"recipe": recipe, "data": images.record(), "machine": machine(torch.device("cpu"))}
            write_outputs(self.folder, {path.name: json_writer(shared | make(images))})
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            other, _ = found["recipe"], found["data"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{path}: not a result of this benchmark; delete it") from None
        if other != recipe:
            raise DataError(f"{path}: of another recipe, {other}; give another --output, or delete it")
        return found

    def check_same_data(self, rows: Sequence[Result], key: str) -> None:
        """Raise DataError where results, which are called what they hold under a key, are of different data."""
        for row in rows:
            if row["data"] != rows[0]["data"]:
                raise DataError(f"{self.folder}: {row[key]} and {rows[0][key]} saw different data; delete one")


@contextmanager
def progress(console: Console | None, total: int) -> Iterator[Callable[[str], Tick]]:
    """The bar counts networks; a tick, one for each step, keeps it moving."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[steps]}"))
    bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=console is None, transient=True)
    with bar as shown:
        task = shown.add_task("", total=total, steps="")
        names = count()

        def named(name: str) -> Tick:
            steps = count(1)
            shown.update(task, description=name, completed=next(names))
            return lambda: shown.update(task, steps=f"step {next(steps)}")

        yield named


def exit_status(run: Callable[[], Iterable[Path]]) -> int:
    """Of a command that may be stopped and goes on when it is given again; prints the paths that it wrote."""
    try:
        for path in run():
            print(path)
    except LipschitzError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished results are kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0
