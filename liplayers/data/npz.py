"""Your own data, in two NumPy archives."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from liplayers.data.source import ImageSource, Loaded
from liplayers.data.split import Split
from liplayers.errors import DataError, DataNotFoundError

__all__ = ["Npz"]

# A label above both this and the number of samples is taken for a mistake, not for so many classes.
_MOST_CLASSES = 1000

# An array of more bytes than this, and than so many for each one of the file, is taken for a zip bomb.
_LARGE, _BYTES_OF_A_BYTE = 2**28, 100

# What NumPy and zipfile raise on damaged archives, depending on where the damage is.
_UNREADABLE = (
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise DataNotFoundError(f"npz data: no file {path}; set data.train and data.test to .npz files")
    try:
        with path.open("rb") as file:
            start = file.read(6)
        if start == b"\x93NUMPY":
            raise DataError(f"npz data: {path} holds a single array; save both with np.savez(path, images=…, labels=…)")
        if not start.startswith(b"PK"):
            # NumPy would call anything unknown a pickle.
            raise DataError(f"npz data: {path} is truncated or not an .npz file; save it with np.savez")
        with np.load(path, allow_pickle=False) as archive:
            assert isinstance(archive.zip, zipfile.ZipFile)
            missing = [name for name in ("images", "labels") if name not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "no arrays"
                raise DataError(
                    f"npz data: {path} has no array {' and no '.join(missing)}; found {found}; "
                    "save them with np.savez(path, images=…, labels=…)"
                )
            for name in ("images", "labels"):
                _check_claim(path, archive.zip, f"{name}.npy")
            return archive["images"], archive["labels"]
    except DataError:
        raise
    except _UNREADABLE as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"npz data: {path} holds pickled objects, which are never opened as they can run code; save plain "
                "arrays images (uint8 or float) and labels (integers) with np.savez"
            ) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"npz data: {path} is truncated or not an .npz file ({reason})") from None


def _check_claim(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    """Raises unless a member holds as many bytes as its array needs, before NumPy makes room for those."""
    member = archive.getinfo(name if name in archive.namelist() else name.removesuffix(".npy"))
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        held = member.file_size - file.tell()
    if dtype.hasobject:
        return  # refused by NumPy, whatever its size
    claimed = dtype.itemsize * math.prod(shape)
    if claimed != held:
        raise DataError(
            f"npz data: {path} claims an array {name.removesuffix('.npy')} of shape {shape}, {claimed:,} bytes, but "
            f"holds {held:,}; save it again with np.savez"
        )
    size = path.stat().st_size
    if claimed > max(_LARGE, _BYTES_OF_A_BYTE * size):
        raise DataError(
            f"npz data: {path} would grow from {size:,} to {claimed:,} bytes; if that is meant, save it uncompressed, "
            "with np.savez"
        )


def _read_split(path: Path) -> Split:
    images, labels = _read_arrays(path)
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DataError(f"npz data: images in {path} are {images.dtype}; save uint8 (0 … 255) or float in [0, 1]")
    if images.dtype.itemsize > 8:
        raise DataError(f"npz data: images in {path} are {images.dtype}; save float64 at most, in which they are used")
    if labels.dtype.kind not in "iu":
        raise DataError(f"npz data: labels in {path} are {labels.dtype}; save integers")
    if images.dtype != np.uint8:
        # Every number stays what it is.
        images = images.astype(np.float64 if images.dtype.itemsize == 8 else np.float32)
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        raise DataError(
            f"npz data: images in {path} have shape {images.shape}, which looks like (N, H, W, C); "
            "transpose them to (N, C, H, W)"
        )
    return Split(_tensor(images), _tensor(labels.astype(np.int64)))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


class Npz(ImageSource):
    """Two `.npz` files, each with `images` (N, C, H, W), uint8 or float in [0, 1], and integer `labels` (N,).

    Images of float64 are certified as they are; training rounds them to float32.

    There are as many classes as the largest training label says, named by their numbers. Pickled objects in the files
    are refused, since opening them can run code.

    Args:
        train: the file of training samples.
        test: the file of test samples.

    Raises:
        DataNotFoundError: from `load`, when a file is absent.
        DataError: from `load`, when a file is not an archive or truncated, lacks an array, or holds images or labels
            that cannot be used.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("train", "test"):
    ...     np.savez(folder / f"{name}.npz", images=np.zeros((20, 1, 4, 4), np.uint8), labels=np.arange(20) % 2)
    >>> loaded = Npz(folder / "train.npz", folder / "test.npz").load()
    >>> loaded.train.input_shape, loaded.class_names
    ((1, 4, 4), ('0', '1'))
    """

    def __init__(self, train: str | Path, test: str | Path) -> None:
        self.train = Path(train)
        self.test = Path(test)
        self.name = self.train.stem

    def load(self) -> Loaded:
        train, test = _read_split(self.train), _read_split(self.test)
        top = int(train.labels.max()) if train.labels.numel() else 0
        if top >= max(_MOST_CLASSES, len(train)):
            raise DataError(
                f"npz data: {self.train} has a label {top} among {len(train)} samples; number the classes from 0"
            )
        return Loaded(train, test, tuple(str(label) for label in range(top + 1)))
