"""Image files in class folders, decoded once into one uint8 tensor."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress

from liplayers.data.source import ImageSource, Loaded
from liplayers.data.split import Split
from liplayers.errors import ArgumentError, DataError, DataNotFoundError, OutputError

__all__ = ["ImageFolder"]

_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# The formats of these endings. Pillow knows more, some of which start other programs: PostScript starts Ghostscript.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# What storage, archives and file managers put beside images, as well as names that begin with a dot; in lower case.
_TOOL_FOLDERS = (
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recycle",
    "@tmp",
    "__macosx",
    "__pycache__",
    "lost+found",
    "system volume information",
)

_GREY = ("1", "L", "LA")
_COLOUR = ("CMYK", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")

# Files given to a thread at a time: few enough for a smooth bar, enough that handing over costs nothing.
_CHUNK = 256

# Smaller images are decoded by one thread: handling them holds the interpreter's lock for longer than decoding takes
# without it, and on two cores a second thread makes 32 × 32 JPEGs slower by half.
_THREADED_PIXELS = 128 * 128

# Part of a cache file's name; to be raised whenever decoding changes.
_CACHE_VERSION = 1

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Files:
    """The image files of one split, in order, with names relative to the root and labels."""

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]

    def path(self, name: str) -> Path:
        return self.root / name


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _TOOL_FOLDERS


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    if not names:
        raise DataError(f"image folder: no class folders in {folder}; expected <class>/<image> there")
    return tuple(names)


def _images(folder: Path, seen: dict[str, Path]) -> Generator[Path]:
    """The images below a folder, links followed; `seen` are the folders that no link may lead to, by their real path.

    Each folder that is looked into is added to them.
    """
    folders = [folder]
    while folders:
        folder = folders.pop()
        real = os.path.realpath(folder)
        if real in seen:
            raise DataError(
                f"image folder: {folder} is a link to {seen[real]}, whose images would count again; remove the link"
            )
        seen[real] = folder
        try:
            with os.scandir(folder) as found:
                entries = [entry for entry in found if not _is_hidden(entry.name)]
        except OSError as error:
            raise DataError(f"image folder: cannot read folder {folder} ({error.strerror}); set data.root") from None
        for entry in entries:
            path = Path(entry.path)
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:
                is_folder, is_file = False, True  # what is wrong is said when it is opened
            if is_folder:
                folders.append(path)
            elif entry.name.lower().endswith(_EXTENSIONS):
                if not is_file and path.exists():  # to read a pipe would take for ever
                    raise DataError(f"image folder: {path} is no regular file; remove it")
                yield path


def _scan(root: Path, split: str, class_names: Sequence[str]) -> _Files:
    names: list[str] = []
    labels: list[int] = []
    above = (root / split).resolve()
    seen = {str(path): path for path in (above, *above.parents)}
    for label, class_name in enumerate(class_names):
        folder = root / split / class_name
        found = sorted(str(path.relative_to(root)) for path in _images(folder, seen))
        if not found:
            raise DataError(f"image folder: no images in {folder}; known endings: {' '.join(_EXTENSIONS)}")
        names += found
        labels += [label] * len(found)
    return _Files(root, tuple(names), tuple(labels))


def _opened(path: Path, use: Callable[[Image.Image], Result]) -> Result:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return use(image)
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(_FORMATS)}"
    except Exception as error:  # damaged headers raise anything: struct.error, KeyError, ZeroDivisionError, …
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split()).replace(f" {str(path)!r}", "") or type(error).__name__
    raise DataError(f"image folder: cannot read image {path} ({reason}); repair or remove it")


def _chunks(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]


def _threaded(
    work: Callable[[Sequence[str]], Result], names: Sequence[str], description: str, threads: int
) -> Generator[Result]:
    """The results chunk by chunk, in order, with a bar on a terminal; to be closed when not used up."""
    console = Console(stderr=True)
    chunks = _chunks(names)
    pool = ThreadPoolExecutor(threads)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(description, total=len(names))
            for chunk, result in zip(chunks, pool.map(work, chunks), strict=True):
                bar.advance(task, len(chunk))
                yield result
    finally:
        # At the first unreadable image, rather than after all the others.
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Format:
    """What every image is decoded to."""

    grey: bool
    size: tuple[int, int]
    resize: bool
    threads: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1 if self.grey else 3, *self.size)

    def decode(self, path: Path) -> np.ndarray:
        """One image as uint8 (C, H, W)."""

        def pixels(image: Image.Image) -> np.ndarray:
            converted = image.convert("L" if self.grey else "RGB")
            height, width = self.size
            if self.resize and converted.size != (width, height):
                converted = converted.resize((width, height), Image.Resampling.BILINEAR)
            array = np.asarray(converted, dtype=np.uint8)
            return array[None] if self.grey else array.transpose(2, 0, 1)

        return _opened(path, pixels)

    def decoded(self, files: _Files) -> Generator[np.ndarray]:
        """The images of a split as uint8 arrays (chunk, C, H, W), in order."""

        def chunk(names: Sequence[str]) -> np.ndarray:
            images = np.empty((len(names), *self.shape), np.uint8)
            for place, name in zip(images, names, strict=True):
                place[...] = self.decode(files.path(name))
            return images

        yield from _threaded(chunk, files.names, "decoding images", self.threads)


def _header(path: Path) -> tuple[str, tuple[int, int]]:
    mode, bits, (width, height) = _opened(path, lambda image: (image.mode, _bits(image), image.size))
    known = mode in _GREY or mode in _COLOUR
    if bits > 8 or not known:
        kind = f"{bits} bits a channel" if known else f"kind {mode}"
        raise DataError(f"image folder: {path} has pixels of {kind}; convert it to 8 bits a channel")
    return mode, (height, width)


def _bits(image: Any) -> int:
    """The bits of a channel in the file, where they may be more than 8; of colours Pillow keeps the upper 8 only."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,)))
    if image.format in ("PNG", "PPM"):
        for *_, raw in image.tile:  # "RGB;16B" in a PNG; in a PPM (mode, largest value) where that is not 255
            if isinstance(raw, tuple):
                return int(raw[1]).bit_length()
            if ";16" in str(raw):
                return 16
    return 8


def _differs(path: Path, size: tuple[int, int], first: Path, expected: tuple[int, int]) -> DataError:
    return DataError(
        f"image folder: {path} is {size[0]}×{size[1]} (H×W) but {first} is {expected[0]}×{expected[1]}; to resize all, "
        f"set data.image_size=[{expected[0]},{expected[1]}]"
    )


def _find_format(splits: Sequence[_Files], image_size: tuple[int, int] | None) -> _Format:
    """Reads all headers: grey when every image is, and one size unless resized."""
    first: tuple[Path, tuple[int, int]] | None = None
    grey = True
    for files in splits:

        def headers(names: Sequence[str], files: _Files = files) -> list[tuple[str, tuple[int, int]]]:
            return [_header(files.path(name)) for name in names]

        # Closed at once on a wrong size, or the threads would go on and the bar stay.
        with closing(_threaded(headers, files.names, "reading image sizes", threads=1)) as parts:
            for name, (mode, size) in zip(files.names, chain.from_iterable(parts), strict=True):
                grey = grey and mode in _GREY
                first = first or (files.path(name), size)
                if image_size is None and size != first[1]:
                    raise _differs(files.path(name), size, *first)
    assert first is not None
    large = first[1][0] * first[1][1] >= _THREADED_PIXELS
    threads = min(16, os.cpu_count() or 1) if large else 1
    return _Format(grey, image_size or first[1], resize=image_size is not None, threads=threads)


def _collected(files: _Files, form: _Format) -> torch.Tensor:
    images = np.empty((len(files.names), *form.shape), np.uint8)
    place = 0
    for part in form.decoded(files):
        images[place : place + len(part)] = part
        place += len(part)
    return torch.from_numpy(images)


def _write_cache(path: Path, files: _Files, form: _Format) -> None:
    """Streams the decoded images into an .npy file, which has its name only once it is whole."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files.names), *form.shape)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file, closing(form.decoded(files)) as parts:
            np.lib.format.write_array_header_1_0(file, header)
            for images in parts:
                file.write(images.data)
        part.replace(path)
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise OutputError(f"image folder: cannot write the cache {path} ({error.strerror}); set data.cache") from None
    finally:
        with suppress(OSError):
            part.unlink()


def _read_cache(path: Path, length: int) -> torch.Tensor | None:
    """The cached images, mapped into memory, or None if there are none that can be used."""
    try:
        # Copy on write: torch warns of read-only memory, and the file stays as it is.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
    except (EOFError, OSError, ValueError):
        return None
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != length:
        return None
    return torch.from_numpy(images)


def _cache_key(splits: Sequence[_Files], image_size: tuple[int, int] | None) -> str:
    digest = hashlib.sha256(repr((_CACHE_VERSION, image_size)).encode())
    for files in splits:
        digest.update(str(files.root.resolve()).encode())
        for name in files.names:
            try:
                status = files.path(name).stat()
            except OSError as error:
                raise DataError(
                    f"image folder: cannot read image {files.path(name)} ({error.strerror}); repair or remove it"
                ) from None
            digest.update(f"\0{name}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _checked_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    if isinstance(image_size, int):
        size: tuple[int, ...] = (image_size, image_size)
    else:
        size = tuple(image_size) if isinstance(image_size, Sequence) else ()
    if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in size):
        raise ArgumentError(f"image_size must be [H, W] or one integer, each at least 1, got {image_size!r}")
    return size[0], size[1]


class ImageFolder(ImageSource):
    """Image files in the layout root/{train,test}/<class>/…, as torchvision's ImageFolder reads it.

    Everything is decoded once (large images by several threads) into one uint8 tensor for each split. Images keep one
    channel if every file of both splits is grey, else all become RGB. Classes are the sorted names of the class
    folders, the same for both splits.

    Files are BMP, JPEG, PNG, PPM/PGM, TIFF or WebP of at most 8 bits a channel, whichever of their endings they have.
    Palettes become the colours they stand for, CMYK becomes RGB; transparency, colour profiles and the orientation that
    a camera notes are dropped; of several frames or pages the first is taken. Names that begin with a dot, and folders
    such as `@eaDir` and `__MACOSX`, are no part of the data. Links are followed; one to a folder above, or to one that
    is read anyhow, is refused. What is certified is the image so decoded, and resized.

    With a cache the decoded images are mapped from a file, which is found again as long as names, sizes and
    modification times of the files stay the same (a file changed behind the same size and time goes unnoticed); files
    of earlier states stay in the cache folder until deleted.

    Args:
        root: the folder that holds both splits.
        image_size: [H, W], or one integer for a square, to resize to (bilinear, antialiased, aspect not kept); None:
            all images must have one size.
        train: the name of the folder of training images under `root`.
        test: the name of the folder of test images under `root`.
        cache: a folder for the decoded images; None to decode each time.

    Raises:
        ArgumentError: an argument out of range.
        DataNotFoundError: from `load`, when the root or a split's folder is absent.
        DataError: from `load`, when there are no images, the classes of the splits differ, an image cannot be read or
            has more than 8 bits a channel, the sizes differ, or a link leads to a folder again.
        OutputError: from `load`, when the cache cannot be written.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int] | None = None,
        train: str = "train",
        test: str = "test",
        cache: str | Path | None = None,
    ) -> None:
        self.root = Path(root)
        self.image_size = _checked_size(image_size)
        self.train = train
        self.test = test
        self.cache = None if cache is None else Path(cache)
        self.name = self.root.resolve().name

    def load(self) -> Loaded:
        if not self.root.is_dir():
            raise DataNotFoundError(f"image folder: no folder {self.root}; set data.root")
        for split in (self.train, self.test):
            if not (self.root / split).is_dir():
                raise DataNotFoundError(
                    f"image folder: no folder {self.root / split}; expected {split}/<class>/<image> in {self.root}"
                )
        class_names = self._classes()
        train, test = (_scan(self.root, split, class_names) for split in (self.train, self.test))
        images = self._decoded(train, test) if self.cache is None else self._cached(self.cache, train, test)
        return Loaded(
            train=Split(images[0], torch.tensor(train.labels), train.names),
            test=Split(images[1], torch.tensor(test.labels), test.names),
            class_names=class_names,
        )

    def _classes(self) -> tuple[str, ...]:
        train, test = _class_names(self.root / self.train), _class_names(self.root / self.test)
        if train == test:
            return train
        only = [
            f"only in {split}: {', '.join(sorted(set(one) - set(other)))}"
            for split, one, other in ((self.train, train, test), (self.test, test, train))
            if set(one) - set(other)
        ]
        raise DataError(f"image folder: class folders in {self.root} differ ({'; '.join(only)}); make them the same")

    def _decoded(self, *splits: _Files) -> list[torch.Tensor]:
        form = _find_format(splits, self.image_size)
        return [_collected(files, form) for files in splits]

    def _cached(self, cache: Path, *splits: _Files) -> list[torch.Tensor]:
        key = _cache_key(splits, self.image_size)
        paths = [cache / f"{self.name}-{key}-{split}.npy" for split in ("train", "test")]
        found = [_read_cache(path, len(files.names)) for path, files in zip(paths, splits, strict=True)]
        if any(images is None for images in found):
            form = _find_format(splits, self.image_size)
            for path, files in zip(paths, splits, strict=True):
                _write_cache(path, files, form)
            found = [_read_cache(path, len(files.names)) for path, files in zip(paths, splits, strict=True)]
        images = [each for each in found if each is not None]
        if len(images) != len(splits):
            raise DataError(f"image folder: the cache {paths[0]} just written cannot be read back; set data.cache")
        return images
